"""The worker registry, the gateways' lines and the poison list in Redis."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

import redis.asyncio as redis
from google.protobuf.message import DecodeError

from forebay.rpc.v1 import worker_pb2
from forebay.store.redis_records import RedisRecords, connect

log = logging.getLogger(__name__)


class RedisRegistry:
    """Implements `Registry`."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._workers = RedisRecords(client, "worker")
        self._poison = RedisRecords(client, "poison")
        self._lines = RedisRecords(client, "line")

    @classmethod
    def connect(cls, url: str) -> RedisRegistry:
        """Connects on first use. Raises ConfigurationError for a URL that is none."""
        return cls(connect(url))

    async def publish(self, worker: worker_pb2.WorkerDescription, ttl_s: float) -> None:
        await self._workers.put(worker.worker_id, worker.SerializeToString(), ttl_s)

    async def remove(self, worker_id: str) -> None:
        await self._workers.remove(worker_id)

    async def list_workers(self) -> list[worker_pb2.WorkerDescription]:
        workers = []
        for worker_id, record in (await self._workers.list()).items():
            try:
                workers.append(worker_pb2.WorkerDescription.FromString(record))
            except DecodeError:
                log.warning("the record of worker %s cannot be read", worker_id)
        return workers

    async def add_poison(self, fingerprint: str, ttl_s: float) -> None:
        await self._poison.put(fingerprint, b"", ttl_s)

    async def list_poison(self) -> list[str]:
        return list(await self._poison.list())

    async def publish_line(
        self, gateway_id: str, num_tokens: Mapping[str, int], ttl_s: float
    ) -> None:
        await self._lines.put(gateway_id, json.dumps(dict(num_tokens)).encode(), ttl_s)

    async def list_lines(self) -> dict[str, dict[str, int]]:
        lines = {}
        for gateway_id, record in (await self._lines.list()).items():
            try:
                found = json.loads(record)
                lines[gateway_id] = {str(name): int(count) for name, count in found.items()}
            except (ValueError, TypeError, AttributeError):
                log.warning("the line of gateway %s cannot be read", gateway_id)
        return lines

    async def close(self) -> None:
        await self._client.aclose()
