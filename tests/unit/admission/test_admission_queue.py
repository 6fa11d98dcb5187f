from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from forebay.admission.queue import RETRY_EVERY_S, AdmissionQueue, NoPlace
from forebay.core import clock
from forebay.core.clock import Deadline
from forebay.core.errors import Overloaded, Unavailable
from forebay.simulator import loop


class Places:
    """`num_free` places; who takes one is noted."""

    def __init__(self, num_free: int, takes_s: float = 0.0) -> None:
        self.num_free = num_free
        self.takes_s = takes_s
        self.taken: list[str] = []
        self.num_attempts = 0

    def attempt(self, name: str) -> Callable[[], Awaitable[str | NoPlace]]:
        async def attempt() -> str | NoPlace:
            self.num_attempts += 1
            await asyncio.sleep(self.takes_s)
            if not self.num_free:
                return NoPlace.NOBODY_PASSES
            self.num_free -= 1
            self.taken.append(name)
            return name

        return attempt


def limit(seconds: float = 1000.0) -> Deadline:
    return Deadline.after(seconds)


async def settled() -> None:
    await asyncio.sleep(0.01)


def wait_in_line(
    queue: AdmissionQueue, places: Places, name: str, seconds: float = 1000.0
) -> asyncio.Task[str]:
    return asyncio.create_task(queue.admit(places.attempt(name), limit(seconds)))


def test_a_free_place_is_taken_without_waiting() -> None:
    async def main() -> None:
        queue, places = AdmissionQueue(0), Places(1)
        assert await queue.admit(places.attempt("a"), limit()) == "a"
        assert clock.now() == 0
        assert len(queue) == 0

    loop.run(main())


def test_first_come_first_served() -> None:
    async def main() -> None:
        queue, places = AdmissionQueue(10), Places(0)
        tasks = [wait_in_line(queue, places, f"{i}") for i in range(5)]
        await settled()
        assert len(queue) == 5
        for num_served in range(1, 6):
            places.num_free += 1
            queue.notify()
            await settled()
            assert places.taken == [f"{i}" for i in range(num_served)]
        assert [await task for task in tasks] == places.taken
        assert len(queue) == 0

    loop.run(main())


def test_a_newcomer_does_not_overtake_the_line() -> None:
    async def main() -> None:
        queue, places = AdmissionQueue(10), Places(0)
        first = wait_in_line(queue, places, "first")
        await settled()
        places.num_free = 1
        second = wait_in_line(queue, places, "second")
        await settled()
        assert places.taken == ["first"]
        assert first.done() and not second.done()
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)

    loop.run(main())


def test_several_places_that_come_free_at_once_are_all_used() -> None:
    async def main() -> None:
        queue, places = AdmissionQueue(10), Places(0)
        tasks = [wait_in_line(queue, places, f"{i}") for i in range(4)]
        await settled()
        places.num_free = 3
        queue.notify()
        await settled()
        assert places.taken == ["0", "1", "2"]
        tasks[3].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    loop.run(main())


def test_a_full_line_refuses_with_a_time_to_come_back() -> None:
    async def main() -> None:
        queue, places = AdmissionQueue(2), Places(0)
        tasks = [wait_in_line(queue, places, f"{i}") for i in range(2)]
        await settled()
        with pytest.raises(Overloaded, match="too many") as caught:
            await queue.admit(places.attempt("x"), limit())
        assert caught.value.retry_after_s >= 1
        assert places.taken == [] and len(queue) == 2
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert len(queue) == 0

    loop.run(main())


@pytest.mark.parametrize("position", [0, 1])
def test_the_deadline_ends_the_wait_wherever_one_stands(position: int) -> None:
    async def main() -> None:
        queue, places = AdmissionQueue(5), Places(0)
        seconds = [50.0, 50.0]
        seconds[position] = 7.0
        tasks = [wait_in_line(queue, places, f"{i}", s) for i, s in enumerate(seconds)]
        with pytest.raises(Overloaded, match="in time"):
            await tasks[position]
        assert clock.now() == pytest.approx(7.0, abs=0.01)
        assert len(queue) == 1
        places.num_free = 1
        queue.notify()
        assert await tasks[1 - position]

    loop.run(main())


