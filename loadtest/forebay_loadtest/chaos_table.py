"""The chaos run's table, for people."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from forebay_loadtest.chaos_report import Outcome, Row, rows
from forebay_loadtest.footprint import shown

_COLUMNS = (
    "fault",
    "count",
    "verified",
    "hit",
    "lost",
    "gateway's",
    "refused",
    "identical",
    "gap p50",
    "gap p99",
    "back p50",
    "back p99",
)


def print_outcome(console: Console, outcome: Outcome) -> None:
    table = Table(title=f"{outcome.engine} engine", box=None, padding=(0, 1, 0, 0))
    for index, name in enumerate(_COLUMNS):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows(outcome):
        table.add_row(*_cells(row))
    console.print(table)
    console.print(
        "lost: streams that a fault cost; gateway's: those that went with their gateway; refused:"
        " by a gateway that was away or drained; gap: longest silence of a stream that was sending;"
        " back: until every worker, the gateway or Valkey was there again; each time a request was"
        " answered after it; seconds"
    )
    console.print(f"blocks leaked, idle: {outcome.leaked_blocks}")
    console.print(f"RSS in MiB before: {shown(outcome.rss_before)}")
    console.print(f"RSS in MiB after:  {shown(outcome.rss_after)}")


def _cells(row: Row) -> list[str]:
    seconds = (row.gap_p50_s, row.gap_p99_s, row.back_p50_s, row.back_p99_s)
    streams = (row.hit, row.lost, row.gateway_lost, row.gateway_refused)
    numbers = (row.count, row.verified, *streams)
    identical = f"{row.identical}/{row.compared}"
    return [row.kind, *map(str, numbers), identical, *map(_seconds, seconds)]


def _seconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"
