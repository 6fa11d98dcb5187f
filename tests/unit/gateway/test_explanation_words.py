from __future__ import annotations

import json
import math
from typing import Any

import pytest
from test_gateway_request import in_virtual_time
from timelines import decision

from forebay.gateway.explain_headers import checked_traceparent, route_header, timeline_comment
from forebay.gateway.explanation import record, route_line, why
from forebay.gateway.timeline import RequestTimeline

POOLS = {"prefill-a": 10.0, "prefill-b": 30.0, "decode-a": 64.0, "decode-b": 64.0}


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (
            decision("decode-a", "prefill-a", POOLS, {"prefill-a": 64}),
            "prefill-a computes the prompt: the lowest cost of 2 prefill workers (10; next 30);"
            " 64 of 100 prompt tokens are cached there; decode-a decodes it: the lowest cost of 2"
            " decode workers (64; 1 more cost the same).",
        ),
        (
            decision("decode-a", "prefill-b", POOLS, {"prefill-a": 64, "prefill-b": 16}),
            "prefill-b computes the prompt: cost 30, where 1 of 2 prefill workers cost less;"
            " 16 of 100 prompt tokens are cached there (the most anywhere: 64); decode-a decodes"
            " it: the lowest cost of 2 decode workers (64; 1 more cost the same).",
        ),
        (
            decision("mixed-a", None, {"mixed-a": 7.25}),
            "mixed-a computes and decodes it: the only mixed worker that could take it (cost 7.25);"
            " 0 of 100 prompt tokens are cached there.",
        ),
        (
            decision("decode-b", None, POOLS, {"decode-b": 90}, num_compute_tokens=10),
            "decode-b decodes it and computes the 10 prompt tokens left itself;"
            " 90 of 100 prompt tokens are cached there.",
        ),
        (
            decision("mixed-a", None, {"mixed-a": 1.0}, pull_from="mixed-b", num_pulled_tokens=48),
            "mixed-a computes and decodes it: the only mixed worker that could take it (cost 1);"
            " 0 of 100 prompt tokens are cached there; it fetches the KV of 48 more tokens from"
            " mixed-b.",
        ),
        (
            decision("mixed-a", None, {"mixed-a": 1.0}, has_room=False),
            "mixed-a computes and decodes it: the only mixed worker that could take it (cost 1);"
            " 0 of 100 prompt tokens are cached there; it has no room yet, so the request waits"
            " for it.",
        ),
        (
            decision("mixed-a", None, {"mixed-a": math.inf, "mixed-b": 2.0}),
            "mixed-a computes and decodes it: chosen without a score; 0 of 100 prompt tokens are"
            " cached there.",
        ),
        (decision("mixed-a", None, {}), ""),
    ],
)
def test_one_sentence(chosen: Any, words: str) -> None:
    assert why(chosen, 100, degraded=False) == words


def test_degraded_routing_says_so() -> None:
    words = why(decision("mixed-a", None, {"mixed-a": 1.0}), 100, degraded=True)
    assert words.endswith(
        "; KV events are not fresh, so load and this gateway's own choices decided."
    )


@in_virtual_time
async def test_header_lines_stay_small_with_a_thousand_workers() -> None:
    workers = {f"prefill-{i:024x}": 1000.0 - i for i in range(1000)}
    chosen = f"prefill-{0:024x}"
    requests = [RequestTimeline(f"req-{i:024x}", f"int-{i}", "m", 9, 1) for i in range(32)]
    for request in requests:
        request.new_leg((0,)).routed(decision(chosen, None, workers, {chosen: 8}), 1e-4)
    header = route_header(requests)
    assert len(header) < 2000 and b"\n" not in header
    first = json.loads(header)[0]
    assert (first["decode"], first["prefill"]) == (chosen, None)
    assert first["num_candidates"] == 1000
    assert list(first["scores"])[:2] == [chosen, f"prefill-{999:024x}"]
    assert first["matched_tokens"] == {chosen: 8}
    assert len(record(requests[0])["legs"][0]["attempts"][0]["scores"]) == 1000  # type: ignore[index]
    assert len(timeline_comment(requests)) < 4000


@in_virtual_time
async def test_a_request_that_found_no_worker_has_a_line_all_the_same() -> None:
    request = RequestTimeline("client", "req", "m", 9, 1)
    assert route_line(request) == {
        "request_id": "client",
        "num_prompt_tokens": 9,
        "cached_tokens": 0,
    }
    assert json.loads(route_header([request]))["num_prompt_tokens"] == 9


@in_virtual_time
async def test_a_worker_that_cannot_be_chosen_has_no_score() -> None:
    request = RequestTimeline("client", "req", "m", 9, 1)
    scores = {"mixed-a": math.inf, "mixed-b": 2.0}
    request.new_leg((0,)).routed(decision("mixed-b", None, scores), 0.0)
    text = json.dumps(record(request), allow_nan=False)
    assert json.loads(text)["legs"][0]["attempts"][0]["scores"] == {"mixed-b": 2.0}


GOOD = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (GOOD, GOOD),
        ("", ""),
        ("my prompt is secret", ""),
        (GOOD.upper(), ""),
        (GOOD + "-more", ""),
        (GOOD + "\n", ""),
    ],
)
def test_only_a_trace_context_is_kept(value: str, kept: str) -> None:
    assert checked_traceparent(value) == kept
