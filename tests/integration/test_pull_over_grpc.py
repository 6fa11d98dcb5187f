"""Pulled prefixes between workers over real gRPC: the sim engine for faults, the default model in
fp32 for the same answer, token for token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from forebay.core.clock import Deadline
from forebay.core.randomness import Rng
from forebay.core.roles import WorkerRole
from forebay.core.settings import EngineSettings, WorkerSettings
from forebay.engine.loader import load_runner
from forebay.rpc import methods
from forebay.rpc.grpc_connector import GrpcConnector
from forebay.rpc.grpc_listener import GrpcListener
from forebay.rpc.v1 import inference_pb2, worker_pb2
from forebay.worker.thread_executor import ThreadExecutor
from forebay.worker.worker import Worker

SIM = EngineSettings(
    engine="sim", model_id="sim", num_blocks=256, sim_time_scale=0.01, max_num_seqs=8
)
PROMPT = 230
PULLED = 224
"""Full blocks of 16."""


class Served:
    """A worker behind a listener, and a gateway's step stream to it."""

    def __init__(self, worker: Worker, listener: GrpcListener) -> None:
        self.worker = worker
        self.listener = listener
        self.channel = GrpcConnector().connect(worker.endpoint)
        self.outputs: list[worker_pb2.SequenceOutput] = []

    def source(self, num_tokens: int = PROMPT, timeout_ms: int = 0) -> worker_pb2.PullSource:
        return worker_pb2.PullSource(
            address=self.worker.endpoint,
            epoch=self.worker.epoch,
            num_tokens=num_tokens,
            timeout_ms=timeout_ms,
        )

    async def prefill(
        self, request: worker_pb2.SequenceSpec, source: worker_pb2.PullSource | None = None
    ) -> None:
        message = worker_pb2.PrefillRequest(sequence=request, source=source)
        await self.channel.unary(methods.PREFILL, message, Deadline.after(5))

    async def answer(
        self, request: worker_pb2.SequenceSpec, source: worker_pb2.PullSource | None = None
    ) -> list[int]:
        await self.prefill(request, source)
        return await self.rest(request)

    async def rest(self, request: worker_pb2.SequenceSpec) -> list[int]:
        def of_request() -> list[worker_pb2.SequenceOutput]:
            return [o for o in self.outputs if o.request_id == request.request_id]

        await until(lambda: any(o.finish_reason for o in of_request()))
        assert all(not output.error for output in of_request())
        return [token for output in of_request() for token in output.token_ids]

    def pulled(self, request: worker_pb2.SequenceSpec) -> tuple[int, int]:
        first = next(o for o in self.outputs if o.request_id == request.request_id)
        return first.num_cached_tokens, first.num_pulled_tokens

    @property
    def is_empty(self) -> bool:
        blocks = self.worker.load().kv_blocks
        return self.worker.idle and blocks.free + blocks.cached == blocks.total


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def served(engine: EngineSettings = SIM, *, kv_frame_kib: int = 1) -> AsyncIterator[Served]:
    executor = ThreadExecutor()
    runner = await executor.run(load_runner, engine)
    settings = WorkerSettings(
        role=WorkerRole.MIXED, engine=engine, kv_frame_kib=kv_frame_kib, lease_s=200
    )
    worker = Worker(settings, runner, executor, GrpcConnector(), Rng())
    listener = GrpcListener(worker.routes(), "127.0.0.1", 0)
    running = asyncio.create_task(worker.run())
    await listener.start()
    worker.endpoint = f"127.0.0.1:{listener.port}"
    there = Served(worker, listener)
    stream = there.channel.duplex(methods.STEPS)
    hello = worker_pb2.GatewayHello(gateway_id="g")
    await stream.send(worker_pb2.StepsRequest(hello=hello))
    assert await stream.receive() is not None

    async def read() -> None:
        while (message := await stream.receive()) is not None:
            there.outputs.extend(message.outputs)

    reading = asyncio.create_task(read())
    try:
        yield there
    finally:
        reading.cancel()
        stream.cancel()
        running.cancel()
        await asyncio.gather(reading, running, return_exceptions=True)
        await worker.close()
        await there.channel.close()
        await listener.stop(0)
        await asyncio.to_thread(executor.close)


