"""The process of a Serve replica, without Serve: SIGTERM ends its main thread as Ray does, and the
worker drains before the interpreter goes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from forebay.core.clock import Deadline
from forebay.core.errors import Unavailable
from forebay.core.finish import FinishReason
from forebay.rpc import methods
from forebay.rpc.conversions import finish_from_proto
from forebay.rpc.grpc_connector import GrpcConnector
from forebay.rpc.v1 import inference_pb2, worker_pb2
from forebay.store.redis_registry import RedisRegistry

MAIN = """
import asyncio, json, os, signal, sys, threading, time
from forebay.deploy import replica as module
from forebay.deploy.replica import WorkerReplica

def on_sigterm(*_):
    sys.exit(1)

signal.signal(signal.SIGTERM, on_sigterm)
loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
replica = WorkerReplica.__new__(WorkerReplica)
asyncio.run_coroutine_threadsafe(replica.__init__("mixed"), loop).result(60)
if "HANG_S" in os.environ:
    module.STOP_MARGIN_S = 0.5
    hang = replica._worker._executor.run(time.sleep, float(os.environ["HANG_S"]))
    asyncio.run_coroutine_threadsafe(hang, loop)
print(json.dumps({"address": replica._worker.address}), flush=True)
while True:
    signal.pause()
"""


@asynccontextmanager
async def replica(
    redis_url: str, drain_s: float, **more: str
) -> AsyncIterator[tuple[Process, str]]:
    environ = {
        **os.environ,
        "FOREBAY_REDIS_URL": redis_url,
        "FOREBAY_ENGINE_ENGINE": "sim",
        "FOREBAY_ENGINE_MODEL_ID": "sim",
        "FOREBAY_ENGINE_NUM_BLOCKS": "256",
        "FOREBAY_WORKER_DRAIN_S": str(drain_s),
        **more,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", MAIN, env=environ, stdout=PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            line = await process.stdout.readline()
        yield process, json.loads(line)["address"]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def answering(
    address: str, max_tokens: int
) -> AsyncIterator[AsyncIterator[worker_pb2.StepsResponse]]:
    """What the worker says after it has begun an answer."""
    channel = GrpcConnector().connect(address)
    stream = channel.duplex(methods.STEPS)
    hello = worker_pb2.GatewayHello(gateway_id="g")
    await stream.send(worker_pb2.StepsRequest(hello=hello))
    assert await stream.receive() is not None
    spec = worker_pb2.SequenceSpec(
        request_id="r",
        gateway_id="g",
        attempt=1,
        prompt_token_ids=range(20),
        cache_root=bytes(16),
        timeout_ms=60_000,
        sampling=inference_pb2.SamplingParams(max_tokens=max_tokens, n=1, seed=1),
    )
    request = worker_pb2.PrefillRequest(sequence=spec)
    await channel.unary(methods.PREFILL, request, Deadline.after(10))

    async def messages() -> AsyncIterator[worker_pb2.StepsResponse]:
        """Until the worker ends the stream."""
        with suppress(Unavailable):
            while (message := await stream.receive()) is not None:
                yield message

    try:
        yield messages()
    finally:
        stream.cancel()
        await channel.close()


async def ended(process: Process) -> None:
    async with asyncio.timeout(30):
        await process.wait()


async def num_listed(redis_url: str) -> int:
    registry = RedisRegistry.connect(redis_url)
    workers = await registry.list_workers()
    await registry.close()
    return len(workers)


async def test_an_answer_under_way_is_finished_after_sigterm(valkey_url: str) -> None:
    async with replica(valkey_url, drain_s=30) as (process, address):
        async with answering(address, max_tokens=60) as messages:
            assert not (await anext(messages)).draining
            process.send_signal(signal.SIGTERM)
            rest = [message async for message in messages]
        tokens = [t for message in rest for output in message.outputs for t in output.token_ids]
        assert len(tokens) == 59
        assert rest[-1].draining
        assert finish_from_proto(rest[-1].outputs[0].finish_reason) is FinishReason.LENGTH
        await ended(process)
        assert await num_listed(valkey_url) == 0


async def test_an_answer_that_takes_too_long_is_handed_over(valkey_url: str) -> None:
    async with replica(valkey_url, drain_s=0.3) as (process, address):
        async with answering(address, max_tokens=2000) as messages:
            await anext(messages)
            process.send_signal(signal.SIGTERM)
            outputs = [output async for message in messages for output in message.outputs]
        assert finish_from_proto(outputs[-1].finish_reason) is FinishReason.ERROR
        assert outputs[-1].resumable
        assert [output.offset for output in outputs[:-1]] == list(range(1, len(outputs)))
        await ended(process)


async def test_a_second_sigterm_ends_the_wait(valkey_url: str) -> None:
    async with (
        replica(valkey_url, drain_s=60) as (process, address),
        answering(address, max_tokens=2000) as messages,
    ):
        await anext(messages)
        process.send_signal(signal.SIGTERM)
        async for message in messages:
            if message.draining:
                break
        process.send_signal(signal.SIGTERM)
        await ended(process)


async def test_a_worker_whose_engine_hangs_ends_all_the_same(valkey_url: str) -> None:
    async with replica(valkey_url, drain_s=0.1, HANG_S="1000") as (process, _):
        process.send_signal(signal.SIGTERM)
        await ended(process)
        assert await num_listed(valkey_url) == 0
