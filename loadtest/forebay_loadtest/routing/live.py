"""`python -m forebay_loadtest.routing.live`: routing by cached prefixes with real processes.

Every subcommand starts platforms of its own on loopback (Valkey, four workers with the sim engine,
one gateway or two), writes JSON when asked to, and ends with `OK: ...` or `SHORT: ...`; exit code 1
says SHORT.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from forebay_loadtest.report import environment
from forebay_loadtest.routing import live_memory
from forebay_loadtest.routing.faults import Fault
from forebay_loadtest.routing.live_dynamo import (
    DYNAMO_TUNED,
    SetResult,
    on_dynamo,
    on_forebay,
    request_sets,
)
from forebay_loadtest.routing.live_faults import FaultResult, run_faults
from forebay_loadtest.routing.live_memory import MemorySample, run_memory
from forebay_loadtest.routing.shares import NEAR_POINTS

CONSOLE = Console(highlight=False, soft_wrap=True, width=140)
BASELINE = {"router_policy": "least-loaded"}
DYNAMOS: Sequence[tuple[str, Mapping[str, str], str]] = (
    ("round-robin", {}, "Dynamo round-robin"),
    ("kv", {}, "Dynamo kv"),
    ("kv", DYNAMO_TUNED, "Dynamo kv, tuned"),
)
GATEWAYS = {1: "Forebay, 1 gateway", 2: "Forebay, 2 gateways"}
NOISE_POINTS = 1.0
"""Two runs of one system differ by as much: which request meets which is the machine's choice."""

_output = click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON here."
)
_seed = click.option("--seed", default=1, show_default=True)
_requests = click.option(
    "--requests", "num_requests", default=1500, show_default=True, type=click.IntRange(1)
)
_trace = click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A Mooncake trace (JSON lines, gzip or not); without it conversations only.",
)
_trace_requests = click.option(
    "--trace-requests", default=3000, show_default=True, type=click.IntRange(1)
)


@click.group()
def main() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


@main.command(name="dynamo")
@click.option(
    "--dynamo-python",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The interpreter of an environment with Dynamo; without it only ours run.",
)
@_trace
@_requests
@_trace_requests
@_seed
@_output
def dynamo_command(
    dynamo_python: Path | None,
    trace: Path | None,
    num_requests: int,
    trace_requests: int,
    seed: int,
    output: Path | None,
) -> None:
    """The same requests, tokens, block size and KV capacity for Dynamo's frontend and ours."""

    async def run() -> list[SetResult]:
        results = []
        for chosen in request_sets(num_requests, trace, trace_requests, seed):
            if dynamo_python is not None:
                # Not resolved: a virtual environment is found by the path of its interpreter.
                python = dynamo_python.absolute()
                for mode, settings, name in DYNAMOS:
                    results.append(await on_dynamo(chosen, seed, python, mode, settings, name))
            results.append(await on_forebay(chosen, seed, 1, BASELINE, "Forebay least loaded"))
            results.append(await on_forebay(chosen, seed, 1, {}, "Forebay"))
        return results

    results = asyncio.run(run())
    _print_sets(results)
    _end(dynamo_shortfalls(results), _dynamo_figures(results), {"runs": results}, seed, output)


@main.command()
@_trace
@_requests
@_trace_requests
@click.option(
    "--repeats",
    default=2,
    show_default=True,
    type=click.IntRange(1),
    help="Runs of each, with seeds of their own; their mean counts.",
)
@_seed
@_output
def gateways(
    trace: Path | None,
    num_requests: int,
    trace_requests: int,
    repeats: int,
    seed: int,
    output: Path | None,
) -> None:
    """One gateway, then two with every request on one drawn by the seed."""

    async def run() -> list[SetResult]:
        return [
            await on_forebay(chosen, own_seed, count, {}, GATEWAYS[count])
            for own_seed in range(seed, seed + repeats)
            for chosen in request_sets(num_requests, trace, trace_requests, own_seed)
            for count in GATEWAYS
        ]

    results = asyncio.run(run())
    _print_sets(results)
    figures = "; ".join(
        f"{name}: {one:.2f} % with one gateway, {two:.2f} % with two"
        for name, (one, two) in _by_gateways(results).items()
    )
    _end(gateway_shortfalls(results), figures, {"runs": results}, seed, output)


