"""The registry over the simulated Redis: straight, or through the network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from forebay.rpc.connector import Connector, Method
from forebay.rpc.v1 import worker_pb2
from forebay.simulator.redis import LIST, PUT, REMOVE, Records, SimRedis
from forebay.simulator.redis_client import SimRedisClient


class MemoryRegistry:
    """Implements `Registry` over a Redis that answers at once and never fails."""

    def __init__(self) -> None:
        routes = SimRedis().routes()
        self._handlers = {method.name: handler for method, handler in routes.unary}

    async def publish(self, worker: worker_pb2.WorkerDescription, ttl_s: float) -> None:
        await self._call(PUT, ("worker", worker.worker_id, worker.SerializeToString(), ttl_s))

    async def remove(self, worker_id: str) -> None:
        await self._call(REMOVE, ("worker", worker_id))

    async def list_workers(self) -> list[worker_pb2.WorkerDescription]:
        records: Records = await self._call(LIST, "worker")
        return [worker_pb2.WorkerDescription.FromString(record) for _, record in records]

    async def add_poison(self, fingerprint: str, ttl_s: float) -> None:
        await self._call(PUT, ("poison", fingerprint, b"", ttl_s))

    async def list_poison(self) -> list[str]:
        records: Records = await self._call(LIST, "poison")
        return [fingerprint for fingerprint, _ in records]

    async def publish_line(
        self, gateway_id: str, num_tokens: Mapping[str, int], ttl_s: float
    ) -> None:
        await self._call(PUT, ("line", gateway_id, json.dumps(dict(num_tokens)).encode(), ttl_s))

    async def list_lines(self) -> dict[str, dict[str, int]]:
        records: Records = await self._call(LIST, "line")
        return {gateway_id: json.loads(record) for gateway_id, record in records}

    async def close(self) -> None:
        """Nothing is open."""

    async def _call(self, method: Method[Any, Any], message: Any) -> Any:
        return await self._handlers[method.name](message)


class SimRegistry(MemoryRegistry):
    """One process's way to the simulated Redis."""

    def __init__(self, connector: Connector) -> None:
        self._client = SimRedisClient(connector)

    @property
    def num_failures(self) -> int:
        return self._client.num_failures

    async def close(self) -> None:
        await self._client.close()

    async def _call(self, method: Method[Any, Any], message: Any) -> Any:
        return await self._client.call(method, message)
