"""Sends a request where its prefix is cached, unless the way there is too busy.

All costs are in tokens of prefill work. A worker that is to compute a prompt of n tokens costs

    queued(w) + miss * missing(w)

where missing(w) is n less what w holds of its beginning (by tier: device 1, host 0.75, disk 0.25).
`miss` is above 1 because a token computed once more delays not only this request but all that come
after it, and takes the room of another block in the cache: on a queue that is busy a share p of the
time, work put in front of later arrivals costs them p / (1 - p) times itself.

Where another worker s holds more, fetching that costs less than computing it:

    queued(w) + pull_overhead + pull * (held(s) - held(w)) + miss * missing(s)

`pull` is mostly the price of a copy: it takes room in a cache that something else loses.

A worker that decodes costs

    sequence * sequences(w) + kv * kv_usage(w) ** 2 + transfer * (n - held(w))

and the last term only where another worker computes the prompt. A pair costs the sum of both and
`pair_overhead`; a worker that computes and decodes costs the sum without the transfer. A hot prefix
spreads by itself: a second worker computes it as soon as the first one's queue is longer than what
the miss costs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from forebay.router.index import Matches
from forebay.router.view import (
    Bools,
    Candidates,
    Decision,
    FleetView,
    Floats,
    KvGroup,
    RouteRequest,
    Rows,
)

_MIX = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)
_NOWHERE: Bools = np.zeros(0, np.bool_)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Of the terms above, in tokens of prefill work. local: how much dearer a token is that is
    computed between the steps of running streams. local_tokens: the most that a decode worker
    computes itself; 0: nothing. pulls: whether KV may be fetched at all."""

    miss: float = 3.0
    pull: float = 1.0
    pull_overhead: float = 512.0
    sequence: float = 64.0
    kv: float = 4096.0
    transfer: float = 0.1
    pair_overhead: float = 32.0
    local: float = 2.0
    local_tokens: int = 64
    pulls: bool = True


class Policy(Protocol):
    """`choose` is None when no worker that may take the request makes up a place for it. It depends
    on its arguments, and for some policies on the decisions before, and on nothing else."""

    def choose(
        self, request: RouteRequest, view: FleetView, matches: Matches
    ) -> Decision | None: ...


class KvAware:
    """Implements `Policy`; keeps no state."""

    def __init__(self, weights: Weights | None = None) -> None:
        self._weights = weights or Weights()

    def choose(self, request: RouteRequest, view: FleetView, matches: Matches) -> Decision | None:
        return choose(request, view, matches, self._weights)


@dataclass(frozen=True, slots=True)
class _Option:
    """`computes`, `decodes`: rows, the same where one worker does both."""

    cost: float
    computes: int
    decodes: int


def choose(
    request: RouteRequest, view: FleetView, matches: Matches, weights: Weights
) -> Decision | None:
    """The cheapest place; between equal ones the rendezvous hash of the prefix decides, so that
    gateways that know nothing of each other agree."""
    group = view.group(request.model_key)
    if group is None:
        return None
    usable = usable_rows(request, view)
    tie_key = _tie_key(request)
    costs = np.full(len(view), np.inf)
    best: tuple[_Option, _Prompt] | None = None
    for kv_group in group.kv_groups:
        prompt = _Prompt.of(request, view, matches, kv_group, weights)
        option = _best_option(prompt, view, kv_group, usable, tie_key, weights, costs)
        if option is not None and (best is None or option.cost < best[0].cost):
            best = option, prompt
    if best is None:
        return None
    option, prompt = best
    candidates = Candidates(view.worker_ids, group.rows, costs, prompt.held)
    return _decision(option, prompt, view, candidates)


def can_serve(model_key: str, view: FleetView) -> bool:
    """Whether the workers that are there, busy or not, make up a place for this model."""
    group = view.group(model_key)
    if group is None:
        return False
    there = view.accepting
    return bool(there[group.mixed].any()) or any(
        bool(there[g.prefill].any()) and bool(there[g.decode].any()) for g in group.kv_groups
    )