@main.command()
@click.option(
    "--fault",
    "chosen",
    multiple=True,
    type=click.Choice([each.name.lower() for each in Fault]),
    help="Only this one; by default all of them.",
)
@_seed
@_output
def faults(chosen: Sequence[str], seed: int, output: Path | None) -> None:
    """Faults under two gateways while requests run."""
    kinds = [each for each in Fault if not chosen or each.name.lower() in chosen]
    results = asyncio.run(run_faults(seed, kinds, _print_fault))
    short = [line for each in results for line in fault_shortfalls(each)]
    slowest = max(max(each.share.back_s or 0.0, each.router_back_s or 0.0) for each in results)
    deepest = max(each.share.dip for each in results)
    figures = (
        f"{sum(each.num_requests for each in results)} requests during {len(results)} kinds of"
        f" fault, 0 failed; the cached share fell by {deepest:.1f} points at most; share and"
        f" routers were back within {slowest:.1f} s of each strike"
    )
    _end(short, figures, {"faults": results}, seed, output)


@main.command()
@click.option("--minutes", default=30.0, show_default=True, type=click.FloatRange(0.5))
@_seed
@_output
def memory(minutes: float, seed: int, output: Path | None) -> None:
    """Random prompts against an index that is smaller than what the workers hold."""
    samples = asyncio.run(run_memory(minutes, seed, _print_sample))
    last = samples[-1]
    figures = (
        f"{last.num_requests} random prompts in {last.at_s / 60:.0f} minutes,"
        f" {last.blocks_applied:.0f} blocks stored or removed, {last.blocks_evicted:.0f} evicted"
        f" from the index, which took"
        f" {max(each.index_bytes or 0.0 for each in samples) / 2**20:.2f} MiB of"
        f" {live_memory.INDEX_MIB} at most; the gateway grew by"
        f" {live_memory.growth(samples) / 2**20:.1f} MiB in the second half"
    )
    _end(live_memory.shortfalls(samples), figures, {"samples": samples}, seed, output)


def fault_shortfalls(each: FaultResult) -> list[str]:
    short = [] if each.struck else [f"{each.fault}: did not happen ({each.evidence})"]
    if each.num_failed:
        short.append(f"{each.fault}: {each.num_failed} requests failed ({each.first_error})")
    if each.fault in (Fault.STOP, Fault.PAUSE) and not each.was_degraded:
        short.append(f"{each.fault}: no router said that it was degraded")
    if each.fault == Fault.DROP and not each.gaps + each.resyncs:
        short.append(f"{each.fault}: no router noticed that events were missing")
    if each.share.back_s is None:
        short.append(f"{each.fault}: the share did not come back")
    if each.router_back_s is None:
        short.append(f"{each.fault}: the routers did not say that they were in step again")
    return short


def _print_fault(each: FaultResult) -> None:
    share, router = _seconds(each.share.back_s), _seconds(each.router_back_s)
    CONSOLE.print(
        f"{each.fault}: {each.evidence}. {each.num_requests} requests, {each.num_failed} failed;"
        f" share {each.share.before.cached:.1f} % of {each.share.before.ideal:.1f} before,"
        f" {each.share.after.cached:.1f} of {each.share.after.ideal:.1f} after, dip"
        f" {each.share.dip:.1f} points, back {share}; router staleness up to"
        f" {each.max_staleness_s:.1f} s, {'degraded' if each.was_degraded else 'never degraded'},"
        f" in step {router}, {each.gaps:.0f} gaps, {each.resyncs:.0f} resyncs"
    )


