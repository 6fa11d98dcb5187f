"""A link notices a worker that is gone, also one that merely says nothing any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from forebay.core import clock
from forebay.core.clock import Deadline
from forebay.core.errors import Unavailable, WorkerLost
from forebay.gateway.worker_link import TICK_S, Blame, Exposure, WorkerLink
from forebay.rpc.v1 import worker_pb2
from forebay.simulator import loop

SILENCE_S = 3.0


class Stream:
    """The worker's end: what it sends is put into `answers`; an exception breaks the stream."""

    def __init__(self) -> None:
        self.sent: list[worker_pb2.StepsRequest] = []
        self.answers: asyncio.Queue[Any] = asyncio.Queue()
        self.answers.put_nowait(worker_pb2.StepsResponse())
        self.cancelled = False

    async def send(self, message: worker_pb2.StepsRequest) -> None:
        self.sent.append(message)

    async def receive(self) -> worker_pb2.StepsResponse | None:
        answer = await self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def renewed(self) -> list[list[str]]:
        return [list(m.renewal.request_ids) for m in self.sent if m.HasField("renewal")]


class Channel:
    def __init__(self) -> None:
        self.stream = Stream()

    def duplex(self, _: object) -> Stream:
        return self.stream

    async def unary(self, *_: object) -> Any:
        await asyncio.Event().wait()

    async def close(self) -> None:
        pass


class Inbox:
    def __init__(self, request_id: str, exposure: Exposure = Exposure.NONE) -> None:
        self.request_id = request_id
        self.outputs: list[worker_pb2.SequenceOutput] = []
        self.blame: Blame | None = None
        self._exposure = exposure

    def deliver(self, link: WorkerLink, output: worker_pb2.SequenceOutput) -> None:
        self.outputs.append(output)

    def exposure(self, link: WorkerLink) -> Exposure:
        return self._exposure

    def lose(self, link: WorkerLink, blame: Blame) -> None:
        self.blame = blame


@asynccontextmanager
async def opened() -> AsyncIterator[tuple[WorkerLink, Stream]]:
    channel = Channel()
    link = WorkerLink(
        worker_pb2.WorkerDescription(worker_id="w"),
        channel,  # type: ignore[arg-type]
        "g",
        SILENCE_S,
        lambda: None,
    )
    await link.open(Deadline.after(1))
    try:
        yield link, channel.stream
    finally:
        await link.close()
    assert channel.stream.cancelled


def test_silence_is_loss() -> None:
    async def main() -> None:
        async with opened() as (link, stream):
            inbox = Inbox("r")
            link.subscribe("r", inbox)
            for _ in range(10):
                await asyncio.sleep(SILENCE_S - TICK_S)
                stream.answers.put_nowait(worker_pb2.StepsResponse())
            assert not link.lost and inbox.blame is None
            await asyncio.sleep(SILENCE_S + TICK_S)
            assert link.lost and inbox.blame is Blame.NONE
            with pytest.raises(WorkerLost):
                link.subscribe("r", inbox)

    loop.run(main())


def test_a_gateway_that_was_stopped_itself_blames_nobody() -> None:
    """A jump of the clock is one tick, however far it was."""

    async def main() -> None:
        async with opened() as (link, stream):
            running = asyncio.get_running_loop()
            jump = 0.0
            time = running.time
            running.time = lambda: time() + jump  # type: ignore[method-assign]
            await asyncio.sleep(TICK_S / 2)
            jump = 10 * SILENCE_S
            await asyncio.sleep(TICK_S)
            assert not link.lost
            stream.answers.put_nowait(worker_pb2.StepsResponse())
            await asyncio.sleep(TICK_S)
            assert not link.lost

    loop.run(main())


