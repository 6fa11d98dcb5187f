"""Replays a trace with every routing policy: `python -m forebay_loadtest.routing.offline`.

Prefill time is linear in uncached tokens, at a speed with which round robin keeps the workers 95 %
busy. Policies of others are tuned: every point of a stated grid on the first seed, the best
`_FINALISTS` of them on all seeds, and of these the one with the least mean TTFT counts. Ours runs
with the weights that gateways have. Prints a table and what of the promises holds; the last line
starts with OK or SHORT.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from forebay.core.errors import ConfigurationError
from forebay_loadtest.report import environment
from forebay_loadtest.routing.replay_lineup import FOREBAY, LEAST_LOADED, LINEUP, Entrant
from forebay_loadtest.routing.replay_plots import draw
from forebay_loadtest.routing.replay_runs import Figures, Ground, Outcome, Setting, play, survey
from forebay_loadtest.routing.replay_targets import Target, targets, verdict

_TRACE = Path("loadtest/traces/mooncake_conversation_first29.5min.jsonl.gz")
_OUTPUT = Path("loadtest/results/routing.json")
_PLOTS = Path("loadtest/results")
_FINALISTS = 2

Star = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], list[Any]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A policy at the point of its grid that came out best: outcomes by seed. tried: what every
    point came to on the first seed."""

    entrant: Entrant
    outcomes: tuple[Outcome, ...]
    tried: tuple[tuple[Entrant, Figures], ...]

    @property
    def by_seed(self) -> list[Figures]:
        return [outcome.figures for outcome in self.outcomes]

    @property
    def mean(self) -> Figures:
        return mean_figures(self.by_seed)


def mean_figures(among: Sequence[Figures]) -> Figures:
    names = [field.name for field in fields(Figures)]
    return Figures(**{n: sum(getattr(one, n) for one in among) / len(among) for n in names})


def compete(
    settings: Sequence[Setting], names: Sequence[str], star: Star
) -> tuple[list[Ground], dict[str, Entry]]:
    """Entries by name. `settings` differ in their seeds."""
    grounds: list[Ground] = star(survey, [(setting,) for setting in settings])
    rounds = list(zip(settings, grounds, strict=True))
    points = [entrant for name in names for entrant in LINEUP[name]]
    first: list[Outcome] = star(play, [(*rounds[0], point) for point in points])
    tried = dict(zip(points, first, strict=True))
    finalists = [entrant for name in names for entrant in _best(LINEUP[name], tried)]
    matches = [(*other, entrant) for entrant in finalists for other in rounds[1:]]
    rest = iter(star(play, matches))
    outcomes = {
        entrant: (tried[entrant], *(next(rest) for _ in rounds[1:])) for entrant in finalists
    }
    return grounds, {name: _entry(LINEUP[name], outcomes, tried) for name in names}


def _best(points: Sequence[Entrant], tried: dict[Entrant, Outcome]) -> list[Entrant]:
    return sorted(points, key=lambda point: tried[point].figures.mean_ttft)[:_FINALISTS]


def _entry(
    points: Sequence[Entrant],
    outcomes: dict[Entrant, tuple[Outcome, ...]],
    tried: dict[Entrant, Outcome],
) -> Entry:
    def ttft(entrant: Entrant) -> float:
        return mean_figures([one.figures for one in outcomes[entrant]]).mean_ttft

    best = min((point for point in points if point in outcomes), key=ttft)
    return Entry(best, outcomes[best], tuple((one, tried[one].figures) for one in points))


