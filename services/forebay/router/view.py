"""What the router sees of the fleet."""

from __future__ import annotations

from dataclasses import dataclass

from forebay.core.roles import WorkerRole


@dataclass(frozen=True, slots=True)
class WorkerView:
    """model_key: equal for workers whose tokens mean the same (id, revision, adapter, tokenizer).
    kv_key: equal for workers between which KV can move as it is. Load figures as the worker last
    told them, plus what this gateway has sent there since. accepting: neither draining nor silent.
    prefill_room_tokens: prompts are taken while this is above 0.
    """

    worker_id: str
    role: WorkerRole
    model_key: str
    kv_key: str
    accepting: bool
    num_sequences: int
    num_pending_prefill_tokens: int
    prefill_room_tokens: int
    kv_usage: float


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """model_key: of the workers that may take it. excluded: workers that have refused this request
    in the present attempt."""

    request_id: str
    model_key: str
    num_prompt_tokens: int
    excluded: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Decision:
    """prefill is None when `decode` computes the prompt itself. scores: worker id to cost, lower
    is better, of every candidate."""

    decode: str
    prefill: str | None
    scores: dict[str, float]
