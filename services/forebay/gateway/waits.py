"""Which requests of this gateway wait for which worker to take them, and with how much work."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from forebay.core import clock


@dataclass(frozen=True, slots=True)
class Wait:
    """order: of the line, the lower the sooner. since: on the loop's clock."""

    order: tuple[int, int]
    worker_id: str
    num_tokens: float
    since: float


class Waits:
    """At most one a request, `key`."""

    def __init__(self) -> None:
        self._waits: dict[Hashable, Wait] = {}

    def __len__(self) -> int:
        return len(self._waits)

    def put(self, key: Hashable, order: tuple[int, int], worker_id: str, num_tokens: float) -> None:
        self._waits[key] = Wait(order, worker_id, num_tokens, clock.now())

    def get(self, key: Hashable) -> Wait | None:
        return self._waits.get(key)

    def remove(self, key: Hashable) -> None:
        self._waits.pop(key, None)

    def tokens_before(self, order: tuple[int, int] | None = None) -> dict[str, float]:
        """Prompt tokens to compute by worker, of all or of those before `order`."""
        tokens: dict[str, float] = {}
        for wait in self._waits.values():
            if order is None or wait.order < order:
                tokens[wait.worker_id] = tokens.get(wait.worker_id, 0.0) + wait.num_tokens
        return tokens
