"""The policies by their names in the settings."""

from __future__ import annotations

from collections.abc import Callable

from forebay.core.errors import ConfigurationError
from forebay.router.baselines import (
    ApproximatePrefixTree,
    ConsistentHash,
    LeastLoaded,
    RoundRobin,
)
from forebay.router.policy import KvAware, Policy

POLICIES: dict[str, Callable[[], Policy]] = {
    "kv": KvAware,
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "consistent-hash": ConsistentHash,
    "prefix-tree": ApproximatePrefixTree,
}


def policy_named(name: str) -> Policy:
    """Raises ConfigurationError."""
    if name not in POLICIES:
        raise ConfigurationError(f"router_policy {name!r}: one of {', '.join(POLICIES)}")
    return POLICIES[name]()
