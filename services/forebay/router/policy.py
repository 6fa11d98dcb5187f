"""Least loaded: the emptiest decode worker, and the prefill worker with the shortest queue that
can hand KV to it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from forebay.core.roles import WorkerRole
from forebay.router.view import Decision, RouteRequest, WorkerView


def choose(request: RouteRequest, view: Sequence[WorkerView]) -> Decision | None:
    """A decode worker with a prefill worker that fits it, or a mixed worker alone, whichever
    decodes at the lower cost; None while no worker has room to compute the prompt."""
    candidates = [
        worker
        for worker in _accepting(request.model_key, view)
        if worker.worker_id not in request.excluded
    ]
    scores = {worker.worker_id: cost(worker) for worker in candidates}
    prefills = [w for w in candidates if w.role is WorkerRole.PREFILL and has_room(w)]

    def rank(worker: WorkerView) -> tuple[float, bytes]:
        return scores[worker.worker_id], _rendezvous(request.request_id, worker.worker_id)

    for worker in sorted(candidates, key=rank):
        if worker.role is WorkerRole.MIXED and has_room(worker):
            return Decision(worker.worker_id, None, scores)
        partners = [prefill for prefill in prefills if compatible(prefill, worker)]
        if worker.role is WorkerRole.DECODE and partners:
            return Decision(worker.worker_id, min(partners, key=rank).worker_id, scores)
    return None


def can_serve(model_key: str, view: Sequence[WorkerView]) -> bool:
    """Whether the workers that are there, busy or not, make up a place for this model."""
    workers = _accepting(model_key, view)
    prefills = [worker for worker in workers if worker.role is WorkerRole.PREFILL]
    return any(
        worker.role is WorkerRole.MIXED
        or (worker.role is WorkerRole.DECODE and any(compatible(p, worker) for p in prefills))
        for worker in workers
    )


def has_room(worker: WorkerView) -> bool:
    return worker.prefill_room_tokens > 0


def cost(worker: WorkerView) -> float:
    """Prompt tokens still to compute for a worker that prefills, sequences and KV use for one that
    decodes; a mixed worker pays for both, a step's worth of tokens counting as a sequence."""
    decode = worker.num_sequences + worker.kv_usage
    prefill = worker.num_pending_prefill_tokens / 512
    if worker.role is WorkerRole.PREFILL:
        return prefill
    return decode if worker.role is WorkerRole.DECODE else decode + prefill


def compatible(prefill: WorkerView, decode: WorkerView) -> bool:
    """Whether KV computed by one may be decoded from by the other."""
    return (prefill.model_key, prefill.kv_key) == (decode.model_key, decode.kv_key)


def _accepting(model_key: str, view: Sequence[WorkerView]) -> list[WorkerView]:
    return [worker for worker in view if worker.accepting and worker.model_key == model_key]


def _rendezvous(request_id: str, worker_id: str) -> bytes:
    """Breaks ties differently for every request, the same way in every gateway."""
    return hashlib.blake2b(f"{request_id}/{worker_id}".encode(), digest_size=8).digest()
