"""`forebay status`"""

from __future__ import annotations

import asyncio
import json

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from forebay.cli.console import running_platform
from forebay.deploy.status import PlatformStatus, WorkerState, WorkerStatus, platform_status

_STATE_STYLES = {
    WorkerState.READY: "green",
    WorkerState.DRAINING: "yellow",
    WorkerState.UNREACHABLE: "red",
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(as_json: bool) -> None:
    """Show the workers of the local platform, each asked at this moment."""
    report = asyncio.run(platform_status(running_platform()))
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
        return
    console = Console(highlight=False)
    if report.workers:
        console.print(_table(report))
        console.print("free, used, leased, cached: KV blocks; sent, received: KV bytes")
    _print_summary(console, report)


def _table(report: PlatformStatus) -> Table:
    """Narrow enough for 80 columns; ids and more are in the JSON."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("role", "address", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("run", "wait", "free", "used", "leased", "cached", "sent", "received"):
        table.add_column(name, no_wrap=True, justify="right")
    for item in report.workers:
        table.add_row(*_row(item))
    return table


def _row(item: WorkerStatus) -> list[str]:
    load, counters = item.worker.load, item.worker.counters
    blocks = load.kv_blocks
    sequences = (load.num_running, load.num_waiting)
    states = (blocks.free, blocks.used, blocks.leased, blocks.cached)
    return [
        item.role,
        item.address,
        f"[{_STATE_STYLES[item.state]}]{item.state.value}[/]",
        *map(str, sequences + states),
        size(counters.kv_bytes_sent),
        size(counters.kv_bytes_received),
    ]


def _print_summary(console: Console, report: PlatformStatus) -> None:
    ready = "[green]ready[/]" if report.gateway_ready else "[red]not ready[/]"
    run = report.run
    console.print(f"Model {escape(run.model_id)} ({run.engine} engine)")
    console.print(f"Gateway {run.http_url} (gRPC {run.grpc_address}): {ready}")
    if not run.ready:
        console.print("The platform is starting.")
    if report.registry_error:
        console.print(
            f"[red]The list of workers cannot be read: {escape(report.registry_error)}[/]"
        )
    totals = report.totals()
    console.print(
        f"Total: {totals['running']} running, {totals['waiting']} waiting,"
        f" {size(totals['kv_bytes_sent'])} KV sent,"
        f" {totals['prompt_tokens']} prompt and {totals['generation_tokens']} generated tokens"
    )


def size(num_bytes: int) -> str:
    """Decimal units, as in `1.5MB`."""
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f}{unit}" if unit == "B" else f"{value:.1f}{unit}"
