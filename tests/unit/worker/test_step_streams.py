from __future__ import annotations

import asyncio

import pytest

from forebay.core.errors import Overloaded, Unavailable
from forebay.rpc.v1 import worker_pb2
from forebay.simulator import loop
from forebay.worker import step_streams
from forebay.worker.step_streams import StepStreams

HELLO = worker_pb2.StepsResponse()


def message(step: int) -> worker_pb2.StepsResponse:
    return worker_pb2.StepsResponse(step=step)


async def settled() -> None:
    await asyncio.sleep(1)


def test_messages_come_in_order_after_the_hello() -> None:
    async def main() -> None:
        streams = StepStreams()
        streams.send("g", message(9))  # nobody is attached: dropped
        stream = streams.serve("g", HELLO)
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
        streams = StepStreams()
        stream = streams.serve("g", HELLO)
        await anext(stream)
        for step in range(10):
            streams.send("g", message(step))
        with pytest.raises(Overloaded, match="too slowly"):
            while True:
                await anext(stream)
        assert not streams.is_attached("g")
        again = streams.serve("g", HELLO)
        await anext(again)
        streams.send("g", message(11))
        assert (await anext(again)).step == 11
        await again.aclose()

    loop.run(main())


@pytest.mark.parametrize("num_read", [0, 1, 2])
def test_a_second_hello_takes_over(num_read: int) -> None:
    """Wherever the first stream stands, it takes nothing of what the second one is due."""

    async def main() -> None:
        streams = StepStreams()
        first = streams.serve("g", HELLO)
        await anext(first)
        for step in range(num_read):
            streams.send("g", message(step))
            await anext(first)
        second = streams.serve("g", HELLO)
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
        streams = StepStreams()
        first = streams.serve("g", HELLO)
        await anext(first)
        waiting = asyncio.create_task(anext(first))
        await settled()
        second = streams.serve("g", HELLO)
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
        streams = StepStreams()
        first = streams.serve("g", HELLO)
        await anext(first)
        second = streams.serve("g", HELLO)
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
        streams = StepStreams()
        stream = streams.serve("g", HELLO)
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
        streams = StepStreams()
        first = streams.serve("g", HELLO)
        await anext(first)
        await first.aclose()
        second = streams.serve("g", HELLO)
        await anext(second)
        assert streams.expire(1e9) == []
        await second.aclose()

    loop.run(main())


def test_closing_ends_every_stream() -> None:
    async def main() -> None:
        streams = StepStreams()
        ends = []
        for gateway in ("a", "b"):
            stream = streams.serve(gateway, HELLO)
            await anext(stream)
            ends.append(asyncio.create_task(anext(stream)))
        await settled()
        streams.close()
        for end in ends:
            with pytest.raises(Unavailable, match="stops"):
                await end

    loop.run(main())
