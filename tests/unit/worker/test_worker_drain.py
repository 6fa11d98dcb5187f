"""A worker that goes, or is not well, says so and leaves nobody waiting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from worker_benches import SLOW, Bench, in_virtual_time, running, running_pair, spec, start_on

from forebay.core.clock import Deadline, now
from forebay.core.errors import InternalError, Unavailable
from forebay.core.finish import FinishReason
from forebay.core.roles import WorkerRole
from forebay.rpc.v1 import worker_pb2
from forebay.worker.step_streams import STEP_HEARTBEAT_S
from forebay.worker.worker import FLUSH_S, SWEEP_S


@in_virtual_time
async def test_a_draining_worker_takes_nothing_new_and_finishes_the_rest() -> None:
    async with running(engine=SLOW) as bench:
        await bench.prefill(spec())
        call = worker_pb2.DrainRequest(timeout_ms=60_000)
        draining = asyncio.create_task(bench.worker.drain_on_call(call))
        await asyncio.sleep(0.01)
        assert bench.messages[-1].draining
        assert bench.worker.description().draining
        for refused in (bench.prefill, bench.reserve):
            with pytest.raises(Unavailable, match="draining"):
                await refused(spec("other"))
        await bench.attach("late")
        assert (await draining).num_left == 0
        assert bench.ends("r") == [FinishReason.LENGTH]
        assert all(message.draining for message in bench.messages[1:])
        bench.check_empty()


@in_virtual_time
async def test_what_is_left_when_the_time_is_up_is_handed_over() -> None:
    async with running_pair(SLOW) as (prefill, decode):
        for bench in (prefill, decode):
            bench.renewing = ["run", "sent"]
        await start_on(prefill, decode, spec("run", n=2, max_tokens=50))
        await asyncio.sleep(3)
        prefill.hall.open.clear()
        await start_on(prefill, decode, spec("sent", max_tokens=50))
        await asyncio.sleep(3)
        num_tokens = len(decode.tokens("run"))
        assert num_tokens > 2
        begun = now()
        assert await decode.worker.drain(Deadline.after(2)) == 3
        assert now() - begun < 2 + FLUSH_S
        assert await prefill.worker.drain(Deadline.after(0)) == 1
        assert decode.ends("run") == [FinishReason.ERROR] * 2
        for bench in (prefill, decode):
            assert bench.ends("sent") == [FinishReason.ERROR]
            last = bench.outputs[-1]
            assert (last.error, last.resumable) == ("the worker is draining", True)
            await asyncio.sleep(2)
            bench.check_empty()
        handed_over = decode.worker.metrics.registry.get_sample_value(
            "forebay_handed_over_requests_total", {"model_name": "sim"}
        )
        assert handed_over == 2


@in_virtual_time
async def test_an_idle_worker_drains_at_once_and_twice() -> None:
    async with running() as bench:
        begun = now()
        for _ in range(2):
            assert await bench.worker.drain(Deadline.after(100)) == 0
        assert now() - begun < 0.2


@in_virtual_time
async def test_draining_does_not_wait_for_a_gateway_that_does_not_read() -> None:
    async with running() as bench:

        async def said() -> AsyncIterator[worker_pb2.StepsRequest]:
            yield worker_pb2.StepsRequest(hello=worker_pb2.GatewayHello(gateway_id="deaf"))
            await asyncio.Event().wait()

        stream = bench.worker.steps(said())
        await anext(stream)
        request = spec(max_tokens=50)
        request.gateway_id = "deaf"
        await bench.prefill(request)
        begun = now()
        assert await bench.worker.drain(Deadline.after(0.2)) == 1
        assert 0.2 + FLUSH_S <= now() - begun < 0.3 + FLUSH_S
        await stream.aclose()


@in_virtual_time
async def test_gateways_hear_something_at_least_this_often() -> None:
    async with running(WorkerRole.DECODE) as bench:
        await bench.reserve(spec())
        for _ in range(5):
            before = len(bench.messages)
            await asyncio.sleep(STEP_HEARTBEAT_S + SWEEP_S)
            assert len(bench.messages) > before
        assert bench.messages[-1].load.kv_blocks.leased == 2
        assert not bench.messages[-1].draining
        assert bench.outputs == []


async def _hang(bench: Bench) -> None:
    """A step begins and outlives its limit."""
    bench.executor.held = {"run"}
    bench.renewing = ["r"]
    await bench.prefill(spec())
    await asyncio.sleep(bench.worker._settings.step_timeout_s + 2 * SWEEP_S)


@in_virtual_time
async def test_a_worker_that_hangs_cuts_its_streams_and_takes_nothing() -> None:
    async with running() as bench:
        await _hang(bench)
        with pytest.raises(InternalError):
            bench.worker.check_health()
        assert [type(error) for error in bench.lost] == [Unavailable]
        with pytest.raises(Unavailable, match="longer than"):
            await bench.prefill(spec("other"))
        with pytest.raises(Unavailable, match="longer than"):
            await bench.attach("other")
        with pytest.raises(Unavailable, match="longer than"):
            await bench.attach()


@in_virtual_time
async def test_a_worker_that_hung_serves_again_when_the_step_ends_after_all() -> None:
    async with running() as bench:
        await _hang(bench)
        bench.executor.release()
        await asyncio.sleep(1)
        await bench.attach()
        await asyncio.sleep(1)
        bench.check_empty()
        await bench.prefill(spec("new"))
        await asyncio.sleep(1)
        assert bench.ends("new") == [FinishReason.LENGTH]


@in_virtual_time
async def test_a_worker_whose_steps_keep_failing_cuts_its_streams() -> None:
    async with running() as bench:

        def fail(*_: object) -> object:
            raise RuntimeError("a bug")

        bench.worker.engine.runner.run = fail  # type: ignore[method-assign,assignment]
        for i in range(3):
            await bench.prefill(spec(f"{i}"))
            await asyncio.sleep(0.01)
        assert bench.ends("2") == [FinishReason.ERROR]
        with pytest.raises(Unavailable, match="last 3 engine steps failed"):
            await bench.prefill(spec("other"))
        await asyncio.sleep(2 * SWEEP_S)
        assert [type(error) for error in bench.lost] == [Unavailable]
        bench.check_empty()
