"""A request's timeline as JSON, whole and in short, with each choice of workers put into words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from forebay.core.roles import WorkerRole
from forebay.gateway.openai_responses import Json
from forebay.gateway.timeline import Attempt, LegTimeline, RequestTimeline, Span
from forebay.router.view import Decision

MAX_LINE_WORKERS = 8
"""Scores in a header line: the chosen workers' and the lowest."""
MAX_LINE_PHASES = 24


def record(timeline: RequestTimeline) -> Json:
    """Everything that is known. Times are milliseconds since the request's arrival."""
    first_token_at = timeline.first_token_at
    return {
        "request_id": timeline.request_id,
        "internal_id": timeline.internal_id,
        "model": timeline.model,
        "outcome": timeline.outcome,
        "num_prompt_tokens": timeline.num_prompt_tokens,
        "num_cached_tokens": timeline.num_cached_tokens,
        "num_choices": timeline.num_choices,
        "duration_ms": _ms(timeline, timeline.until),
        "ttft_ms": _ms(timeline, first_token_at),
        "phases": [_phase(timeline, span) for span in timeline.spans()],
        "num_legs": timeline.num_legs,
        "legs": [_leg(timeline, leg) for leg in timeline.legs],
        "choices": [
            {
                "choice": i,
                "first_token_ms": _ms(timeline, choice.first_token_at),
                "ended_ms": _ms(timeline, choice.ended_at),
                "num_tokens": choice.num_tokens,
                "finish_reason": choice.finish_reason,
            }
            for i, choice in enumerate(timeline.choices)
        ],
    }


def route_line(timeline: RequestTimeline) -> Json:
    """Where the request's latest leg went, small enough for a header."""
    attempt = _latest_attempt(timeline)
    line: Json = {"request_id": timeline.request_id}
    if attempt is not None:
        decision = attempt.decision
        scores, matched = _scores(decision), decision.matched
        chosen = [w for w in (decision.prefill, decision.decode) if w is not None]
        line |= {
            "decode": decision.decode,
            "prefill": decision.prefill,
            "pull_from": decision.pull_from,
            "scores": _leading(scores, chosen),
            "num_candidates": len(scores),
            "matched_tokens": {worker: matched.get(worker, 0) for worker in chosen},
            "degraded": attempt.degraded,
        }
    return line | {
        "num_prompt_tokens": timeline.num_prompt_tokens,
        "cached_tokens": timeline.num_cached_tokens,
    }


def timeline_line(timeline: RequestTimeline) -> Json:
    """The phases, small enough for a header."""
    spans = timeline.spans()
    return {
        "request_id": timeline.request_id,
        "outcome": timeline.outcome,
        "duration_ms": _ms(timeline, timeline.until),
        "ttft_ms": _ms(timeline, timeline.first_token_at),
        "cached_tokens": timeline.num_cached_tokens,
        "phases": [_phase(timeline, span) for span in spans[:MAX_LINE_PHASES]],
        "num_phases": len(spans),
    }


def why(decision: Decision, num_prompt_tokens: int, *, degraded: bool) -> str:
    """One sentence on a choice whose scores are there, else nothing."""
    return _why(decision, _scores(decision), decision.matched, num_prompt_tokens, degraded)


def _why(
    decision: Decision,
    scores: Mapping[str, float],
    matched: Mapping[str, int],
    num_prompt_tokens: int,
    degraded: bool,
) -> str:
    if not scores:
        return ""
    computes, decodes = decision.computes, decision.decode
    cached = _cached(matched, computes, num_prompt_tokens)
    if decision.prefill is not None:
        parts = [
            f"{computes} computes the prompt: {_rank(scores, computes)}",
            cached,
            f"{decodes} decodes it: {_rank(scores, decodes)}",
        ]
    elif _kind(decodes) == WorkerRole.DECODE.value:
        left = decision.num_compute_tokens
        parts = [f"{decodes} decodes it and computes the {left} prompt tokens left itself", cached]
    else:
        parts = [f"{decodes} computes and decodes it: {_rank(scores, decodes)}", cached]
    if decision.pull_from is not None:
        pulled = decision.num_pulled_tokens
        parts.append(f"it fetches the KV of {pulled} more tokens from {decision.pull_from}")
    if not decision.has_room:
        parts.append("it has no room yet, so the request waits for it")
    if degraded:
        parts.append("KV events are not fresh, so load and this gateway's own choices decided")
    return "; ".join(parts) + "."


