"""Which workers there are: the seam, implemented over Redis and, for simulation, in memory."""

from __future__ import annotations

from typing import Protocol

from forebay.rpc.v1 import worker_pb2


class Registry(Protocol):
    """Records disappear `ttl_s` after they were last published. Every call returns within a few
    seconds or raises Unavailable."""

    async def publish(self, worker: worker_pb2.WorkerDescription, ttl_s: float) -> None: ...

    async def remove(self, worker_id: str) -> None: ...

    async def list_workers(self) -> list[worker_pb2.WorkerDescription]:
        """In the order of their ids."""

    async def close(self) -> None: ...
