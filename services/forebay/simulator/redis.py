"""A Redis in memory: what one life of it remembers, and how it is asked."""

from __future__ import annotations

from forebay.core import clock
from forebay.rpc.connector import Routes
from forebay.simulator.kv_events import SimKvStreams
from forebay.simulator.redis_client import redis_method

PUT, REMOVE, LIST = redis_method("Put"), redis_method("Remove"), redis_method("List")

Records = tuple[tuple[str, bytes], ...]


class SimRedis:
    """`num_calls` counts what it was asked about records."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.kv_streams = SimKvStreams()
        self._kinds: dict[str, dict[str, tuple[float, bytes]]] = {}

    def routes(self) -> Routes:
        routes = self.kv_streams.routes()
        routes.unary += [(PUT, self.put), (REMOVE, self.remove), (LIST, self.list)]
        return routes

    def flush(self) -> int:
        """Forgets everything; returns how many records, streams and snapshots there were."""
        num_records = sum(len(records) for records in self._kinds.values()) + len(self.kv_streams)
        self._kinds.clear()
        self.kv_streams.flush()
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
