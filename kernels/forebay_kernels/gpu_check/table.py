"""Rows as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forebay_kernels.gpu_check.case import Case, Target

UNMEASURED = "unmeasured"
NOT_THERE = "not available: "


def render(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it can be read as it is."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [_line(header, widths), "|" + "|".join("-" * (width + 2) for width in widths) + "|"]
    return "\n".join([*lines, *(_line(row, widths) for row in rows)])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(cells, widths, strict=True)) + " |"


def microseconds(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def peer_cells(ours_s: float, peers: Mapping[str, Mapping[str, Any]]) -> str:
    """`torch 120 us (3.1x)`: how much longer the peer takes; or why there is no time of it."""
    cells = []
    for name, found in peers.items():
        if "seconds" not in found:
            absent = found["reason"].startswith(NOT_THERE)
            cells.append(f"{name} absent" if absent else f"{name} failed: {found['reason'][:80]}")
            continue
        eager = " eager" if found.get("how") == "eager" else ""
        ratio = found["seconds"] / ours_s
        cells.append(f"{name}{eager} {microseconds(found['seconds'])} us ({ratio:.2f}x)")
    return "; ".join(cells)


def met(target: Target, ours_s: float, floor_s: float, peers: Mapping[str, Any]) -> str:
    """yes, no, or what could not be judged for want of a peer."""
    if target == Target():
        return ""
    verdicts = []
    if target.share is not None:
        verdicts.append(floor_s / ours_s >= target.share)
    if target.seconds is not None:
        verdicts.append(ours_s <= target.seconds)
    unjudged = []
    for name, ratio in target.times.items():
        if "seconds" in peers.get(name, {}):
            verdicts.append(peers[name]["seconds"] / ours_s >= ratio)
        else:
            unjudged.append(name)
    if not all(verdicts):
        return "no"
    if unjudged:
        return f"{'yes, ' if verdicts else ''}without {', '.join(unjudged)}"
    return "yes"


HEADER = ("op", "shape", "time, us", "floor, us", "time/floor", "target", "met", "peers")


def case_cells(case: Case, data: Mapping[str, Any] | None) -> tuple[str, ...]:
    """data: of the case's row in the journal or in RESULTS.json; None: nobody has run it."""
    floor = microseconds(case.floor_s)
    if data is None:
        return (case.op, case.shape, UNMEASURED, floor, "", str(case.target), "", "")
    ours_s, peers = data["ours"]["seconds"], data["peers"]
    return (
        case.op,
        case.shape,
        microseconds(ours_s),
        floor,
        f"{ours_s / data['floor_s']:.2f}",
        str(case.target),
        met(case.target, ours_s, data["floor_s"], peers),
        peer_cells(ours_s, peers),
    )