def test_when_the_first_leaves_the_next_tries_at_once() -> None:
    async def main() -> None:
        queue, places = AdmissionQueue(5), Places(0)
        first, second = (wait_in_line(queue, places, name) for name in "ab")
        await settled()
        places.num_free = 1
        before = clock.now()
        first.cancel()
        assert await second == "b"
        assert clock.now() == before
        assert first.cancelled()

    loop.run(main())


def test_when_the_first_is_cancelled_in_its_attempt_the_next_tries() -> None:
    async def main() -> None:
        queue, places = AdmissionQueue(5), Places(0)
        first = wait_in_line(queue, places, "a")
        second = wait_in_line(queue, places, "b")
        await settled()
        places.takes_s, places.num_free = 5.0, 1
        queue.notify()
        await asyncio.sleep(1)
        first.cancel()
        assert await second == "b"
        assert places.taken == ["b"]

    loop.run(main())


def test_an_error_of_the_first_wakes_the_next() -> None:
    async def main() -> None:
        queue, places = AdmissionQueue(5), Places(0)

        async def broken() -> str | NoPlace:
            if places.num_free:
                raise Unavailable("away")
            return NoPlace.NOBODY_PASSES

        first = asyncio.create_task(queue.admit(broken, limit()))
        second = wait_in_line(queue, places, "b")
        await settled()
        places.num_free = 1
        queue.notify()
        with pytest.raises(Unavailable):
            await first
        assert await second == "b"

    loop.run(main())


def test_a_change_during_an_attempt_is_not_missed() -> None:
    async def main() -> None:
        queue, places = AdmissionQueue(5), Places(0)
        looked = asyncio.Event()

        async def slow() -> str | NoPlace:
            free = places.num_free
            looked.set()
            await asyncio.sleep(0.1)
            return "a" if free else NoPlace.NOBODY_PASSES

        task = asyncio.create_task(queue.admit(slow, limit()))
        await asyncio.sleep(0.15)  # in line now, in the middle of an attempt
        places.num_free = 1
        queue.notify()
        assert await task == "a"
        assert clock.now() < 0.1 * 3 + RETRY_EVERY_S / 2

    loop.run(main())


def test_the_first_tries_again_by_itself() -> None:
    async def main() -> None:
        queue, places = AdmissionQueue(5), Places(0)
        task = wait_in_line(queue, places, "a")
        await asyncio.sleep(10)
        places.num_free = 1
        await task
        assert clock.now() <= 10 + RETRY_EVERY_S + 0.01
        assert places.num_attempts < 10 / RETRY_EVERY_S + 10

    loop.run(main())


def test_retry_after_follows_the_rate_of_placements() -> None:
    async def main() -> None:
        queue, places = AdmissionQueue(100), Places(0)
        assert queue.retry_after_s() == 1.0
        tasks = [wait_in_line(queue, places, f"{i}") for i in range(40)]
        await settled()
        for _ in range(10):
            await asyncio.sleep(2)
            places.num_free += 1
            queue.notify()
        await settled()
        assert len(queue) == 30
        assert 40 <= queue.retry_after_s() <= 60
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    loop.run(main())


@pytest.mark.parametrize("seed", range(30))
def test_nobody_is_forgotten(seed: int) -> None:
    """Arrivals, departures and places at random, told of or not: all who stay are served in order,
    and no place stays empty while somebody waits."""

    async def main() -> None:
        chance = random.Random(seed)
        queue, places = AdmissionQueue(50), Places(0, takes_s=0.003)
        tasks: dict[str, asyncio.Task[str]] = {}
        for i in range(150):
            action = chance.random()
            if action < 0.4:
                tasks[f"{i:03}"] = wait_in_line(queue, places, f"{i:03}")
            elif action < 0.6 and tasks:
                chance.choice(list(tasks.values())).cancel()
            else:
                places.num_free += 1
                if chance.random() < 0.7:
                    queue.notify()
            await asyncio.sleep(chance.random() * 0.02)
        await asyncio.sleep(RETRY_EVERY_S * 150)
        assert not len(queue) or not places.num_free
        places.num_free += 200
        queue.notify()
        ends = await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert len(queue) == 0
        served = [end for end in ends if isinstance(end, str)]
        assert sorted(places.taken) == places.taken
        assert set(served) <= set(places.taken)
        assert all(isinstance(end, str | asyncio.CancelledError) for end in ends)

    loop.run(main())


