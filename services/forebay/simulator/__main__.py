"""`python -m forebay.simulator --seeds N`: N simulated platforms under faults, and one line at the
end, OK or SHORT. `--seed K --timeline` shows one of them, event by event."""

from __future__ import annotations

import argparse
import os
import sys

from forebay.simulator.report import simulate_guarded, simulate_many


def main() -> int:
    options = _parse()
    if options.seed is not None:
        return _show(options.seed, timeline=options.timeline)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    report = simulate_many(seeds, options.jobs, progress=True)
    for seed, error in report.failures[:1]:
        print(f"seed {seed}: {error}")
        _show(seed, timeline=True)
    for seed, error in report.failures[1:20]:
        print(f"seed {seed}: {error}")
    print(report.table())
    print(report.last_line())
    return 1 if report.shortfalls() else 0


def _show(seed: int, *, timeline: bool) -> int:
    result = simulate_guarded(seed, timeline=timeline)
    print("\n".join(result.lines))
    for name, faults in (("injected", result.injected), ("verified", result.verified)):
        print(f"{name}: " + ", ".join(f"{kind} {count}" for kind, count in sorted(faults.items())))
    print("requests: " + ", ".join(f"{n} {end}" for end, n in sorted(result.ends.items())))
    print(f"{result.num_events} events, {result.virtual_s:.3f} s of virtual time")
    print(f"SHORT: seed {seed}: {result.error}" if result.error else f"OK: seed {seed}")
    return 1 if result.error else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m forebay.simulator", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--timeline", action="store_true", help="with --seed: every event of it")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
