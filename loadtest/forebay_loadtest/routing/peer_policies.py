"""What other routers publish about how they choose, on the interface of ours, to be compared with.

Formulas and defaults come from their documentation and were written anew. All three get what is
best for them here: the same index as ours (events, and predictions of their own choices), without
loss, and requests that are never queued in front of the router. Where they need to know how many
prompts a prefill worker has, `FleetView.num_sequences` tells.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import numpy as np

from forebay.router.index import Matches
from forebay.router.places import Places
from forebay.router.view import Decision, FleetView, Floats, RouteRequest


class _Outstanding:
    """Tokens of the prompts that were sent to a worker and are not done, told by how many it has:
    workers compute them in the order in which they came."""

    def __init__(self) -> None:
        self._sent: defaultdict[str, deque[int]] = defaultdict(deque)

    def tokens(self, places: Places) -> Floats:
        view = places.view
        return np.array([self._left(view, row) for row in places.rows.tolist()], np.float64)

    def add(self, worker_id: str, num_tokens: int) -> None:
        self._sent[worker_id].append(num_tokens)

    def _left(self, view: FleetView, row: int) -> int:
        sent = self._sent[view.worker_ids[row]]
        while len(sent) > view.num_sequences[row]:
            sent.popleft()
        return sum(sent)


@dataclass(frozen=True, slots=True)
class DynamoParameters:
    """credit: of a cached block against the prefill load. decay: how much of that credit a worker
    loses with work queued beyond the least loaded one's. temperature: of the softmax over costs
    divided by their range; 0: the least. modelled: whether a prompt under way counts for what is
    left of it (its duration known exactly, as with a perfect prefill load model) instead of whole
    until its first token."""

    credit: float = 1.0
    decay: float = 0.0
    temperature: float = 0.0
    modelled: bool = False


class Dynamo:
    """NVIDIA Dynamo 1.6, `--router-mode kv` (docs/components/router/router-concepts.md, "Cost
    Calculation"; router-configuration.md, "Tuning Guidelines"; options of ai-dynamo 1.6.1):

        cost = max(active prefill blocks + blocks of the prompt - credit * cached blocks, 0)
        credit' = credit / (1 + decay * active blocks beyond the least / blocks of the prompt)

    The other term, active decode blocks, is nil for workers that only prefill, as the second page
    advises to set it; then the scale of the first term (once the overlap score weight) changes
    nothing. Active prefill tokens are the router's own reckoning: uncached tokens that it has sent.
    """

    def __init__(self, parameters: DynamoParameters | None = None, seed: int = 0) -> None:
        self._parameters = parameters or DynamoParameters()
        self._active = _Outstanding()
        self._dice = random.Random(seed)

    def choose(self, request: RouteRequest, view: FleetView, matches: Matches) -> Decision | None:
        places = Places.of(request, view, matches)
        if places is None:
            return None
        decision = places.cheapest(self._sampled(self._costs(places)))
        self._active.add(decision.computes, decision.num_compute_tokens)
        return decision

    def _costs(self, places: Places) -> Floats:
        has = self._parameters
        active = places.queued if has.modelled else self._active.tokens(places)
        num_tokens = places.request.num_tokens
        credit = has.credit / (1 + has.decay * (active - active.min()) / num_tokens)
        cached = places.held[places.rows]
        costs: Floats = np.maximum(active + num_tokens - credit * cached, 0.0)
        return costs

    def _sampled(self, costs: Floats) -> Floats:
        """Zero for the one that the dice choose, one for the others."""
        spread = float(costs.max() - costs.min())
        if self._parameters.temperature == 0 or spread == 0:
            return costs
        logits = (costs.min() - costs) / spread / self._parameters.temperature
        weights = np.exp(logits)
        (row,) = self._dice.choices(range(len(costs)), weights.tolist())
        return np.where(np.arange(len(costs)) == row, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class SglangParameters:
    """max_tree_blocks: of one worker's tree; theirs of 2 ** 26 characters are as many tokens as
    about 2 ** 15 blocks of 512. otherwise: where a prompt goes that matches too little, to the
    smallest tree as documented or to the shortest queue as in later releases."""

    cache_threshold: float = 0.3
    balance_abs_threshold: int = 64
    balance_rel_threshold: float = 1.5
    max_tree_blocks: int = 1 << 15
    otherwise: Literal["smallest tree", "shortest queue"] = "smallest tree"


class Sglang:
    """SGLang's router 0.3.2, `--policy cache_aware` (sgl-model-gateway/src/policies/cache_aware.rs,
    the comment at its top; options and defaults of sglang-router 0.3.2): a tree for each worker of
    what was sent there. If the most requests at a worker exceed the least both by more than
    balance_abs_threshold and by more than balance_rel_threshold times, the worker with the fewest;
    else the longest match, if it is more than cache_threshold of the prompt. Trees are of blocks
    instead of characters and are cut as soon as they are too large, not once a minute.
    """

    def __init__(self, parameters: SglangParameters | None = None) -> None:
        self._parameters = parameters or SglangParameters()
        self._trees: defaultdict[str, OrderedDict[bytes, None]] = defaultdict(OrderedDict)

    def choose(self, request: RouteRequest, view: FleetView, matches: Matches) -> Decision | None:
        places = Places.of(request, view, matches)
        if places is None:
            return None
        decision = places.cheapest(self._costs(places))
        tree = self._trees[decision.computes]
        for block in reversed(request.hashes):
            tree[block] = None
            tree.move_to_end(block)
        while len(tree) > self._parameters.max_tree_blocks:
            tree.popitem(last=False)
        return decision

    def _costs(self, places: Places) -> Floats:
        has, view = self._parameters, places.view
        num_requests: Floats = view.num_sequences[places.rows]
        most, least = num_requests.max(), num_requests.min()
        if most - least > has.balance_abs_threshold and most > has.balance_rel_threshold * least:
            return num_requests
        trees = [self._trees[view.worker_ids[row]] for row in places.rows.tolist()]
        matched = np.array([_run(tree, places.request.hashes) for tree in trees], np.float64)
        block_size = view.facts[places.rows[0]].block_size
        if matched.max() * block_size > has.cache_threshold * places.request.num_tokens:
            return -matched
        if has.otherwise == "shortest queue":
            return num_requests
        return np.array([len(tree) for tree in trees], np.float64)


def _run(tree: OrderedDict[bytes, None], hashes: Sequence[bytes]) -> int:
    return next((i for i, block in enumerate(hashes) if block not in tree), len(hashes))


class Load(Enum):
    """llm-d's scorers of load. Waiting requests are those that the worker has not begun."""

    QUEUE = "queue-scorer"
    LOAD_AWARE = "load-aware-scorer"
    ACTIVE_REQUESTS = "active-request-scorer"
    TOKENS = "token-load-scorer"


