from __future__ import annotations

import asyncio

import pytest
from kv_pairs import KEY, ROOT, KvPair

from forebay.core.clock import Deadline
from forebay.core.errors import KvTransferError
from forebay.engine.engine import Prefilled
from forebay.rpc.v1 import worker_pb2
from forebay.simulator import loop
from forebay.worker.prefill import Transfers
from forebay.worker.requests import WorkerRequest


class Sending:
    def __init__(self) -> None:
        self.pair = KvPair()
        self.ends: list[str | None] = []
        self.transfers = Transfers(self.pair.source, self.pair.sender, self._end)

    def request(self) -> WorkerRequest:
        return WorkerRequest(
            key=KEY,
            attempt=1,
            prompt=self.pair.prompt,
            params=self.pair.params,
            cache_root=ROOT,
            deadline=Deadline.after(10),
            since=0.0,
            target=worker_pb2.TransferTarget(lease_id="lease", epoch="epoch"),
        )

    def start(self) -> None:
        self.transfers.start(self.request(), self.pair.prefilled)

    def check_all_free(self) -> None:
        assert len(self.transfers) == 0
        counts = self.pair.source.pool.counts()
        assert counts.free + counts.cached == counts.total
        self.pair.source.check_integrity()

    def _end(self, request: WorkerRequest, prefilled: Prefilled, error: str | None) -> None:
        assert self.pair.source.pool.counts().used == 0
        self.ends.append(error)


def test_a_transfer_frees_its_source_and_reports() -> None:
    async def main() -> None:
        sending = Sending()
        sending.start()
        assert len(sending.transfers) == 1
        await asyncio.sleep(1)
        assert sending.ends == [None]
        assert len(sending.pair.commits) == 1
        sending.check_all_free()

    loop.run(main())


@pytest.mark.parametrize("error", [KvTransferError("torn"), RuntimeError("bug")])
def test_a_failed_transfer_frees_its_source_and_reports(error: Exception) -> None:
    async def main() -> None:
        sending = Sending()

        def fail(_: object) -> list[bytes]:
            raise error

        sending.pair.alter = fail
        sending.start()
        await asyncio.sleep(1)
        (reported,) = sending.ends
        assert reported is not None and "KV transfer failed" in reported
        assert "bug" not in reported
        assert sending.transfers.num_failures == 1
        sending.check_all_free()

    loop.run(main())


@pytest.mark.parametrize("num_turns", range(6))
def test_an_aborted_transfer_leaves_nothing_behind(num_turns: int) -> None:
    """Even one that is aborted before its task has begun."""

    async def main() -> None:
        sending = Sending()
        never = asyncio.Event()

        async def hang(*_: object) -> None:
            await never.wait()

        sending.pair.push = hang  # type: ignore[method-assign,assignment]
        sending.start()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        assert sending.transfers.abort(KEY)
        await asyncio.sleep(1)
        assert not sending.transfers.abort(KEY)
        assert sending.ends == []
        sending.check_all_free()

    loop.run(main())


def test_a_newer_attempt_is_not_forgotten_when_the_older_one_ends() -> None:
    async def main() -> None:
        sending = Sending()
        ends = [asyncio.Event(), asyncio.Event()]
        turns = iter(ends)

        async def slow_to_cancel(*_: object) -> None:
            end = next(turns)
            try:
                await end.wait()
            except asyncio.CancelledError:
                await end.wait()
                raise

        sending.pair.push = slow_to_cancel  # type: ignore[method-assign,assignment]
        sending.start()
        await asyncio.sleep(1)
        sending.transfers.abort(KEY)
        await asyncio.sleep(1)
        sending.start()
        await asyncio.sleep(1)
        ends[0].set()
        await asyncio.sleep(1)
        assert len(sending.transfers) == 1
        assert sending.transfers.abort(KEY)
        ends[1].set()
        await asyncio.sleep(1)
        sending.check_all_free()

    loop.run(main())


def test_closing_ends_every_transfer() -> None:
    async def main() -> None:
        sending = Sending()
        never = asyncio.Event()

        async def hang(*_: object) -> None:
            await never.wait()

        sending.pair.push = hang  # type: ignore[method-assign,assignment]
        sending.start()
        await sending.transfers.close()
        await asyncio.sleep(0)
        sending.check_all_free()

    loop.run(main())
