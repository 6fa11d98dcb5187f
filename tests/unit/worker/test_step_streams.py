from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import pytest

from forebay.core.errors import InternalError, InvalidRequest, Overloaded, Unavailable
from forebay.rpc.v1 import worker_pb2
from forebay.simulator import loop
from forebay.worker import step_streams
from forebay.worker.step_streams import STEP_HEARTBEAT_S, StepStreams, read_hello

HELLO = worker_pb2.StepsResponse()
Stream = AsyncGenerator[worker_pb2.StepsResponse, None]


class Streams(StepStreams):
    """`heard`: what gateways said after their hello."""

    def __init__(self) -> None:
        super().__init__(lambda: HELLO, self._hear)
        self.heard: list[tuple[str, list[str]]] = []

    def _hear(self, gateway_id: str, message: worker_pb2.StepsRequest) -> None:
        if not message.HasField("renewal"):
            raise InvalidRequest("not a renewal", param="renewal")
        self.heard.append((gateway_id, list(message.renewal.request_ids)))


async def nothing() -> AsyncIterator[worker_pb2.StepsRequest]:
    await asyncio.Event().wait()
    yield worker_pb2.StepsRequest()


def renewal(*request_ids: str) -> worker_pb2.StepsRequest:
    return worker_pb2.StepsRequest(renewal=worker_pb2.Renewal(request_ids=request_ids))


def message(step: int) -> worker_pb2.StepsResponse:
    return worker_pb2.StepsResponse(step=step)


async def settled() -> None:
    await asyncio.sleep(1)


def test_messages_come_in_order_after_the_hello() -> None:
    async def main() -> None:
        streams = Streams()
        streams.send("g", message(9))  # nobody is attached: dropped
        stream = streams.serve("g", nothing())
        assert not streams.is_attached("g")
        assert await anext(stream) == HELLO
        assert streams.is_attached("g")
        for step in (1, 2, 3):
            streams.send("g", message(step))
            streams.send("other", message(100))
        assert [(await anext(stream)).step for _ in range(3)] == [1, 2, 3]
        waiting = asyncio.create_task(anext(stream))
        await settled()
        assert not waiting.done()
        streams.send("g", message(4))
        assert (await waiting).step == 4
        await stream.aclose()
        assert not streams.is_attached("g")

    loop.run(main())


def test_a_full_buffer_cuts_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_streams, "MAX_BUFFERED_MESSAGES", 3)

    async def main() -> None:
        streams = Streams()
        stream = streams.serve("g", nothing())
        await anext(stream)
        for step in range(10):
            streams.send("g", message(step))
        with pytest.raises(Overloaded, match="too slowly"):
            while True:
                await anext(stream)
        assert not streams.is_attached("g")
        again = streams.serve("g", nothing())
        await anext(again)
        streams.send("g", message(11))
        assert (await anext(again)).step == 11
        await again.aclose()

    loop.run(main())


@pytest.mark.parametrize("num_read", [0, 1, 2])
def test_a_second_hello_takes_over(num_read: int) -> None:
    """Wherever the first stream stands, it takes nothing of what the second one is due."""

    async def main() -> None:
        streams = Streams()
        first = streams.serve("g", nothing())
        await anext(first)
        for step in range(num_read):
            streams.send("g", message(step))
            await anext(first)
        second = streams.serve("g", nothing())
        await anext(second)
        for step in (5, 6):
            streams.send("g", message(step))
        with pytest.raises(Unavailable, match="another step stream"):
            await anext(first)
        assert streams.is_attached("g")
        assert [(await anext(second)).step for _ in range(2)] == [5, 6]
        await second.aclose()
        assert not streams.is_attached("g")

    loop.run(main())


def test_a_second_hello_ends_a_stream_that_waits() -> None:
    async def main() -> None:
        streams = Streams()
        first = streams.serve("g", nothing())
        await anext(first)
        waiting = asyncio.create_task(anext(first))
        await settled()
        second = streams.serve("g", nothing())
        await anext(second)
        with pytest.raises(Unavailable):
            await waiting
        reading = asyncio.create_task(anext(second))
        streams.send("g", message(1))
        assert (await reading).step == 1
        await second.aclose()

    loop.run(main())


def test_no_wakeup_is_lost_between_two_streams_of_a_gateway() -> None:
    """The first stream ends while the second is still busy with its hello."""

    async def main() -> None:
        streams = Streams()
        first = streams.serve("g", nothing())
        await anext(first)
        second = streams.serve("g", nothing())
        await anext(second)
        streams.send("g", message(1))
        with pytest.raises(Unavailable):
            await anext(first)
        async with asyncio.timeout(10):
            assert (await anext(second)).step == 1
        await second.aclose()

    loop.run(main())


def test_gateways_are_forgotten_after_their_grace() -> None:
    async def main() -> None:
        streams = Streams()
        stream = streams.serve("g", nothing())
        await anext(stream)
        assert streams.expire(1e9) == []
        await asyncio.sleep(5)
        await stream.aclose()
        assert streams.expire(4.9) == []
        assert streams.expire(5.0) == ["g"]
        assert streams.expire(5.0) == []

    loop.run(main())


