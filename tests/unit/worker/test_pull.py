"""KV of a prompt's beginning from another worker: the answer is the one that would have been
computed, and whatever goes wrong, it is computed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from worker_benches import ENGINE, LEASE_S, Bench, Hall, abort_of, running, spec, start_on

from forebay.core.clock import Deadline
from forebay.core.errors import InvalidRequest, KvTransferError, Overloaded, Unavailable
from forebay.core.finish import FinishReason
from forebay.core.roles import WorkerRole
from forebay.engine.sim import SimRunner
from forebay.kv.block_pool import Holder
from forebay.rpc.methods import PROTOCOL_VERSION
from forebay.rpc.v1 import worker_pb2
from forebay.simulator import loop
from forebay.worker.prefix_sends import MAX_SENDS
from forebay.worker.pull import MAX_PULLS, PULL_S

BIG = replace(ENGINE, num_blocks=64, max_num_seqs=16)
PROMPT = 40
PULLED = 36
"""Full blocks of all tokens but the last."""


class Scene:
    """`source` holds the prompt's KV; `puller` is asked to answer."""

    def __init__(self, hall: Hall, source: Bench, puller: Bench) -> None:
        self.hall = hall
        self.source = source
        self.puller = puller

    def pull_source(self, num_tokens: int = PROMPT, **values: Any) -> worker_pb2.PullSource:
        worker = self.source.worker
        where = {"address": worker.endpoint, "epoch": worker.epoch, **values}
        return worker_pb2.PullSource(num_tokens=num_tokens, **where)

    async def pull(self, request: worker_pb2.SequenceSpec, **values: Any) -> None:
        await self.puller.prefill(request, source=self.pull_source(**values))

    def figures(self, request_id: str = "r") -> tuple[int, int]:
        """Cached and pulled tokens, as the gateway hears of them."""
        outputs = [o for o in self.puller.outputs if o.request_id == request_id]
        return outputs[0].num_cached_tokens, outputs[0].num_pulled_tokens

    @property
    def num_failures(self) -> int:
        return self.puller.worker.description().counters.kv_pull_failures

    def check_empty(self) -> None:
        for bench in (self.source, self.puller):
            bench.check_empty()
            traffic = bench.worker._traffic
            assert (len(traffic.pulls), len(traffic.prefix_sends)) == (0, 0)
            assert len(bench.worker.leases) == 0


@asynccontextmanager
async def scene(engine: Any = BIG, **puller: Any) -> AsyncIterator[Scene]:
    hall = Hall()
    async with (
        running(WorkerRole.MIXED, engine, hall, "source") as source,
        running(WorkerRole.MIXED, engine, hall, "puller", **puller) as bench,
    ):
        await source.prefill(spec("w", prompt=PROMPT, max_tokens=1))
        await asyncio.sleep(1)
        yield Scene(hall, source, bench)


