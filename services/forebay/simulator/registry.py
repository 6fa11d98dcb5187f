"""The worker registry in memory, on the loop's clock."""

from __future__ import annotations

from forebay.core import clock
from forebay.rpc.v1 import worker_pb2


class MemoryRegistry:
    """Implements `Registry`; records are kept serialised, as Redis would."""

    def __init__(self) -> None:
        self._records: dict[str, tuple[float, bytes]] = {}

    async def publish(self, worker: worker_pb2.WorkerDescription, ttl_s: float) -> None:
        self._records[worker.worker_id] = (clock.now() + ttl_s, worker.SerializeToString())

    async def remove(self, worker_id: str) -> None:
        self._records.pop(worker_id, None)

    async def list_workers(self) -> list[worker_pb2.WorkerDescription]:
        return [
            worker_pb2.WorkerDescription.FromString(record)
            for _, (expires_at, record) in sorted(self._records.items())
            if expires_at > clock.now()
        ]

    async def close(self) -> None:
        """Shared by all processes of a simulation: nothing to close."""
