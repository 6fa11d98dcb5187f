"""The registry over the simulated Redis: straight, or through the network."""

from __future__ import annotations

from typing import Any

from forebay.core.clock import Deadline
from forebay.core.errors import DeadlineExceeded, ForebayError, Unavailable
from forebay.rpc.connector import Connector, Method
from forebay.rpc.v1 import worker_pb2
from forebay.simulator.redis import LIST, PUT, REMOVE, Records, SimRedis

REDIS_ADDRESS = "redis:1"
TIMEOUT_S = 2.0
"""As in the registry over a real one."""


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

    async def close(self) -> None:
        """Nothing is open."""

    async def _call(self, method: Method[Any, Any], message: Any) -> Any:
        return await self._handlers[method.name](message)


class SimRegistry(MemoryRegistry):
    """One process's way to the Redis that listens on REDIS_ADDRESS. `num_failures`: calls it had no
    answer to."""

    def __init__(self, connector: Connector) -> None:
        self.num_failures = 0
        self._channel = connector.connect(REDIS_ADDRESS)

    async def close(self) -> None:
        await self._channel.close()

    async def _call(self, method: Method[Any, Any], message: Any) -> Any:
        try:
            return await self._channel.unary(method, message, Deadline.after(TIMEOUT_S))
        except DeadlineExceeded as error:
            self.num_failures += 1
            raise Unavailable(f"Redis did not answer within {TIMEOUT_S:.0f} s") from error
        except ForebayError as error:
            self.num_failures += 1
            raise Unavailable(f"Redis: {error.message}") from error
