"""What processes tell each other through Redis; in memory for simulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from forebay.rpc.v1 import worker_pb2


class Registry(Protocol):
    """Which workers there are, what waits for them, and which requests have ended workers. Records
    disappear `ttl_s` after they were last written. Every call returns within a few seconds or
    raises Unavailable."""

    async def publish(self, worker: worker_pb2.WorkerDescription, ttl_s: float) -> None: ...

    async def remove(self, worker_id: str) -> None: ...

    async def list_workers(self) -> list[worker_pb2.WorkerDescription]:
        """In the order of their ids."""

    async def add_poison(self, fingerprint: str, ttl_s: float) -> None: ...

    async def list_poison(self) -> list[str]:
        """The fingerprints of requests that are blocked, in order."""

    async def publish_line(
        self, gateway_id: str, num_tokens: Mapping[str, int], ttl_s: float
    ) -> None:
        """Prompt tokens that wait in a gateway, by the worker they wait for."""

    async def list_lines(self) -> dict[str, dict[str, int]]:
        """By gateway."""

    async def close(self) -> None: ...
