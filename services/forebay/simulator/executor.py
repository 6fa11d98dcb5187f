"""The executor in virtual time: calls wait their turn and take a while, so that writes land late
and steps are under way while other things happen."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar, TypeVarTuple

from forebay.engine.interface import Runner
from forebay.simulator.dice import Dice
from forebay.simulator.loop import SimLoop

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class _Job:
    __slots__ = ("begun", "function", "future", "is_step", "over")

    def __init__(
        self, function: Callable[[], Any], future: asyncio.Future[Any], is_step: bool
    ) -> None:
        self.function = function
        self.is_step = is_step
        self.future = future
        self.begun = False
        self.over = False


class SimExecutor:
    """Implements `Executor`: one "thread". A call takes up to `max_s`; its effects take place at
    its beginning or, as often, at its end. What it posts is spread over the time it takes."""

    def __init__(self, loop: SimLoop, dice: Dice, max_s: float) -> None:
        self.stall_s = 0.0
        """The next step takes so much longer: a hang."""
        self.num_stalls = 0
        self._loop = loop
        self._dice = dice
        self._max_s = max_s
        self._jobs: deque[_Job] = deque()
        self._posts: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        job = _Job(
            lambda: function(*args, **kwargs),
            self._loop.create_future(),
            getattr(function, "__name__", "") == Runner.run.__name__,
        )
        self._jobs.append(job)
        if len(self._jobs) == 1:
            self._begin()
        try:
            result: T = await job.future
            return result
        except asyncio.CancelledError:
            if job.begun:
                await _until_over(job)
            elif job in self._jobs:
                self._jobs.remove(job)
            raise

    def post(self, callback: Callable[[*Ts], None], *args: *Ts) -> None:
        self._posts.append((callback, args))

    def _begin(self) -> None:
        job = self._jobs[0]
        job.begun = True
        takes_s = self._max_s * self._dice.between(0.05, 1)
        if self.stall_s and job.is_step:
            takes_s += self.stall_s
            self.stall_s = 0.0
            self.num_stalls += 1
        if self._dice.chance(0.5):
            result, error = self._call(job)
            self._deliver_posts(takes_s)
            self._loop.call_later(takes_s, self._end, job, result, error)
        else:
            self._loop.call_later(takes_s, self._call_and_end, job)

    def _call(self, job: _Job) -> tuple[Any, Exception | None]:
        try:
            return job.function(), None
        except Exception as error:
            return None, error

    def _deliver_posts(self, within_s: float) -> None:
        posts, self._posts = self._posts, []
        for number, (callback, args) in enumerate(posts):
            self._loop.call_later(within_s * number / len(posts), callback, *args)

    def _call_and_end(self, job: _Job) -> None:
        result, error = self._call(job)
        posts, self._posts = self._posts, []
        for callback, args in posts:
            self._loop.call_soon(callback, *args)
        self._end(job, result, error)

    def _end(self, job: _Job, result: Any, error: Exception | None) -> None:
        assert self._jobs.popleft() is job
        job.over = True
        if not job.future.done():
            if error is None:
                job.future.set_result(result)
            else:
                job.future.set_exception(error)
        if self._jobs:
            self._begin()


async def _until_over(job: _Job) -> None:
    """However often the caller is cancelled in the meantime; its own error is the cancellation."""
    while not job.over:
        job.future = asyncio.get_running_loop().create_future()
        with suppress(asyncio.CancelledError, Exception):
            await job.future
