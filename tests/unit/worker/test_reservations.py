from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from kv_pairs import ROOT, sim_engine

from forebay.core.clock import Deadline
from forebay.core.errors import KvTransferError
from forebay.core.randomness import Rng
from forebay.core.sampling import SamplingParams
from forebay.engine.engine import Engine
from forebay.engine.sequence import RequestKey, SequenceStart
from forebay.kv.block_pool import OutOfBlocks
from forebay.kv.leases import LeaseTable
from forebay.simulator import loop
from forebay.worker.decode import Reservations
from forebay.worker.requests import WorkerRequest

ALL: frozenset[int] = frozenset()


class Desk:
    def __init__(self, num_blocks: int = 16) -> None:
        self.engine: Engine = sim_engine(num_blocks)
        self.leases = LeaseTable(self.engine.pool, "epoch")
        self.reservations = Reservations(self.engine, self.leases, Rng(1))

    def request(self, name: str, *, n: int = 1, num_generated: int = 0) -> WorkerRequest:
        choices = (0,) if num_generated else tuple(range(n))
        start = SequenceStart(
            key=RequestKey("g", name),
            attempt=1,
            tokens=tuple(range(9 + num_generated)),
            num_prompt_tokens=9,
            params=SamplingParams(n=n, max_tokens=8),
            choices=choices,
            cache_root=ROOT,
        )
        deadline = Deadline.after(100)
        return WorkerRequest(start, deadline, since=0.0, lease=deadline, going_on=set(choices))

    def check(self) -> None:
        self.engine.check_integrity()
        self.leases.check_integrity()
        assert len(self.reservations) == len(self.leases)


def in_virtual_time(test: Callable[[Desk], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            desk = Desk()
            await test(desk)
            desk.check()

        loop.run(main())

    run.__name__ = test.__name__  # type: ignore[attr-defined]
    return run


@in_virtual_time
async def test_a_committed_reservation_becomes_sequences(desk: Desk) -> None:
    request = desk.request("a", n=2)
    lease = desk.reservations.reserve(request)
    assert desk.reservations.find(request.key) is lease
    assert desk.reservations.commit(lease, [(0, 97), (1, 98)]) is request
    assert desk.reservations.find(request.key) is None
    assert len(desk.engine.sequences(request.key)) == 2
    assert desk.engine.pool.counts().used == 3


@in_virtual_time
async def test_choices_dropped_before_the_commit_do_not_start(desk: Desk) -> None:
    request = desk.request("a", n=3)
    lease = desk.reservations.reserve(request)
    assert desk.reservations.abort(request.key, frozenset({1}))
    desk.reservations.commit(lease, [(0, 97), (1, 98)])
    assert [s.choices for s in desk.engine.sequences(request.key)] == [(0,)]


@in_virtual_time
async def test_a_commit_of_dropped_choices_only_frees_the_blocks(desk: Desk) -> None:
    request = desk.request("a", n=3)
    lease = desk.reservations.reserve(request)
    desk.reservations.abort(request.key, frozenset({1, 2}))
    desk.reservations.commit(lease, [(1, 97), (2, 98)])
    assert desk.engine.num_sequences == 0
    assert desk.engine.pool.counts().free == 16


@in_virtual_time
async def test_abort_of_all_or_every_choice_releases_the_lease(desk: Desk) -> None:
    for name, drops in (("a", [ALL]), ("b", [frozenset({0}), frozenset({1})])):
        request = desk.request(name, n=2)
        desk.reservations.reserve(request)
        for choices in drops:
            assert desk.reservations.abort(request.key, choices)
        assert not desk.reservations.abort(request.key, ALL)
        assert desk.engine.pool.counts().free == 16


@in_virtual_time
async def test_room_is_reserved_for_what_was_generated_too(desk: Desk) -> None:
    request = desk.request("a", n=2, num_generated=4)
    lease = desk.reservations.reserve(request)
    assert (lease.num_tokens, len(lease.block_table)) == (13, 4)
    with pytest.raises(KvTransferError):
        desk.reservations.commit(lease, [(1, 97)])
    desk.reservations.commit(lease, [(0, 97)])
    (sequence,) = desk.engine.sequences(request.key)
    assert (sequence.num_generated_tokens, sequence.num_computed_tokens) == (5, 13)


@in_virtual_time
async def test_no_room_reserves_nothing(desk: Desk) -> None:
    for i in range(5):
        desk.reservations.reserve(desk.request(f"{i}"))
    with pytest.raises(OutOfBlocks):
        desk.reservations.reserve(desk.request("5"))
    assert len(desk.reservations) == 5


@pytest.mark.parametrize(
    "first_tokens", [[(3, 97)], [(0, 97), (0, 98)], [(0, 259)], [(0, 97), (1, 2**31)]]
)
def test_first_tokens_that_cannot_be_change_nothing(first_tokens: list[tuple[int, int]]) -> None:
    @in_virtual_time
    async def check(desk: Desk) -> None:
        request = desk.request("a", n=2)
        lease = desk.reservations.reserve(request)
        with pytest.raises(KvTransferError):
            desk.reservations.commit(lease, first_tokens)
        assert desk.reservations.find(request.key) is lease
        assert desk.reservations.abort(request.key, ALL)

    check()
