"""Reservations: prompts whose KV a decode worker waits for, until their transfer commits."""

from __future__ import annotations

from dataclasses import dataclass, field

from forebay.core.errors import KvTransferError
from forebay.core.randomness import Rng
from forebay.engine.engine import Engine
from forebay.engine.sequence import RequestKey
from forebay.kv.block_hash import HashChain
from forebay.kv.leases import Lease, LeaseTable
from forebay.worker.requests import WorkerRequest


@dataclass(slots=True)
class _Reservation:
    """`dropped`: choices that were aborted before the KV was here."""

    request: WorkerRequest
    lease: Lease
    dropped: set[int] = field(default_factory=set)


class Reservations:
    """At most one per request. The lease table and the engine share one block pool."""

    def __init__(self, engine: Engine, leases: LeaseTable, rng: Rng) -> None:
        self._engine = engine
        self._leases = leases
        self._rng = rng
        self._by_key: dict[RequestKey, _Reservation] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def find(self, key: RequestKey) -> Lease | None:
        reservation = self._by_key.get(key)
        return reservation.lease if reservation else None

    def reserve(self, request: WorkerRequest) -> Lease:
        """Raises OutOfBlocks, and then holds nothing."""
        assert request.key not in self._by_key
        start = request.start
        chain = HashChain(start.cache_root, self._engine.pool.block_size)
        lease = self._leases.grant(
            self._rng.token("lease"), request.key, chain.upto(start.tokens), len(start.tokens)
        )
        self._engine.count_cache_lookup(len(start.tokens), lease.num_cached_tokens)
        self._by_key[request.key] = _Reservation(request, lease)
        return lease

    def commit(self, lease: Lease, first_tokens: list[tuple[int, int]]) -> WorkerRequest:
        """The KV of `lease` is whole: its request goes on as running sequences. Raises
        KvTransferError, and then changes nothing, for first tokens the request cannot have."""
        assert isinstance(lease.owner, RequestKey)
        reservation = self._by_key[lease.owner]
        request = reservation.request
        choices = {choice for choice, _ in first_tokens}
        if len(choices) < len(first_tokens) or not choices <= set(request.start.choices):
            raise KvTransferError("the commit's first tokens are not one a choice")
        vocab_size = self._engine.runner.model.vocab_size
        if any(token_id >= vocab_size for _, token_id in first_tokens):
            raise KvTransferError("a first token is outside the vocabulary")
        del self._by_key[lease.owner]
        wanted = [first for first in first_tokens if first[0] not in reservation.dropped]
        if not wanted:
            self._leases.release(lease)
            return request
        self._engine.adopt(request.start, self._leases.take(lease), wanted)
        return request

    def abort(self, key: RequestKey, choices: frozenset[int]) -> bool:
        """Ends a reservation; `choices`, unless empty, are only crossed off."""
        reservation = self._by_key.get(key)
        if reservation is None:
            return False
        reservation.dropped |= choices
        if not choices or reservation.dropped.issuperset(reservation.request.start.choices):
            del self._by_key[key]
            self._leases.release(reservation.lease)
        return True
