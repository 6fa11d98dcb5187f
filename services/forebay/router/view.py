"""What the router sees of the fleet: one row a worker, one numpy column a figure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from forebay.core.roles import WorkerRole

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.intp]

NO_SLOT = -1


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What never changes in a worker's life. model_key: equal for workers whose tokens mean the
    same (id, revision, adapter, tokenizer). kv_key: equal for workers between which KV can move as
    it is. block_size: tokens per KV block."""

    worker_id: str
    role: WorkerRole
    model_key: str
    kv_key: str
    block_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """As the worker last told it, plus what this gateway has sent there since.

    accepting: neither draining nor silent. num_queued_tokens: prompt tokens to compute there before
    a new prompt's turn. prefill_room_tokens: prompts are taken while this is above 0. kv_usage:
    share of the KV blocks that are held, 0 to 1."""

    accepting: bool = True
    num_sequences: int = 0
    num_queued_tokens: int = 0
    prefill_room_tokens: int = 1
    kv_usage: float = 0.0


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """num_tokens: to be computed before the next one can be sampled. hashes: of their full blocks.
    excluded: workers that must not be chosen."""

    request_id: str
    model_key: str
    num_tokens: int
    hashes: Sequence[bytes] = ()
    excluded: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Candidates:
    """What was weighed, kept as columns: most decisions are never looked at. costs: infinite where
    a worker could not be chosen. held: prompt tokens that it holds, as far as is known."""

    worker_ids: tuple[str, ...]
    rows: Rows
    costs: Floats
    held: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """prefill is None when `decode` computes the prompt itself.

    has_room: whether the worker that computes the prompt takes one now; otherwise the request waits
    for it. num_compute_tokens: prompt tokens left to compute there, num_pulled_tokens: to fetch
    from `pull_from` first, as far as is known.
    """

    decode: str
    prefill: str | None
    has_room: bool
    num_compute_tokens: int
    candidates: Candidates
    pull_from: str | None = None
    num_pulled_tokens: int = 0

    @property
    def computes(self) -> str:
        """The worker that computes the prompt."""
        return self.decode if self.prefill is None else self.prefill

    @property
    def scores(self) -> dict[str, float]:
        """Cost in tokens by candidate, lower is better."""
        among = self.candidates
        pairs = zip(among.rows.tolist(), among.costs[among.rows].tolist(), strict=True)
        return {among.worker_ids[row]: round(cost, 3) for row, cost in pairs if isfinite(cost)}

    @property
    def matched(self) -> dict[str, int]:
        """Prompt tokens held, by candidate that holds any."""
        among = self.candidates
        pairs = zip(among.rows.tolist(), among.held[among.rows].tolist(), strict=True)
        return {among.worker_ids[row]: int(held) for row, held in pairs if held}


