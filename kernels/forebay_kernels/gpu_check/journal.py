"""What has been found so far: one JSON object a line, appended by whichever process found it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

PHASE = ""
"""The name of the row that says how a phase as a whole ended."""


class State(StrEnum):
    OK = "ok"
    FAILED = "failed"
    NOT_AVAILABLE = "not available"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class Key:
    """Rows of the same sources on the same device and driver stand for one another."""

    source: str
    device: str
    driver: str


@dataclass(frozen=True, slots=True)
class Row:
    phase: str
    name: str
    state: State
    data: Mapping[str, Any]
    reason: str = ""


class Journal:
    def __init__(self, path: Path, key: Key) -> None:
        self.path = path
        self.key = key

    def append(self, phase: str, name: str, state: State, reason: str = "", **data: object) -> None:
        row = {**asdict(self.key), "phase": phase, "name": name, "state": state}
        line = json.dumps({**row, "reason": reason, "data": data}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(line)

    def rows(self) -> dict[tuple[str, str], Row]:
        """The last row of each phase and name, in the order of their first. A line that a killed
        process left half written counts as absent."""
        found: dict[tuple[str, str], Row] = {}
        for entry in self._entries():
            row = Row(
                entry["phase"], entry["name"], State(entry["state"]), entry["data"], entry["reason"]
            )
            found[row.phase, row.name] = row
        return found

    def of_phase(self, phase: str) -> list[Row]:
        return [row for row in self.rows().values() if row.phase == phase and row.name != PHASE]

    def done(self, phase: str, name: str = PHASE) -> bool:
        """Nothing would come of doing it again: it went well, or cannot be done here."""
        row = self.rows().get((phase, name))
        return row is not None and row.state in (State.OK, State.NOT_AVAILABLE)

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)

    def _entries(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        key = asdict(self.key)
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(entry, dict) and all(entry.get(name) == key[name] for name in key):
                yield entry