def _print_sample(each: MemorySample) -> None:
    size = "unknown" if each.index_bytes is None else f"{each.index_bytes / 2**20:.2f} MiB"
    CONSOLE.print(
        f"{each.at_s:7.1f} s: {each.num_requests} prompts, {each.num_failed} failed; index {size},"
        f" {each.index_blocks:.0f} blocks; {each.blocks_applied:.0f} applied,"
        f" {each.blocks_evicted:.0f} evicted; gateway {each.gateway_rss / 2**20:.1f} MiB"
    )


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"after {value:.1f} s"


def _by_gateways(results: Sequence[SetResult]) -> dict[str, tuple[float, float]]:
    """By request set: mean cached shares with one gateway and with two."""

    def mean(name: str, system: str) -> float:
        runs = [e.cached for e in results if (e.request_set, e.system) == (name, system)]
        return sum(runs) / len(runs)

    names = dict.fromkeys(each.request_set for each in results)
    return {name: (mean(name, GATEWAYS[1]), mean(name, GATEWAYS[2])) for name in names}


def _failures(results: Sequence[SetResult]) -> list[str]:
    return [
        f"{each.system}, {each.request_set}: {each.num_failed} failed ({each.first_error})"
        for each in results
        if each.num_failed
    ]


def gateway_shortfalls(results: Sequence[SetResult]) -> list[str]:
    return _failures(results) + [
        f"{name}: {two:.2f} % with two gateways, {one:.2f} % with one"
        for name, (one, two) in _by_gateways(results).items()
        if abs(one - two) > NEAR_POINTS
    ]


def dynamo_shortfalls(results: Sequence[SetResult]) -> list[str]:
    """Ours has to be as good as any other on every set."""
    short = _failures(results)
    ours = {each.request_set: each for each in results if each.system == "Forebay"}
    short += [
        f"{each.request_set}: {each.system} {each.cached} %, Forebay"
        f" {ours[each.request_set].cached} %"
        for each in results
        if each.cached > ours[each.request_set].cached + NOISE_POINTS
    ]
    return short


def _dynamo_figures(results: Sequence[SetResult]) -> str:
    parts: dict[str, list[str]] = {}
    for each in results:
        parts.setdefault(each.request_set, []).append(f"{each.system} {each.cached} %")
    return "cached tokens, " + "; ".join(
        f"{name}: {', '.join(each)} (no cache could give more than {ideal} %)"
        for (name, each), ideal in zip(
            parts.items(), dict.fromkeys(each.ideal for each in results), strict=True
        )
    )


def _print_sets(results: Sequence[SetResult]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    titles = ("requests", "system", "cached %", "ideal %", "pulled %", "failed", "mean s", "took s")
    for index, name in enumerate(titles):
        table.add_column(name, justify="right" if index > 1 else "left", no_wrap=True)
    for each in results:
        table.add_row(
            f"{each.num_requests} {each.request_set}",
            each.system,
            f"{each.cached:.2f}",
            f"{each.ideal:.2f}",
            f"{each.pulled:.2f}",
            str(each.num_failed),
            f"{each.mean_s:.3f}",
            f"{each.wall_s:.1f}",
        )
    CONSOLE.print(table)


def _end(
    short: Sequence[str],
    figures: str,
    result: Mapping[str, Sequence[object]],
    seed: int,
    output: Path | None,
) -> None:
    """Writes, prints the last line and exits. Values of `result`: lists of dataclasses."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        lists = {name: [asdict(each) for each in rows] for name, rows in result.items()}  # type: ignore[call-overload]
        report = {**environment(), "seed": seed, **lists, "short": list(short)}
        output.write_text(json.dumps(report, indent=1) + "\n")
    CONSOLE.print(f"SHORT: {'; '.join(short)}" if short else f"OK: {figures}")
    sys.exit(1 if short else 0)


if __name__ == "__main__":
    main()