def _leg(timeline: RequestTimeline, leg: LegTimeline) -> Json:
    return {
        "leg": leg.number,
        "continues": leg.continues,
        "choices": list(leg.choices),
        "num_tokens_before": leg.num_tokens,
        "began_ms": _ms(timeline, leg.began_at),
        "ended_ms": _ms(timeline, leg.ended_at),
        "end": None if leg.end is None else leg.end.value,
        "lost_worker": leg.lost_worker,
        "decode": leg.decode,
        "prefill": leg.prefill,
        "num_attempts": leg.num_attempts,
        "attempts": [_attempt(timeline, attempt) for attempt in leg.attempts],
    }


def _attempt(timeline: RequestTimeline, attempt: Attempt) -> Json:
    decision = attempt.decision
    scores, matched = _scores(decision), decision.matched
    num_prompt_tokens = timeline.num_prompt_tokens
    return {
        "routed_ms": _ms(timeline, attempt.routed_at),
        "first_look_ms": _ms(timeline, attempt.first_at),
        "num_looks": attempt.num_looks,
        "decision_us": round(attempt.decision_s * 1e6, 1),
        "degraded": attempt.degraded,
        "decode": decision.decode,
        "prefill": decision.prefill,
        "has_room": decision.has_room,
        "pull_from": decision.pull_from,
        "num_pulled_tokens": decision.num_pulled_tokens,
        "num_compute_tokens": decision.num_compute_tokens,
        "reserved_ms": _ms(timeline, attempt.reserved_at),
        "accepted_ms": _ms(timeline, attempt.accepted_at),
        "refused_ms": _ms(timeline, attempt.refused_at),
        "refused_by": attempt.refused_by,
        "scores": scores,
        "matched_tokens": matched,
        "why": _why(decision, scores, matched, num_prompt_tokens, attempt.degraded),
    }


def _phase(timeline: RequestTimeline, span: Span) -> Json:
    return {
        "name": span.phase.value,
        "leg": span.leg,
        "start_ms": _ms(timeline, span.began_at),
        "duration_ms": round((span.ended_at - span.began_at) * 1000, 3),
        "worker": span.worker_id,
    }


def _ms(timeline: RequestTimeline, at: float | None) -> float | None:
    return None if at is None else round((at - timeline.arrived_at) * 1000, 3)


def _latest_attempt(timeline: RequestTimeline) -> Attempt | None:
    return next((leg.attempts[-1] for leg in reversed(timeline.legs) if leg.attempts), None)


def _scores(decision: Decision) -> dict[str, float]:
    """The lowest first."""
    return dict(sorted(decision.scores.items(), key=lambda item: item[1]))


def _leading(scores: Mapping[str, float], chosen: Sequence[str]) -> dict[str, float]:
    """The chosen ones' and the lowest."""
    shown = dict.fromkeys([*(w for w in chosen if w in scores), *scores])
    return {worker: scores[worker] for worker in list(shown)[:MAX_LINE_WORKERS]}


def _cached(matched: Mapping[str, int], worker: str, num_prompt_tokens: int) -> str:
    held = matched.get(worker, 0)
    text = f"{held} of {num_prompt_tokens} prompt tokens are cached there"
    most = max(matched.values(), default=0)
    return text if most <= held else f"{text} (the most anywhere: {most})"


def _rank(scores: Mapping[str, float], worker: str) -> str:
    """Among the workers of the same role, with which their ids begin."""
    own = scores.get(worker)
    if own is None:
        return "chosen without a score"
    kind = _kind(worker)
    others = [score for other, score in scores.items() if other != worker and _kind(other) == kind]
    if not others:
        return f"the only {kind} worker that could take it (cost {own:.4g})"
    among = f"{len(others) + 1} {kind} workers"
    best = min(others)
    if own < best:
        return f"the lowest cost of {among} ({own:.4g}; next {best:.4g})"
    if own == best:
        ties = sum(score == own for score in others)
        return f"the lowest cost of {among} ({own:.4g}; {ties} more cost the same)"
    cheaper = sum(score < own for score in others)
    return f"cost {own:.4g}, where {cheaper} of {among} cost less"


def _kind(worker_id: str) -> str:
    return worker_id.partition("-")[0]