@dataclass(frozen=True, slots=True)
class LlmdParameters:
    """prefix, load: weights of the scorers. threshold: of load-aware requests or token-load tokens.
    relative: prefix scores spread over 0 to 1 between the workers that have any (release 0.8.0);
    otherwise the share of the prompt that is cached (after it)."""

    prefix: float = 2.0
    load: float = 1.0
    scorer: Load = Load.QUEUE
    threshold: float = 128.0
    relative: bool = False


class Llmd:
    """llm-d's inference scheduler, 0.8.0 and commit 520af478 (pkg/epp/framework/plugins/scheduling/
    scorer/*/README.md; deploy/config/epp-precise-prefix-cache-config.yaml): the highest weighted
    sum of scores from 0 to 1, of a prefix scorer over KV events and of a load scorer. The scorer of
    KV utilisation is left out: a worker that computes one prompt at a time uses next to nothing.
    """

    def __init__(self, parameters: LlmdParameters | None = None) -> None:
        self._parameters = parameters or LlmdParameters()
        self._in_flight = _Outstanding()

    def choose(self, request: RouteRequest, view: FleetView, matches: Matches) -> Decision | None:
        places = Places.of(request, view, matches)
        if places is None:
            return None
        has = self._parameters
        scores = has.prefix * self._prefix(places) + has.load * self._load(places)
        decision = places.cheapest(-scores)
        self._in_flight.add(decision.computes, _in_flight_tokens(request))
        return decision

    def _prefix(self, places: Places) -> Floats:
        cached = places.held[places.rows]
        if not self._parameters.relative:
            shares: Floats = cached / places.request.num_tokens
            return shares
        some = cached[cached > 0]
        if not len(some):
            return np.zeros(len(cached))
        if some.min() == some.max():
            return (cached > 0).astype(np.float64)
        spread: Floats = np.maximum(cached - some.min(), 0) / (some.max() - some.min())
        return spread

    def _load(self, places: Places) -> Floats:
        num_requests: Floats = places.view.num_sequences[places.rows]
        waiting = np.maximum(num_requests - 1, 0)
        most = self._parameters.threshold
        match self._parameters.scorer:
            case Load.QUEUE:
                spread = waiting.max() - waiting.min()
                scores = (waiting.max() - waiting) / spread if spread else np.ones(len(waiting))
            case Load.LOAD_AWARE:
                scores = 0.5 * (1 - np.minimum(waiting, most) / most)
            case Load.ACTIVE_REQUESTS:
                busiest = max(num_requests.max(), 1.0)
                scores = np.where(num_requests == 0, 1.0, (busiest - num_requests) / busiest)
            case Load.TOKENS:
                scores = 1 - np.minimum(self._in_flight.tokens(places), most) / most
        return scores


