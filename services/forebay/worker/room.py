"""How much more a worker takes on: beyond that, requests wait in the gateways' queues."""

from __future__ import annotations

from forebay.core.errors import Overloaded
from forebay.engine.engine import Engine
from forebay.worker.request_table import RequestTable
from forebay.worker.requests import WorkerRequest

PREFILL_QUEUE_STEPS = 2
"""Prompt tokens that may wait here, in full steps."""


class Room:
    """Only reads what the engine and the requests say now."""

    def __init__(self, engine: Engine, requests: RequestTable, max_batch_tokens: int) -> None:
        self._engine = engine
        self._requests = requests
        self._max_queued_tokens = PREFILL_QUEUE_STEPS * max_batch_tokens

    @property
    def prefill_tokens(self) -> int:
        """0 when enough prompt tokens wait here already."""
        return max(0, self._max_queued_tokens - self._engine.num_pending_prefill_tokens)

    def check(self, request: WorkerRequest) -> None:
        """Raises Overloaded: a prompt is let in only if every running sequence could still grow by
        a block, those that wait (preempted ones too) could start, and a slot of the batch is free
        for each of its choices."""
        pool, engine = self._engine.pool, self._engine
        num_seqs = self._requests.num_sequences
        if num_seqs and num_seqs + len(request.start.choices) > engine.max_num_seqs:
            raise Overloaded(f"{num_seqs} sequences are here already")
        wanted = engine.num_waiting_blocks + pool.blocks_for(len(request.start.tokens))
        if pool.num_available - wanted < engine.num_running:
            raise Overloaded("not enough free KV blocks")
