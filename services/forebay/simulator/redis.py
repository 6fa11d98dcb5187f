"""A Redis in memory: what one life of it remembers, and how it is asked."""

from __future__ import annotations

from typing import Any

from forebay.core import clock
from forebay.rpc.connector import Method, Routes


def _identity(message: Any) -> Any:
    return message


def _method(name: str) -> Method[Any, Any]:
    """Messages are tuples of immutable values, sent as they are."""
    return Method("redis", name, _identity, _identity, _identity, _identity)


PUT, REMOVE, LIST = _method("Put"), _method("Remove"), _method("List")

Records = tuple[tuple[str, bytes], ...]


class SimRedis:
    """`num_calls` counts what it was asked."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._kinds: dict[str, dict[str, tuple[float, bytes]]] = {}

    def routes(self) -> Routes:
        return Routes(unary=[(PUT, self.put), (REMOVE, self.remove), (LIST, self.list)])

    def flush(self) -> int:
        """Forgets everything; returns how many records there were."""
        num_records = sum(len(records) for records in self._kinds.values())
        self._kinds.clear()
        return num_records

    async def put(self, message: tuple[str, str, bytes, float]) -> tuple[()]:
        kind, record_id, record, ttl_s = message
        self.num_calls += 1
        self._kinds.setdefault(kind, {})[record_id] = (clock.now() + ttl_s, record)
        return ()

    async def remove(self, message: tuple[str, str]) -> tuple[()]:
        kind, record_id = message
        self.num_calls += 1
        self._kinds.get(kind, {}).pop(record_id, None)
        return ()

    async def list(self, kind: str) -> Records:
        self.num_calls += 1
        now = clock.now()
        records = sorted(self._kinds.get(kind, {}).items())
        return tuple((record_id, record) for record_id, (until, record) in records if until > now)
