"""The seams: nodes that die, freeze and have clocks of their own; a network that loses things."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest

from forebay.core import clock, errors
from forebay.core.clock import Deadline
from forebay.rpc.connector import Method, Routes
from forebay.simulator import loop
from forebay.simulator.channel import SimConnector
from forebay.simulator.dice import Dice
from forebay.simulator.executor import SimExecutor
from forebay.simulator.fabric import Network
from forebay.simulator.loop import Livelock, Node, SimLoop
from forebay.simulator.tampering import ArmedKvFault, KvFault, LostAnswer, Replay
from forebay.simulator.timeline import Timeline


def identity(message: Any) -> Any:
    return message


ASK: Method[bytes, bytes] = Method("test", "Ask", identity, identity, identity, identity)
PUSH: Method[bytes, bytes] = Method("test", "Push", identity, identity, identity, identity)
TALK: Method[bytes, bytes] = Method("test", "Talk", identity, identity, identity, identity)


class Bench:
    """Nodes a and b; b listens."""

    def __init__(self) -> None:
        running = asyncio.get_running_loop()
        assert isinstance(running, SimLoop)
        self.loop = running
        self.bugs: list[Exception] = []
        self.network = Network(
            running, Dice(1), Timeline(False), 0.001, 2.0, lambda _, error: self.bugs.append(error)
        )
        self.a, self.b = running.new_node("a"), running.new_node("b")
        self.pushed: list[bytes] = []
        self.asked: list[bytes] = []
        self.cancelled = 0
        routes = Routes(
            unary=[(ASK, self.ask)], push=[(PUSH, self.push)], duplex=[(TALK, self.talk)]
        )
        self.network.listen("b:1", self.b, routes)
        self.channel = SimConnector(self.network, self.a).connect("b:1")

    async def ask(self, message: bytes) -> bytes:
        self.asked.append(message)
        if message == b"fail":
            raise errors.Overloaded("full", retry_after_s=2.5)
        if message == b"break":
            raise KeyError("x")
        if message == b"wait":
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return message + b"!"

    async def push(self, messages: AsyncIterator[bytes]) -> bytes:
        async for message in messages:
            self.pushed.append(message)
        return b"%d" % len(self.pushed)

    async def talk(self, messages: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        async for message in messages:
            yield message + b"!"
            if message == b"end":
                return

    async def call(self, message: bytes, seconds: float = 10) -> bytes:
        return await self.channel.unary(ASK, message, Deadline.after(seconds))


async def frames(*messages: bytes) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


def test_a_killed_node_runs_nothing_not_even_finally() -> None:
    seen: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(1)
            seen.append("woke")
        finally:
            seen.append("finally")

    async def main(running: SimLoop) -> None:
        node = running.new_node("n")
        running.spawn(node, work())
        await asyncio.sleep(0.5)
        running.kill(node)
        await asyncio.sleep(10)
        assert seen == []

    running = SimLoop()
    loop.run(main(running), running)
    assert seen == ["finally"], "at the end nothing may be left to the garbage collector"


def test_a_frozen_node_is_late() -> None:
    async def main(running: SimLoop) -> None:
        node = running.new_node("n")
        woke_at: list[float] = []

        async def work() -> None:
            for _ in range(3):
                await asyncio.sleep(1)
                woke_at.append(clock.now())

        running.spawn(node, work())
        await asyncio.sleep(1.5)
        running.freeze(node)
        await asyncio.sleep(5)
        assert woke_at == [1]
        assert running.thaw(node) == 1
        await asyncio.sleep(10)
        assert woke_at == [1, 6.5, 7.5]

    running = SimLoop()
    loop.run(main(running), running)


def test_each_node_has_its_clock() -> None:
    async def main(running: SimLoop) -> None:
        ahead = running.new_node("ahead", 3600)
        times: list[float] = []

        async def work(node: Node) -> None:
            deadline = Deadline.after(2)
            try:
                async with asyncio.timeout(deadline.remaining_s()):
                    await asyncio.sleep(5)
            except TimeoutError:
                times.append(clock.now())
            running.call_at(clock.now() + 1, lambda: times.append(running.time()))

        running.spawn(ahead, work(ahead))
        await asyncio.sleep(10)
        assert times == [3602, 3603]
        assert running.time() == 10

    running = SimLoop()
    loop.run(main(running), running)


def test_endless_events_are_reported() -> None:
    async def main() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(Livelock):
        loop.run(main(), SimLoop(10_000))


def test_an_exception_nobody_takes_is_reported() -> None:
    async def main(running: SimLoop) -> None:
        async def fail() -> None:
            raise ValueError("lost")

        running.spawn(running.world, fail())
        await asyncio.sleep(1)

    running = SimLoop()
    reported: list[Any] = []
    running.set_exception_handler(lambda _, context: reported.append(context["exception"]))
    loop.run(main(running), running)
    assert [str(error) for error in reported] == ["lost"]


def test_calls_and_their_errors() -> None:
    async def main() -> None:
        bench = Bench()
        assert await bench.call(b"hello") == b"hello!"
        with pytest.raises(errors.Overloaded, match="full") as caught:
            await bench.call(b"fail")
        assert caught.value.retry_after_s == 2.5
        with pytest.raises(errors.InternalError, match="internal error"):
            await bench.call(b"break")
        assert [repr(bug) for bug in bench.bugs] == ["KeyError('x')"]
        nobody = SimConnector(bench.network, bench.a).connect("nobody:1")
        with pytest.raises(errors.Unavailable):
            await nobody.unary(ASK, b"", Deadline.after(10))

    loop.run(main())


def test_deadlines_and_cancellations_reach_the_server() -> None:
    async def main() -> None:
        bench = Bench()
        with pytest.raises(errors.DeadlineExceeded):
            await bench.call(b"wait", 1)
        task = asyncio.create_task(bench.call(b"wait"))
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(1)
        assert bench.cancelled == 2
        assert bench.network.num_calls(bench.a) == bench.network.num_calls(bench.b) == 0

    loop.run(main())


def test_a_stream_keeps_its_order_and_ends() -> None:
    async def main() -> None:
        bench = Bench()
        stream = bench.channel.duplex(TALK)
        for message in (b"1", b"2", b"end"):
            await stream.send(message)
        answers = [await stream.receive() for _ in range(4)]
        assert answers == [b"1!", b"2!", b"end!", None]
        assert await stream.receive() is None
        stream.cancel()

    loop.run(main())


def test_death_breaks_calls() -> None:
    async def main() -> None:
        bench = Bench()
        stream = bench.channel.duplex(TALK)
        await stream.send(b"1")
        assert await stream.receive() == b"1!"
        bench.loop.kill(bench.b)
        assert bench.network.kill(bench.b) == 1
        with pytest.raises(errors.Unavailable, match="reset"):
            await stream.receive()
        with pytest.raises(errors.Unavailable, match="connect"):
            await bench.call(b"hello")

    loop.run(main())


@pytest.mark.parametrize("seconds", [1.0, 5.0])
def test_a_cut_is_silent_and_then_breaks(seconds: float) -> None:
    async def main() -> None:
        bench = Bench()
        link = bench.network.cut(bench.a, bench.b)
        began = clock.now()
        task = asyncio.create_task(bench.call(b"hello", 20))
        await asyncio.sleep(seconds)
        bench.network.heal(link)
        if seconds < bench.network.keep_alive_s:
            assert await task == b"hello!"
            assert clock.now() - began >= seconds
        else:
            with pytest.raises(errors.Unavailable, match="keep-alive"):
                await task
            assert await bench.call(b"again") == b"again!"
        assert link.num_held == 1

    loop.run(main())


@pytest.mark.parametrize(
    ("kind", "received"),
    [
        (KvFault.TRUNCATED, [b"aaaa", b"bbbbbb", b"cccccc"]),
        (KvFault.DUPLICATED, [b"aaaaaa", b"aaaaaa", b"bbbbbb", b"cccccc"]),
        (KvFault.REORDERED, [b"bbbbbb", b"aaaaaa", b"cccccc"]),
        (KvFault.LOST, [b"bbbbbb", b"cccccc"]),
        (KvFault.LATE, [b"aaaaaa", b"bbbbbb", b"cccccc"]),
    ],
)
def test_messages_of_a_push_go_wrong(kind: KvFault, received: list[bytes]) -> None:
    async def main() -> None:
        bench = Bench()
        fault = ArmedKvFault(kind, commit=False, skip=0, late_s=3)
        bench.network.tampering.arm(fault)
        messages = frames(b"aaaaaa", b"bbbbbb", b"cccccc")
        await bench.channel.push(PUSH, messages, Deadline.after(10))
        assert bench.pushed == received
        assert fault.num_hit == 1
        assert (clock.now() > 3) is (kind is KvFault.LATE)

    loop.run(main())


@pytest.mark.parametrize("silent", [False, True])
def test_an_answer_is_lost(silent: bool) -> None:
    async def main() -> None:
        bench = Bench()
        bench.network.tampering.arm(LostAnswer("Ask", silent))
        expected = errors.DeadlineExceeded if silent else errors.Unavailable
        with pytest.raises(expected):
            await bench.call(b"hello", 5)
        assert bench.asked == [b"hello"]
        assert await bench.call(b"hello", 5) == b"hello!"

    loop.run(main())


def test_a_call_comes_twice() -> None:
    async def main() -> None:
        bench = Bench()
        bench.network.tampering.arm(Replay("Ask", late_s=1))
        bench.network.tampering.arm(Replay("Push", late_s=1))
        assert await bench.call(b"hello", 5) == b"hello!"
        assert await bench.channel.push(PUSH, frames(b"a", b"b"), Deadline.after(5)) == b"2"
        await asyncio.sleep(2)
        assert bench.asked == [b"hello"] * 2
        assert bench.pushed == [b"a", b"b"] * 2

    loop.run(main())


def test_executor_keeps_order_and_ends_what_has_begun() -> None:
    async def main(running: SimLoop) -> None:
        executor = SimExecutor(running, Dice(1), 1.0)
        done: list[int] = []
        tasks = [asyncio.create_task(executor.run(done.append, number)) for number in range(4)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[2].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert done == [0, 1, 3]
        assert [isinstance(r, asyncio.CancelledError) for r in results] == [
            True,
            False,
            True,
            False,
        ]
        assert clock.now() > 0

        def post() -> str:
            for number in range(3):
                executor.post(done.append, 10 + number)
            return "result"

        for _ in range(6):
            done.clear()
            assert await executor.run(post) == "result"
            assert done == [10, 11, 12]

    running = SimLoop()
    loop.run(main(running), running)