def test_what_is_wanted_is_renewed() -> None:
    async def main() -> None:
        async with opened() as (link, stream):
            await asyncio.sleep(2)
            assert stream.renewed == []
            link.subscribe("a", Inbox("a"))
            link.subscribe("b", Inbox("b"))
            stream.answers.put_nowait(worker_pb2.StepsResponse())
            await asyncio.sleep(1.1)
            link.unsubscribe("a")
            await asyncio.sleep(1)
            assert stream.renewed[0] == ["a", "b"]
            assert stream.renewed[-1] == ["b"]

    loop.run(main())


@pytest.mark.parametrize("end", [None, Unavailable("it broke")])
def test_a_call_ends_with_the_link(end: Exception | None) -> None:
    async def main() -> None:
        async with opened() as (link, stream):
            spec = worker_pb2.SequenceSpec(request_id="r")
            call = asyncio.create_task(link.reserve(spec, Deadline.after(60)))
            await asyncio.sleep(0.1)
            before = clock.now()
            stream.answers.put_nowait(end)
            with pytest.raises(WorkerLost):
                await call
            assert clock.now() == before
            assert await link.lost_within(0)
            await link.abort(spec)
            assert clock.now() == before

    loop.run(main())


def test_a_cancelled_call_is_cancelled() -> None:
    async def main() -> None:
        async with opened() as (link, _):
            call = asyncio.create_task(link.reserve(worker_pb2.SequenceSpec(), Deadline.after(60)))
            await asyncio.sleep(0.1)
            call.cancel()
            await asyncio.wait((call,))
            assert call.cancelled()
            assert not await link.lost_within(1)

    loop.run(main())


def test_draining_is_known_with_the_next_message() -> None:
    async def main() -> None:
        async with opened() as (link, stream):
            stream.answers.put_nowait(worker_pb2.StepsResponse(draining=True))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert link.draining

    loop.run(main())


NONE, PROVEN, UNPROVEN, ON_PROBATION = Exposure


@pytest.mark.parametrize(
    ("requests", "blames"),
    [
        ([("a", NONE), ("b", NONE)], [Blame.NONE, Blame.NONE]),
        ([("a", PROVEN)], [Blame.SOLE]),
        ([("a", PROVEN), ("b", PROVEN)], [Blame.NONE, Blame.NONE]),
        ([("a", PROVEN), ("b", UNPROVEN), ("c", NONE)], [Blame.NONE, Blame.SOLE, Blame.NONE]),
        ([("a", UNPROVEN), ("b", UNPROVEN)], [Blame.SUSPECT, Blame.SUSPECT]),
        ([("a", UNPROVEN), ("a", UNPROVEN)], [Blame.SOLE, Blame.SOLE]),
        ([("a", PROVEN), ("a", PROVEN)], [Blame.SOLE, Blame.SOLE]),
        ([("a", UNPROVEN), ("b", ON_PROBATION)], [Blame.NONE, Blame.SOLE]),
        ([("a", ON_PROBATION), ("b", ON_PROBATION)], [Blame.SUSPECT, Blame.SUSPECT]),
    ],
)
def test_who_is_to_blame(requests: list[tuple[str, Exposure]], blames: list[Blame]) -> None:
    async def main() -> None:
        async with opened() as (link, stream):
            inboxes = [Inbox(name, exposure) for name, exposure in requests]
            for i, inbox in enumerate(inboxes):
                link.subscribe(f"{inbox.request_id}.{i}", inbox)
            stream.answers.put_nowait(Unavailable("it broke"))
            await asyncio.sleep(0.1)
            assert [inbox.blame for inbox in inboxes] == blames

    loop.run(main())


def test_a_worker_that_drained_died_of_nobody() -> None:
    async def main() -> None:
        async with opened() as (link, stream):
            inbox = Inbox("a", UNPROVEN)
            link.subscribe("a", inbox)
            stream.answers.put_nowait(worker_pb2.StepsResponse(draining=True))
            stream.answers.put_nowait(Unavailable("the worker stops"))
            await asyncio.sleep(0.1)
            assert inbox.blame is Blame.NONE

    loop.run(main())
