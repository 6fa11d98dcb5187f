"""What a client that sends `x-forebay-explain: 1` gets beside its answer, over HTTP and gRPC."""

from __future__ import annotations

import re
from collections.abc import Sequence

from forebay.gateway.explanation import route_line, timeline_line
from forebay.gateway.openai_responses import Json, to_json
from forebay.gateway.timeline import RequestTimeline

EXPLAIN = "x-forebay-explain"
ROUTE = "x-forebay-route"
TIMELINE = "x-forebay-timeline"
TRACEPARENT = "traceparent"

MAX_LINES = 2
"""Of a request with several prompts the first ones only: headers have to stay small."""
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def wants_explanation(value: str) -> bool:
    return value == "1"


def checked_traceparent(value: str) -> str:
    """Empty for what is none: a client's other text is not kept."""
    return value if _TRACEPARENT.fullmatch(value) else ""


def route_header(timelines: Sequence[RequestTimeline]) -> bytes:
    return _lines([route_line(timeline) for timeline in timelines[:MAX_LINES]])


def timeline_header(timelines: Sequence[RequestTimeline]) -> bytes:
    return _lines([timeline_line(timeline) for timeline in timelines[:MAX_LINES]])


def timeline_comment(timelines: Sequence[RequestTimeline]) -> bytes:
    """An event stream's comment: clients that do not know it skip it."""
    return b": " + TIMELINE.encode("ascii") + b" " + timeline_header(timelines) + b"\n\n"


def _lines(lines: Sequence[Json]) -> bytes:
    return to_json(lines[0] if len(lines) == 1 else lines)