@dataclass(frozen=True, slots=True)
class Swept:
    setting: Setting
    ours: Figures
    least_loaded: Figures

    def __str__(self) -> str:
        at = self.setting
        return (
            f"{at.num_workers:3} workers, caches of {100 * at.cache_share:g} %, events "
            f"{1000 * at.event_delay_s:g} ms late: {100 * self.ours.of_shared:.1f} % of shared, "
            f"mean TTFT {self.ours.mean_ttft:.2f} s, of least loaded "
            f"{self.least_loaded.mean_ttft:.2f} s"
        )

    def as_json(self) -> dict[str, object]:
        return {
            "num_workers": self.setting.num_workers,
            "cache_share": self.setting.cache_share,
            "event_delay_s": self.setting.event_delay_s,
            FOREBAY: _rounded(self.ours),
            LEAST_LOADED: _rounded(self.least_loaded),
        }


def sweep(base: Setting, ground: Ground, star: Star) -> list[Swept]:
    """Ours and the least loaded with more and fewer workers, smaller and larger caches, events
    sooner and later; speeds set anew each time, so that round robin is 95 % utilised."""
    varied = [
        *(replace(base, num_workers=n) for n in (4, 16)),
        *(replace(base, cache_share=share) for share in (0.025, 0.1)),
        *(replace(base, event_delay_s=delay) for delay in (0.0, 5.0, 60.0)),
    ]
    shapes = list(dict.fromkeys(_shape(setting) for setting in (base, *varied)))
    found: list[Ground] = star(survey, [(shape,) for shape in shapes[1:]])
    grounds = dict(zip(shapes, (ground, *found), strict=True))
    matches = [(shape, grounds[shape], LINEUP[LEAST_LOADED][0]) for shape in shapes]
    matches += [(setting, grounds[_shape(setting)], LINEUP[FOREBAY][0]) for setting in varied]
    outcomes: list[Outcome] = star(play, matches)
    least_loaded = dict(zip(shapes, outcomes, strict=False))
    return [
        Swept(setting, ours.figures, least_loaded[_shape(setting)].figures)
        for setting, ours in zip(varied, outcomes[len(shapes) :], strict=True)
    ]


def _shape(setting: Setting) -> Setting:
    """What matters to policies that do not listen to events."""
    return replace(setting, event_delay_s=0.0)


def _rounded(figures: Figures) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(figures).items()}


_COLUMNS: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("hit rate", lambda one: f"{one.hit_rate:.4f}"),
    ("% inf.", lambda one: f"{100 * one.of_infinite:.1f}"),
    ("% shared", lambda one: f"{100 * one.of_shared:.1f}"),
    ("pulled %", lambda one: f"{100 * one.pulled_share:.1f}"),
    ("TTFT mean", lambda one: f"{one.mean_ttft:.2f}"),
    ("p50", lambda one: f"{one.p50_ttft:.2f}"),
    ("p99", lambda one: f"{one.p99_ttft:.2f}"),
    ("queued p99", lambda one: f"{one.p99_queued:.2f}"),
    ("max/mean", lambda one: f"{one.imbalance:.3f}"),
    ("util.", lambda one: f"{one.utilisation:.3f}"),
)


def header(base: Setting, grounds: Sequence[Ground]) -> str:
    """What was replayed, and the bounds."""
    first = grounds[0]
    speeds = [ground.tokens_per_s for ground in grounds]
    return (
        f"{base.trace.name}: {first.num_requests} requests, {first.num_tokens / 1e6:.1f} M tokens, "
        f"{first.num_distinct_blocks} blocks in {first.span_s:.0f} s\n"
        f"{base.num_workers} prefill workers of {first.num_blocks} blocks, events "
        f"{base.event_delay_s * 1000:g} ms late; orders of arrival {base.seed} to "
        f"{base.seed + len(grounds) - 1}, {min(speeds):.0f} to {max(speeds):.0f} tokens/s each\n"
        f"hit rate of an infinite cache {_mean_of(grounds, 'infinite'):.4f}, "
        f"of one shared cache {_mean_of(grounds, 'shared'):.4f}"
    )


def _mean_of(grounds: Sequence[Ground], name: str) -> float:
    return sum(float(getattr(ground, name)) for ground in grounds) / len(grounds)


