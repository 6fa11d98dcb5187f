"""`python -m forebay_loadtest.routing.index`: memory, pace and pauses of the router's index, and
what a decision costs."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from forebay_loadtest.report import environment
from forebay_loadtest.routing.decision_times import decision_times
from forebay_loadtest.routing.index_bounds import endless_prompts, hit_quality
from forebay_loadtest.routing.index_lookups import hashing, long_prompts, short_prompts
from forebay_loadtest.routing.index_size import FullIndex

_MIB = 1 << 20


@click.command()
@click.option("--blocks", default=10_000_000, show_default=True, type=click.IntRange(10_000))
@click.option("--workers", default=1000, show_default=True, type=click.IntRange(64))
@click.option("--max-mib", default=1024, show_default=True, type=click.IntRange(16))
@click.option("--seed", default=0, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON here.")
def main(blocks: int, workers: int, max_mib: int, seed: int, output: Path | None) -> None:
    """Exits with 1 when something falls short. Judged is the CPU time of calls: what a machine with
    other work adds is printed beside it."""
    rng = random.Random(seed)
    figures: dict[str, Any] = {"hashing 100k tokens": hashing(rng, 100_000)}
    bounded = endless_prompts(rng, max_mib * _MIB // 16, workers, blocks // 2)
    figures["random prompts for ever"] = bounded
    figures["hits when too small"] = hit_quality(rng, 8 * _MIB, 20_000)
    gc.collect()
    full = FullIndex(rng, workers, max_mib * _MIB)
    figures["memory"] = full.fill(blocks)
    figures["blocks applied a CPU second, by batch"] = full.churn(blocks // 20)
    figures["match 64 blocks"] = short_prompts(full.index, rng, full.slots)
    figures["match 2000 blocks over 64 workers"] = long_prompts(full.index, rng, 64)
    figures["decision for 2000 blocks over 64 workers"] = decision_times(rng, 64, 2000)
    figures["decision for 64 blocks over 1000 workers"] = decision_times(rng, 1000, 64)
    figures["sweep"] = full.sweep(workers // 10, 16_384)
    figures["calls"] = {name: times.as_json() for name, times in full.pauses.items()}
    for name, value in figures.items():
        click.echo(f"{name}: {_line(value)}")
    if output is not None:
        report = {**environment(), "numpy": importlib.metadata.version("numpy"), "seed": seed}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**report, **figures}, indent=1) + "\n")
    held = _held(figures)
    short = [text for text, ok in held.items() if not ok]
    click.echo(f"{'SHORT' if short else 'OK'}: {'; '.join(short or held)}")
    sys.exit(1 if short else 0)


def _held(figures: Mapping[str, Any]) -> dict[str, bool]:
    """What is asked of the index, with figures, and whether it holds."""
    memory = figures["memory"]
    per_block = max(memory["accounted_bytes_per_block"], memory["rss_bytes_per_block"])
    rate = min(figures["blocks applied a CPU second, by batch"].values())
    long = figures["decision for 2000 blocks over 64 workers"]["p99_cpu_ms"]
    short = figures["decision for 64 blocks over 1000 workers"]["p99_cpu_ms"]
    hashed = max(times["p50_cpu_ms"] for times in figures["hashing 100k tokens"].values())
    pause = _longest_cpu_ms(figures)
    endless = figures["random prompts for ever"]
    return {
        f"{per_block} bytes a block (200)": per_block <= 200,
        f"{rate} blocks applied a CPU second (50000)": rate >= 50_000,
        f"2000 blocks over 64 workers decided in {long} CPU ms p99 (1)": long <= 1,
        f"64 blocks over 1000 workers in {short} CPU ms p99 (0.3)": short <= 0.3,
        f"100k tokens hashed in {hashed} CPU ms (10)": hashed <= 10,
        f"longest call {pause} CPU ms (5)": pause <= 5,
        f"{endless['most_accounted_bytes']} bytes at most ({endless['max_bytes']})": endless[
            "within_bound"
        ],
    }


def _longest_cpu_ms(figures: Mapping[str, Any]) -> float:
    of_lookups = [
        times["max_cpu_ms"]
        for name in ("match 64 blocks", "match 2000 blocks over 64 workers")
        for times in figures[name].values()
    ]
    others = [times["max_cpu_ms"] for times in figures["calls"].values()]
    return float(max(of_lookups + others))


def _line(value: Mapping[str, Any]) -> str:
    parts = []
    for name, item in value.items():
        text = "(" + _line(item) + ")" if isinstance(item, Mapping) else str(item)
        parts.append(f"{name} {text}")
    return ", ".join(parts)


if __name__ == "__main__":
    main()
