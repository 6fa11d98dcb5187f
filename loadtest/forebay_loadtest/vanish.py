"""`python -m forebay_loadtest.vanish`: clients that go away at every phase of a request."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from forebay_loadtest.departures import Phase, Seen, tally
from forebay_loadtest.footprint import growth, mib, shown
from forebay_loadtest.local_platform import LocalPlatform
from forebay_loadtest.report import environment
from forebay_loadtest.vanish_run import Round, VanishRun

LEASE_S = 10.0
"""What workers hold for a client that is gone is free after this at the latest."""
MAX_GROWTH = 12 << 20
"""Bytes that a process may gain from the middle round to the last: allocators' own noise."""


@dataclass(frozen=True, slots=True)
class Profile:
    """`repeats`: of a prompt of up to 120 words, to make it as long as a prefill that one can
    leave."""

    options: tuple[str, ...]
    settings: Mapping[str, str]
    count: int
    repeats: int
    max_tokens: int


_SIM_SETTINGS = {
    # Answers of full length, so that clients can leave at the last token.
    "FOREBAY_ENGINE_SIM_MEAN_OUTPUT_TOKENS": "1000000",
    # Few enough that one round touches all of them: what grows after that is a leak.
    "FOREBAY_ENGINE_NUM_BLOCKS": "2048",
}
PROFILES: Mapping[str, Profile] = {
    "sim": Profile(("--engine=sim",), _SIM_SETTINGS, 1000, 6, 40),
    "torch": Profile(("--dtype=fp32", "--kv-memory-mib=96"), {}, 100, 1, 24),
}


@click.command()
@click.option("--engine", type=click.Choice(["sim", "torch"]), default="sim", show_default=True)
@click.option("--clients", type=click.IntRange(1), help="By default 1000 with sim, 100 with torch.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(2, 100))
@click.option("--seed", default=0, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON here.")
def main(engine: str, clients: int | None, rounds: int, seed: int, output: Path | None) -> None:
    """Starts a platform of its own. Exits with 1 when something is left behind."""
    console = Console(highlight=False, soft_wrap=True, width=120)
    profile = PROFILES[engine]
    count = clients or profile.count
    with tempfile.TemporaryDirectory(prefix="forebay-vanish-") as folder:
        platform = LocalPlatform.prepare(Path(folder) / "state", profile.settings)
        with platform.started(*profile.options, "--prefill=2", "--decode=2"):
            run = VanishRun(platform, profile.repeats, profile.max_tokens, seed)
            seen, made = asyncio.run(run.run(count, rounds))
    _print(console, seen, made)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        figures: dict[str, object] = {
            "engine": engine,
            "clients": count,
            "seed": seed,
            "departures": tally(seen),
        }
        figures["rounds"] = [{**asdict(each), "rss": mib(each.rss)} for each in made]
        output.write_text(json.dumps({**environment(), **figures}, indent=1) + "\n")
    short = shortfalls(seen, made)
    console.print(f"SHORT: {'; '.join(short)}" if short else f"OK: {_figures(engine, seen, made)}")
    sys.exit(1 if short else 0)


def shortfalls(seen: Sequence[Seen], rounds: Sequence[Round]) -> list[str]:
    """Empty when nothing is left behind."""
    found = []
    for number, each in enumerate(rounds, 1):
        if each.idle_s is None:
            found.append(
                f"round {number} left {each.held_blocks} blocks held, {each.num_busy} requests"
                f" counted by the gateway and {each.num_sequences} by workers"
            )
        elif each.idle_s > LEASE_S:
            found.append(f"round {number} was idle after {each.idle_s:.1f} s only")
    grown = growth(warm(rounds).rss, rounds[-1].rss)
    if grown > MAX_GROWTH:
        found.append(f"RSS of a process grew by {grown / 2**20:.1f} MiB")
    errors = sorted({each.error for each in seen if each.error})
    if errors:
        found.append(f"errors before the clients went: {errors[:3]}")
    return found


def warm(rounds: Sequence[Round]) -> Round:
    """The one in the middle: by then every page of the KV memory has been written once."""
    return rounds[(len(rounds) - 1) // 2]


def _figures(engine: str, seen: Sequence[Seen], rounds: Sequence[Round]) -> str:
    slowest = max(each.idle_s or 0.0 for each in rounds)
    grown = growth(warm(rounds).rss, rounds[-1].rss) / 2**20
    return (
        f"{len(seen)} clients left the {engine} engine at {len(Phase)} phases; after each of"
        f" {len(rounds)} rounds every block and counter was back within {slowest:.1f} s; from the"
        f" middle round to the last RSS grew by {grown:.1f} MiB at most"
    )


def _print(console: Console, seen: Sequence[Seen], rounds: Sequence[Round]) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for index, name in enumerate(("gone at", "clients", "before text", "after text", "too late")):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for line in tally(seen):
        table.add_row(*map(str, line))
    console.print(table)
    for number, each in enumerate(rounds, 1):
        idle = "not idle" if each.idle_s is None else f"idle after {each.idle_s:.1f} s"
        console.print(
            f"round {number}: {each.num_clients} clients; {idle}; {each.held_blocks} blocks held;"
            f" {each.num_busy} requests counted; {each.num_expired} leases ran out;"
            f" RSS in MiB: {shown(each.rss)}"
        )


if __name__ == "__main__":
    main()
