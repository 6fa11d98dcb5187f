"""What the router promises of itself on a trace, and whether it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from forebay_loadtest.routing.replay_lineup import (
    FOREBAY,
    LEAST_LOADED,
    LONGEST_PREFIX,
    PEERS,
    ROUND_ROBIN,
)
from forebay_loadtest.routing.replay_runs import Figures

LEAST_OF_SHARED = 0.95
LEAST_GAIN = {LEAST_LOADED: 2.5, ROUND_ROBIN: 15.0}
MOST_IMBALANCE = 1.1
LEAST_MELT = 2.0
"""Busy seconds of the busiest worker over the mean, from which on it counts as melted."""

BySeed = Sequence[Figures]


@dataclass(frozen=True, slots=True)
class Target:
    """figure: the mean over the seeds, and between which values it lies by seed."""

    name: str
    wanted: str
    figure: str
    held: bool

    def __str__(self) -> str:
        verdict = "held" if self.held else "MISSED"
        return f"{verdict:6}  {self.name}: {self.figure} (wanted: {self.wanted})"


def targets(figures: Mapping[str, BySeed]) -> list[Target]:
    """Of policies that were replayed: those that need another one's figures are left out."""
    found = []
    ours = figures.get(FOREBAY)
    if ours is not None:
        shares = [one.of_shared for one in ours]
        found.append(_at_least("hit rate over one shared cache's", shares, LEAST_OF_SHARED))
        for name, gain in LEAST_GAIN.items():
            if name in figures:
                found += _against_baseline(name, gain, ours, figures[name])
        found.append(_at_most("busy max/mean", [one.imbalance for one in ours], MOST_IMBALANCE))
        for name in PEERS:
            if name in figures:
                found += _against_peer(name, ours, figures[name])
    if LONGEST_PREFIX in figures:
        melted = [one.imbalance for one in figures[LONGEST_PREFIX]]
        found.append(_at_least("busy max/mean of longest prefix alone", melted, LEAST_MELT))
    return found


def verdict(found: Sequence[Target]) -> str:
    """One line: `OK: ...` with the figures, or `SHORT: ...` with what falls short."""
    if not found:
        return "SHORT: no policy was replayed that a target is about"
    missed = [target for target in found if not target.held]
    told = "; ".join(f"{target.name} {target.figure}" for target in (missed or found))
    return f"{'SHORT' if missed else 'OK'}: {told}"


def _against_baseline(name: str, gain: float, ours: BySeed, theirs: BySeed) -> list[Target]:
    ttft = [their.mean_ttft / our.mean_ttft for our, their in zip(ours, theirs, strict=True)]
    queued = [
        _ratio(their.p99_queued, our.p99_queued) for our, their in zip(ours, theirs, strict=True)
    ]
    return [
        _at_least(f"mean TTFT, {name} over ours", ttft, gain),
        _at_least(f"p99 of queueing, {name} over ours", queued, 1.0),
    ]


def _against_peer(name: str, ours: BySeed, theirs: BySeed) -> list[Target]:
    hits = [_ratio(our.hit_rate, their.hit_rate) for our, their in zip(ours, theirs, strict=True)]
    ttft = [their.mean_ttft / our.mean_ttft for our, their in zip(ours, theirs, strict=True)]
    return [
        _at_least(f"hit rate, ours over {name}", hits, 1.0),
        _at_least(f"mean TTFT, {name} over ours", ttft, 1.0),
    ]


def _at_least(name: str, values: Sequence[float], least: float) -> Target:
    return Target(name, f">= {least:g}", _told(values), _mean(values) >= least)


def _at_most(name: str, values: Sequence[float], most: float) -> Target:
    return Target(name, f"<= {most:g}", _told(values), _mean(values) <= most)


def _told(values: Sequence[float]) -> str:
    mean = f"{_mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ratio(value: float, of: float) -> float:
    """Of figures that may both be nil."""
    if of:
        return value / of
    return 1.0 if not value else float("inf")