def _in_flight_tokens(request: RouteRequest) -> int:
    """inflight-load-producer reckons an answer with one and a half times the prompt's tokens."""
    return math.ceil(2.5 * request.num_tokens)


DYNAMO_GRID = (
    *(DynamoParameters(credit) for credit in (1.0, 2.0, 3.0, 4.0)),
    *(DynamoParameters(credit, modelled=True) for credit in (1.0, 2.0, 3.0, 4.0, 6.0)),
    DynamoParameters(1.0, temperature=0.1, modelled=True),
    DynamoParameters(3.0, temperature=0.05, modelled=True),
    DynamoParameters(3.0, decay=0.25, modelled=True),
)
SGLANG_GRID = (
    SglangParameters(),
    *(SglangParameters(share, most) for share in (0.5, 0.7, 0.9) for most in (4, 8, 16)),
    SglangParameters(0.5, 8, max_tree_blocks=4096),
    SglangParameters(0.5, 8, otherwise="shortest queue"),
    SglangParameters(0.7, 8, otherwise="shortest queue"),
)
LLMD_GRID = (
    LlmdParameters(2.0, 1.0, Load.QUEUE, relative=True),
    LlmdParameters(1.0, 1.0, Load.QUEUE, relative=True),
    LlmdParameters(3.0, 1.0, Load.QUEUE),
    LlmdParameters(2.0, 1.0, Load.QUEUE),
    LlmdParameters(1.0, 1.0, Load.QUEUE),
    LlmdParameters(1.0, 1.0, Load.LOAD_AWARE, 128),
    LlmdParameters(1.0, 1.0, Load.LOAD_AWARE, 16),
    LlmdParameters(1.0, 1.0, Load.ACTIVE_REQUESTS),
    LlmdParameters(1.0, 1.0, Load.TOKENS, 1 << 22),
    LlmdParameters(1.0, 1.0, Load.TOKENS, 1 << 20),
    LlmdParameters(1.0, 1.0, Load.TOKENS, 1 << 19),
    LlmdParameters(1.0, 1.0, Load.TOKENS, 1 << 18),
)
