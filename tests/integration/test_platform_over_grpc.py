"""Workers and a gateway over real gRPC and a real Valkey, in one process; the sim engine, so that
answers are known without weights."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from forebay.core.clock import Deadline
from forebay.core.errors import (
    DeadlineExceeded,
    InvalidRequest,
    KvTransferError,
    NotFound,
    Overloaded,
    Unavailable,
)
from forebay.core.randomness import Rng
from forebay.core.roles import WorkerRole
from forebay.core.sampling import MAX_STOP_TOKEN_IDS, SamplingParams
from forebay.core.settings import EngineSettings, GatewaySettings, WorkerSettings
from forebay.gateway.generation import (
    ChatPrompt,
    Chunk,
    Completion,
    Event,
    GenerationRequest,
    TextPrompt,
    TokenPrompt,
)
from forebay.gateway.service import GatewayService
from forebay.rpc import methods
from forebay.rpc.grpc_connector import GrpcConnector
from forebay.rpc.v1 import kv_transfer_pb2, worker_pb2
from forebay.store.redis_kv_events import RedisKvEventSource
from forebay.store.redis_registry import RedisRegistry
from forebay.worker.frames import encode_commit
from forebay.worker.process import WorkerProcess

POOLS = (WorkerRole.PREFILL, WorkerRole.DECODE)
ENGINE = EngineSettings(
    engine="sim", model_id="sim", num_blocks=256, sim_time_scale=0.01, max_num_seqs=8
)
REQUEST = GenerationRequest(
    model="sim",
    prompt=ChatPrompt([{"role": "user", "content": "hello " * 20}]),
    params=SamplingParams(ignore_eos=True),
    max_tokens=30,
    seed=3,
)


class Platform:
    def __init__(self, gateway: GatewayService, workers: list[WorkerProcess]) -> None:
        self.gateway = gateway
        self.workers = workers

    async def collect(self, request: GenerationRequest) -> list[Event]:
        return [event async for event in self.gateway.prepare(request).events()]

    async def describe(self, index: int) -> worker_pb2.WorkerDescription:
        channel = GrpcConnector().connect(self.workers[index].address)
        try:
            response = await channel.unary(
                methods.DESCRIBE, worker_pb2.DescribeRequest(), Deadline.after(5)
            )
        finally:
            await channel.close()
        return response.worker

    async def all_blocks_back(self) -> bool:
        descriptions = [await self.describe(i) for i in range(len(self.workers))]
        return all(
            w.load.kv_blocks.free + w.load.kv_blocks.cached == w.load.kv_blocks.total
            for w in descriptions
        )


async def until(condition: object) -> None:
    async with asyncio.timeout(15):
        while not await condition():  # type: ignore[operator]
            await asyncio.sleep(0.02)


@asynccontextmanager
async def platform(
    redis_url: str,
    roles: tuple[WorkerRole, ...] = POOLS,
    engine: EngineSettings = ENGINE,
    **gateway: object,
) -> AsyncIterator[Platform]:
    settings = WorkerSettings(redis_url=redis_url, gateway_grace_s=0.2, engine=engine)
    workers = [WorkerProcess(replace(settings, role=role)) for role in roles]
    for worker in workers:
        await worker.start()
    service = GatewayService(
        replace(GatewaySettings(registry_poll_s=0.05, request_timeout_s=20), **gateway),
        GrpcConnector(),
        RedisRegistry.connect(redis_url),
        RedisKvEventSource.connect(redis_url),
        Rng(),
    )
    await service.start()
    try:

        async def ready() -> bool:
            return service.ready

        await until(ready)
        yield Platform(service, workers)
    finally:
        await service.stop()
        for worker in workers:
            await worker.stop(0)


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Chunk))


async def test_pools_and_mixed_worker_give_the_same_answer(valkey_url: str) -> None:
    async with platform(valkey_url) as pools:
        answer = await pools.collect(REQUEST)
        prefill, decode = await pools.describe(0), await pools.describe(1)
        assert prefill.counters.kv_bytes_sent == decode.counters.kv_bytes_received > 0
        assert prefill.counters.generation_tokens == 1
        assert decode.counters.generation_tokens == 29
        assert await pools.all_blocks_back()
    async with platform(valkey_url, (WorkerRole.MIXED,)) as mixed:
        assert text_of(await mixed.collect(REQUEST)) == text_of(answer)
    last = answer[-1]
    assert isinstance(last, Completion)
    assert last.usage.completion_tokens == 30


async def test_as_many_stop_tokens_as_a_client_may_name(valkey_url: str) -> None:
    params = SamplingParams(stop_token_ids=tuple(range(MAX_STOP_TOKEN_IDS)))
    async with platform(valkey_url) as pools:
        events = await pools.collect(replace(REQUEST, params=params, max_tokens=3))
        assert isinstance(events[-1], Completion)


async def test_second_turn_sends_only_what_is_new(valkey_url: str) -> None:
    async with platform(valkey_url) as pools:
        text = "hello " * 30
        first = await pools.collect(replace(REQUEST, prompt=TextPrompt(text)))
        sent_before = (await pools.describe(0)).counters.kv_bytes_sent
        assert isinstance(first[-1], Completion)
        held = first[-1].usage.prompt_tokens // 16 * 16
        longer = TextPrompt(text + "more than is computed between two steps, " * 4)
        second = await pools.collect(replace(REQUEST, prompt=longer))
        sent = (await pools.describe(0)).counters.kv_bytes_sent - sent_before
        assert isinstance(second[-1], Completion)
        usage = second[-1].usage
        assert usage.cached_tokens == held
        assert sent == (usage.prompt_tokens - held) * 4 * 8


async def test_many_streams_through_small_pools(valkey_url: str) -> None:
    engine = replace(ENGINE, num_blocks=48)
    async with platform(valkey_url, (*POOLS, WorkerRole.DECODE), engine) as pools:
        requests = [replace(REQUEST, seed=i, max_tokens=10 + i) for i in range(32)]
        runs = await asyncio.gather(*(pools.collect(request) for request in requests))
        for i, events in enumerate(runs):
            assert isinstance(events[-1], Completion)
            assert events[-1].usage.completion_tokens == 10 + i
        await until(pools.all_blocks_back)


async def test_client_that_leaves_frees_every_block(valkey_url: str) -> None:
    slow = replace(ENGINE, sim_time_scale=1.0)
    async with platform(valkey_url, engine=slow) as pools:
        for num_events in (0, 1, 3):
            stream = pools.gateway.prepare(replace(REQUEST, max_tokens=2000)).events()
            for _ in range(num_events):
                await anext(stream)
            await stream.aclose()
            await until(pools.all_blocks_back)


async def test_gateway_that_dies_frees_every_block(valkey_url: str) -> None:
    slow = replace(ENGINE, sim_time_scale=1.0)
    async with platform(valkey_url, engine=slow) as pools:
        doomed = GatewayService(
            GatewaySettings(registry_poll_s=0.05),
            GrpcConnector(),
            RedisRegistry.connect(valkey_url),
            RedisKvEventSource.connect(valkey_url),
            Rng(),
        )
        await doomed.start()

        async def ready() -> bool:
            return doomed.ready

        await until(ready)
        stream = doomed.prepare(replace(REQUEST, max_tokens=2000)).events()
        await anext(stream)
        await anext(stream)
        await doomed.stop()  # closes its connections; the stream was never closed or aborted
        await until(pools.all_blocks_back)
        with pytest.raises(Unavailable):
            async for _ in stream:
                pass


@pytest.mark.parametrize("grace_s", [0.0, 0.3, 30.0])
async def test_a_stream_survives_its_decode_worker(valkey_url: str, grace_s: float) -> None:
    """However long the worker gets to end in order: it finishes the stream or hands it over."""
    slow = replace(ENGINE, sim_time_scale=1.0)
    request = replace(REQUEST, max_tokens=150)
    async with platform(valkey_url, (WorkerRole.PREFILL, WorkerRole.DECODE), slow) as pools:
        undisturbed = await pools.collect(request)
        stream = pools.gateway.prepare(request).events()
        events = [await anext(stream) for _ in range(5)]
        first = pools.workers[1]
        settings = WorkerSettings(redis_url=valkey_url, role=WorkerRole.DECODE, engine=slow)
        pools.workers[1] = WorkerProcess(settings)
        await pools.workers[1].start()
        ending = asyncio.create_task(first.stop(grace_s))
        events += [event async for event in stream]
        await ending
        assert text_of(events) == text_of(undisturbed)
        first_usage, usage = undisturbed[-1], events[-1]
        assert isinstance(first_usage, Completion) and isinstance(usage, Completion)
        assert usage.usage.completion_tokens == first_usage.usage.completion_tokens
        assert usage.usage.prompt_tokens == first_usage.usage.prompt_tokens
        await until(pools.all_blocks_back)


async def test_without_another_worker_a_stream_waits_until_its_deadline(valkey_url: str) -> None:
    slow = replace(ENGINE, sim_time_scale=1.0)
    async with platform(valkey_url, engine=slow) as pools:
        request = replace(REQUEST, max_tokens=2000, timeout_s=3.0)
        stream = pools.gateway.prepare(request).events()
        for _ in range(3):
            await anext(stream)
        await pools.workers[1].stop(0)
        with pytest.raises((Unavailable, DeadlineExceeded)):
            async for _ in stream:
                pass
        assert not pools.gateway.ready


async def test_no_place_in_time_is_overloaded_with_a_time_to_come_back(valkey_url: str) -> None:
    slow = replace(ENGINE, sim_time_scale=1.0, max_num_seqs=1)
    async with platform(valkey_url, engine=slow, queue_timeout_s=0.3) as pools:
        stream = pools.gateway.prepare(replace(REQUEST, max_tokens=2000)).events()
        await anext(stream)
        await anext(stream)
        with pytest.raises(Overloaded) as caught:
            await pools.collect(REQUEST)
        assert caught.value.retry_after_s >= 1
        await stream.aclose()
        assert text_of(await pools.collect(REQUEST))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": "gpt-9"}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**7}, "max_tokens"),
        ({"prompt": TextPrompt("x" * 5000)}, "prompt"),
        ({"prompt": TokenPrompt((1, 999))}, "prompt"),
        ({"prompt": TokenPrompt(())}, "prompt"),
        ({"prompt": ChatPrompt([])}, "messages"),
        ({"params": SamplingParams(temperature=float("nan"))}, "temperature"),
        ({"params": SamplingParams(stop_token_ids=(259,))}, "stop_token_ids"),
    ],
)
async def test_bad_requests_name_the_field(
    valkey_url: str, change: dict[str, object], param: str
) -> None:
    async with platform(valkey_url, (WorkerRole.MIXED,)) as mixed:
        with pytest.raises((InvalidRequest, NotFound)) as caught:
            mixed.gateway.prepare(replace(REQUEST, **change))
        assert caught.value.param == param


async def test_worker_refuses_what_a_gateway_would_not_send(valkey_url: str) -> None:
    async with platform(valkey_url) as pools:
        channel = GrpcConnector().connect(pools.workers[1].address)
        spec = worker_pb2.SequenceSpec(request_id="r", gateway_id="unknown", timeout_ms=1000)
        with pytest.raises(InvalidRequest):
            await channel.unary(
                methods.RESERVE, worker_pb2.ReserveRequest(sequence=spec), Deadline.after(5)
            )
        spec.prompt_token_ids.append(1)
        spec.cache_root = bytes(16)
        spec.sampling.max_tokens = 1
        with pytest.raises(Unavailable, match="no step stream"):
            await channel.unary(
                methods.RESERVE, worker_pb2.ReserveRequest(sequence=spec), Deadline.after(5)
            )

        async def commit_without_lease() -> AsyncIterator[bytes]:
            yield encode_commit(kv_transfer_pb2.KvCommit(lease_id="none", epoch="none"))

        with pytest.raises(KvTransferError, match="no lease"):
            await channel.push(methods.KV_PUSH, commit_without_lease(), Deadline.after(5))
        await channel.close()


async def test_health_and_reflection_on_the_listener(valkey_url: str) -> None:
    async with (
        platform(valkey_url, (WorkerRole.MIXED,)) as mixed,
        grpc.aio.insecure_channel(mixed.workers[0].address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", methods.WORKER_SERVICE, methods.KV_TRANSFER_SERVICE):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        async for response in call:
            names = {service.name for service in response.list_services_response.service}
            assert {methods.WORKER_SERVICE, methods.KV_TRANSFER_SERVICE} <= names
