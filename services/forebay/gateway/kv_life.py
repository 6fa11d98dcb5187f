"""What a gateway knows of one worker's life: how far it has read, how far the worker has got."""

from __future__ import annotations

from collections import deque

_MAX_TOLD = 64
_RETRY_S = 0.5
_MAX_RETRY_S = 4.0


class KvLife:
    """slot: the worker's in the index. is_empty: nothing has been put there yet. position: the
    last batch that is in there; None while the index is not in step. needed: a snapshot of an
    earlier batch leads nowhere. turn: another one voids what somebody was about to apply. retry_at:
    no look at the snapshot before."""

    def __init__(self, worker_id: str, epoch: str, slot: int, now: float) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.slot = slot
        self.is_empty = True
        self.position: int | None = None
        self.needed = 0
        self.turn = 0
        self.retry_at = now
        self._lost_at = now
        self._exhausted_at = now
        self._retry_s = _RETRY_S
        self._told: deque[tuple[int, float]] = deque()
        self._told_seq = 0

    def told(self, seq: int, now: float) -> None:
        """The worker has made batch `seq`. Of very many that are outstanding the newest count as
        older than they are."""
        if seq <= self._told_seq:
            return
        self._told_seq = seq
        if self.position is None or seq <= self.position:
            return
        since = self._told.pop()[1] if len(self._told) >= _MAX_TOLD else now
        self._told.append((seq, since))

    def advance(self, seq: int) -> None:
        self.position = seq
        while self._told and self._told[0][0] <= seq:
            self._told.popleft()

    def in_step(self, seq: int, now: float) -> None:
        """A snapshot has been applied; what has come after it may take a moment."""
        self.position = seq
        self.needed = 0
        self._retry_s = _RETRY_S
        if self._told_seq > seq:
            self._told.append((self._told_seq, now))

    def lose(self, needed: int, now: float) -> None:
        """Out of step until there is a snapshot of batch `needed` or a later one."""
        self._lost_at = now - self.staleness_s(now)
        self._told.clear()
        self.position = None
        self.needed = needed
        self.turn += 1

    def leave(self) -> None:
        """The worker has gone."""
        self.position = None
        self.turn += 1

    def exhausted(self, at: float) -> None:
        """A read that began then found nothing after the position."""
        self._exhausted_at = at

    def postpone(self, now: float) -> None:
        """There is no snapshot that would help, yet."""
        self.retry_at = now + self._retry_s
        self._retry_s = min(2 * self._retry_s, _MAX_RETRY_S)

    def staleness_s(self, now: float) -> float:
        """How long ago the worker made the first batch that is not in the index."""
        if self.position is None:
            return now - self._lost_at
        return now - self._told[0][1] if self._told else 0.0

    def wants_snapshot(self, resync_after_s: float) -> bool:
        """Out of step, or a batch that the worker has made is not in its stream: one that merely
        comes late, because Redis or the gateway is slow, is waited for."""
        if self.position is None:
            return True
        return bool(self._told) and self._exhausted_at - self._told[0][1] >= resync_after_s

    @property
    def least_useful(self) -> int:
        """A snapshot of an earlier batch is none that helps."""
        return self.needed if self.position is None else self.position + 1
