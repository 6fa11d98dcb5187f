"""Whatever ends a request while KV is pulled for it leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from pull_scene import EXPECTED, PULLED, REQUEST, Scene, check_answer, in_scene, stalled
from worker_benches import LEASE_S, abort_of

from forebay.core.clock import Deadline
from forebay.core.finish import FinishReason
from forebay.rpc.v1 import worker_pb2


async def asking(there: Scene) -> None:
    there.hall.asking.clear()


async def half_way(there: Scene) -> None:
    stalled(there)


async def writing(there: Scene) -> None:
    there.hall.detached = True
    there.puller.executor.held.add("import_kv")


async def preparing(there: Scene) -> None:
    """The source has not read anything yet."""
    there.source.executor.held.add("read")


PHASES = [asking, half_way, writing, preparing]


async def let_go(there: Scene) -> None:
    there.hall.alter = lambda message: [message]
    there.hall.asking.set()
    there.hall.open.set()
    there.puller.executor.release()
    there.source.executor.release()
    await asyncio.sleep(1)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("choices", [(), (1,), (0, 1)])
def test_an_abort_leaves_nothing(
    phase: Callable[[Scene], Awaitable[None]], choices: tuple[int, ...]
) -> None:
    @in_scene
    async def check(there: Scene) -> None:
        await phase(there)
        await there.pull(REQUEST)
        await asyncio.sleep(0.1)
        there.puller.worker.check_integrity()
        assert there.puller.worker.load().kv_blocks.leased == PULLED // 4
        answer = await there.puller.worker.abort(abort_of(REQUEST, *choices))
        assert answer.found
        if choices == (1,):
            await let_go(there)
            await asyncio.sleep(1)
            assert there.puller.tokens("r", 0) == EXPECTED[0]
            assert there.puller.tokens("r", 1) == []
        else:
            there.puller.worker.check_integrity()
            counts = there.puller.worker.load().kv_blocks
            assert counts.leased == 0
            assert counts.quarantined == (PULLED // 4 if phase is writing else 0)
            await let_go(there)
            assert there.puller.outputs == []
        there.check_empty()

    check()


@pytest.mark.parametrize("phase", PHASES)
def test_a_lease_that_runs_out_ends_the_wait(phase: Callable[[Scene], Awaitable[None]]) -> None:
    @in_scene
    async def check(there: Scene) -> None:
        await phase(there)
        await there.pull(REQUEST, timeout_ms=60_000)
        await asyncio.sleep(LEASE_S + 1)
        outputs = there.puller.outputs
        assert {o.choice for o in outputs if o.resumable and "lease" in o.error} == {0, 1}
        await let_go(there)
        assert there.puller.tokens("r") == []
        there.check_empty()

    check()


@pytest.mark.parametrize("phase", PHASES)
def test_the_requests_deadline_bounds_the_pull(phase: Callable[[Scene], Awaitable[None]]) -> None:
    @in_scene
    async def check(there: Scene) -> None:
        await phase(there)
        request = worker_pb2.SequenceSpec.FromString(REQUEST.SerializeToString())
        request.timeout_ms = 500
        await there.pull(request, timeout_ms=60_000)
        await asyncio.sleep(1.5)
        assert there.puller.ends("r") == [FinishReason.ERROR] * 2
        await let_go(there)
        there.check_empty()

    check()


@pytest.mark.parametrize("phase", PHASES)
def test_a_gateway_that_is_gone_wants_nothing(phase: Callable[[Scene], Awaitable[None]]) -> None:
    @in_scene
    async def check(there: Scene) -> None:
        await phase(there)
        await there.pull(REQUEST)
        there.puller.tasks[0].cancel()
        await asyncio.sleep(4)
        await let_go(there)
        there.check_empty()

    check()


@pytest.mark.parametrize("phase", PHASES)
def test_a_newer_attempt_takes_over(phase: Callable[[Scene], Awaitable[None]]) -> None:
    @in_scene
    async def check(there: Scene) -> None:
        await phase(there)
        await there.pull(REQUEST)
        await asyncio.sleep(0.1)
        request = worker_pb2.SequenceSpec.FromString(REQUEST.SerializeToString())
        request.attempt = 2
        await there.pull(request)
        await asyncio.sleep(0.1)
        there.puller.worker.check_integrity()
        await let_go(there)
        await asyncio.sleep(1)
        check_answer(there.puller)
        assert {output.attempt for output in there.puller.outputs} == {2}
        there.check_empty()

    check()


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("timeout_s", [0.0, 20.0])
def test_a_worker_that_drains_finishes_or_hands_over(
    phase: Callable[[Scene], Awaitable[None]], timeout_s: float
) -> None:
    @in_scene
    async def check(there: Scene) -> None:
        await phase(there)
        await there.pull(REQUEST, timeout_ms=300)
        await asyncio.sleep(0.1)
        there.puller.renewing.append("r")
        num_left = await there.puller.worker.drain(Deadline.after(timeout_s))
        assert num_left == (0 if timeout_s else 2)
        if timeout_s:
            check_answer(there.puller)
        else:
            assert all(o.resumable for o in there.puller.outputs)
        await let_go(there)
        there.check_empty()

    check()


@pytest.mark.parametrize("phase", PHASES)
def test_a_source_that_drains_finishes_its_sends(
    phase: Callable[[Scene], Awaitable[None]],
) -> None:
    @in_scene
    async def check(there: Scene) -> None:
        await phase(there)
        await there.pull(REQUEST, timeout_ms=2000)
        await asyncio.sleep(0.1)
        drain = asyncio.create_task(there.source.worker.drain(Deadline.after(10)))
        await asyncio.sleep(0.5)
        assert drain.done() == (phase is asking), "it waits for its send"
        await let_go(there)
        await drain
        await asyncio.sleep(2)
        check_answer(there.puller)
        there.check_empty()

    check()
