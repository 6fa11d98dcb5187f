"""Many seeds over several processes, and what came of them."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType

from forebay.simulator.scenario import (
    ENVIRONMENTS,
    FAULTS,
    MIN_FAULTS,
    MIN_REQUESTS,
    SeedResult,
    simulate,
)

STUCK_S = 60
"""Wall time after which a seed's code counts as stuck outside of the event loop."""
SEEDS_PER_S = 20
_CHUNK = 8


class Stuck(KeyboardInterrupt):
    """Not an Exception, which production code might take for a failure of its own."""


@dataclass(slots=True)
class Report:
    """failures: (seed, error)."""

    num_seeds: int = 0
    num_pulled_tokens: int = 0
    num_failed_pulls: int = 0
    num_events: int = 0
    num_messages: int = 0
    virtual_s: float = 0.0
    wall_s: float = 0.0
    injected: Counter[str] = field(default_factory=Counter)
    verified: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)

    def add(self, result: SeedResult) -> None:
        self.num_seeds += 1
        self.num_pulled_tokens += result.num_pulled_tokens
        self.num_failed_pulls += result.num_failed_pulls
        self.num_events += result.num_events
        self.num_messages += result.num_messages
        self.virtual_s += result.virtual_s
        self.injected += result.injected
        self.verified += result.verified
        self.ends += result.ends
        if result.error:
            self.failures.append((result.seed, result.error))

    @property
    def seeds_per_s(self) -> float:
        return self.num_seeds / max(self.wall_s, 1e-9)

    def table(self) -> str:
        kinds = [kind.name for kind in FAULTS] + list(ENVIRONMENTS)
        rows = [f"{'fault':<28} {'injected':>9} {'verified':>9}"]
        rows += [f"{kind:<28} {self.injected[kind]:>9} {self.verified[kind]:>9}" for kind in kinds]
        rows.append(f"{'all':<28} {self.injected.total():>9} {self.verified.total():>9}")
        rows.append("requests: " + ", ".join(f"{n} {end}" for end, n in sorted(self.ends.items())))
        rows.append(
            f"pulls: KV of {self.num_pulled_tokens} tokens fetched, {self.num_failed_pulls} in vain"
        )
        rows.append(
            f"{self.num_seeds} seeds, {self.num_events} events, {self.num_messages} messages, "
            f"{self.virtual_s:.0f} s of virtual time in {self.wall_s:.1f} s: "
            f"{self.seeds_per_s:.1f} seeds/s"
        )
        return "\n".join(rows)

    def shortfalls(self) -> list[str]:
        """What keeps this from being a proof."""
        short = [f"seed {seed}: {error}" for seed, error in self.failures[:3]]
        if len(self.failures) > 3:
            short.append(f"{len(self.failures)} seeds failed")
        if self.num_seeds >= 500:
            kinds = [kind.name for kind in FAULTS] + list(ENVIRONMENTS)
            short += [f"no {kind} took place" for kind in kinds if not self.verified[kind]]
            if self.wall_s and self.seeds_per_s < SEEDS_PER_S:
                short.append(f"{self.seeds_per_s:.1f} seeds/s, {SEEDS_PER_S} wanted on two cores")
        return short

    def last_line(self) -> str:
        short = self.shortfalls()
        if short:
            return "SHORT: " + "; ".join(short)
        return (
            f"OK: {self.num_seeds} seeds, {self.ends.total()} requests (at least {MIN_REQUESTS} "
            f"and {MIN_FAULTS} verified faults a seed), {self.verified.total()} faults verified, "
            f"{self.num_events} events, {self.seeds_per_s:.1f} seeds/s"
        )


Prepare = Callable[[], None]


def simulate_many(
    seeds: range,
    jobs: int,
    *,
    prepare: Prepare | None = None,
    until_failure: bool = False,
    progress: bool = False,
) -> Report:
    """`prepare` runs once in every process before its first seed. until_failure: stops soon after
    the first seed that fails."""
    report = Report()
    began = time.monotonic()
    for result in _results(seeds, jobs, prepare):
        report.add(result)
        if progress and report.num_seeds % 500 == 0:
            report.wall_s = time.monotonic() - began
            print(
                f"{report.num_seeds} seeds, {len(report.failures)} failed, "
                f"{report.seeds_per_s:.1f} seeds/s",
                file=sys.stderr,
            )
        if until_failure and result.error:
            break
    report.failures.sort()
    report.wall_s = time.monotonic() - began
    return report


def _results(seeds: range, jobs: int, prepare: Prepare | None) -> Iterator[SeedResult]:
    if jobs == 1:
        if prepare is not None:
            prepare()
        yield from map(simulate_guarded, seeds)
        return
    with multiprocessing.Pool(jobs, prepare) as pool:
        yield from pool.imap_unordered(simulate_guarded, seeds, _CHUNK)


def simulate_guarded(seed: int, *, timeline: bool = False) -> SeedResult:
    """A seed whose code never comes back to the event loop fails, too."""

    def stuck(_: int, frame: FrameType | None) -> None:
        where = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "nowhere"
        raise Stuck(f"the event loop got no turn for {STUCK_S} s, at {where}")

    before = signal.signal(signal.SIGALRM, stuck)
    signal.alarm(STUCK_S)
    try:
        return simulate(seed, timeline=timeline)
    except Stuck as error:
        return SeedResult(seed, error=f"Stuck: {error}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
