"""Where a request can go: what policies share that choose the computing worker by a rule of their
own and leave the rest to chance or load."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forebay.router.index import Matches
from forebay.router.policy import cheapest, rendezvous_key, usable_rows
from forebay.router.view import (
    Bools,
    Candidates,
    Decision,
    FleetView,
    Floats,
    ModelGroup,
    RouteRequest,
    Rows,
)


@dataclass(frozen=True, slots=True)
class Places:
    """rows: of the workers that can compute the prompt, in the order of joining: mixed ones, and
    prefill workers that have a decode worker to send it to. held: tokens of the prompt that are
    there, by row of the view; 0 outside `rows`."""

    request: RouteRequest
    view: FleetView
    group: ModelGroup
    usable: Bools
    rows: Rows
    held: Floats

    @classmethod
    def of(cls, request: RouteRequest, view: FleetView, matches: Matches) -> Places | None:
        """None where there is no place."""
        group = view.group(request.model_key)
        if group is None:
            return None
        usable = usable_rows(request, view)
        able = np.zeros(len(view), np.bool_)
        able[group.mixed] = usable[group.mixed]
        tokens_a_block = np.zeros(len(view))
        for kv_group in group.kv_groups:
            tokens_a_block[kv_group.rows] = kv_group.block_size
            if usable[kv_group.decode].any():
                able[kv_group.prefill] = usable[kv_group.prefill]
        rows = np.flatnonzero(able)
        if not len(rows):
            return None
        held = view.by_row(matches.num_blocks) * tokens_a_block * able
        return cls(request, view, group, usable, rows, np.minimum(held, request.num_tokens - 1))

    @property
    def missing(self) -> Floats:
        """Tokens left to compute, one a row of `rows`."""
        return self.request.num_tokens - self.held[self.rows]

    @property
    def queued(self) -> Floats:
        """Tokens to compute there before this prompt's turn, one a row of `rows`."""
        return self.view.num_queued_tokens[self.rows]

    def cheapest(self, costs: Floats, tie_key: np.uint64 | None = None) -> Decision:
        """The place with the least of `costs`, one a row of `rows`; between equal ones the
        rendezvous hash of `tie_key` decides, or chance (the request's id)."""
        by_row = np.full(len(self.view), np.inf)
        by_row[self.rows] = costs
        chance = rendezvous_key(self.request.request_id)
        row = cheapest(self.rows, by_row, self.view, chance if tie_key is None else tie_key)
        is_mixed = row in self.group.mixed
        decode = row if is_mixed else self._decode(row, chance)
        ids = self.view.worker_ids
        return Decision(
            decode=ids[decode],
            prefill=None if is_mixed else ids[row],
            has_room=bool(self.view.prefill_room_tokens[row] > 0),
            num_compute_tokens=self.request.num_tokens - int(self.held[row]),
            candidates=Candidates(ids, self.group.rows, by_row, self.held),
        )

    def _decode(self, prefill: int, chance: np.uint64) -> int:
        """The decode worker with the fewest sequences, then the one with the most free KV."""
        kv_group = next(group for group in self.group.kv_groups if prefill in group.prefill)
        rows = kv_group.decode[self.usable[kv_group.decode]]
        load = self.view.num_sequences + self.view.kv_usage
        return cheapest(rows, load, self.view, chance)
