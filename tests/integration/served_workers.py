"""Workers behind listeners in this process, and a gateway's step stream to each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from forebay.core.clock import Deadline
from forebay.core.kv_codec import KvCodec
from forebay.core.randomness import Rng
from forebay.core.roles import WorkerRole
from forebay.core.settings import EngineSettings, WorkerSettings
from forebay.engine.interface import Runner
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

    async def reserve(self, request: worker_pb2.SequenceSpec) -> worker_pb2.TransferTarget:
        """Blocks for a prompt that is computed elsewhere; as a gateway does it."""
        message = worker_pb2.ReserveRequest(sequence=request)
        lease = await self.channel.unary(methods.RESERVE, message, Deadline.after(5))
        return worker_pb2.TransferTarget(
            address=self.worker.endpoint,
            lease_id=lease.lease_id,
            epoch=lease.epoch,
            start_token=lease.num_cached_tokens,
            kv_codecs=self.worker.description().kv_codecs,
        )

    async def prefill(
        self,
        request: worker_pb2.SequenceSpec,
        source: worker_pb2.PullSource | None = None,
        target: worker_pb2.TransferTarget | None = None,
    ) -> None:
        message = worker_pb2.PrefillRequest(sequence=request, source=source, target=target)
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
async def served(
    engine: EngineSettings = SIM,
    *,
    kv_frame_kib: int = 1,
    kv_codec: KvCodec = KvCodec.RAW,
    runner: Runner | None = None,
) -> AsyncIterator[Served]:
    """`runner`: instead of a new one."""
    executor = ThreadExecutor()
    runner = runner or await executor.run(load_runner, engine)
    settings = WorkerSettings(
        role=WorkerRole.MIXED,
        engine=engine,
        kv_frame_kib=kv_frame_kib,
        kv_codec=kv_codec,
        lease_s=200,
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
