"""`python -m forebay_loadtest.sampling`: is what is drawn right, the same everywhere, and fast?

Chi-square of many draws against the exact distribution; tokens of the CPU's operations and of the
host-compiled CUDA code against the torch reference, one batch and split at random; times of the
engine's sampler on this CPU beside the ways of `sampling_peers`, measured in turns.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor

from forebay.core.sampling import SamplingParams
from forebay.engine.interface import ScheduledSequence
from forebay.engine.sampler import sample
from forebay_kernels import native, ops
from forebay_kernels.isa import best_isa, cpu_isas
from forebay_kernels.testkit import Inputs, chi_square_p_value
from forebay_loadtest.report import environment
from forebay_loadtest.sampling_peers import fp64_by_row, softmax_and_sort

CHI_SQUARE_SHAPES = (
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(top_k=40),
    SamplingParams(top_p=0.9),
    SamplingParams(min_p=0.02),
    SamplingParams(temperature=1.5, min_p=0.001, top_k=300, top_p=0.95),
)
TIMED_SHAPES = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.8),
    "top_p": SamplingParams(top_p=0.9),
    "top_k": SamplingParams(top_k=50),
}
VOCABS = (49_152, 131_072)
BATCHES = (1, 16)
MIN_P_VALUE = 0.001


def settings_of(params: SamplingParams, draws: int, seed: int) -> tuple[Tensor, ...]:
    """Of row 0, each draw at a counter of its own."""
    counter = torch.arange(draws, dtype=torch.int32)
    return (
        torch.zeros(draws, dtype=torch.int32),
        torch.full((draws,), params.temperature),
        torch.full((draws,), params.top_k, dtype=torch.int32),
        torch.full((draws,), params.top_p),
        torch.full((draws,), params.min_p),
        torch.full((draws,), seed),
        counter % 16,
        counter // 16,
    )


def exact_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """fp64 [V] by a sort of the whole row."""
    mass = ((logits.double() - logits.double().max()) / params.temperature).exp()
    order = mass.sort(descending=True, stable=True).indices
    order = order[mass[order] >= params.min_p][: params.top_k or None]
    ordered = mass[order]
    before = ordered.cumsum(0) - ordered
    order = order[(before < params.top_p * ordered.sum()) | (params.top_p == 1.0)]
    out = torch.zeros_like(mass)
    out[order] = mass[order]
    return out / out.sum()


def chi_squares(draws: int, seed: int) -> Iterator[dict[str, object]]:
    logits = Inputs(seed).normal(1000, scale=0.7)
    logits[[5, 400, 990]] += 5.0
    for params in CHI_SQUARE_SHAPES:
        token, _ = ops.sample(logits[None], *settings_of(params, draws, seed), logprobs=False)
        counts = torch.bincount(token, minlength=len(logits))
        p_value = chi_square_p_value(counts, exact_probabilities(logits, params))
        yield {**described(params), "draws": draws, "p_value": round(p_value, 4)}


def agreement(draws: int, seed: int) -> dict[str, dict[str, int]]:
    """By implementation: how many draws were compared with the reference, how many differ."""
    inputs = Inputs(seed)
    kept = native.libraries.of("cpu")
    best = cpu_isas().index(best_isa())
    names = ["host", *(f"cpu-{isa}" for isa in cpu_isas()[best:])]
    counts = {name: {"draws": 0, "different": 0} for name in names}
    shapes = (*CHI_SQUARE_SHAPES, *TIMED_SHAPES.values())
    try:
        for i in range(draws // 128):
            vocab = int(inputs.integers(1, low=1, high=4000))
            logits = inputs.normal(1, vocab, scale=float(inputs.uniform(1, high=6.0)))
            logits = logits.mul(8).round().div(8) if i % 3 == 0 else logits
            logits = logits.bfloat16() if i % 2 == 0 else logits
            setup = settings_of(shapes[i % len(shapes)], 128, seed + i)
            native.libraries.use("cpu", None)
            expected, _ = ops.sample(logits, *setup, logprobs=False)
            for name in names:
                native.libraries.use("cpu", native.load(name))
                cut = int(inputs.integers(1, low=0, high=129))
                for part in (slice(0, cut), slice(cut, 128)):
                    token, _ = ops.sample(logits, *(each[part] for each in setup), logprobs=False)
                    counts[name]["draws"] += len(token)
                    counts[name]["different"] += int((token != expected[part]).sum())
    finally:
        native.libraries.use("cpu", kept)
    return counts


def timings(repeats: int, seed: int) -> Iterator[dict[str, object]]:
    """Microseconds of the fastest step of a batch, everything included up to the ids in a list."""
    inputs = Inputs(seed)
    for vocab in VOCABS:
        for batch in BATCHES:
            logits = inputs.normal(batch, vocab, scale=2.5)
            for name, params in TIMED_SHAPES.items():
                sequences = [ScheduledSequence([1, 2], 1, 1, 1, [0], params, (0,))] * batch
                rows = [params] * batch
                ways: dict[str, Callable[[], object]] = {"ours": partial(sample, logits, sequences)}
                if params.greedy:
                    ways["argmax"] = partial(_argmax, logits)
                else:
                    ways["fp64"] = partial(fp64_by_row, logits, rows)
                    ways["sort"] = partial(softmax_and_sort, logits, rows)
                times = in_turns(ways, repeats)
                ratios = {
                    f"{way}/ours": round(value / times["ours"], 1)
                    for way, value in times.items()
                    if way != "ours"
                }
                micros = {f"{way}_us": round(value * 1e6) for way, value in times.items()}
                yield {"vocab": vocab, "batch": batch, "shape": name, **micros, **ratios}


def _argmax(logits: Tensor) -> list[int]:
    ids: list[int] = logits.argmax(-1).tolist()
    return ids


def in_turns(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest run of each: other work on the machine only ever adds. The order of a
    round is that of the round before, turned by one."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for _ in range(repeats + 1):
        for name in names:
            began = time.perf_counter()
            ways[name]()
            taken[name].append(time.perf_counter() - began)
        names = [*names[1:], names[0]]
    return {name: min(times[1:]) for name, times in taken.items()}


def described(params: SamplingParams) -> dict[str, object]:
    return {
        "temperature": params.temperature,
        "min_p": params.min_p,
        "top_k": params.top_k,
        "top_p": params.top_p,
    }


@click.command()
@click.option("--draws", default=1_000_000, show_default=True, type=click.IntRange(1000))
@click.option("--compared", default=12_800, show_default=True, type=click.IntRange(128))
@click.option("--repeats", default=15, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON here.")
def main(draws: int, compared: int, repeats: int, seed: int, output: Path | None) -> None:
    """Exits with 1 when a distribution is wrong or a token differs."""
    squares = list(chi_squares(draws, seed))
    agreed = agreement(compared, seed)
    report = {
        **environment(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "isa": best_isa(),
        "seed": seed,
        "chi_square": squares,
        "agreement": agreed,
        "cpu": list(timings(repeats, seed)),
    }
    text = json.dumps(report, indent=2)
    click.echo(text)
    if output is not None:
        output.write_text(text + "\n")
    ok = all(float(str(item["p_value"])) > MIN_P_VALUE for item in squares)
    sys.exit(0 if ok and not any(item["different"] for item in agreed.values()) else 1)


if __name__ == "__main__":
    main()
