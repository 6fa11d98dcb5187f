"""How much more a worker takes on: beyond that, requests wait in the gateways' queues."""

from __future__ import annotations

from forebay.core.errors import Overloaded
from forebay.engine.engine import Engine
from forebay.engine.wire import load_of
from forebay.rpc.v1 import worker_pb2
from forebay.worker.pull import MAX_PULLS, Pulls
from forebay.worker.request_table import RequestTable
from forebay.worker.requests import WorkerRequest

PREFILL_QUEUE_STEPS = 2
"""Prompt tokens that may wait here, in full steps."""


class Room:
    """Only reads what the engine, the pulls and the requests say now."""

    def __init__(
        self, engine: Engine, pulls: Pulls, requests: RequestTable, max_batch_tokens: int
    ) -> None:
        self._engine = engine
        self._pulls = pulls
        self._requests = requests
        self._max_queued_tokens = PREFILL_QUEUE_STEPS * max_batch_tokens

    @property
    def prefill_tokens(self) -> int:
        """0 when enough prompt tokens wait here already, or not even the smallest prompt would be
        let in."""
        return self._left_of(self._num_pending_tokens)

    def load(self) -> worker_pb2.WorkerLoad:
        """Prompts that wait for KV from elsewhere wait like others."""
        load = load_of(self._engine)
        load.num_waiting += self._pulls.num_waiting
        load.num_pending_prefill_tokens = self._num_pending_tokens
        load.prefill_room_tokens = self._left_of(load.num_pending_prefill_tokens)
        return load

    def _left_of(self, num_pending_tokens: int) -> int:
        if num_pending_tokens >= self._max_queued_tokens or self._pulls.num_waiting >= MAX_PULLS:
            return 0
        if not self._has_slot or self._num_spare_blocks < 1:
            return 0
        return self._max_queued_tokens - num_pending_tokens

    def check(self, request: WorkerRequest) -> None:
        """Raises Overloaded: a prompt is let in only if every running sequence could still grow by
        a block, those that wait (preempted ones too) could start, and a slot of the batch is free.
        One slot does for several choices: what has no place in a step waits for the next."""
        if not self._has_slot:
            raise Overloaded("as many sequences as fit into a batch are here already")
        if self._engine.pool.blocks_for(len(request.start.tokens)) > self._num_spare_blocks:
            raise Overloaded("not enough free KV blocks")

    def check_prefill(self, request: WorkerRequest) -> None:
        """`check`, and raises Overloaded for one that would only wait."""
        self.check(request)
        if self.prefill_tokens == 0:
            raise Overloaded("enough prompts wait here already")

    @property
    def _has_slot(self) -> bool:
        """A prompt whose KV goes elsewhere is one sequence, whatever its choices."""
        num_seqs = sum(1 if r.target is not None else len(r.going_on) for r in self._requests)
        return num_seqs < self._engine.max_num_seqs

    @property
    def _num_pending_tokens(self) -> int:
        """To be computed; of prompts that wait for KV from elsewhere only what stays behind it."""
        return self._engine.num_pending_prefill_tokens + self._pulls.num_pending_tokens

    @property
    def _num_spare_blocks(self) -> int:
        engine = self._engine
        num_waiting = engine.num_waiting_blocks + self._pulls.num_waiting_blocks
        return engine.pool.num_available - num_waiting - engine.num_running
