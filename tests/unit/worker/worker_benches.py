"""Whole workers without a network, each with one gateway attached."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from forebay.core.clock import Deadline
from forebay.core.errors import DeadlineExceeded, Unavailable
from forebay.core.executor import InlineExecutor
from forebay.core.finish import FinishReason
from forebay.core.randomness import Rng
from forebay.core.roles import WorkerRole
from forebay.core.settings import EngineSettings, WorkerSettings
from forebay.engine.loader import load_runner
from forebay.rpc import methods
from forebay.rpc.connector import Channel
from forebay.rpc.conversions import finish_from_proto
from forebay.rpc.v1 import inference_pb2, worker_pb2
from forebay.simulator import loop
from forebay.worker.worker import Worker

LEASE_S = 5.0
ENGINE = EngineSettings(
    engine="sim", model_id="sim", num_blocks=16, block_size=4, sim_time_scale=1.0, max_num_seqs=4
)
SLOW = replace(ENGINE, sim_time_scale=20.0)
"""A step takes 0.6 s."""


class Hall:
    """Implements `Connector` between the workers named in `workers`. Messages of pushes go one at
    a time while `open` is set, asked-for prefixes while `asking` is. `alter`: what becomes of the
    messages of a push. `detached`: what receives a push goes on without its sender."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.open = asyncio.Event()
        self.open.set()
        self.asking = asyncio.Event()
        self.asking.set()
        self.alter: Callable[[bytes], list[bytes]] = lambda message: [message]
        self.asked: list[str] = []
        self.detached = False
        self.receiving: list[asyncio.Task[Any]] = []
        self.num_messages = 0

    def connect(self, address: str) -> Channel:
        return HallChannel(self, address)  # type: ignore[return-value]  # no duplex calls here


class HallChannel:
    def __init__(self, hall: Hall, address: str) -> None:
        self._hall = hall
        self._address = address

    async def unary(self, method: Any, request: Any, deadline: Deadline) -> Any:
        assert method is methods.SEND_PREFIX
        self._hall.asked.append(self._address)
        message = method.decode_request(method.encode_request(request))
        async with self._limited(deadline):
            await self._hall.asking.wait()
            return await self._worker().send_prefix(message)

    async def push(self, _: Any, requests: AsyncIterator[bytes], deadline: Deadline) -> Any:
        async def arriving() -> AsyncIterator[bytes]:
            async for message in requests:
                await self._hall.open.wait()
                for altered in self._hall.alter(message):
                    self._hall.num_messages += 1
                    yield altered

        receiving = asyncio.create_task(self._worker().push(arriving()))
        self._hall.receiving.append(receiving)
        try:
            async with self._limited(deadline):
                return await (asyncio.shield(receiving) if self._hall.detached else receiving)
        finally:
            if not self._hall.detached:
                receiving.cancel()
                await asyncio.gather(receiving, return_exceptions=True)

    async def close(self) -> None:
        pass

    def _worker(self) -> Worker:
        if self._address not in self._hall.workers:
            raise Unavailable(f"nobody listens at {self._address}")
        return self._hall.workers[self._address]

    @asynccontextmanager
    async def _limited(self, deadline: Deadline) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(deadline.remaining_s()):
                yield
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self._address} did not answer in time") from error


