"""One replay of a trace with one policy, and the figures of it. Runs in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from forebay.core.roles import WorkerRole
from forebay.router.baselines import RoundRobin
from forebay.router.index import Matches
from forebay.router.policy import Policy
from forebay.router.view import Decision, FleetView, RouteRequest
from forebay.simulator.prefix_trace import TraceRequest, load_trace, num_distinct_blocks
from forebay.simulator.routing_replay import (
    ReplayOptions,
    ReplayResult,
    RoutingReplay,
    cache_hit_rate,
)
from forebay_loadtest.routing.replay_lineup import Entrant

TARGET_UTILISATION = 0.95
_CLOSE_ENOUGH = 0.002
_MOST_ROUNDS = 5
_CURVE_POINTS = 400
_QUEUE_POINTS = 120

_load = lru_cache(maxsize=8)(load_trace)


@dataclass(frozen=True, slots=True)
class Setting:
    """cache_share: of the trace's distinct blocks that one worker holds."""

    trace: Path
    seed: int
    num_workers: int
    cache_share: float
    event_delay_s: float


@dataclass(frozen=True, slots=True)
class Ground:
    """What a setting gives before any policy has its say. num_blocks: of one worker. infinite,
    shared: hit rates of one cache that never evicts, and of one as large as all workers' together.
    tokens_per_s: with which round robin keeps a worker busy for TARGET_UTILISATION of the time in
    which requests arrive."""

    num_requests: int
    num_tokens: int
    span_s: float
    num_distinct_blocks: int
    num_blocks: int
    infinite: float
    shared: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Times in seconds. queued: from arrival until the worker begins. imbalance: busy time of the
    busiest worker over the mean."""

    hit_rate: float
    of_infinite: float
    of_shared: float
    mean_ttft: float
    p50_ttft: float
    p99_ttft: float
    p99_queued: float
    imbalance: float
    utilisation: float
    pulled_share: float


@dataclass(frozen=True, slots=True)
class Curves:
    """For plots. ttft: values at evenly spaced quantiles. queue_at, queue_mean, queue_most: seconds
    of prefill work queued at workers, over the time of arrivals. busy_s: by worker."""

    ttft: tuple[float, ...]
    queue_at: tuple[float, ...]
    queue_mean: tuple[float, ...]
    queue_most: tuple[float, ...]
    busy_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    figures: Figures
    curves: Curves


def survey(setting: Setting) -> Ground:
    requests = _load(setting.trace, setting.seed)
    num_distinct = num_distinct_blocks(requests)
    num_blocks = max(1, int(num_distinct * setting.cache_share))
    num_tokens = sum(request.num_tokens for request in requests)
    span_s = requests[-1].at_s - requests[0].at_s
    speed = num_tokens / span_s / setting.num_workers / TARGET_UTILISATION
    for _ in range(_MOST_ROUNDS):
        result = RoutingReplay(requests, RoundRobin(), _options(setting, num_blocks, speed)).run()
        if abs(result.utilisation - TARGET_UTILISATION) < _CLOSE_ENOUGH:
            break
        speed *= result.utilisation / TARGET_UTILISATION
    return Ground(
        num_requests=len(requests),
        num_tokens=num_tokens,
        span_s=span_s,
        num_distinct_blocks=num_distinct,
        num_blocks=num_blocks,
        infinite=cache_hit_rate(requests, None),
        shared=cache_hit_rate(requests, num_blocks * setting.num_workers),
        tokens_per_s=speed,
    )


def play(setting: Setting, ground: Ground, entrant: Entrant) -> Outcome:
    requests = _load(setting.trace, setting.seed)
    watched = _Watched(
        entrant.policy(ground.num_blocks * setting.num_workers), requests, ground.tokens_per_s
    )
    options = _options(setting, ground.num_blocks, ground.tokens_per_s)
    replay = RoutingReplay(requests, watched, options)
    result = replay.run()
    return Outcome(_figures(result, ground), watched.curves(result))


def _options(setting: Setting, num_blocks: int, tokens_per_s: float) -> ReplayOptions:
    return ReplayOptions(
        num_workers=setting.num_workers,
        num_blocks=num_blocks,
        tokens_per_s=tokens_per_s,
        event_delay_s=setting.event_delay_s,
    )


class _Watched:
    """Implements `Policy`: that of `policy`; notes the queues that every request finds."""

    def __init__(
        self, policy: Policy, requests: Sequence[TraceRequest], tokens_per_s: float
    ) -> None:
        self._policy = policy
        self._at_s = [request.at_s for request in requests]
        self._tokens_per_s = tokens_per_s
        self._queues: list[npt.NDArray[np.float64]] = []

    def choose(self, request: RouteRequest, view: FleetView, matches: Matches) -> Decision | None:
        computing = [
            row for row, facts in enumerate(view.facts) if facts.role is not WorkerRole.DECODE
        ]
        self._queues.append(view.num_queued_tokens[computing])
        return self._policy.choose(request, view, matches)

    def curves(self, result: ReplayResult) -> Curves:
        ttft = np.array([one.ttft_s for one in result.served])
        queues = np.array(self._queues) / self._tokens_per_s
        slices = np.array_split(np.arange(len(queues)), min(_QUEUE_POINTS, len(queues)))
        return Curves(
            ttft=_rounded(np.quantile(ttft, np.linspace(0, 1, _CURVE_POINTS))),
            queue_at=_rounded([self._at_s[part[0]] - self._at_s[0] for part in slices]),
            queue_mean=_rounded([queues[part].mean() for part in slices]),
            queue_most=_rounded([queues[part].max(axis=1).mean() for part in slices]),
            busy_s=_rounded(result.busy_s),
        )


def _rounded(values: Sequence[float] | npt.NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(round(float(value), 3) for value in values)


def _figures(result: ReplayResult, ground: Ground) -> Figures:
    ttft = np.array([one.ttft_s for one in result.served])
    queued = np.array([one.queued_s for one in result.served])
    return Figures(
        hit_rate=result.hit_rate,
        of_infinite=_share(result.hit_rate, ground.infinite),
        of_shared=_share(result.hit_rate, ground.shared),
        mean_ttft=float(ttft.mean()),
        p50_ttft=float(np.median(ttft)),
        p99_ttft=float(np.quantile(ttft, 0.99)),
        p99_queued=float(np.quantile(queued, 0.99)),
        imbalance=result.imbalance,
        utilisation=result.utilisation,
        pulled_share=result.pulled_share,
    )


def _share(value: float, whole: float) -> float:
    return value / whole if whole else 0.0
