"""Requests that ended workers, and are refused for a while, by every gateway."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from array import array
from collections.abc import Sequence

from forebay.core import clock
from forebay.core.errors import InvalidRequest, Unavailable
from forebay.store.registry import Registry

log = logging.getLogger(__name__)

POLL_S = 1.0


class PoisonList:
    """This gateway's copy of the list in Redis; no request waits for Redis. `salt` keys the
    fingerprints, so that nobody who reads the list can tell a prompt."""

    def __init__(self, registry: Registry, salt: bytes, ttl_s: float) -> None:
        self._registry = registry
        self._key = hashlib.sha256(salt).digest()
        self._ttl_s = ttl_s
        self._listed: frozenset[str] = frozenset()
        self._listed_until = 0.0
        self._own: dict[str, float] = {}
        self._unwritten: list[str] = []

    def fingerprint(self, model_id: str, prompt: Sequence[int]) -> str:
        digest = hashlib.blake2b(model_id.encode() + b"\0", key=self._key, digest_size=16)
        digest.update(array("I", prompt).tobytes())
        return digest.hexdigest()

    def check(self, fingerprint: str) -> None:
        """Raises InvalidRequest for a request that is blocked."""
        now = clock.now()
        is_listed = fingerprint in self._listed and now < self._listed_until
        if is_listed or now < self._own.get(fingerprint, 0.0):
            raise poisoned()

    def add(self, fingerprint: str) -> None:
        """Blocks it here at once, everywhere with the next write to Redis."""
        self._own[fingerprint] = clock.now() + self._ttl_s
        self._unwritten.append(fingerprint)

    async def run(self) -> None:
        """Until cancelled. Without Redis the list stays as it is, for as long as what stands in it
        may be valid."""
        while True:
            try:
                await self._write()
                self._listed = frozenset(await self._registry.list_poison())
                self._listed_until = clock.now() + self._ttl_s
            except Unavailable as error:
                log.debug("poison list: %s", error.message)
            except Exception:
                log.exception("the poison list cannot be read")
            for fingerprint in [f for f, until in self._own.items() if until <= clock.now()]:
                del self._own[fingerprint]
            await asyncio.sleep(POLL_S)

    async def _write(self) -> None:
        while self._unwritten:
            await self._registry.add_poison(self._unwritten[0], self._ttl_s)
            del self._unwritten[0]


def poisoned() -> InvalidRequest:
    return InvalidRequest(
        "this request has ended two workers and is blocked for a while", code="poisoned_request"
    )