def test_urgent_ones_come_first_in_their_own_order() -> None:
    async def main() -> None:
        queue, places = AdmissionQueue(2), Places(0)
        tasks = [wait_in_line(queue, places, name) for name in ("a", "b")]
        await settled()
        for name in ("x", "y"):  # the line is full, but not for them
            admitted = queue.admit(places.attempt(name), limit(), urgent=True)
            tasks.append(asyncio.create_task(admitted))
            await settled()
        with pytest.raises(Overloaded):
            await queue.admit(places.attempt("c"), limit())
        for _ in tasks:
            places.num_free = 1
            queue.notify()
            await settled()
        await asyncio.gather(*tasks)
        assert places.taken == ["x", "y", "a", "b"]

    loop.run(main())


def test_an_urgent_one_that_leaves_gives_its_place_back() -> None:
    async def main() -> None:
        queue, places = AdmissionQueue(8), Places(0)
        first = wait_in_line(queue, places, "a")
        await settled()
        urgent = asyncio.create_task(queue.admit(places.attempt("x"), limit(), urgent=True))
        await settled()
        urgent.cancel()
        await settled()
        later = wait_in_line(queue, places, "b")
        await settled()
        places.num_free = 2
        queue.notify()
        await asyncio.gather(first, later)
        assert places.taken == ["a", "b"]

    loop.run(main())


def test_a_first_one_that_is_overtaken_as_it_is_woken_waits_again() -> None:
    async def main() -> None:
        queue, places = AdmissionQueue(8), Places(0)
        first = wait_in_line(queue, places, "a")
        await settled()
        urgent = asyncio.create_task(queue.admit(places.attempt("x"), limit(), urgent=True))
        queue.notify()
        await settled()
        places.num_free = 2
        queue.notify()
        await asyncio.gather(first, urgent)
        assert places.taken == ["x", "a"]

    loop.run(main())


class OwnPlaces:
    """A place of its own for each, which it waits for; `tries` in the order of attempts."""

    def __init__(self) -> None:
        self.free: set[str] = set()
        self.tries: list[str] = []

    def wait(self, queue: AdmissionQueue, name: str, **how: bool) -> asyncio.Task[str]:
        async def attempt() -> str | NoPlace:
            self.tries.append(name)
            return name if name in self.free else NoPlace.ASIDE

        def may_try() -> bool:
            return name not in self.tries or name in self.free

        return asyncio.create_task(queue.admit(attempt, limit(), may_try=may_try, **how))


def test_one_that_waits_for_its_own_place_lets_others_pass() -> None:
    async def main() -> None:
        queue, own = AdmissionQueue(8), OwnPlaces()
        waiting = [own.wait(queue, name) for name in "abc"]
        await settled()
        assert len(queue) == 3
        own.free = {"c"}
        queue.notify()
        assert await waiting[2] == "c"
        own.free = {"d"}
        assert await own.wait(queue, "d") == "d"
        assert len(queue) == 2
        own.free = {"a", "b"}
        queue.notify()
        assert await asyncio.gather(*waiting[:2]) == ["a", "b"]

    loop.run(main())


def test_nobody_tries_who_may_not() -> None:
    async def main() -> None:
        queue, own = AdmissionQueue(8), OwnPlaces()
        waiting = [own.wait(queue, name) for name in "abc"]
        await settled()
        tries = list(own.tries)
        for _ in range(20):
            queue.notify()
            await settled()
        assert own.tries == tries
        own.free = {"b"}
        queue.notify()
        await waiting[1]
        assert own.tries == [*tries, "b"]
        for task in (waiting[0], waiting[2]):
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert len(queue) == 0

    loop.run(main())


def test_nobody_passes_one_that_waits_for_any_place() -> None:
    async def main() -> None:
        queue, places, own = AdmissionQueue(8), Places(0), OwnPlaces()
        first = own.wait(queue, "a")
        await settled()
        anywhere = wait_in_line(queue, places, "x")
        own.free = {"b"}
        behind = own.wait(queue, "b")
        await settled()
        queue.notify()
        await settled()
        assert not behind.done()
        places.num_free = 1
        queue.notify()
        assert await anywhere == "x"
        assert await behind == "b"
        own.free = {"a"}
        queue.notify()
        assert await first == "a"

    loop.run(main())
