"""The timelines of the latest requests, for whoever asks why a request went where it went."""

from __future__ import annotations

from collections import deque

from forebay.core.errors import NotFound
from forebay.gateway.timeline import RequestTimeline

MAX_BYTES = 32 * 1024 * 1024
_RESPONSE_PREFIXES = ("chatcmpl-", "cmpl-")

_REQUEST_BYTES = 2000
_LEG_BYTES = 800
_ATTEMPT_BYTES = 1200
_ROW_BYTES = 32
_CHOICE_BYTES = 250
"""Upper bounds, measured: see the tests."""


class Explanations:
    """The requests under way, and of those that ended the last `max_requests`, or fewer where they
    would take more than `max_bytes`."""

    def __init__(self, max_requests: int, max_bytes: int = MAX_BYTES) -> None:
        self.num_bytes = 0
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._by_id: dict[str, RequestTimeline] = {}
        self._by_internal_id: dict[str, RequestTimeline] = {}
        self._ended: deque[tuple[RequestTimeline, int]] = deque()

    def __len__(self) -> int:
        return len(self._by_internal_id)

    def begin(self, timeline: RequestTimeline) -> None:
        """Of requests with one id the latest is found under it."""
        self._by_id[timeline.request_id] = timeline
        self._by_internal_id[timeline.internal_id] = timeline

    def end(self, timeline: RequestTimeline) -> None:
        size = num_bytes(timeline)
        self._ended.append((timeline, size))
        self.num_bytes += size
        while len(self._ended) > self._max_requests or self.num_bytes > self._max_bytes:
            oldest, size = self._ended.popleft()
            self.num_bytes -= size
            self._forget(oldest)

    def find(self, request_id: str) -> RequestTimeline:
        """By the id that the client knows (the response's own id will do) or by the workers'.
        Raises NotFound."""
        for prefix in _RESPONSE_PREFIXES:
            request_id = request_id.removeprefix(prefix)
        found = self._by_internal_id.get(request_id) or self._by_id.get(request_id)
        if found is not None:
            return found
        if f"{request_id}-0" in self._by_id:
            hint = "it had several prompts, each with an id of its own: add -0, -1 and so on"
        else:
            hint = f"this gateway knows the last {self._max_requests} that it served itself"
        raise NotFound(f"no such request: {hint}", param="request_id", code="request_not_found")

    def _forget(self, timeline: RequestTimeline) -> None:
        del self._by_internal_id[timeline.internal_id]
        if self._by_id.get(timeline.request_id) is timeline:
            del self._by_id[timeline.request_id]


def num_bytes(timeline: RequestTimeline) -> int:
    """What keeping it takes at most."""
    attempts = [attempt for leg in timeline.legs for attempt in leg.attempts]
    num_rows = sum(len(attempt.decision.candidates.costs) for attempt in attempts)
    return (
        _REQUEST_BYTES
        + _LEG_BYTES * len(timeline.legs)
        + _ATTEMPT_BYTES * len(attempts)
        + _ROW_BYTES * num_rows
        + _CHOICE_BYTES * len(timeline.choices)
    )
