"""Streams through real processes that are killed, stopped, or die of what they are asked."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from forebay.core.errors import InvalidRequest
from forebay.core.randomness import Rng
from forebay.core.sampling import SamplingParams
from forebay.core.settings import GatewaySettings
from forebay.gateway.generation import (
    ChatPrompt,
    Chunk,
    Completion,
    GenerationRequest,
    Migrated,
    TextPrompt,
)
from forebay.gateway.service import GatewayService
from forebay.rpc.grpc_connector import GrpcConnector
from forebay.store.redis_kv_events import RedisKvEventSource
from forebay.store.redis_registry import RedisRegistry
from worker_processes import RunningWorker, workers

POOLS = ("prefill", "prefill", "decode", "decode")
REQUEST = GenerationRequest(
    model="sim",
    prompt=ChatPrompt([{"role": "user", "content": "hello " * 20}]),
    params=SamplingParams(ignore_eos=True),
    max_tokens=40,
    seed=3,
)
PROGRESS = (Chunk, Migrated)


@asynccontextmanager
async def gateway(redis_url: str, num_workers: int) -> AsyncIterator[GatewayService]:
    settings = GatewaySettings(
        registry_poll_s=0.05, worker_silence_s=1.5, request_timeout_s=60, cache_salt="shared"
    )
    service = GatewayService(
        settings,
        GrpcConnector(),
        RedisRegistry.connect(redis_url),
        RedisKvEventSource.connect(redis_url),
        Rng(),
    )
    await service.start()
    try:
        async with asyncio.timeout(30):
            while service.router.view.accepting.sum() < num_workers:
                await asyncio.sleep(0.02)
        yield service
    finally:
        await service.stop()


async def answer(service: GatewayService, request: GenerationRequest) -> tuple[str, Completion]:
    text, completion = "", None
    async for event in service.prepare(request).events():
        if isinstance(event, Chunk):
            text += event.text
        elif isinstance(event, Completion):
            completion = event
    assert completion is not None
    return text, completion


async def decoding_worker(service: GatewayService, running: list[RunningWorker]) -> RunningWorker:
    """The one with a running sequence; there is one stream."""
    async with asyncio.timeout(20):
        while True:
            for link in service._fleet._links.values():
                if link.load.num_running and not link.lost:
                    found = [worker for worker in running if worker.address == link.address]
                    if found and running.index(found[0]) >= 2:
                        return found[0]
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_stream_survives_its_decode_worker(valkey_url: str, number: signal.Signals) -> None:
    async with workers(valkey_url, *POOLS) as running, gateway(valkey_url, 4) as service:
        undisturbed = await answer(service, REQUEST)
        events: list[object] = []

        async def read() -> None:
            async for event in service.prepare(REQUEST).events():
                events.append(event)

        reading = asyncio.create_task(read())
        victim = await decoding_worker(service, running)
        victim.process.send_signal(number)
        async with asyncio.timeout(40):
            await reading
        text = "".join(event.text for event in events if isinstance(event, Chunk))
        last = events[-1]
        assert isinstance(last, Completion)
        assert sum(isinstance(event, Migrated) for event in events) >= 1
        assert text == undisturbed[0]
        assert last.usage.completion_tokens == undisturbed[1].usage.completion_tokens == 40


async def test_a_request_that_kills_workers_is_blocked_everywhere(valkey_url: str) -> None:
    crash = {"FOREBAY_ENGINE_SIM_CRASH_TEXT": "BOOM"}
    async with (
        workers(valkey_url, *["mixed"] * 4, **crash) as running,
        gateway(valkey_url, 4) as service,
        gateway(valkey_url, 4) as other,
    ):
        undisturbed = await answer(service, REQUEST)
        streams = [asyncio.create_task(answer(service, REQUEST)) for _ in range(6)]
        poison = replace(REQUEST, prompt=TextPrompt("it goes BOOM at once"))
        with pytest.raises(InvalidRequest) as caught:
            await answer(service, poison)
        assert caught.value.code == "poisoned_request"
        async with asyncio.timeout(40):
            for stream in streams:
                text, completion = await stream
                assert (text, completion.usage.completion_tokens) == (undisturbed[0], 40)
        # Two when it was alone, three when others began on the first worker with it.
        assert sum(worker.alive for worker in running) in (1, 2)
        with pytest.raises(InvalidRequest):
            service.prepare(poison)
        async with asyncio.timeout(10):
            while True:
                try:
                    other.prepare(poison)
                except InvalidRequest as error:
                    assert error.code == "poisoned_request"
                    break
                await asyncio.sleep(0.1)
        assert (await answer(other, REQUEST))[0] == undisturbed[0]
