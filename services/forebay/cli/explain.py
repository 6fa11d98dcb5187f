"""`forebay explain`"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from forebay.cli.console import running_platform
from forebay.cli.timeline_chart import chart, heading
from forebay.client import fetch_explanation

MAX_ROWS = 16
"""Workers in the table; --json has them all."""


@click.command()
@click.argument("request_id")
@click.option(
    "--url",
    metavar="http://HOST:PORT",
    help="The gateway that served it; by default that of the platform on this machine.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the record as one JSON object.")
def explain(request_id: str, url: str | None, as_json: bool) -> None:
    """Show why a request went to its workers, and where its time went.

    REQUEST_ID is the response's x-request-id, or the id in its body.
    """
    record = fetch_explanation(url or running_platform().http_url, request_id)
    if as_json:
        click.echo(json.dumps(record, indent=2))
        return
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for line in _summary(record):
        console.print(line)
    for leg in record["legs"]:
        _print_leg(console, record, leg)
    console.print()
    console.print(heading(record["phases"]))
    for line in chart(record["phases"], record["duration_ms"]):
        console.print(line)


def _summary(record: Mapping[str, Any]) -> list[str]:
    ttft, choices = record["ttft_ms"], record["choices"]
    num_tokens = sum(choice["num_tokens"] for choice in choices)
    first = "no token yet" if ttft is None else f"first token after {ttft:.1f} ms"
    among = f" in {len(choices)} choices" if len(choices) > 1 else ""
    return [
        f"Request {record['request_id']} ({record['model']}): {record['outcome']}"
        f" after {record['duration_ms']:.1f} ms, {first}",
        f"{record['num_prompt_tokens']} prompt tokens, {record['num_cached_tokens']} of them"
        f" cached; {num_tokens} generated{among}",
    ]


def _print_leg(console: Console, record: Mapping[str, Any], leg: Mapping[str, Any]) -> None:
    """A leg's choice of workers; of all its tries, the last one in full."""
    console.print()
    if record["num_legs"] > 1:
        console.print(_origin(record, leg))
    if not leg["attempts"]:
        console.print("No worker was chosen.")
        return
    for attempt in leg["attempts"][:-1]:
        console.print(_failed(attempt))
    last = leg["attempts"][-1]
    if last["scores"]:
        console.print(_table(last))
        hidden = len(last["scores"]) - len(_shown(last))
        if hidden > 0:
            console.print(f"and {hidden} more that cost more")
    if last["why"]:
        console.print(last["why"])
    console.print(_course(last))


def _origin(record: Mapping[str, Any], leg: Mapping[str, Any]) -> str:
    number, choices = leg["leg"], ", ".join(map(str, leg["choices"]))
    if leg["continues"] is None:
        return f"Leg {number}, choices {choices}"
    before = next((other for other in record["legs"] if other["leg"] == leg["continues"]), None)
    reason = ""
    if before is not None and before["end"] == "lost":
        reason = f": {before['lost_worker']} was lost"
    elif before is not None and before["end"] == "returned":
        reason = ": its worker handed it back"
    tokens = f"after {leg['num_tokens_before']} tokens" if leg["num_tokens_before"] else "from anew"
    return f"Leg {number}, choices {choices}, goes on {tokens} from leg {leg['continues']}{reason}"


def _workers(attempt: Mapping[str, Any]) -> str:
    if attempt["prefill"] is None:
        return str(attempt["decode"])
    return f"{attempt['prefill']} and {attempt['decode']}"


def _failed(attempt: Mapping[str, Any]) -> str:
    at = f"{attempt['first_look_ms']:.1f} ms"
    if attempt["refused_by"] is not None:
        return f"At {at}: {_workers(attempt)}; {attempt['refused_by']} refused"
    looks = attempt["num_looks"]
    times = "" if looks == 1 else f", looked {looks} times"
    return f"At {at}: waited for room on {_workers(attempt)}{times}"


def _course(attempt: Mapping[str, Any]) -> str:
    if attempt["refused_by"] is not None or not attempt["has_room"]:
        return _failed(attempt)
    marks = [f"Chosen at {attempt['routed_ms']:.1f} ms (in {attempt['decision_us']:.0f} us)"]
    for name in ("reserved", "accepted"):
        if attempt[f"{name}_ms"] is not None:
            marks.append(f"{name} at {attempt[f'{name}_ms']:.1f} ms")
    return ", ".join(marks)


def _shown(attempt: Mapping[str, Any]) -> Sequence[str]:
    """The lowest, and the chosen ones wherever they stand."""
    leading = list(attempt["scores"])[:MAX_ROWS]
    chosen = (attempt["prefill"], attempt["decode"])
    return leading + [w for w in attempt["scores"] if w in chosen and w not in leading]


def _table(attempt: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("worker", no_wrap=True)
    table.add_column("cost", justify="right")
    table.add_column("cached tokens", justify="right")
    table.add_column("chosen to")
    for worker in _shown(attempt):
        cost, held = attempt["scores"][worker], attempt["matched_tokens"].get(worker, 0)
        table.add_row(worker, f"{cost:.1f}", str(held), _part(attempt, worker))
    return table


def _part(attempt: Mapping[str, Any], worker: str) -> str:
    computes = attempt["prefill"] or attempt["decode"]
    parts = ["prefill"] if worker == computes else []
    if worker == attempt["decode"]:
        parts.append("decode")
    if worker == attempt["pull_from"]:
        parts.append("send its prefix")
    return ", ".join(parts)