def test_a_gateway_that_comes_back_in_time_is_not_forgotten() -> None:
    async def main() -> None:
        streams = Streams()
        first = streams.serve("g", nothing())
        await anext(first)
        await first.aclose()
        second = streams.serve("g", nothing())
        await anext(second)
        assert streams.expire(1e9) == []
        await second.aclose()

    loop.run(main())


def test_closing_ends_every_stream() -> None:
    async def main() -> None:
        streams = Streams()
        ends = []
        for gateway in ("a", "b"):
            stream = streams.serve(gateway, nothing())
            await anext(stream)
            ends.append(asyncio.create_task(anext(stream)))
        await settled()
        streams.close("the worker stops")
        for end in ends:
            with pytest.raises(Unavailable, match="stops"):
                await end
        again = streams.serve("a", nothing())
        assert await anext(again) == HELLO
        await again.aclose()

    loop.run(main())


def test_what_waits_is_read_before_a_stream_closes() -> None:
    async def main() -> None:
        streams = Streams()
        stream = streams.serve("g", nothing())
        await anext(stream)
        streams.send("g", message(1))
        assert not streams.all_taken
        streams.close("the worker stops")
        assert streams.all_taken
        streams.send("g", message(2))
        assert not streams.is_attached("g")
        assert (await anext(stream)).step == 1
        with pytest.raises(Unavailable):
            await anext(stream)

    loop.run(main())


def test_a_silent_stream_gets_signs_of_life() -> None:
    async def main() -> None:
        streams = Streams()
        stream = streams.serve("g", nothing())
        await anext(stream)
        gone = streams.serve("gone", nothing())
        await anext(gone)
        await gone.aclose()
        waiting = asyncio.create_task(anext(stream))
        await asyncio.sleep(STEP_HEARTBEAT_S * 0.9)
        streams.send_signs_of_life()
        assert not waiting.done()
        streams.send("g", message(1))
        assert (await waiting).step == 1
        waiting = asyncio.create_task(anext(stream))
        await asyncio.sleep(STEP_HEARTBEAT_S * 0.9)
        streams.send_signs_of_life()
        assert not waiting.done()
        await asyncio.sleep(STEP_HEARTBEAT_S * 0.1)
        streams.send_signs_of_life()
        streams.send_signs_of_life()
        assert await waiting == HELLO
        assert streams.all_taken
        await stream.aclose()

    loop.run(main())


def test_who_does_not_read_gets_no_signs_of_life() -> None:
    async def main() -> None:
        streams = Streams()
        stream = streams.serve("g", nothing())
        await anext(stream)
        streams.send("g", message(1))
        for _ in range(5):
            await asyncio.sleep(STEP_HEARTBEAT_S)
            streams.send_signs_of_life()
        streams.announce()
        assert [(await anext(stream)).step for _ in range(2)] == [1, 0]
        assert streams.all_taken
        await stream.aclose()

    loop.run(main())


def test_what_a_gateway_says_is_heard_beside_its_stream() -> None:
    async def main() -> None:
        said: asyncio.Queue[worker_pb2.StepsRequest] = asyncio.Queue()

        async def messages() -> AsyncIterator[worker_pb2.StepsRequest]:
            while True:
                yield await said.get()

        streams = Streams()
        stream = streams.serve("g", messages())
        await anext(stream)
        said.put_nowait(renewal("a", "b"))
        said.put_nowait(renewal())
        await settled()
        assert streams.heard == [("g", ["a", "b"]), ("g", [])]
        await stream.aclose()
        said.put_nowait(renewal("late"))
        await settled()
        assert len(streams.heard) == 2

    loop.run(main())


def test_a_gateway_that_says_no_more_may_go_on_listening() -> None:
    async def main() -> None:
        async def once() -> AsyncIterator[worker_pb2.StepsRequest]:
            yield renewal("a")

        streams = Streams()
        stream = streams.serve("g", once())
        await anext(stream)
        await settled()
        streams.send("g", message(1))
        assert (await anext(stream)).step == 1
        assert streams.is_attached("g")
        await stream.aclose()

    loop.run(main())


@pytest.mark.parametrize(
    ("broken", "error"),
    [(worker_pb2.StepsRequest(), InvalidRequest), (ValueError("torn"), InternalError)],
)
def test_what_cannot_be_heard_ends_the_stream(broken: object, error: type[Exception]) -> None:
    async def main() -> None:
        async def messages() -> AsyncIterator[worker_pb2.StepsRequest]:
            if isinstance(broken, Exception):
                raise broken
            assert isinstance(broken, worker_pb2.StepsRequest)
            yield broken

        streams = Streams()
        stream = streams.serve("g", messages())
        await anext(stream)
        with pytest.raises(error):
            await anext(stream)
        assert not streams.is_attached("g")

    loop.run(main())


def test_a_stream_without_a_hello_ends_by_itself() -> None:
    async def main() -> None:
        async def nothing() -> AsyncIterator[worker_pb2.StepsRequest]:
            await asyncio.Event().wait()
            yield worker_pb2.StepsRequest()

        with pytest.raises(InvalidRequest):
            await read_hello(nothing())

    loop.run(main())
