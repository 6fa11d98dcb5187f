"""Probes that answer when the test says so; no clock is involved."""

from __future__ import annotations

import asyncio

from forebay.deploy.liveness import MAX_FAILURES, START_FAILURES, Liveness
from forebay.deploy.processes import ProcessRecord

FIRST, SECOND = ProcessRecord(1, 1, "it"), ProcessRecord(2, 2, "it")


class Probe:
    def __init__(self) -> None:
        self.answers = True
        self.hanging = False
        self.count = 0

    async def __call__(self) -> bool:
        self.count += 1
        if self.hanging:
            await asyncio.get_running_loop().create_future()
        return self.answers


async def looks(liveness: Liveness, record: ProcessRecord, count: int) -> bool:
    """The last of `count` looks, with the probes between them finished."""
    hung = False
    for _ in range(count):
        hung = liveness.hung(record)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    return hung


async def test_what_answers_is_not_hung() -> None:
    probe = Probe()
    assert not await looks(Liveness(probe), FIRST, 5 * START_FAILURES)
    assert probe.count == 5 * START_FAILURES


async def test_silence_in_a_row_is_a_hang() -> None:
    probe = Probe()
    liveness = Liveness(probe)
    await looks(liveness, FIRST, 2)
    probe.answers = False
    assert not await looks(liveness, FIRST, MAX_FAILURES)
    assert await looks(liveness, FIRST, 1)


async def test_one_answer_starts_the_count_again() -> None:
    probe = Probe()
    liveness = Liveness(probe)
    await looks(liveness, FIRST, 2)
    for _ in range(10):
        probe.answers = False
        assert not await looks(liveness, FIRST, MAX_FAILURES - 1)
        probe.answers = True
        assert not await looks(liveness, FIRST, 2)


async def test_a_process_that_starts_gets_more_time() -> None:
    probe = Probe()
    probe.answers = False
    liveness = Liveness(probe)
    assert not await looks(liveness, FIRST, START_FAILURES)
    assert await looks(liveness, FIRST, 1)


async def test_another_process_has_a_record_of_its_own() -> None:
    probe = Probe()
    liveness = Liveness(probe)
    await looks(liveness, FIRST, 2)
    probe.answers = False
    assert await looks(liveness, FIRST, MAX_FAILURES + 1)
    assert not await looks(liveness, SECOND, MAX_FAILURES + 1)


async def test_one_probe_at_a_time() -> None:
    probe = Probe()
    probe.hanging = True
    liveness = Liveness(probe)
    assert not await looks(liveness, FIRST, 5 * START_FAILURES)
    assert probe.count == 1
    liveness.close()
