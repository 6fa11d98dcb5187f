"""What has changed among the findable blocks of a pool since somebody last asked, numbered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KvChanges:
    """Block hashes in the order of their last change; none is in both. False when empty."""

    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()

    def __len__(self) -> int:
        return len(self.stored) + len(self.removed)


class KvJournal:
    """Nets changes per hash: the last state wins. Until it is taken it grows with the number of
    distinct hashes. `seq`: how many batches that were not empty have been taken. `on_change` is
    called when the journal is no longer empty."""

    def __init__(self, on_change: Callable[[], None] | None = None) -> None:
        self.seq = 0
        self._on_change = on_change
        self._is_stored: dict[bytes, bool] = {}

    def __len__(self) -> int:
        return len(self._is_stored)

    def stored(self, block_hash: bytes) -> None:
        self._note(block_hash, True)

    def removed(self, block_hash: bytes) -> None:
        self._note(block_hash, False)

    def take(self) -> KvChanges:
        """All changes, which the journal forgets. If there are any, they are batch `seq`."""
        if not self._is_stored:
            return KvChanges()
        changes, self._is_stored = self._is_stored, {}
        self.seq += 1
        return KvChanges(
            tuple(h for h, is_stored in changes.items() if is_stored),
            tuple(h for h, is_stored in changes.items() if not is_stored),
        )

    def _note(self, block_hash: bytes, is_stored: bool) -> None:
        was_empty = not self._is_stored
        self._is_stored.pop(block_hash, None)
        self._is_stored[block_hash] = is_stored
        if was_empty and self._on_change is not None:
            self._on_change()
