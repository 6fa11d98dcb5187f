"""Which faults, how many of each, and in which order. Pure."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from forebay.core.errors import ConfigurationError


class Target(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    GATEWAY = "gateway"
    VALKEY = "valkey"
    GCS = "gcs"
    RAYLET = "raylet"
    HEAD = "head"
    """GCS and raylet."""


class Act(StrEnum):
    KILL = "kill"
    """SIGKILL."""
    STOP = "stop"
    """SIGSTOP, and nothing more: the platform must notice and replace the process."""
    PAUSE = "pause"
    """SIGSTOP, and SIGCONT before a lease runs out."""
    DRAIN = "drain"
    """SIGTERM."""
    SCALE = "scale"
    """One worker fewer through Ray Serve, then one more."""
    AWAY = "away"
    """SIGKILL, and nobody starts it again for more than a minute."""


@dataclass(frozen=True, slots=True)
class FaultKind:
    target: Target
    act: Act

    @property
    def name(self) -> str:
        return f"{self.target} {self.act}"

    @property
    def worker(self) -> bool:
        return self.target in (Target.PREFILL, Target.DECODE)

    @property
    def alone(self) -> bool:
        """Workers are replaced by a new head, so no other fault goes with it."""
        return self.target in (Target.RAYLET, Target.HEAD)

    @property
    def group(self) -> str:
        """Within a group a fault waits until the one before it is over."""
        return "edge" if self.target in (Target.GATEWAY, Target.VALKEY) else str(self.target)

    def goes_with(self, other: FaultKind) -> bool:
        """Whether both may be under way at once. Scaling asks the control store."""
        if self.alone or other.alone or self.group == other.group:
            return False
        return not (
            Act.SCALE in (self.act, other.act) and Target.GCS in (self.target, other.target)
        )

    @property
    def may_lose(self) -> bool:
        """Streams of a gateway that is lost are lost with it."""
        return self.target is Target.GATEWAY and self.act is not Act.PAUSE


SHARES: Mapping[FaultKind, float] = {
    FaultKind(Target.PREFILL, Act.KILL): 6,
    FaultKind(Target.PREFILL, Act.STOP): 1,
    FaultKind(Target.PREFILL, Act.PAUSE): 10,
    FaultKind(Target.PREFILL, Act.DRAIN): 3,
    FaultKind(Target.PREFILL, Act.SCALE): 1,
    FaultKind(Target.DECODE, Act.KILL): 6,
    FaultKind(Target.DECODE, Act.STOP): 1,
    FaultKind(Target.DECODE, Act.PAUSE): 10,
    FaultKind(Target.DECODE, Act.DRAIN): 3,
    FaultKind(Target.DECODE, Act.SCALE): 1,
    FaultKind(Target.GATEWAY, Act.KILL): 4,
    FaultKind(Target.GATEWAY, Act.STOP): 1,
    FaultKind(Target.GATEWAY, Act.PAUSE): 8,
    FaultKind(Target.GATEWAY, Act.DRAIN): 1,
    FaultKind(Target.VALKEY, Act.KILL): 9,
    FaultKind(Target.VALKEY, Act.STOP): 2,
    FaultKind(Target.VALKEY, Act.PAUSE): 9,
    FaultKind(Target.GCS, Act.KILL): 6,
    FaultKind(Target.RAYLET, Act.KILL): 1,
}
"""Relative; the kinds that take longest to heal are the rarest."""
ONCE = FaultKind(Target.HEAD, Act.AWAY)
"""More than a minute by itself."""
SLOW = frozenset({FaultKind(Target.PREFILL, Act.SCALE), FaultKind(Target.DECODE, Act.SCALE), ONCE})
"""With a model that takes long to load they would fill most of a run."""


def plan_faults(
    num_faults: int,
    seed: int,
    only: Sequence[str] = (),
    *,
    without: frozenset[FaultKind] = frozenset(),
) -> list[FaultKind]:
    """At least one of each kind but those of `without` when there are enough; the same for the
    same seed. `only`: names of kinds, in turn, where not all are wanted. Raises
    ConfigurationError for an unknown one."""
    if only:
        by_name = {kind.name: kind for kind in (*SHARES, ONCE)}
        if unknown := [name for name in only if name not in by_name]:
            raise ConfigurationError(f"no such fault: {unknown[0]}; there are {', '.join(by_name)}")
        return [by_name[only[index % len(only)]] for index in range(num_faults)]
    kinds = [kind for kind in SHARES if kind not in without]
    rng = random.Random(seed)
    if num_faults <= len(kinds):
        return rng.sample(kinds, num_faults)
    once = [] if ONCE in without else [ONCE]
    total = sum(SHARES[kind] for kind in kinds)
    left = num_faults - len(once)
    counts = {kind: max(1, int(left * SHARES[kind] / total)) for kind in kinds}
    by_share = sorted(kinds, key=lambda kind: SHARES[kind], reverse=True)
    while (missing := left - sum(counts.values())) != 0:
        for kind in by_share[: abs(missing)]:
            counts[kind] += 1 if missing > 0 else -1
    plan = [kind for kind in kinds for _ in range(counts[kind])]
    rng.shuffle(plan)
    middle = len(plan) // 2
    return plan[:middle] + once + plan[middle:]