class GatedExecutor(InlineExecutor):
    """Runs the functions whose names are in `held` only once they are not."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.changed = asyncio.Event()

    def release(self) -> None:
        self.held.clear()
        self.changed.set()

    async def run(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        while function.__name__ in self.held:
            await self.changed.wait()
        return function(*args, **kwargs)


class Bench:
    """A worker and what gateway `g` hears of it."""

    def __init__(
        self,
        role: WorkerRole,
        engine: EngineSettings = ENGINE,
        hall: Hall | None = None,
        address: str = "",
        **options: Any,
    ) -> None:
        settings = WorkerSettings(
            role=role,
            engine=engine,
            lease_s=LEASE_S,
            gateway_grace_s=2,
            step_timeout_s=20,
            kv_frame_kib=1,
        )
        self.executor = GatedExecutor()
        self.hall = hall or Hall()
        self.worker = Worker(
            settings, load_runner(engine), self.executor, self.hall, Rng(2), **options
        )
        self.worker.endpoint = address or role.value
        self.hall.workers[self.worker.endpoint] = self.worker
        self.messages: list[worker_pb2.StepsResponse] = []
        self.lost: list[Exception] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.renewing: list[str] = []

    @property
    def outputs(self) -> list[worker_pb2.SequenceOutput]:
        return [output for message in self.messages for output in message.outputs]

    async def attach(self, gateway_id: str = "g", renewing: list[str] | None = None) -> None:
        """Says hello, and from then on renews `renewing` once a second, by default the bench's
        own. What other gateways than `g` hear is not kept."""
        kept = self.messages if gateway_id == "g" else []

        async def said() -> AsyncIterator[worker_pb2.StepsRequest]:
            yield worker_pb2.StepsRequest(hello=worker_pb2.GatewayHello(gateway_id=gateway_id))
            while True:
                await asyncio.sleep(1)
                yield renewal(*(self.renewing if renewing is None else renewing))

        stream = self.worker.steps(said())
        await anext(stream)

        async def read() -> None:
            try:
                async for message in stream:
                    kept.append(message)
            except Exception as error:
                self.lost.append(error)
            finally:
                await stream.aclose()

        self.tasks.append(asyncio.create_task(read()))
        await asyncio.sleep(0)

    async def prefill(
        self,
        request: worker_pb2.SequenceSpec,
        target: worker_pb2.TransferTarget | None = None,
        source: worker_pb2.PullSource | None = None,
    ) -> None:
        message = worker_pb2.PrefillRequest(sequence=request, target=target, source=source)
        await self.worker.prefill(message)

    async def reserve(self, request: worker_pb2.SequenceSpec) -> worker_pb2.ReserveResponse:
        return await self.worker.reserve(worker_pb2.ReserveRequest(sequence=request))

    def tokens(self, request_id: str, choice: int | None = None) -> list[int]:
        """Without those given; of all choices unless one is named."""
        found = [o for o in self.outputs if o.request_id == request_id]
        return [t for o in found if choice in (None, o.choice) for t in o.token_ids]

    def ends(self, request_id: str) -> list[FinishReason | None]:
        reasons = [
            finish_from_proto(o.finish_reason) for o in self.outputs if o.request_id == request_id
        ]
        return [reason for reason in reasons if reason is not None]

    def check_empty(self) -> None:
        self.worker.check_integrity()
        assert self.worker.idle
        blocks = self.worker.load().kv_blocks
        assert blocks.free + blocks.cached == blocks.total
        assert not self.worker._requests


def renewal(*request_ids: str) -> worker_pb2.StepsRequest:
    return worker_pb2.StepsRequest(renewal=worker_pb2.Renewal(request_ids=request_ids))


def spec(
    request_id: str = "r", *, attempt: int = 1, prompt: int = 8, **values: float
) -> worker_pb2.SequenceSpec:
    sampling: dict[str, Any] = {"max_tokens": 5, "n": 1, "seed": 1, **values}
    return worker_pb2.SequenceSpec(
        request_id=request_id,
        gateway_id="g",
        attempt=attempt,
        prompt_token_ids=[(len(request_id) + i) % 250 for i in range(prompt)],
        cache_root=bytes(16),
        timeout_ms=60_000,
        sampling=inference_pb2.SamplingParams(**sampling),
    )


async def start_on(
    prefill: Bench,
    decode: Bench,
    request: worker_pb2.SequenceSpec,
    source: worker_pb2.PullSource | None = None,
) -> worker_pb2.ReserveResponse:
    """As a gateway does it."""
    answer = await decode.reserve(request)
    target = worker_pb2.TransferTarget(
        address=decode.worker.endpoint,
        lease_id=answer.lease_id,
        epoch=answer.epoch,
        start_token=answer.num_cached_tokens,
    )
    await prefill.prefill(request, target, source)
    return answer


def abort_of(request: worker_pb2.SequenceSpec, *choices: int) -> worker_pb2.AbortRequest:
    return worker_pb2.AbortRequest(
        request_id=request.request_id,
        gateway_id=request.gateway_id,
        attempt=request.attempt,
        choices=choices,
    )


@asynccontextmanager
async def running(
    role: WorkerRole = WorkerRole.MIXED,
    engine: EngineSettings = ENGINE,
    hall: Hall | None = None,
    address: str = "",
    **options: Any,
) -> AsyncIterator[Bench]:
    bench = Bench(role, engine, hall, address, **options)
    await bench.attach()
    bench.tasks.append(asyncio.create_task(bench.worker.run()))
    try:
        yield bench
    finally:
        for task in bench.tasks:
            task.cancel()
        await asyncio.gather(*bench.tasks, return_exceptions=True)
        await bench.worker.close()


@asynccontextmanager
async def running_pair(
    engine: EngineSettings = ENGINE,
) -> AsyncIterator[tuple[Bench, Bench]]:
    """A prefill and a decode worker."""
    hall = Hall()
    async with (
        running(WorkerRole.PREFILL, engine, hall) as prefill,
        running(WorkerRole.DECODE, engine, hall) as decode,
    ):
        yield prefill, decode


def in_virtual_time(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            await test()

        loop.run(main())

    return run
