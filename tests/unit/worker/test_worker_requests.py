"""A whole worker without a network: what gateways and other workers may ask of it, in any order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from worker_benches import ENGINE, Bench, Hall, abort_of, in_virtual_time, running, spec

from forebay.core.errors import (
    ConfigurationError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RequestCancelled,
    Unavailable,
)
from forebay.core.executor import InlineExecutor
from forebay.core.finish import FinishReason
from forebay.core.kv_codec import KvCodec
from forebay.core.randomness import Rng
from forebay.core.roles import WorkerRole
from forebay.core.settings import WorkerSettings
from forebay.engine.loader import load_runner
from forebay.rpc.v1 import worker_pb2
from forebay.worker.request_table import ENDED_MEMORY_S
from forebay.worker.requests import accept
from forebay.worker.worker import Worker


@in_virtual_time
async def test_a_prompt_is_answered_over_the_step_stream() -> None:
    async with running() as bench:
        await bench.prefill(spec(n=2))
        await bench.prefill(spec(n=2))
        await asyncio.sleep(10)
        assert len(bench.tokens("r")) == 10
        assert bench.ends("r") == [FinishReason.LENGTH] * 2
        assert bench.worker.description().counters.requests == 1
        bench.check_empty()


def test_a_worker_whose_kv_has_not_the_codec_does_not_start() -> None:
    settings = WorkerSettings(engine=ENGINE, kv_codec=KvCodec.FP8)
    with pytest.raises(ConfigurationError, match="the sim engine's KV has no fp8"):
        Worker(settings, load_runner(ENGINE), InlineExecutor(), Hall(), Rng(1))


@in_virtual_time
async def test_an_abort_that_overtakes_its_request_is_remembered() -> None:
    async with running() as bench:
        for call in (bench.prefill, bench.reserve):
            request = spec(call.__name__)
            answer = await bench.worker.abort(abort_of(request))
            assert not answer.found
            with pytest.raises(RequestCancelled):
                await call(request)
            assert bench.worker.idle
        await bench.prefill(spec("prefill", attempt=2))
        await asyncio.sleep(ENDED_MEMORY_S + 1)
        assert len(bench.tokens("prefill")) == 5
        assert not bench.worker._requests._ended
        bench.check_empty()


@in_virtual_time
async def test_a_choice_aborted_before_its_first_token_ends_with_it() -> None:
    async with running() as bench:
        request = spec(n=3)
        await bench.prefill(request)
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
            await bench.prefill(request)
            await bench.worker.abort(abort_of(request, wanted_gone))
            await asyncio.sleep(10)
            assert [output.choice for output in bench.outputs] == [1 - wanted_gone]
            bench.check_empty()


@in_virtual_time
async def test_every_choice_of_a_reservation_takes_a_place() -> None:
    async with running(WorkerRole.DECODE) as bench:
        await bench.reserve(spec("a", n=3))
        await bench.reserve(spec("b", n=3))  # one place was left, and one is enough
        with pytest.raises(Overloaded):
            await bench.reserve(spec("c"))
        await bench.worker.abort(abort_of(spec("a")))
        await bench.reserve(spec("c"))
        await bench.worker.abort(abort_of(spec("b")))
        await bench.worker.abort(abort_of(spec("c")))
        bench.check_empty()


@in_virtual_time
async def test_a_replayed_call_does_not_begin_anew() -> None:
    async with running() as bench:
        await bench.prefill(spec(max_tokens=2))
        await asyncio.sleep(5)
        bench.check_empty()
        with pytest.raises(RequestCancelled):
            await bench.prefill(spec(max_tokens=2))
        bench.check_empty()


@in_virtual_time
async def test_a_gateway_that_comes_back_starts_anew() -> None:
    async with running() as bench:
        await bench.prefill(spec(max_tokens=1000))
        await asyncio.sleep(0.1)
        await bench.attach()
        await asyncio.sleep(1)
        bench.check_empty()


@in_virtual_time
async def test_attempts_of_a_request_follow_one_another() -> None:
    async with running(WorkerRole.DECODE) as bench:
        first = await bench.reserve(spec(attempt=1))
        assert await bench.reserve(spec(attempt=1)) == first
        second = await bench.reserve(spec(attempt=2))
        assert second.lease_id != first.lease_id
        assert len(bench.worker.leases) == 1
        with pytest.raises(InvalidRequest, match="attempt 1 is over"):
            await bench.reserve(spec(attempt=1))
        late = await bench.worker.abort(abort_of(spec(attempt=1)))
        assert not late.found
        assert len(bench.worker.leases) == 1
        assert (await bench.worker.abort(abort_of(spec(attempt=2)))).found
        bench.check_empty()


@in_virtual_time
async def test_an_abort_that_overtakes_a_newer_attempt_ends_the_older_one_and_is_remembered() -> (
    None
):
    async with running(WorkerRole.DECODE) as bench:
        await bench.reserve(spec(attempt=1))
        assert (await bench.worker.abort(abort_of(spec(attempt=2)))).found
        bench.check_empty()
        with pytest.raises(RequestCancelled):
            await bench.reserve(spec(attempt=2))
        await bench.reserve(spec(attempt=3))


@in_virtual_time
async def test_the_deadline_ends_what_runs() -> None:
    async with running() as bench:
        request = spec(max_tokens=50)
        request.timeout_ms = 500
        await bench.prefill(request)
        await asyncio.sleep(5)
        assert bench.ends("r") == [FinishReason.ERROR]
        assert not bench.outputs[-1].resumable
        assert 0 < len(bench.tokens("r")) < 50
        bench.check_empty()
        request.timeout_ms = 0
        with pytest.raises(DeadlineExceeded):
            await bench.prefill(request)


@in_virtual_time
async def test_requests_of_a_gateway_that_left_end_after_its_grace() -> None:
    async with running() as bench:
        await bench.prefill(spec(max_tokens=50, prompt=4))
        bench.tasks[0].cancel()
        await asyncio.sleep(0.1)
        assert not bench.worker.idle
        with pytest.raises(Unavailable, match="no step stream"):
            await bench.prefill(spec("other"))
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
    await bench.prefill(spec())
    await asyncio.gather(task, return_exceptions=True)
    assert isinstance(task.exception(), ExceptionGroup)
    await asyncio.sleep(0.1)
    assert [type(error) for error in bench.lost] == [Unavailable]
    with pytest.raises(Unavailable):
        await bench.prefill(spec("other"))
    await bench.worker.close()
    await asyncio.gather(*bench.tasks)


@in_virtual_time
async def test_a_step_that_fails_ends_its_requests_and_no_others() -> None:
    async with running() as bench:
        run = bench.worker.engine.runner.run

        def fail(*_: object) -> object:
            raise RuntimeError("secret detail")

        bench.worker.engine.runner.run = fail  # type: ignore[method-assign,assignment]
        await bench.prefill(spec(n=2))
        await asyncio.sleep(0.1)
        assert bench.ends("r") == [FinishReason.ERROR] * 2
        assert all(output.resumable for output in bench.outputs)
        assert "secret" not in bench.outputs[0].error
        bench.check_empty()
        await bench.prefill(spec("again"))
        await asyncio.sleep(0.1)
        bench.worker.check_health()
        bench.worker.engine.runner.run = run  # type: ignore[method-assign]
        await bench.prefill(spec("well"))
        await asyncio.sleep(5)
        assert len(bench.tokens("well")) == 5
        bench.worker.check_health()


@in_virtual_time
async def test_newcomers_leave_room_for_what_was_preempted() -> None:
    """Else a stream of short prompts could keep a long one, once preempted, from coming back."""
    async with running(WorkerRole.DECODE) as bench:
        engine = bench.worker.engine
        leased = await bench.reserve(spec("holder", prompt=16))
        assert leased.num_cached_tokens == 0
        long = spec("long", prompt=20)
        request = worker_pb2.SequenceSpec.FromString(long.SerializeToString())
        known = accept(request, engine.runner.model, 60)
        bench.worker._requests.enter(known)
        engine.submit(known.start, prefill_only=False)
        assert engine.num_waiting_blocks == 5
        with pytest.raises(Overloaded):
            await bench.reserve(spec("greedy", prompt=32))
        await bench.reserve(spec("modest", prompt=24))


@in_virtual_time
async def test_blocks_that_leave_quarantine_wake_the_engine() -> None:
    async with running(WorkerRole.MIXED) as bench:
        lease = bench.worker.leases.grant("l", "nobody", [], 60)
        bench.worker.leases.begin_write(lease)
        await asyncio.sleep(0.1)
        engine = bench.worker.engine
        known = accept(spec(), engine.runner.model, 60)
        bench.worker._requests.enter(known)
        engine.submit(known.start, prefill_only=False)
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
                await bench.prefill(request)
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
                await bench.prefill(request)
            assert caught.value.param == "prompt_token_ids"

    check()


@in_virtual_time
async def test_gateways_hear_at_once_of_room_that_has_come_back() -> None:
    async with running() as bench:
        bench.renewing = [f"r{i}" for i in range(4)]
        for request_id in bench.renewing:
            await bench.prefill(spec(request_id, max_tokens=50))
        while not bench.messages or bench.messages[-1].load.prefill_room_tokens:
            await asyncio.sleep(0.01)
        await bench.worker.abort(abort_of(spec("r0")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert bench.messages[-1].load.prefill_room_tokens
        assert not bench.messages[-1].outputs
