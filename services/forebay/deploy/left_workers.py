"""Workers that outlived their raylet: they serve on until new ones have taken their place."""

from __future__ import annotations

import logging
import signal
from collections import Counter
from collections.abc import Iterable, Sequence

from forebay.deploy.processes import ProcessRecord
from forebay.rpc.v1 import worker_pb2

TAKEOVER_S = 3.0
"""Between the new workers' arrival and the old ones' drain: gateways connect meanwhile."""
PARTIAL_S = 10.0
"""The same where fewer have come than were there before, after the last one to come."""
REPLACED_LIMIT_S = 120.0
"""Old workers drain after this time even when no new ones have come."""
DRAIN_MARGIN_S = 10.0
"""More than a worker itself takes on top of its drain before it gives up."""

Workers = Iterable[worker_pb2.WorkerDescription]
Counts = Counter[int]

logger = logging.getLogger("forebay.supervisor")


class LeftWorkers:
    """`registered`: the registry's list at the time of the loss, None when it could not be read;
    then only the time limit counts. Times are the caller's clock."""

    def __init__(
        self, records: Sequence[ProcessRecord], registered: Workers | None, now: float
    ) -> None:
        self._records = list(records)
        self._old = None if registered is None else {_key(worker): worker for worker in registered}
        self._limit_at = now + REPLACED_LIMIT_S
        self._new: Counts = Counter()
        self._changed_at = now
        self._kill_at: float | None = None

    def tend(self, registered: Workers | None, now: float, drain_s: float) -> bool:
        """True once none of them lives any more."""
        self._records = [record for record in self._records if record.alive]
        if self._kill_at is None and (self._replaced(registered, now) or now >= self._limit_at):
            logger.info("%d workers without a raylet drain", len(self._records))
            self._kill_at = now + drain_s + DRAIN_MARGIN_S
            self._signal(signal.SIGTERM)
        elif self._kill_at is not None and now >= self._kill_at:
            self._signal(signal.SIGKILL)
        return not self._records

    def _replaced(self, registered: Workers | None, now: float) -> bool:
        """Whether each pool has had as many new workers as it had old ones for a moment, or some
        for longer: of the old ones the registry may still list some that had ended before."""
        if self._old is None or registered is None:
            return False
        new: Counts = Counter(item.role for item in registered if _key(item) not in self._old)
        if new != self._new:
            self._new, self._changed_at = new, now
        old: Counts = Counter(item.role for item in self._old.values())
        waited_s = now - self._changed_at
        return (new >= old and waited_s >= TAKEOVER_S) or (
            new.keys() >= old.keys() and waited_s >= PARTIAL_S
        )

    def _signal(self, number: signal.Signals) -> None:
        for record in self._records:
            record.signal(number)


def _key(worker: worker_pb2.WorkerDescription) -> tuple[str, str]:
    return worker.worker_id, worker.epoch
