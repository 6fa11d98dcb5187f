"""What all requests of a gateway share on their way to workers."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from forebay.admission.queue import AdmissionQueue
from forebay.gateway.fleet import Fleet
from forebay.gateway.placement import Placer
from forebay.gateway.poison import PoisonList
from forebay.gateway.router import Router
from forebay.gateway.worker_link import WorkerLink
from forebay.rpc.v1 import worker_pb2


class Dispatcher:
    """`probation` is held by the one leg that may be what its last worker died of, until it has
    shown that it is not: two suspects never share a worker, so that the next death tells."""

    def __init__(
        self,
        fleet: Fleet,
        router: Router,
        queue: AdmissionQueue,
        poison: PoisonList,
        max_migrations: int,
    ) -> None:
        self.placer = Placer(fleet, router, queue, self.discard)
        self.lives = fleet.lives
        self.poison = poison
        self.probation = asyncio.Lock()
        self.max_migrations = max_migrations
        self.closing = False
        self._queue = queue
        self._background: dict[asyncio.Task[None], None] = {}

    async def close(self) -> None:
        """No leg begins any more; returns when nothing is under way in the background."""
        self.closing = True
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)

    def discard(self, link: WorkerLink, spec: worker_pb2.SequenceSpec) -> None:
        """Nothing more is wanted of `spec` from this worker. What that frees wakes nobody in line:
        it was the first in line that had taken it in vain, and would do so again at once."""
        link.unsubscribe(spec.request_id)
        self.spawn(link.abort(_named(spec), ()))

    def abort(
        self, link: WorkerLink, spec: worker_pb2.SequenceSpec, choices: tuple[int, ...]
    ) -> None:
        """Ends choices (none named: all) on a worker, in the background."""
        task = self.spawn(link.abort(_named(spec), choices))
        task.add_done_callback(lambda _: self._queue.notify())

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """`work` handles its own errors."""
        task = asyncio.create_task(work)
        self._background[task] = None
        task.add_done_callback(self._background.pop)
        return task


def _named(spec: worker_pb2.SequenceSpec) -> worker_pb2.SequenceSpec:
    """As it is now: its attempt will change."""
    return worker_pb2.SequenceSpec(request_id=spec.request_id, attempt=spec.attempt)