class FleetView:
    """Rows in the order of joining. `slots`: the workers' bits in the KV index, NO_SLOT where it
    knows nothing of one. The columns are the view's own: read them, do not change them."""

    def __init__(self) -> None:
        self.worker_ids: tuple[str, ...] = ()
        self.facts: tuple[WorkerFacts, ...] = ()
        self._row_of: dict[str, int] = {}
        self._columns: dict[str, npt.NDArray[Any]] = {}
        self._groups: dict[str, ModelGroup] = {}
        self._rebuild([], [])

    @classmethod
    def of(cls, workers: Mapping[WorkerFacts, WorkerLoad]) -> FleetView:
        view = cls()
        for facts, load in workers.items():
            view.join(facts)
            view.update(facts.worker_id, load)
        return view

    def __len__(self) -> int:
        return len(self.worker_ids)

    def __contains__(self, worker_id: str) -> bool:
        return worker_id in self._row_of

    def row_of(self, worker_id: str) -> int | None:
        return self._row_of.get(worker_id)

    def join(self, facts: WorkerFacts) -> None:
        assert facts.worker_id not in self._row_of
        self._rebuild([*self.facts, facts], range(len(self)))

    def leave(self, worker_id: str) -> None:
        gone = self._row_of[worker_id]
        kept = [row for row in range(len(self)) if row != gone]
        self._rebuild([self.facts[row] for row in kept], kept)

    def update(self, worker_id: str, load: WorkerLoad) -> None:
        row = self._row_of[worker_id]
        self.accepting[row] = load.accepting
        self.num_sequences[row] = load.num_sequences
        self._columns["num_worker_tokens"][row] = load.num_queued_tokens
        self.prefill_room_tokens[row] = load.prefill_room_tokens
        self.kv_usage[row] = load.kv_usage

    def set_line_tokens(self, num_tokens: Mapping[str, float]) -> None:
        """By worker: what waits for it in the gateways. Replaces what was set before."""
        column = self._columns["num_line_tokens"]
        column.fill(0.0)
        for worker_id, count in num_tokens.items():
            row = self._row_of.get(worker_id)
            if row is not None:
                column[row] = count

    def set_slot(self, worker_id: str, slot: int) -> None:
        row = self._row_of[worker_id]
        self.slots[row] = slot
        self._columns["known"][row] = slot != NO_SLOT

    def by_row(self, by_slot: npt.NDArray[Any]) -> Floats:
        """A column of figures by slot, 0 where a worker has no slot."""
        if not len(by_slot):
            return np.zeros(len(self))
        found: Floats = by_slot.take(self.slots) * self._columns["known"]
        return found

    def group(self, model_key: str) -> ModelGroup | None:
        return self._groups.get(model_key)

    @property
    def accepting(self) -> Bools:
        return self._columns["accepting"]

    @property
    def num_sequences(self) -> Floats:
        return self._columns["num_sequences"]

    @property
    def num_queued_tokens(self) -> Floats:
        """To compute before a new prompt's turn: on the worker, and waiting for it in a line."""
        queued: Floats = self._columns["num_worker_tokens"] + self._columns["num_line_tokens"]
        return queued

    @property
    def prefill_room_tokens(self) -> Floats:
        return self._columns["prefill_room_tokens"]

    @property
    def kv_usage(self) -> Floats:
        return self._columns["kv_usage"]

    @property
    def slots(self) -> Rows:
        return self._columns["slots"]

    @property
    def tie_breakers(self) -> npt.NDArray[np.uint64]:
        """One random number a worker, the same in every gateway."""
        return self._columns["tie_breakers"]

    def _rebuild(self, facts: Sequence[WorkerFacts], kept: Sequence[int]) -> None:
        fresh: dict[str, npt.NDArray[Any]] = {
            "accepting": np.zeros(len(facts), np.bool_),
            "num_sequences": np.zeros(len(facts), np.float64),
            "num_worker_tokens": np.zeros(len(facts), np.float64),
            "num_line_tokens": np.zeros(len(facts), np.float64),
            "prefill_room_tokens": np.zeros(len(facts), np.float64),
            "kv_usage": np.zeros(len(facts), np.float64),
            "slots": np.full(len(facts), NO_SLOT, np.intp),
            "known": np.zeros(len(facts), np.float64),
            "tie_breakers": np.zeros(len(facts), np.uint64),
        }
        for name, column in fresh.items():
            if kept:
                column[: len(kept)] = self._columns[name][list(kept)]
        ids = tuple(worker.worker_id for worker in facts)
        for row in range(len(kept), len(facts)):
            fresh["tie_breakers"][row] = _tie_breaker(ids[row])
        self.worker_ids, self.facts = ids, tuple(facts)
        self._columns = fresh
        self._row_of = {worker_id: row for row, worker_id in enumerate(ids)}
        models = dict.fromkeys(worker.model_key for worker in facts)
        self._groups = {key: ModelGroup.of(key, self.facts) for key in models}


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Rows between which KV can move. block_size: tokens per KV block."""

    rows: Rows
    prefill: Rows
    decode: Rows
    mixed: Rows
    block_size: int


@dataclass(frozen=True, slots=True)
class ModelGroup:
    """Rows of the workers of one model; `mixed` ones prefill and decode."""

    rows: Rows
    mixed: Rows
    kv_groups: tuple[KvGroup, ...]

    @classmethod
    def of(cls, model_key: str, facts: Sequence[WorkerFacts]) -> ModelGroup:
        mine = [(row, worker) for row, worker in enumerate(facts) if worker.model_key == model_key]

        def rows(kv_key: str | None, *roles: WorkerRole) -> Rows:
            found = [
                row
                for row, worker in mine
                if worker.role in roles and kv_key in (None, worker.kv_key)
            ]
            return np.array(found, np.intp)

        groups = [
            KvGroup(
                rows(kv_key, *WorkerRole),
                rows(kv_key, WorkerRole.PREFILL),
                rows(kv_key, WorkerRole.DECODE),
                rows(kv_key, WorkerRole.MIXED),
                block_size,
            )
            for kv_key, block_size in dict.fromkeys((w.kv_key, w.block_size) for _, w in mine)
        ]
        return cls(rows(None, *WorkerRole), rows(None, WorkerRole.MIXED), tuple(groups))


def _tie_breaker(worker_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(worker_id.encode(), digest_size=8).digest(), "little")
