"""Simple policies to compare with, and to fall back on. Each says by one rule which worker computes
the prompt; the decode worker is the least loaded one. None fetches KV from another worker."""

from __future__ import annotations

import numpy as np

from forebay.router.index import Matches
from forebay.router.places import Places
from forebay.router.policy import Weights, rendezvous_key
from forebay.router.routed_prefixes import RoutedPrefixes
from forebay.router.view import Decision, FleetView, Floats, RouteRequest

_WEIGHTS = Weights()


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, request: RouteRequest, view: FleetView, matches: Matches) -> Decision | None:
        places = Places.of(request, view, matches)
        if places is None:
            return None
        num_rows = len(places.rows)
        turns = (np.arange(num_rows) - self._turn) % num_rows
        self._turn += 1
        return places.cheapest(turns.astype(np.float64))


class LeastLoaded:
    """Where the least prefill work is queued; of a mixed worker its streams count too."""

    def choose(self, request: RouteRequest, view: FleetView, matches: Matches) -> Decision | None:
        places = Places.of(request, view, matches)
        return None if places is None else places.cheapest(_load(places))


class ConsistentHash:
    """Prompts with the same first blocks go to the same worker, by rendezvous hashing, unless that
    one has more than `bound` times the mean work queued, this prompt's share included: then to the
    next in the order that has not (bounded loads: Mirrokni et al., arXiv:1608.01350)."""

    def __init__(self, num_blocks: int = 4, bound: float = 1.25) -> None:
        self._num_blocks = num_blocks
        self._bound = bound

    def choose(self, request: RouteRequest, view: FleetView, matches: Matches) -> Decision | None:
        places = Places.of(request, view, matches)
        if places is None:
            return None
        load = _load(places)
        most = self._bound * (load.sum() + request.num_tokens) / len(load)
        return places.cheapest((load > most).astype(np.float64), self._key(request))

    def _key(self, request: RouteRequest) -> np.uint64 | None:
        if not request.hashes:
            return None
        last = min(self._num_blocks, len(request.hashes)) - 1
        return rendezvous_key(request.hashes[last].hex())


class LongestPrefix:
    """Where most of the prompt is cached, however much is queued there: what is hot gets hotter."""

    def choose(self, request: RouteRequest, view: FleetView, matches: Matches) -> Decision | None:
        places = Places.of(request, view, matches)
        return None if places is None else places.cheapest(places.missing)


class ApproximatePrefixTree:
    """Queued work and what is left of the prompt, reckoned from what this gateway has itself sent
    where: no events, so it does not know what workers have evicted, nor what others sent."""

    def __init__(self, max_blocks: int = 1 << 18) -> None:
        self._routed = RoutedPrefixes(max_blocks)

    def choose(self, request: RouteRequest, view: FleetView, matches: Matches) -> Decision | None:
        places = Places.of(request, view, matches)
        if places is None:
            return None
        sent = self._routed.match(request.hashes)
        tokens = [
            sent.get(view.worker_ids[row], 0) * view.facts[row].block_size
            for row in places.rows.tolist()
        ]
        decision = places.cheapest(_load(places) - np.array(tokens, np.float64))
        if decision.has_room:
            self._routed.add(request.hashes, decision.computes)
        return decision


def _load(places: Places) -> Floats:
    """Tokens of prefill work, in the terms of `policy.Weights`."""
    view, rows = places.view, places.rows
    decoding = _WEIGHTS.sequence * view.num_sequences + _WEIGHTS.kv * view.kv_usage**2
    load: Floats = places.queued + decoding[rows] * np.isin(rows, places.group.mixed)
    return load
