"""Pictures of replays: PNG files, one a question."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np

from forebay_loadtest.routing.replay_runs import Outcome

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_DOTS_AN_INCH = 120
_TITLE = "routing policies over the same trace"


def draw(folder: Path, outcomes: Mapping[str, Outcome]) -> list[Path]:
    """Of one seed. Returns the files, in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _bars(folder / "routing-bars.png", outcomes),
        _ttft(folder / "routing-ttft.png", outcomes),
        _queues(folder / "routing-queues.png", outcomes),
        _busy(folder / "routing-busy.png", outcomes),
    ]


def _bars(path: Path, outcomes: Mapping[str, Outcome]) -> Path:
    figure, (hits, ttft) = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    names = list(outcomes)[::-1]
    shares = [100 * outcomes[name].figures.of_shared for name in names]
    means = [outcomes[name].figures.mean_ttft for name in names]
    hits.bar_label(hits.barh(names, shares), fmt="%.1f")
    hits.set_xlabel("hit rate, % of one shared cache")
    ttft.bar_label(ttft.barh(names, means, color="tab:orange"), fmt="%.2f")
    ttft.set_xscale("log")
    for axes in (hits, ttft):
        axes.margins(x=0.15)
    ttft.set_xlabel("mean TTFT, s")
    figure.suptitle(_TITLE)
    return _saved(path)


def _ttft(path: Path, outcomes: Mapping[str, Outcome]) -> Path:
    _, axes = plt.subplots(figsize=(9, 5))
    for name, outcome in outcomes.items():
        values = outcome.curves.ttft
        axes.plot(np.maximum(values, 0.01), np.linspace(0, 100, len(values)), label=name)
    axes.set_xscale("log")
    _labelled(axes, "TTFT, s", "% of requests")
    return _saved(path)


def _queues(path: Path, outcomes: Mapping[str, Outcome]) -> Path:
    figure, (mean, most) = plt.subplots(2, 1, figsize=(10, 8), sharex=True)
    for name, outcome in outcomes.items():
        curves = outcome.curves
        mean.plot(curves.queue_at, np.maximum(curves.queue_mean, 0.01), label=name)
        most.plot(curves.queue_at, np.maximum(curves.queue_most, 0.01), label=name)
    for axes, what in ((mean, "mean worker"), (most, "fullest worker")):
        axes.set_yscale("log")
        _labelled(axes, "time, s", f"work queued, {what}, s")
    figure.suptitle(_TITLE)
    return _saved(path)


def _busy(path: Path, outcomes: Mapping[str, Outcome]) -> Path:
    _, axes = plt.subplots(figsize=(10, 5))
    left = np.zeros(len(outcomes))
    names = list(outcomes)[::-1]
    shares = np.array([_shares(outcomes[name].curves.busy_s) for name in names])
    for worker in range(shares.shape[1]):
        axes.barh(names, shares[:, worker], left=left, edgecolor="white")
        left += shares[:, worker]
    axes.set_xlabel("share of busy seconds by worker, %")
    return _saved(path)


def _shares(busy_s: tuple[float, ...]) -> list[float]:
    """Largest first."""
    return sorted((100 * one / sum(busy_s) for one in busy_s), reverse=True)


def _labelled(axes: Axes, across: str, up: str) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _saved(path: Path) -> Path:
    plt.tight_layout()
    plt.savefig(path, dpi=_DOTS_AN_INCH)
    plt.close()
    return path
