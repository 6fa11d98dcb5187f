"""What happened in a simulation, line by line: time, process, event. Never a prompt's text."""

from __future__ import annotations


class Timeline:
    """Off, it keeps nothing and costs next to nothing: ask `on` before putting a line together."""

    def __init__(self, on: bool) -> None:
        self.on = on
        self.lines: list[str] = []

    def add(self, now: float, node_name: str, event: str) -> None:
        if self.on:
            self.lines.append(f"{now:10.4f}  {node_name:<12}  {event}")