def table(entries: dict[str, Entry]) -> str:
    """Means over the seeds; times in seconds."""
    lines = [["policy", *(title for title, _ in _COLUMNS)]]
    for name, entry in entries.items():
        lines.append([name, *(told(entry.mean) for _, told in _COLUMNS)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def spread(entries: dict[str, Entry]) -> str:
    """From seed to seed."""
    lines = []
    for name, entry in entries.items():
        hits = [100 * one.of_shared for one in entry.by_seed]
        ttft = [one.mean_ttft for one in entry.by_seed]
        lines.append(
            f"{name:18} {min(hits):.1f} to {max(hits):.1f} % of shared, "
            f"mean TTFT {min(ttft):.2f} to {max(ttft):.2f} s"
        )
    return "\n".join(lines)


def as_json(entries: dict[str, Entry]) -> dict[str, object]:
    return {
        name: {
            "parameters": entry.entrant.described(),
            "mean": _rounded(entry.mean),
            "by_seed": [_rounded(one) for one in entry.by_seed],
            "busy_s": entry.outcomes[0].curves.busy_s,
            "grid": [
                {"parameters": point.described(), **_rounded(figures)}
                for point, figures in entry.tried
            ]
            if len(entry.tried) > 1
            else [],
        }
        for name, entry in entries.items()
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m forebay_loadtest.routing.offline")
    parser.add_argument("--trace", type=Path, default=_TRACE, help="in the format of Mooncake's")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--cache-share", type=float, default=0.05)
    parser.add_argument("--event-delay-ms", type=float, default=200.0)
    parser.add_argument("--seed", type=int, default=1, help="of the first of the arrivals' orders")
    parser.add_argument("--seeds", type=int, default=3, help="how many orders of arrival")
    parser.add_argument("--policies", help="some of " + ",".join(LINEUP))
    parser.add_argument("--no-sweeps", action="store_true")
    parser.add_argument("--output", type=Path, default=_OUTPUT)
    parser.add_argument("--plots", type=Path, default=_PLOTS)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    options.policies = options.policies.split(",") if options.policies else list(LINEUP)
    unknown = sorted(set(options.policies) - set(LINEUP))
    if unknown:
        parser.error(f"no such policy: {', '.join(unknown)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    try:
        if options.processes == 1:
            found = _run(options, lambda call, among: [call(*one) for one in among])
        else:
            with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
                found = _run(options, lambda call, among: pool.starmap(call, among, chunksize=1))
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 2
    print(verdict(found))
    return 0 if found and all(target.held for target in found) else 1


def _run(options: argparse.Namespace, star: Star) -> list[Target]:
    """Prints everything but the verdict, and writes the files."""
    began_s = time.perf_counter()
    base = Setting(
        trace=options.trace,
        seed=options.seed,
        num_workers=options.workers,
        cache_share=options.cache_share,
        event_delay_s=options.event_delay_ms / 1000,
    )
    settings = [replace(base, seed=base.seed + number) for number in range(options.seeds)]
    grounds, entries = compete(settings, options.policies, star)
    print(header(base, grounds), table(entries), spread(entries), sep="\n\n", end="\n\n")
    swept = [] if options.no_sweeps else sweep(base, grounds[0], star)
    for row in swept:
        print(row)
    found = targets({name: entry.by_seed for name, entry in entries.items()})
    print("", *found, "", sep="\n")
    report = {
        "environment": environment(),
        "settings": {**asdict(base), "trace": base.trace.name, "num_seeds": options.seeds},
        "bounds": [asdict(ground) for ground in grounds],
        "policies": as_json(entries),
        "sweeps": [row.as_json() for row in swept],
        "targets": [asdict(target) for target in found],
        "verdict": verdict(found),
        "took_s": round(time.perf_counter() - began_s, 1),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    plots = draw(options.plots, {name: entry.outcomes[0] for name, entry in entries.items()})
    print(f"{time.perf_counter() - began_s:.0f} s;", options.output, *plots)
    return found


if __name__ == "__main__":
    sys.exit(main())