def spec(
    request_id: str, prompt: list[int] | None = None, max_tokens: int = 12
) -> worker_pb2.SequenceSpec:
    return worker_pb2.SequenceSpec(
        request_id=request_id,
        gateway_id="g",
        attempt=1,
        prompt_token_ids=prompt or [i % 250 for i in range(PROMPT)],
        cache_root=bytes(16),
        timeout_ms=200_000,
        sampling=inference_pb2.SamplingParams(max_tokens=max_tokens, n=1, seed=1),
    )


def slow_reads(there: Served, seconds: float) -> None:
    """Each frame takes so long to be read."""
    runner: Any = there.worker._runner
    export = runner.export_kv

    def slowly(*args: Any) -> int:
        time.sleep(seconds)
        return export(*args)  # type: ignore[no-any-return]

    runner.export_kv = slowly


async def test_pulled_and_computed_answers_agree() -> None:
    async with served() as source, served() as puller:
        expected = await source.answer(spec("computed"))
        request = spec("pulled")
        assert await puller.answer(request, source.source()) == expected
        assert puller.pulled(request) == (PULLED, PULLED)
        await until(lambda: source.is_empty and puller.is_empty)
        counters = puller.worker.description().counters
        assert (counters.kv_pulled_tokens, counters.kv_pull_failures) == (PULLED, 0)
        assert counters.kv_bytes_received == PULLED * 4 * 8


async def test_a_source_that_dies_in_the_middle_costs_only_time() -> None:
    async with served() as source, served() as puller:
        expected = await source.answer(spec("computed"))
        slow_reads(source, 0.05)
        request = spec("pulled")
        await puller.prefill(request, source.source())
        await until(lambda: puller.worker.description().counters.kv_bytes_received > 0)
        await source.listener.stop(0)
        assert await puller.rest(request) == expected
        assert puller.pulled(request) == (0, 0)
        assert puller.worker.description().counters.kv_pull_failures == 1
        await until(lambda: puller.is_empty and source.is_empty)


async def test_nobody_at_the_address() -> None:
    async with served() as puller:
        expected = await puller.answer(spec("one"))
    async with served() as puller:
        nowhere = worker_pb2.PullSource(address="127.0.0.1:1", epoch="e", num_tokens=PROMPT)
        assert await puller.answer(spec("two"), nowhere) == expected
        assert puller.worker.description().counters.kv_pull_failures == 1


async def test_a_pull_that_takes_too_long_is_given_up_on_both_sides() -> None:
    async with served() as source, served() as puller:
        expected = await source.answer(spec("computed"))
        slow_reads(source, 0.05)
        request = spec("pulled")
        assert await puller.answer(request, source.source(timeout_ms=100)) == expected
        assert puller.pulled(request) == (0, 0)
        await until(lambda: puller.is_empty and source.is_empty)


async def test_an_abort_reaches_the_source() -> None:
    async with served() as source, served() as puller:
        await source.answer(spec("computed"))
        slow_reads(source, 0.05)
        request = spec("pulled")
        await puller.prefill(request, source.source())
        await until(lambda: len(source.worker._traffic.prefix_sends) == 1)
        abort = worker_pb2.AbortRequest(request_id="pulled", gateway_id="g", attempt=1)
        answer = await puller.channel.unary(methods.ABORT, abort, Deadline.after(5))
        assert answer.found
        await until(lambda: puller.is_empty and source.is_empty)
        assert source.worker.description().counters.kv_bytes_sent == 0
        assert [o for o in puller.outputs if o.request_id == "pulled"] == []


async def test_the_real_model_answers_the_same_from_pulled_kv(default_model_path: Path) -> None:
    """fp32: what was pulled is bit for bit what would have been computed, wherever the rest of the
    prompt begins."""
    engine = EngineSettings(
        model_path=str(default_model_path), dtype="fp32", num_blocks=64, num_threads=1
    )
    async with (
        served(engine, kv_frame_kib=1024) as source,
        served(engine, kv_frame_kib=1024) as puller,
    ):
        for number, pulled in enumerate((PULLED, 96)):
            prompt = [(17 * i * i + (5 + number) * i) % 20_000 + 100 for i in range(PROMPT)]
            expected = await source.answer(spec(f"computed {number}", prompt))
            request = spec(f"pulled {number}", prompt)
            assert await puller.answer(request, source.source(pulled, 60_000)) == expected
            assert puller.pulled(request) == (pulled, pulled)
        await until(lambda: source.is_empty and puller.is_empty)