def in_scene(test: Callable[[Scene], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            async with scene() as there:
                await test(there)

        loop.run(main())

    return run


def computed(request: worker_pb2.SequenceSpec, engine: Any = BIG) -> list[list[int]]:
    """The answer of a worker that knows nothing, choice by choice."""

    async def main() -> list[list[int]]:
        async with running(engine=engine) as bench:
            await bench.prefill(request)
            await asyncio.sleep(10)
            return [bench.tokens("r", choice) for choice in range(request.sampling.n)]

    return loop.run(main())


REQUEST = spec(prompt=PROMPT, max_tokens=8, n=2)
EXPECTED = computed(REQUEST)


def check_answer(bench: Bench, request_id: str = "r") -> None:
    assert [bench.tokens(request_id, choice) for choice in range(2)] == EXPECTED
    assert bench.ends(request_id) == [FinishReason.LENGTH] * 2


@in_scene
async def test_a_pulled_prefix_is_as_good_as_a_computed_one(there: Scene) -> None:
    await there.pull(REQUEST)
    await asyncio.sleep(2)
    check_answer(there.puller)
    assert there.figures() == (PULLED, PULLED)
    counters = there.puller.worker.description().counters
    assert (counters.kv_pulled_tokens, counters.kv_pull_failures) == (PULLED, 0)
    assert counters.kv_bytes_received == PULLED * 4 * 8
    assert there.source.worker.description().counters.kv_bytes_sent == PULLED * 4 * 8
    there.check_empty()


@in_scene
async def test_the_answer_is_made_of_the_pulled_kv(there: Scene) -> None:
    runner = there.source.worker._runner
    assert isinstance(runner, SimRunner)
    runner._memory[:, :, 0] ^= runner._memory.dtype.type(1)
    await there.pull(REQUEST)
    await asyncio.sleep(2)
    assert there.figures() == (PULLED, PULLED)
    assert there.puller.tokens("r", 0) != EXPECTED[0]


@in_scene
async def test_pulled_blocks_stay_in_the_cache(there: Scene) -> None:
    await there.pull(REQUEST)
    await asyncio.sleep(2)
    again = spec("s", prompt=PROMPT, max_tokens=8, n=2)
    await there.pull(again)
    await asyncio.sleep(2)
    check_answer(there.puller, "s")
    assert there.figures("s") == (PULLED, 0)
    assert there.hall.asked.count("source") == 1, "what is here is not asked for"


@in_scene
async def test_only_what_is_missing_is_pulled(there: Scene) -> None:
    shorter = spec("h", prompt=16, max_tokens=1)
    await there.puller.prefill(shorter)
    await asyncio.sleep(1)
    await there.pull(REQUEST)
    await asyncio.sleep(2)
    check_answer(there.puller)
    assert there.figures() == (PULLED, PULLED - 16)
    assert there.puller.worker.description().counters.kv_bytes_received == (PULLED - 16) * 4 * 8
    there.check_empty()


@pytest.mark.parametrize(
    ("claimed", "pulled"), [(0, 0), (3, 0), (4, 4), (21, 20), (PROMPT, PULLED), (10_000, PULLED)]
)
def test_as_much_as_the_source_is_said_to_hold(claimed: int, pulled: int) -> None:
    @in_scene
    async def check(there: Scene) -> None:
        await there.pull(REQUEST, num_tokens=claimed)
        await asyncio.sleep(2)
        check_answer(there.puller)
        assert there.figures() == (pulled, pulled)
        assert there.num_failures == 0
        there.check_empty()

    check()


@in_scene
async def test_as_much_as_the_source_still_holds(there: Scene) -> None:
    """Its index entry was older than an eviction."""
    pool = there.source.worker.engine.pool
    blocks = pool.allocate(pool.num_available - 5, Holder.SEQUENCE)
    await there.pull(REQUEST)
    await asyncio.sleep(2)
    pool.release(blocks, Holder.SEQUENCE)
    check_answer(there.puller)
    cached, pulled = there.figures()
    assert cached == pulled == 20
    assert there.num_failures == 0
    there.check_empty()


@in_scene
async def test_a_prompt_for_another_worker_can_have_a_source(there: Scene) -> None:
    async with running(WorkerRole.DECODE, BIG, there.hall) as decode:
        await start_on(there.puller, decode, REQUEST, there.pull_source())
        await asyncio.sleep(2)
        for choice in range(2):
            answer = there.puller.tokens("r", choice) + decode.tokens("r", choice)
            assert answer == EXPECTED[choice]
        assert there.figures() == (PULLED, PULLED)
        decode.check_empty()
    there.check_empty()


@in_scene
async def test_the_decode_worker_itself_can_be_the_source(there: Scene) -> None:
    """It holds the conversation so far, and the prefill worker does not."""
    await start_on(there.puller, there.source, REQUEST, there.pull_source())
    await asyncio.sleep(2)
    for choice in range(2):
        answer = there.puller.tokens("r", choice) + there.source.tokens("r", choice)
        assert answer == EXPECTED[choice]
    assert there.figures() == (PULLED, PULLED)
    there.check_empty()


# What goes wrong.


def nobody(there: Scene) -> dict[str, Any]:
    return {"address": "nowhere"}


def another_life(there: Scene) -> dict[str, Any]:
    return {"epoch": "an earlier one"}


def draining(there: Scene) -> dict[str, Any]:
    there.source.worker.draining = True
    return {}


def stopped(there: Scene) -> dict[str, Any]:
    there.source.worker._stopped = True
    return {}


def evicted(there: Scene) -> dict[str, Any]:
    pool = there.source.worker.engine.pool
    pool.release(pool.allocate(pool.num_available, Holder.SEQUENCE), Holder.SEQUENCE)
    return {}


def no_answer(there: Scene) -> dict[str, Any]:
    there.hall.asking.clear()
    return {"timeout_ms": 300}


def stalled(there: Scene) -> dict[str, Any]:
    """After the first message."""

    def alter(message: bytes) -> list[bytes]:
        there.hall.open.clear()
        return [message]

    there.hall.alter = alter
    return {"timeout_ms": 300}


def corrupt(there: Scene) -> dict[str, Any]:
    there.hall.alter = lambda message: [message[:-1] + bytes([message[-1] ^ 1])]
    return {}


def frame_lost(there: Scene) -> dict[str, Any]:
    messages: list[bytes] = []

    def alter(message: bytes) -> list[bytes]:
        messages.append(message)
        return [] if len(messages) == 2 else [message]

    there.hall.alter = alter
    return {}


def last_frame_lost(there: Scene) -> dict[str, Any]:
    """Indistinguishable from a sender that holds less, but for the commit's counts."""
    held_back: list[bytes] = []

    def alter(message: bytes) -> list[bytes]:
        if message[:1] == b"\x1a":
            return [message]
        held_back.append(message)
        return held_back[-2:-1]

    there.hall.alter = alter
    return {}


def commit_lost(there: Scene) -> dict[str, Any]:
    there.hall.alter = lambda message: [] if message[:1] == b"\x1a" else [message]
    return {}


def source_closes(there: Scene) -> dict[str, Any]:
    def alter(message: bytes) -> list[bytes]:
        there.hall.open.clear()
        there.source.worker._traffic.prefix_sends.close()
        return [message]

    there.hall.alter = alter
    return {}


def unreadable(there: Scene) -> dict[str, Any]:
    def export(*_: Any) -> bytes:
        raise KvTransferError("the memory cannot be read")

    there.source.worker._runner.export_kv = export  # type: ignore[method-assign]
    return {}


FAULTS = [
    nobody,
    another_life,
    draining,
    stopped,
    evicted,
    no_answer,
    stalled,
    corrupt,
    frame_lost,
    last_frame_lost,
    commit_lost,
    source_closes,
    unreadable,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_goes_wrong_the_prompt_is_computed(
    fault: Callable[[Scene], dict[str, Any]],
) -> None:
    @in_scene
    async def check(there: Scene) -> None:
        values = fault(there)
        await there.pull(REQUEST, **values)
        await asyncio.sleep(3)
        check_answer(there.puller)
        assert there.figures() == (0, 0)
        assert there.num_failures == 1
        there.hall.open.set()
        there.hall.asking.set()
        await asyncio.sleep(1)
        there.check_empty()

    check()


def test_workers_of_two_versions_exchange_no_kv() -> None:
    async def main() -> None:
        async with scene(protocol_version=PROTOCOL_VERSION + 1) as there:
            await there.pull(REQUEST)
            await asyncio.sleep(2)
            check_answer(there.puller)
            assert there.figures() == (0, 0) and there.num_failures == 1
            assert there.hall.num_messages == 0
            there.check_empty()

    loop.run(main())


@in_scene
async def test_without_a_time_of_the_gateways_the_wait_is_short(there: Scene) -> None:
    there.hall.asking.clear()
    await there.pull(REQUEST)
    await asyncio.sleep(PULL_S - 0.1)
    assert there.puller.tokens("r") == []
    await asyncio.sleep(2)
    assert there.num_failures == 1
    await there.puller.worker.abort(abort_of(REQUEST))
    there.hall.asking.set()
    there.check_empty()


@in_scene
async def test_another_tenants_kv_is_not_sent(there: Scene) -> None:
    request = worker_pb2.SequenceSpec.FromString(REQUEST.SerializeToString())
    request.cache_root = b"another root 16B"
    await there.pull(request)
    await asyncio.sleep(2)
    check_answer(there.puller)
    assert there.figures() == (0, 0)
    assert there.hall.num_messages == 0


@in_scene
async def test_what_the_source_reads_is_not_evicted_meanwhile(there: Scene) -> None:
    there.hall.open.clear()
    await there.pull(REQUEST)
    await asyncio.sleep(0.1)
    pool = there.source.worker.engine.pool
    assert pool.counts().used == PULLED // 4
    await there.source.prefill(spec("crowd", prompt=200, max_tokens=1))
    await asyncio.sleep(1)
    there.source.worker.check_integrity()
    there.hall.open.set()
    await asyncio.sleep(1)
    check_answer(there.puller)
    assert there.figures() == (PULLED, PULLED)
    there.check_empty()


# Ends, in every phase.


async def asking(there: Scene) -> None:
    there.hall.asking.clear()


async def half_way(there: Scene) -> None:
    stalled(there)


async def writing(there: Scene) -> None:
    there.hall.detached = True
    there.puller.executor.held.add("_import")


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


@in_scene
async def test_a_repeated_call_waits_for_the_same_pull(there: Scene) -> None:
    there.hall.asking.clear()
    await there.pull(REQUEST)
    await there.pull(REQUEST)
    with pytest.raises(InvalidRequest):
        await there.puller.reserve(REQUEST)
    there.hall.asking.set()
    await asyncio.sleep(2)
    assert there.hall.asked.count("source") == 1
    check_answer(there.puller)
    there.check_empty()


# One prefix, several prompts.


def twins(count: int) -> list[worker_pb2.SequenceSpec]:
    return [spec("abcdefghijklmnop"[i], prompt=PROMPT, max_tokens=8, n=2) for i in range(count)]


@in_scene
async def test_one_pull_serves_all_who_wait_for_the_same_blocks(there: Scene) -> None:
    there.hall.asking.clear()
    for request in twins(3):
        await there.pull(request)
    await asyncio.sleep(0.1)
    assert there.hall.asked.count("source") == 1
    there.hall.asking.set()
    await asyncio.sleep(3)
    assert there.hall.asked.count("source") == 1
    for request in twins(3):
        check_answer(there.puller, request.request_id)
    assert [there.figures(twin.request_id) for twin in twins(3)] == [
        (PULLED, PULLED),
        (PULLED, 0),
        (PULLED, 0),
    ]
    there.check_empty()


@in_scene
async def test_when_the_first_leaves_the_next_one_asks(there: Scene) -> None:
    there.hall.asking.clear()
    for request in twins(3):
        await there.pull(request)
    await asyncio.sleep(0.1)
    await there.puller.worker.abort(abort_of(twins(1)[0]))
    await asyncio.sleep(0.1)
    assert there.hall.asked.count("source") == 2
    there.hall.asking.set()
    await asyncio.sleep(3)
    for request in twins(3)[1:]:
        check_answer(there.puller, request.request_id)
    assert there.num_failures == 0
    there.check_empty()


@in_scene
async def test_nobody_waits_longer_for_another_ones_pull(there: Scene) -> None:
    there.hall.asking.clear()
    first, second = twins(2)
    await there.pull(first, timeout_ms=4000)
    await there.pull(second, timeout_ms=300)
    await asyncio.sleep(2)
    check_answer(there.puller, second.request_id)
    assert there.puller.tokens(first.request_id) == []
    there.hall.asking.set()
    await asyncio.sleep(2)
    check_answer(there.puller, first.request_id)
    there.check_empty()


# Room.


@in_scene
async def test_room_counts_what_waits(there: Scene) -> None:
    there.hall.asking.clear()
    before = there.puller.worker.load()
    await there.pull(REQUEST)
    for _ in range(2):
        load = there.puller.worker.load()
        assert load.num_waiting == before.num_waiting + 1
        assert load.num_pending_prefill_tokens == PROMPT - PULLED
        assert load.prefill_room_tokens == before.prefill_room_tokens - (PROMPT - PULLED)
        await asyncio.sleep(0.1)
    with pytest.raises(Overloaded, match="KV blocks"):
        await there.puller.prefill(spec("too big", prompt=219))
    await there.puller.prefill(spec("fits", prompt=215, max_tokens=1))
    await asyncio.sleep(1)
    there.hall.asking.set()
    await asyncio.sleep(2)
    check_answer(there.puller)
    there.check_empty()


def _others(count: int) -> list[worker_pb2.SequenceSpec]:
    """Prompts of a few blocks that share none."""
    return [spec("x" * (i + 2), prompt=9, max_tokens=1) for i in range(count)]


@in_scene
async def test_only_so_many_wait(there: Scene) -> None:
    there.hall.asking.clear()
    *waiting, one_more = _others(MAX_PULLS + 1)
    for request in waiting:
        assert there.puller.worker.load().prefill_room_tokens > 0
        await there.pull(request)
    assert there.puller.worker.load().prefill_room_tokens == 0
    with pytest.raises(Overloaded):
        await there.pull(one_more)
    there.hall.asking.set()
    await asyncio.sleep(3)
    assert there.puller.worker.load().prefill_room_tokens > 0
    there.check_empty()


@in_scene
async def test_a_source_serves_only_so_many(there: Scene) -> None:
    there.hall.open.clear()
    message = worker_pb2.SendPrefixRequest(
        cache_root=bytes(16),
        token_ids=REQUEST.prompt_token_ids,
        target=worker_pb2.TransferTarget(address="puller", lease_id="none", epoch="none"),
        epoch=there.source.worker.epoch,
        timeout_ms=500,
        protocol_version=PROTOCOL_VERSION,
    )
    calls = [
        asyncio.create_task(there.source.worker.send_prefix(message)) for _ in range(MAX_SENDS)
    ]
    await asyncio.sleep(0.1)
    with pytest.raises(Overloaded):
        await there.source.worker.send_prefix(message)
    assert there.source.worker.load().kv_blocks.used == PROMPT // 4
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert len([r for r in results if isinstance(r, Exception)]) == MAX_SENDS
    there.hall.open.set()
    there.check_empty()


@in_scene
async def test_a_call_that_is_cancelled_gives_the_blocks_back(there: Scene) -> None:
    there.hall.open.clear()
    await there.pull(REQUEST)
    await asyncio.sleep(0.1)
    assert len(there.source.worker._traffic.prefix_sends) == 1
    assert not there.source.worker.idle and not there.puller.worker.idle
    await there.puller.worker.close()
    await asyncio.sleep(0.1)
    there.source.check_empty()
    there.hall.open.set()


@in_scene
async def test_bad_sources_are_named(there: Scene) -> None:
    for values in ({"address": ""}, {"epoch": ""}):
        with pytest.raises(InvalidRequest) as caught:
            await there.pull(REQUEST, **values)
        assert caught.value.param == "source"
    there.check_empty()


@in_scene
async def test_a_late_second_call_for_a_prefix_changes_nothing(there: Scene) -> None:
    """The network may double it; its lease is over by then."""
    messages: list[worker_pb2.SendPrefixRequest] = []
    send = there.source.worker.send_prefix

    async def noted(message: worker_pb2.SendPrefixRequest) -> worker_pb2.SendPrefixResponse:
        messages.append(message)
        return await send(message)

    there.source.worker.send_prefix = noted  # type: ignore[method-assign]
    await there.pull(REQUEST)
    await asyncio.sleep(2)
    with pytest.raises(KvTransferError):
        await send(messages[0])
    check_answer(there.puller)
    there.check_empty()


@in_scene
async def test_a_worker_that_ends_asks_and_serves_no_longer(there: Scene) -> None:
    there.hall.open.clear()
    await there.pull(REQUEST)
    await asyncio.sleep(0.1)
    await there.source.worker.close()
    there.source.worker._stopped = True
    await asyncio.sleep(0.5)
    check_answer(there.puller)
    with pytest.raises(Unavailable):
        await there.source.worker.send_prefix(worker_pb2.SendPrefixRequest())
    there.check_empty()
