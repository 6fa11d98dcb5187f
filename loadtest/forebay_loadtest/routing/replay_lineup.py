"""The policies that are replayed, by name, and the grids that those of others are tuned over."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum

from forebay.router.baselines import (
    ApproximatePrefixTree,
    ConsistentHash,
    LeastLoaded,
    LongestPrefix,
    RoundRobin,
)
from forebay.router.policy import KvAware, Policy, Weights
from forebay_loadtest.routing.peer_policies import (
    DYNAMO_GRID,
    LLMD_GRID,
    SGLANG_GRID,
    Dynamo,
    DynamoParameters,
    Llmd,
    LlmdParameters,
    Sglang,
    SglangParameters,
)

Parameters = Weights | DynamoParameters | SglangParameters | LlmdParameters

ROUND_ROBIN = "round-robin"
LEAST_LOADED = "least-loaded"
CONSISTENT_HASH = "consistent-hash"
APPROXIMATE_TREE = "approximate-tree"
LONGEST_PREFIX = "longest-prefix"
SGLANG = "sglang"
LLMD = "llm-d"
DYNAMO = "dynamo"
NO_PULLS = "forebay-no-pulls"
FOREBAY = "forebay"

PEERS = (SGLANG, LLMD, DYNAMO)


@dataclass(frozen=True, slots=True)
class Entrant:
    """A policy with its parameters, None where there are none to tune."""

    name: str
    parameters: Parameters | None = None

    def policy(self, num_blocks: int) -> Policy:
        """A fresh one. num_blocks: of all workers together."""
        match self.parameters:
            case Weights() as weights:
                return KvAware(weights)
            case DynamoParameters() as parameters:
                return Dynamo(parameters)
            case SglangParameters() as parameters:
                return Sglang(parameters)
            case LlmdParameters() as parameters:
                return Llmd(parameters)
        if self.name == APPROXIMATE_TREE:
            return ApproximatePrefixTree(num_blocks)
        return _SIMPLE[self.name]()

    def described(self) -> dict[str, object]:
        if self.parameters is None:
            return {}
        pairs = asdict(self.parameters).items()
        return {key: value.value if isinstance(value, Enum) else value for key, value in pairs}


_SIMPLE: dict[str, type[RoundRobin | LeastLoaded | ConsistentHash | LongestPrefix]] = {
    ROUND_ROBIN: RoundRobin,
    LEAST_LOADED: LeastLoaded,
    CONSISTENT_HASH: ConsistentHash,
    LONGEST_PREFIX: LongestPrefix,
}

LINEUP: dict[str, tuple[Entrant, ...]] = {
    ROUND_ROBIN: (Entrant(ROUND_ROBIN),),
    LEAST_LOADED: (Entrant(LEAST_LOADED),),
    CONSISTENT_HASH: (Entrant(CONSISTENT_HASH),),
    APPROXIMATE_TREE: (Entrant(APPROXIMATE_TREE),),
    LONGEST_PREFIX: (Entrant(LONGEST_PREFIX),),
    SGLANG: tuple(Entrant(SGLANG, point) for point in SGLANG_GRID),
    LLMD: tuple(Entrant(LLMD, point) for point in LLMD_GRID),
    DYNAMO: tuple(Entrant(DYNAMO, point) for point in DYNAMO_GRID),
    NO_PULLS: (Entrant(NO_PULLS, Weights(pulls=False)),),
    FOREBAY: (Entrant(FOREBAY, Weights()),),
}
"""By name: the points of its grid."""
