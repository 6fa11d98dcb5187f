"""Transfers under way: prompts computed here whose KV goes to a decode worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from forebay.core.errors import ForebayError
from forebay.engine.engine import Engine, Prefilled
from forebay.engine.sequence import RequestKey
from forebay.rpc.v1 import worker_pb2
from forebay.worker.requests import WorkerRequest
from forebay.worker.transfer import KvSender

log = logging.getLogger(__name__)


class Transfers:
    """One task per prompt. `on_end(request, prefilled, error)` is called when a transfer is over,
    with the error's message or None; the source blocks are free by then."""

    def __init__(
        self,
        engine: Engine,
        sender: KvSender,
        on_end: Callable[[WorkerRequest, Prefilled, str | None], None],
    ) -> None:
        self.num_failures = 0
        self._engine = engine
        self._sender = sender
        self._on_end = on_end
        self._tasks: dict[RequestKey, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, request: WorkerRequest, prefilled: Prefilled) -> None:
        assert request.target is not None
        task = asyncio.create_task(self._run(request, prefilled, request.target))
        self._tasks[request.key] = task
        task.add_done_callback(lambda _: self._ended(request.key, task, prefilled))

    def abort(self, key: RequestKey) -> bool:
        """Ends the transfer of a request, without a call of `on_end`."""
        task = self._tasks.get(key)
        return task is not None and task.cancel()

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(
        self, request: WorkerRequest, prefilled: Prefilled, target: worker_pb2.TransferTarget
    ) -> None:
        error: str | None = None
        try:
            await self._sender.push(prefilled, target, request.deadline)
        except ForebayError as failure:
            log.warning("KV transfer of %s failed: %s", request.key.request_id, failure.message)
            self.num_failures += 1
            error = "the KV transfer failed"
        except Exception:
            log.exception("KV transfer of %s broke", request.key.request_id)
            self.num_failures += 1
            error = "the KV transfer failed"
        self._engine.release(prefilled.sequence)
        self._on_end(request, prefilled, error)

    def _ended(self, key: RequestKey, task: asyncio.Task[None], prefilled: Prefilled) -> None:
        """Also for a task that was cancelled before its first line; meanwhile a newer attempt of
        the request may have a transfer of its own."""
        if self._tasks.get(key) is task:
            del self._tasks[key]
        self._engine.release(prefilled.sequence)
