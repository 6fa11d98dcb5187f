"""How long single calls take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class CallTimes:
    """Wall time of each call, which contains what the machine did meanwhile, and CPU time of the
    calling thread."""

    def __init__(self) -> None:
        self._wall_ns: list[int] = []
        self._cpu_ns: list[int] = []

    def call(self, work: Callable[[], Result]) -> Result:
        wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
        result = work()
        self._cpu_ns.append(time.thread_time_ns() - cpu)
        self._wall_ns.append(time.perf_counter_ns() - wall)
        return result

    @property
    def cpu_s(self) -> float:
        return sum(self._cpu_ns) / 1e9

    def as_json(self) -> dict[str, float]:
        """Milliseconds, by nearest rank."""
        figures: dict[str, float] = {"calls": len(self._wall_ns)}
        for kind, nanoseconds in (("cpu_ms", self._cpu_ns), ("ms", self._wall_ns)):
            ordered = sorted(nanoseconds)
            for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
                at = max(0, math.ceil(share * len(ordered)) - 1)
                figures[f"{name}_{kind}"] = round(ordered[at] / 1e6, 4)
        return figures
