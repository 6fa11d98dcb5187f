"""Transfers under way: prompts that are computed here and whose KV goes to a decode worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from forebay.core.errors import ForebayError
from forebay.engine.engine import Engine, Prefilled
from forebay.engine.sequence import RequestKey, Sequence
from forebay.worker.kv_push import KvPush
from forebay.worker.requests import WorkerRequest
from forebay.worker.transfer import KvSender

log = logging.getLogger(__name__)

TRANSFER_STALL_S = 10.0
"""How long KV may wait without the receiver taking any of it before the transfer has failed."""


@dataclass(slots=True, eq=False)
class _Transfer:
    request: WorkerRequest
    sequence: Sequence
    push: KvPush
    task: asyncio.Task[None] = field(init=False)


class Transfers:
    """One push and one task per prompt, from its arrival on.

    `on_end(request, error)` is called once when a transfer is over, unless it was aborted: with
    None after the commit, else with a message fit for the client, perhaps before the prompt has
    been computed. The blocks of a computed prompt are free by then (why that is safe, KvPush says);
    of any other the engine's sequence is the caller's to abort.
    """

    def __init__(
        self,
        engine: Engine,
        sender: KvSender,
        on_end: Callable[[WorkerRequest, str | None], None],
    ) -> None:
        self.num_failures = 0
        self._engine = engine
        self._sender = sender
        self._on_end = on_end
        self._by_key: dict[RequestKey, _Transfer] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Those aborted count until their push has wound up."""
        return len(self._tasks)

    @property
    def pushes(self) -> list[KvPush]:
        return [transfer.push for transfer in self._by_key.values()]

    def open(self, request: WorkerRequest, sequence: Sequence) -> None:
        """Right after `sequence` has been queued: connects, and waits for it to be computed."""
        assert request.target is not None and request.key not in self._by_key
        push = self._sender.open(sequence, request.target)
        transfer = _Transfer(request, sequence, push)
        transfer.task = asyncio.create_task(self._run(transfer))
        self._by_key[request.key] = transfer
        self._tasks.add(transfer.task)
        transfer.task.add_done_callback(self._tasks.discard)

    def complete(self, prefilled: Prefilled) -> None:
        """The prompt is computed: sends the rest and commits. One whose transfer has ended is
        released."""
        transfer = self._by_key.get(prefilled.sequence.key)
        if transfer is not None and transfer.sequence is prefilled.sequence:
            transfer.push.complete(prefilled.first_tokens)
        else:
            self._engine.release(prefilled.sequence)

    def abort(self, key: RequestKey) -> bool:
        """Ends the transfer of a request without a call of `on_end`; False without one."""
        transfer = self._by_key.get(key)
        if transfer is None:
            return False
        self._forget(transfer)
        transfer.task.cancel()
        return True

    def sweep(self) -> None:
        """To be called often: ends the transfers whose receiver takes nothing."""
        for transfer in list(self._by_key.values()):
            if transfer.push.waits_for_s() >= TRANSFER_STALL_S:
                self._fail(transfer, "the KV transfer stalled")
                transfer.task.cancel()

    async def close(self) -> None:
        for key in list(self._by_key):
            self.abort(key)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, transfer: _Transfer) -> None:
        try:
            await self._sender.send(transfer.push, transfer.request.deadline)
        except ForebayError as error:
            log.warning("KV transfer of %s: %s", transfer.request.key.request_id, error.message)
            self._fail(transfer, "the KV transfer failed")
        except Exception:
            log.exception("KV transfer of %s broke", transfer.request.key.request_id)
            self._fail(transfer, "the KV transfer failed")
        else:
            self._end(transfer, None)

    def _fail(self, transfer: _Transfer, error: str) -> None:
        self.num_failures += 1
        self._end(transfer, error)

    def _end(self, transfer: _Transfer, error: str | None) -> None:
        if self._by_key.get(transfer.request.key) is transfer:
            self._forget(transfer)
            self._on_end(transfer.request, error)

    def _forget(self, transfer: _Transfer) -> None:
        del self._by_key[transfer.request.key]
        transfer.push.close()
        self._engine.release(transfer.sequence)
