"""`python -m forebay_loadtest.chaos`: real faults in a real platform under streams."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from forebay.core.errors import ConfigurationError
from forebay_loadtest.chaos_report import Outcome, as_json, figures, shortfalls
from forebay_loadtest.chaos_run import ChaosRun
from forebay_loadtest.chaos_table import print_outcome
from forebay_loadtest.fault_plan import SLOW, FaultKind, plan_faults
from forebay_loadtest.local_platform import LocalPlatform
from forebay_loadtest.report import environment

POOLS = {"prefill": 2, "decode": 2}


@dataclass(frozen=True, slots=True)
class Profile:
    """How hard an engine is worked. Seconds: `quiet_s` of streams without faults at first, and at
    least `spacing_s` between two faults."""

    options: tuple[str, ...]
    num_faults: int
    num_bodies: int
    max_tokens: int
    quiet_s: float
    spacing_s: float
    without: frozenset[FaultKind] = frozenset()


PROFILES: Mapping[str, Profile] = {
    "torch": Profile(("--dtype=fp32", "--kv-memory-mib=256"), 60, 64, 48, 12.0, 4.0, SLOW),
    "sim": Profile(("--engine=sim", "--kv-memory-mib=64"), 200, 128, 160, 4.0, 1.5),
}
SETTINGS = {"FOREBAY_WORKER_DRAIN_S": "5"}
"""A drain shorter than a stream, so that streams are handed over, too."""


@click.command()
@click.option("--engine", type=click.Choice(["torch", "sim", "both"]), default="both")
@click.option("--faults", type=click.IntRange(1), help="By default 60 with torch, 200 with sim.")
@click.option("--streams", default=32, show_default=True, type=click.IntRange(1, 512))
@click.option("--minutes", default=20.0, show_default=True, help="No fault is begun after this.")
@click.option("--seed", default=0, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON here.")
@click.option("--logs", type=click.Path(file_okay=False, path_type=Path), help="Copy logs here.")
@click.option("--only", multiple=True, metavar="KIND", help="As in the table: 'decode kill'.")
def main(
    engine: str,
    faults: int | None,
    streams: int,
    minutes: float,
    seed: int,
    output: Path | None,
    logs: Path | None,
    only: tuple[str, ...],
) -> None:
    """Starts a platform of its own for each engine. Exits with 1 when something falls short."""
    console = Console(highlight=False, soft_wrap=True, width=140)
    engines = ("torch", "sim") if engine == "both" else (engine,)
    try:
        plans = {
            name: plan_faults(
                faults or PROFILES[name].num_faults, seed, only, without=PROFILES[name].without
            )
            for name in engines
        }
    except ConfigurationError as error:
        raise click.ClickException(error.message) from None
    end_at = time.monotonic() + 60 * minutes
    outcomes = []
    for name, plan in plans.items():
        outcome = _run(name, plan, streams, end_at, seed, console.print, logs)
        print_outcome(console, outcome)
        outcomes.append(outcome)
    if output is not None:
        report = {**environment(), "streams": streams, "seed": seed}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(
            json.dumps({**report, "runs": [as_json(item) for item in outcomes]}, indent=1) + "\n"
        )
    short = [text for outcome in outcomes for text in shortfalls(outcome)]
    line = "; ".join(short) if short else "; ".join(figures(outcome) for outcome in outcomes)
    console.print(f"{'SHORT' if short else 'OK'}: {line}")
    sys.exit(1 if short else 0)


def _run(
    engine: str,
    plan: Sequence[FaultKind],
    streams: int,
    end_at: float,
    seed: int,
    say: Callable[[str], None],
    logs: Path | None,
) -> Outcome:
    profile = PROFILES[engine]
    counts = [f"--{role}={count}" for role, count in POOLS.items()]
    with tempfile.TemporaryDirectory(prefix="forebay-chaos-") as folder:
        platform = LocalPlatform.prepare(Path(folder) / "state", SETTINGS)
        try:
            with platform.started(*profile.options, *counts):
                run = ChaosRun(
                    engine=engine,
                    platform=platform,
                    pools=POOLS,
                    num_streams=streams,
                    num_bodies=profile.num_bodies,
                    max_tokens=profile.max_tokens,
                    quiet_s=profile.quiet_s,
                    spacing_s=profile.spacing_s,
                    seed=seed,
                    say=say,
                )
                return asyncio.run(run.run(plan, end_at))
        finally:
            if logs is not None:
                platform.copy_logs(logs / engine)


if __name__ == "__main__":
    main()
