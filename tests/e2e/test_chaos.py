"""The harnesses of `make chaos` and `make vanish`, with a handful of faults and clients."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

LIMIT_S = 280
KINDS = (
    "decode kill",
    "prefill kill",
    "valkey kill",
    "decode pause",
    "prefill drain",
    "gcs kill",
    "gateway kill",
)


def run(module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"forebay_loadtest.{module}", *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    last = done.stdout.rstrip().rpartition("\n")[2]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert last.startswith("OK: ")
    return done.stdout


def test_faults_cost_no_stream(tmp_path: Path) -> None:
    output = tmp_path / "chaos.json"
    only = [f"--only={kind}" for kind in KINDS]
    faults = ["--engine=sim", f"--faults={len(KINDS)}", "--streams=16"]
    printed = run("chaos", *faults, *only, f"--output={output}")
    assert all(kind in printed for kind in KINDS)
    (made,) = json.loads(output.read_text())["runs"]
    quiet, *kinds = made["kinds"]
    assert quiet["kind"] == "none"
    assert {row["kind"] for row in kinds} == set(KINDS)
    assert all(row["verified"] == row["count"] == 1 for row in kinds)
    assert all(row["identical"] == row["compared"] for row in kinds)
    assert sum(row["hit"] for row in kinds) > 16
    assert made["lost"] == [] or {item["fault"] for item in made["lost"]} == {"gateway kill"}
    assert made["different"] == []
    assert all(fault["evidence"] and fault["back_s"] for fault in made["faults"])


def test_clients_that_vanish_leave_nothing(tmp_path: Path) -> None:
    output = tmp_path / "vanish.json"
    run("vanish", "--clients=104", "--rounds=2", f"--output={output}")
    made: Any = json.loads(output.read_text())
    assert sum(clients for _, clients, *_ in made["departures"]) == 104
    assert sum(before for _, _, before, *_ in made["departures"]) > 0
    assert sum(after for _, _, _, after, _ in made["departures"]) > 0
    assert all(each["held_blocks"] == each["num_busy"] == 0 for each in made["rounds"])


def test_an_unknown_fault_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "forebay_loadtest.chaos", "--only=decode tickle"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 1
    assert "no such fault: decode tickle" in done.stderr
