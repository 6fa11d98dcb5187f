from __future__ import annotations

import asyncio

import pytest

from forebay.core import clock
from forebay.core.clock import Deadline
from forebay.core.errors import DeadlineExceeded
from forebay.core.randomness import Rng
from forebay.simulator import loop


def test_a_deadline_counts_down_and_stops_at_zero() -> None:
    async def main() -> None:
        deadline = Deadline.after(2.0)
        await asyncio.sleep(0.5)
        assert deadline.remaining_s() == pytest.approx(1.5)
        assert deadline.remaining_ms() == 1500
        assert not deadline.expired
        deadline.check("it ran")
        await asyncio.sleep(1.4999)
        assert deadline.remaining_ms() == 1
        assert not deadline.expired
        await asyncio.sleep(1)
        assert deadline.remaining_s() == 0
        assert deadline.remaining_ms() == 0
        assert deadline.expired
        with pytest.raises(DeadlineExceeded, match="while it waited"):
            deadline.check("it waited")

    loop.run(main())


def test_within_takes_the_earlier_one() -> None:
    async def main() -> None:
        deadline = Deadline.after_ms(5000)
        assert deadline.within(2).at == clock.now() + 2
        assert deadline.within(9) == deadline
        assert Deadline.after_ms(0).expired

    loop.run(main())


def test_seeded_ids_repeat_and_others_do_not() -> None:
    one, same, other, system = Rng(1), Rng(1), Rng(2), Rng()
    tokens = [one.token("req") for _ in range(100)]
    assert tokens == [same.token("req") for _ in range(100)]
    assert len({*tokens, other.token("req"), system.token("req")}) == 102
    assert all(t.startswith("req-") and len(t) == 28 for t in tokens)
    for rng in (one, system):
        assert all(0 <= rng.seed64() < 2**63 for _ in range(100))
        assert all(0 <= rng.uniform() < 1 for _ in range(100))
