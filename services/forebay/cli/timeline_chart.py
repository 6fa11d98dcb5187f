"""A request's phases as bars of text on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BAR_WIDTH = 40


def chart(phases: Sequence[Mapping[str, Any]], duration_ms: float) -> list[str]:
    """One line a phase, from left to right over the request's whole life. `phases`: as in the
    record; a phase too short to be seen still has one mark."""
    scale = BAR_WIDTH / duration_ms if duration_ms > 0 else 0.0
    shows_legs = any(phase["leg"] for phase in phases)
    return [_line(phase, scale, shows_legs=shows_legs) for phase in phases]


def _line(phase: Mapping[str, Any], scale: float, *, shows_legs: bool) -> str:
    start, duration = float(phase["start_ms"]), float(phase["duration_ms"])
    begin = min(BAR_WIDTH - 1, int(start * scale))
    end = min(BAR_WIDTH, max(begin + 1, round((start + duration) * scale)))
    bar = "." * begin + "#" * (end - begin) + "." * (BAR_WIDTH - end)
    leg = ""
    if shows_legs:
        leg = "    " if phase["leg"] is None else f"{phase['leg']:>3} "
    return f"{leg}{phase['name']:<9}{start:>11.1f}{duration:>11.1f}  {bar}"


def heading(phases: Sequence[Mapping[str, Any]]) -> str:
    leg = "leg " if any(phase["leg"] for phase in phases) else ""
    return f"{leg}{'phase':<9}{'start ms':>11}{'ms':>11}"
