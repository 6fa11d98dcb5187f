from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from forebay.core.clock import Deadline
from forebay.core.errors import KvTransferError, Unavailable
from forebay.rpc.v1 import kv_transfer_pb2
from forebay.simulator import loop
from forebay.worker.transfer import ConnectorKvTransport


class Channels:
    """A connector, and its one kind of channel; `error` is what pushes raise."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.num_open = 0
        self.error: Exception | None = None

    def connect(self, address: str) -> Channels:
        self.opened.append(address)
        self.num_open += 1
        return self

    async def push(self, *_: object) -> kv_transfer_pb2.PushResponse:
        if self.error is not None:
            raise self.error
        return kv_transfer_pb2.PushResponse()

    async def close(self) -> None:
        self.num_open -= 1


async def nothing() -> AsyncIterator[bytes]:
    for _ in ():
        yield b""


def test_addresses_that_are_gone_are_not_kept() -> None:
    async def main() -> None:
        channels = Channels()
        transport = ConnectorKvTransport(channels)  # type: ignore[arg-type]

        async def push(address: str) -> None:
            await transport.push(address, nothing(), Deadline.after(1))

        for address in ("a", "a", "b"):
            await push(address)
        assert channels.opened == ["a", "b"]
        channels.error = KvTransferError("refused")
        with pytest.raises(KvTransferError):
            await push("a")
        assert channels.num_open == 2
        channels.error = Unavailable("gone")
        for i in range(50):
            with pytest.raises(Unavailable):
                await push(f"gone-{i}")
        assert channels.num_open == 2
        with pytest.raises(Unavailable):
            await push("a")
        channels.error = None
        await push("a")
        assert channels.opened.count("a") == 2
        await transport.close()
        assert channels.num_open == 0

    loop.run(main())


def test_a_lost_connection_closes_after_its_last_push() -> None:
    """Another push over it may still be told how it ended."""

    async def main() -> None:
        channels = Channels()
        transport = ConnectorKvTransport(channels)  # type: ignore[arg-type]
        go_on = asyncio.Event()

        class Slow(Channels):
            async def push(self, *_: object) -> kv_transfer_pb2.PushResponse:
                await go_on.wait()
                return await Channels.push(channels)

        channels.push = Slow.push.__get__(Slow())  # type: ignore[method-assign]
        slow = asyncio.create_task(transport.push("a", nothing(), Deadline.after(1)))
        await asyncio.sleep(0)
        del channels.push  # type: ignore[method-assign]
        channels.error = Unavailable("gone")
        with pytest.raises(Unavailable):
            await transport.push("a", nothing(), Deadline.after(1))
        assert channels.num_open == 1
        channels.error = None
        await transport.push("a", nothing(), Deadline.after(1))
        assert channels.num_open == 2
        go_on.set()
        await slow
        assert channels.num_open == 1

    loop.run(main())
