"""A whole worker without a network: what gateways and other workers may ask of it, in any order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from forebay.core.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
    RequestCancelled,
    Unavailable,
)
from forebay.core.executor import InlineExecutor
from forebay.core.finish import FinishReason
from forebay.core.randomness import Rng
from forebay.core.roles import WorkerRole
from forebay.core.settings import EngineSettings, WorkerSettings
from forebay.engine.loader import load_runner
from forebay.rpc.conversions import finish_from_proto
from forebay.rpc.v1 import inference_pb2, worker_pb2
from forebay.simulator import loop
from forebay.simulator.network import SimNetwork
from forebay.worker.requests import accept
from forebay.worker.worker import ABORT_MEMORY_S, Worker


class Bench:
    """A worker with one gateway attached."""

    def __init__(self, role: WorkerRole, engine: EngineSettings) -> None:
        settings = WorkerSettings(role=role, engine=engine, lease_s=5, gateway_grace_s=2)
        network = SimNetwork(Rng(1), 0.001)
        self.worker = Worker(settings, load_runner(engine), InlineExecutor(), network, Rng(2))
        self.outputs: list[worker_pb2.SequenceOutput] = []
        self.lost: list[Exception] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def attach(self) -> None:
        async def hello() -> AsyncIterator[worker_pb2.StepsRequest]:
            yield worker_pb2.StepsRequest(hello=worker_pb2.GatewayHello(gateway_id="g"))
            await asyncio.Event().wait()

        stream = self.worker.steps(hello())
        await anext(stream)

        async def read() -> None:
            try:
                async for message in stream:
                    self.outputs += message.outputs
            except Exception as error:
                self.lost.append(error)
            finally:
                await stream.aclose()

        self.tasks.append(asyncio.create_task(read()))
        await asyncio.sleep(0)

    def tokens(self, request_id: str) -> list[int]:
        found = [o for o in self.outputs if o.request_id == request_id]
        return [token_id for output in found for token_id in output.token_ids]

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


def spec(
    request_id: str = "r", *, attempt: int = 1, prompt: int = 8, **values: int
) -> worker_pb2.SequenceSpec:
    sampling: dict[str, int] = {"max_tokens": 5, "n": 1, "seed": 1, **values}
    return worker_pb2.SequenceSpec(
        request_id=request_id,
        gateway_id="g",
        attempt=attempt,
        prompt_token_ids=[(len(request_id) + i) % 250 for i in range(prompt)],
        cache_root=bytes(16),
        timeout_ms=60_000,
        sampling=inference_pb2.SamplingParams(**sampling),
    )


def abort_of(request: worker_pb2.SequenceSpec, *choices: int) -> worker_pb2.AbortRequest:
    return worker_pb2.AbortRequest(
        request_id=request.request_id,
        gateway_id=request.gateway_id,
        attempt=request.attempt,
        choices=choices,
    )


ENGINE = EngineSettings(
    engine="sim", model_id="sim", num_blocks=16, block_size=4, sim_time_scale=1.0, max_num_seqs=4
)


@asynccontextmanager
async def running(
    role: WorkerRole = WorkerRole.MIXED, engine: EngineSettings = ENGINE
) -> AsyncIterator[Bench]:
    bench = Bench(role, engine)
    await bench.attach()
    bench.tasks.append(asyncio.create_task(bench.worker.run()))
    try:
        yield bench
    finally:
        for task in bench.tasks:
            task.cancel()
        await asyncio.gather(*bench.tasks, return_exceptions=True)
        await bench.worker.close()


def in_virtual_time(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            await test()

        loop.run(main())

    return run


async def prefill(bench: Bench, request: worker_pb2.SequenceSpec) -> None:
    await bench.worker.prefill(worker_pb2.PrefillRequest(sequence=request))


async def reserve(bench: Bench, request: worker_pb2.SequenceSpec) -> worker_pb2.ReserveResponse:
    return await bench.worker.reserve(worker_pb2.ReserveRequest(sequence=request))


@in_virtual_time
async def test_a_prompt_is_answered_over_the_step_stream() -> None:
    async with running() as bench:
        await prefill(bench, spec(n=2))
        await prefill(bench, spec(n=2))
        await asyncio.sleep(10)
        assert len(bench.tokens("r")) == 10
        assert bench.ends("r") == [FinishReason.LENGTH] * 2
        assert bench.worker.description().counters.requests == 1
        bench.check_empty()


@in_virtual_time
async def test_an_abort_that_overtakes_its_request_is_remembered() -> None:
    async with running() as bench:
        for call in (prefill, reserve):
            request = spec(call.__name__)
            answer = await bench.worker.abort(abort_of(request))
            assert not answer.found
            with pytest.raises(RequestCancelled):
                await call(bench, request)
            assert bench.worker.idle
        await prefill(bench, spec("prefill", attempt=2))
        await asyncio.sleep(ABORT_MEMORY_S + 1)
        assert len(bench.tokens("prefill")) == 5
        assert not bench.worker._aborted
        bench.check_empty()


@in_virtual_time
async def test_a_choice_aborted_before_its_first_token_ends_with_it() -> None:
    async with running() as bench:
        request = spec(n=3)
        await prefill(bench, request)
        await bench.worker.abort(abort_of(request, 1))
        await asyncio.sleep(10)
        assert bench.ends("r") == [FinishReason.LENGTH] * 2
        assert {output.choice for output in bench.outputs} == {0, 2}
        bench.check_empty()


@in_virtual_time
async def test_the_other_choice_may_end_with_its_first_token() -> None:
    for wanted_gone in (0, 1):
        async with running() as bench:
            request = spec(n=2, max_tokens=1)
            await prefill(bench, request)
            await bench.worker.abort(abort_of(request, wanted_gone))
            await asyncio.sleep(10)
            assert [output.choice for output in bench.outputs] == [1 - wanted_gone]
            bench.check_empty()


@in_virtual_time
async def test_every_choice_of_a_reservation_takes_a_place() -> None:
    async with running(WorkerRole.DECODE) as bench:
        await reserve(bench, spec("a", n=3))
        with pytest.raises(Overloaded):
            await reserve(bench, spec("b", n=3))
        await bench.worker.abort(abort_of(spec("a")))
        await reserve(bench, spec("b", n=3))
        await bench.worker.abort(abort_of(spec("b")))
        bench.check_empty()


@in_virtual_time
async def test_a_gateway_that_comes_back_starts_anew() -> None:
    async with running() as bench:
        await prefill(bench, spec(max_tokens=1000))
        await asyncio.sleep(0.1)
        await bench.attach()
        await asyncio.sleep(1)
        bench.check_empty()


@in_virtual_time
async def test_attempts_of_a_request_follow_one_another() -> None:
    async with running(WorkerRole.DECODE) as bench:
        first = await reserve(bench, spec(attempt=1))
        assert await reserve(bench, spec(attempt=1)) == first
        second = await reserve(bench, spec(attempt=2))
        assert second.lease_id != first.lease_id
        assert len(bench.worker.leases) == 1
        with pytest.raises(InvalidRequest, match="attempt 1 is over"):
            await reserve(bench, spec(attempt=1))
        late = await bench.worker.abort(abort_of(spec(attempt=1)))
        assert not late.found
        assert len(bench.worker.leases) == 1
        assert (await bench.worker.abort(abort_of(spec(attempt=2)))).found
        bench.check_empty()


@in_virtual_time
async def test_a_lease_that_waits_too_long_is_an_error() -> None:
    async with running(WorkerRole.DECODE) as bench:
        await reserve(bench, spec(n=2))
        await asyncio.sleep(4.5)
        assert bench.outputs == []
        await asyncio.sleep(1)
        assert bench.ends("r") == [FinishReason.ERROR] * 2
        assert "did not arrive" in bench.outputs[0].error
        assert bench.worker.description().counters.expired_leases == 1
        bench.check_empty()


@in_virtual_time
async def test_the_deadline_ends_what_runs() -> None:
    async with running() as bench:
        request = spec(max_tokens=50)
        request.timeout_ms = 500
        await prefill(bench, request)
        await asyncio.sleep(5)
        assert bench.ends("r") == [FinishReason.ERROR]
        assert 0 < len(bench.tokens("r")) < 50
        bench.check_empty()
        request.timeout_ms = 0
        with pytest.raises(DeadlineExceeded):
            await prefill(bench, request)


@in_virtual_time
async def test_requests_of_a_gateway_that_left_end_after_its_grace() -> None:
    async with running() as bench:
        await prefill(bench, spec(max_tokens=50, prompt=4))
        bench.tasks[0].cancel()
        await asyncio.sleep(0.1)
        assert not bench.worker.idle
        with pytest.raises(Unavailable, match="no step stream"):
            await prefill(bench, spec("other"))
        await asyncio.sleep(2.5)
        bench.check_empty()


@in_virtual_time
async def test_a_worker_whose_loop_dies_ends_its_streams() -> None:
    bench = Bench(WorkerRole.MIXED, ENGINE)
    await bench.attach()

    def broken(_: object) -> None:
        raise ValueError("a bug")

    bench.worker._loop._on_outcome = broken  # type: ignore[assignment]
    task = asyncio.create_task(bench.worker.run())
    await prefill(bench, spec())
    await asyncio.gather(task, return_exceptions=True)
    assert isinstance(task.exception(), ExceptionGroup)
    await asyncio.sleep(0.1)
    assert [type(error) for error in bench.lost] == [Unavailable]
    with pytest.raises(Unavailable):
        await prefill(bench, spec("other"))
    await bench.worker.close()
    await asyncio.gather(*bench.tasks)


@in_virtual_time
async def test_a_step_that_fails_ends_its_requests_and_no_others() -> None:
    async with running() as bench:
        run = bench.worker.engine.runner.run

        def fail(batch: object) -> object:
            raise RuntimeError("secret detail")

        bench.worker.engine.runner.run = fail  # type: ignore[method-assign,assignment]
        await prefill(bench, spec(n=2))
        await asyncio.sleep(0.1)
        assert bench.ends("r") == [FinishReason.ERROR] * 2
        assert "secret" not in bench.outputs[0].error
        bench.worker.check_health()
        bench.check_empty()
        for i in range(2):
            await prefill(bench, spec(f"again{i}"))
            await asyncio.sleep(0.1)
        with pytest.raises(InternalError, match="last 3 engine steps failed"):
            bench.worker.check_health()
        bench.worker.engine.runner.run = run  # type: ignore[method-assign]
        await prefill(bench, spec("well"))
        await asyncio.sleep(5)
        assert len(bench.tokens("well")) == 5
        bench.worker.check_health()


@in_virtual_time
async def test_newcomers_leave_room_for_what_was_preempted() -> None:
    """Else a stream of short prompts could keep a long one, once preempted, from coming back."""
    async with running(WorkerRole.DECODE) as bench:
        engine = bench.worker.engine
        leased = await reserve(bench, spec("holder", prompt=16))
        assert leased.num_cached_tokens == 0
        long = spec("long", prompt=20)
        request = worker_pb2.SequenceSpec.FromString(long.SerializeToString())
        tokens = list(request.prompt_token_ids)
        known = accept(request, engine.runner.model)
        bench.worker._requests[known.key] = known
        engine.submit(known.key, 1, tokens, known.params, bytes(16), prefill_only=False)
        assert engine.num_waiting_blocks == 5
        with pytest.raises(Overloaded):
            await reserve(bench, spec("greedy", prompt=32))
        await reserve(bench, spec("modest", prompt=24))


@in_virtual_time
async def test_blocks_that_leave_quarantine_wake_the_engine() -> None:
    async with running(WorkerRole.MIXED) as bench:
        lease = bench.worker.leases.grant("l", "nobody", [], 60, 1e9)
        bench.worker.leases.begin_write(lease)
        await asyncio.sleep(0.1)
        engine = bench.worker.engine
        known = accept(spec(), engine.runner.model)
        bench.worker._requests[known.key] = known
        engine.submit(known.key, 1, known.prompt, known.params, bytes(16), prefill_only=False)
        bench.worker._loop.wake()
        await asyncio.sleep(0.1)
        assert engine.num_waiting == 1
        bench.worker.leases.release(lease)

        async def messages() -> AsyncIterator[bytes]:
            bench.worker.leases.end_write(lease)
            for _ in ():
                yield b""

        with pytest.raises(Exception, match="without a commit"):
            await bench.worker.push(messages())
        await asyncio.sleep(5)
        assert len(bench.tokens("r")) == 5


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"request_id": ""}, "request_id"),
        ({"gateway_id": ""}, "request_id"),
        ({"cache_root": b"short"}, "cache_root"),
    ],
)
def test_what_no_gateway_sends_is_refused(change: dict[str, object], param: str) -> None:
    @in_virtual_time
    async def check() -> None:
        async with running() as bench:
            request = spec()
            for name, value in change.items():
                setattr(request, name, value)
            with pytest.raises(InvalidRequest) as caught:
                await prefill(bench, request)
            assert caught.value.param == param

    check()


@pytest.mark.parametrize("prompt", [[], [259], [1] * 64, [2**32 - 1]])
def test_prompts_that_do_not_fit_are_refused(prompt: list[int]) -> None:
    @in_virtual_time
    async def check() -> None:
        async with running() as bench:
            request = spec()
            del request.prompt_token_ids[:]
            request.prompt_token_ids.extend(prompt)
            with pytest.raises(InvalidRequest) as caught:
                await prefill(bench, request)
            assert caught.value.param == "prompt_token_ids"

    check()


@in_virtual_time
async def test_a_draining_worker_takes_nothing_new_and_waits_for_the_rest() -> None:
    async with running() as bench:
        await prefill(bench, spec())
        answer = await bench.worker.drain(worker_pb2.DrainRequest(timeout_ms=60_000))
        assert answer.num_left == 0
        assert len(bench.tokens("r")) == 5
        with pytest.raises(Unavailable, match="draining"):
            await prefill(bench, spec("other"))
        bench.check_empty()
