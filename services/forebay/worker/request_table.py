"""The requests of one worker, each under a lease of its gateway.

Whatever a worker holds for a request, in whatever phase, ends with its lease: a gateway that lost
interest, or whose abort was lost, need not be heard for blocks to come back. A renewal costs a look
into a dict for each request it names; no step waits for it and it waits for no step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from forebay.core import clock
from forebay.core.errors import InvalidRequest, RequestCancelled
from forebay.engine.sequence import RequestKey
from forebay.worker.requests import WorkerRequest

ENDED_MEMORY_S = 30.0
"""How long an attempt that has ended is remembered, and one whose abort found nothing: a request
may come late, or twice."""


class RequestTable:
    """`num_accepted`, `num_expired`: totals since the start."""

    def __init__(self, lease_s: float) -> None:
        self.num_accepted = 0
        self.num_expired = 0
        self._lease_s = lease_s
        self._by_key: dict[RequestKey, WorkerRequest] = {}
        self._ended: dict[RequestKey, tuple[int, float]] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[WorkerRequest]:
        """Over a copy: requests may be removed meanwhile."""
        return iter(list(self._by_key.values()))

    def __contains__(self, request: WorkerRequest) -> bool:
        """Not so once it has ended or a newer attempt has taken its place."""
        return self._by_key.get(request.key) is request

    @property
    def num_sequences(self) -> int:
        return sum(len(request.going_on) for request in self._by_key.values())

    def get(self, key: RequestKey) -> WorkerRequest | None:
        return self._by_key.get(key)

    def of_gateways(self, gateway_ids: Collection[str]) -> list[WorkerRequest]:
        return [request for request in self if request.key.gateway_id in gateway_ids]

    def check_attempt(self, request: WorkerRequest) -> None:
        """Raises RequestCancelled for an attempt that has ended, or whose abort came first;
        InvalidRequest for one that a newer attempt has replaced."""
        attempt = request.attempt
        known = self._by_key.get(request.key)
        if known is not None and known.attempt > attempt:
            raise InvalidRequest(f"attempt {attempt} is over", param="attempt")
        if request.key in self._ended and self._ended[request.key][0] >= attempt:
            raise RequestCancelled(f"attempt {attempt} has ended")

    def enter(self, request: WorkerRequest) -> None:
        self._by_key[request.key] = request
        self.num_accepted += 1

    def remove(self, key: RequestKey) -> None:
        request = self._by_key.pop(key, None)
        if request is not None:
            self.remember_end(key, request.attempt)

    def renew(self, gateway_id: str, request_ids: Iterable[str]) -> None:
        """Names that are not known here, or are another gateway's, have no effect."""
        now = clock.now()
        for request_id in request_ids:
            request = self._by_key.get(RequestKey(gateway_id, request_id))
            if request is not None:
                request.lease = clock.Deadline(min(request.deadline.at, now + self._lease_s))

    def expired(self) -> list[WorkerRequest]:
        """Those whose lease is over, their deadline perhaps as well. They stay until removed."""
        now = clock.now()
        return [request for request in self._by_key.values() if request.lease.at <= now]

    def remember_end(self, key: RequestKey, attempt: int) -> None:
        before, _ = self._ended.get(key, (0, 0.0))
        self._ended[key] = (max(before, attempt), clock.now())

    def forget_ended(self) -> None:
        """Those that nothing has followed for ENDED_MEMORY_S."""
        forgotten = clock.now() - ENDED_MEMORY_S
        for key in [key for key, (_, since) in self._ended.items() if since <= forgotten]:
            del self._ended[key]

    def check_integrity(self) -> None:
        for key, request in self._by_key.items():
            assert request.key == key
            assert request.going_on <= set(request.start.choices)
            assert request.going_on, "a request without a choice that goes on"
            assert request.lease.at <= request.deadline.at