def usable_rows(request: RouteRequest, view: FleetView) -> Bools:
    """Of all rows, those that may be chosen."""
    if not request.excluded:
        return view.accepting
    usable = view.accepting.copy()
    for worker_id in request.excluded:
        row = view.row_of(worker_id)
        if row is not None:
            usable[row] = False
    return usable


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What a prompt costs to compute, by row; figures of rows outside the KV group mean nothing.

    held: tokens of its beginning that are there. work: cost to compute the rest there, in the
    cheaper of the two ways. source: the row that holds most. pulls: where fetching from `source` is
    the cheaper way."""

    num_tokens: int
    held: Floats
    work: Floats
    source: int
    pulls: Bools

    @classmethod
    def of(
        cls,
        request: RouteRequest,
        view: FleetView,
        matches: Matches,
        kv_group: KvGroup,
        weights: Weights,
    ) -> _Prompt:
        """At least the last token is always computed: its logits are wanted."""
        most = request.num_tokens - 1
        held = np.minimum(view.by_row(matches.num_blocks) * kv_group.block_size, most)
        saved = held
        if matches.weighted is not matches.num_blocks:
            saved = np.minimum(view.by_row(matches.weighted) * kv_group.block_size, most)
        work = weights.miss * (request.num_tokens - saved)
        pulls = _NOWHERE
        rows = _among(kv_group.rows, view.accepting)
        source = int(rows[np.argmax(saved[rows])]) if len(rows) else 0
        if weights.pulls and len(rows) and held[source]:
            rest = weights.miss * (request.num_tokens - saved[source])
            missing = held[source] - held
            by_pull = rest + weights.pull_overhead + weights.pull * missing
            pulls = (missing > 0) & (by_pull < work)
            work = np.where(pulls, by_pull, work)
        return cls(request.num_tokens, held, work, source, pulls)


def _best_option(
    prompt: _Prompt,
    view: FleetView,
    kv_group: KvGroup,
    usable: Bools,
    tie_key: np.uint64,
    weights: Weights,
    costs: Floats,
) -> _Option | None:
    """Writes the costs of the group's rows into `costs`, for whoever wants to know."""
    computing = view.num_queued_tokens + prompt.work
    decoding = weights.sequence * view.num_sequences + weights.kv * view.kv_usage**2
    receiving = decoding + weights.transfer * (prompt.num_tokens - prompt.held)
    options = []
    prefills = _among(kv_group.prefill, usable)
    decodes = _among(kv_group.decode, usable)
    costs[prefills] = computing[prefills]
    if len(prefills) and len(decodes):
        costs[decodes] = receiving[decodes]
        prefill = cheapest(prefills, computing, view, tie_key)
        decode = cheapest(decodes, receiving, view, tie_key)
        total = computing[prefill] + receiving[decode] + weights.pair_overhead
        options.append(_Option(float(total), prefill, decode))
        local = _local(prompt, view, decodes, decoding, tie_key, weights)
        if local is not None:
            options.append(local)
    mixed = _among(kv_group.mixed, usable)
    if len(mixed):
        alone = computing + decoding
        costs[mixed] = alone[mixed]
        row = cheapest(mixed, alone, view, tie_key)
        options.append(_Option(float(alone[row]), row, row))
    return min(options, key=lambda option: option.cost, default=None)


def _local(
    prompt: _Prompt,
    view: FleetView,
    decodes: Rows,
    decoding: Floats,
    tie_key: np.uint64,
    weights: Weights,
) -> _Option | None:
    """A decode worker that computes what is left of the prompt itself."""
    missing = prompt.num_tokens - prompt.held
    able = decodes[missing[decodes] <= weights.local_tokens]
    if not len(able):
        return None
    costs = view.num_queued_tokens + weights.local * weights.miss * missing + decoding
    row = cheapest(able, costs, view, tie_key)
    return _Option(float(costs[row]), row, row)


def _among(rows: Rows, usable: Bools) -> Rows:
    """Those of `rows` that are usable; mostly all are."""
    mask = usable.take(rows)
    return rows if mask.all() else rows[mask]


def cheapest(rows: Rows, costs: Floats, view: FleetView, tie_key: np.uint64) -> int:
    """Of `rows`, at least one; equal ones by rendezvous hashing."""
    mine = costs.take(rows)
    equal = rows[mine == mine.min()]
    if len(equal) == 1:
        return int(equal[0])
    mixed = (view.tie_breakers[equal] ^ tie_key) * _MIX
    mixed = (mixed ^ (mixed >> _SHIFT)) * _MIX
    return int(equal[np.argmax(mixed)])


def _tie_key(request: RouteRequest) -> np.uint64:
    """Of the longest prefix that could be cached: equal prompts meet."""
    if request.hashes:
        return np.uint64(int.from_bytes(request.hashes[-1][:8], "little"))
    return rendezvous_key(request.request_id)


def rendezvous_key(text: str) -> np.uint64:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _decision(
    option: _Option, prompt: _Prompt, view: FleetView, candidates: Candidates
) -> Decision:
    ids, row = view.worker_ids, option.computes
    is_local = option.computes == option.decodes
    pulls = prompt.pulls is not _NOWHERE and bool(prompt.pulls[row])
    held = int(prompt.held[prompt.source if pulls else row])
    return Decision(
        decode=ids[option.decodes],
        prefill=None if is_local else ids[row],
        has_room=bool(view.prefill_room_tokens[row] > 0),
        num_compute_tokens=prompt.num_tokens - held,
        pull_from=ids[prompt.source] if pulls else None,
        num_pulled_tokens=held - int(prompt.held[row]) if pulls else 0,
        candidates=candidates,
    )
