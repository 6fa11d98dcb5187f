"""Seeds of the whole platform under faults, and proof that the simulator would see a bug."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import planted_bugs
from forebay.simulator.report import simulate_many
from forebay.simulator.scenario import MIN_FAULTS, MIN_REQUESTS, simulate

NUM_SEEDS = 150


def test_seeds_pass() -> None:
    report = simulate_many(range(NUM_SEEDS), os.cpu_count() or 1)
    assert report.failures == []
    assert report.num_seeds == NUM_SEEDS
    assert report.ends.total() >= NUM_SEEDS * MIN_REQUESTS
    assert report.verified.total() >= NUM_SEEDS * MIN_FAULTS
    assert report.ends["complete"] > 0.85 * report.ends.total()
    assert len(report.verified) > 30
    assert report.num_pulled_tokens > 5 * NUM_SEEDS
    assert report.num_failed_pulls > 0.3 * NUM_SEEDS


@pytest.mark.parametrize("name", planted_bugs.BUGS)
def test_planted_bug_is_found(name: str) -> None:
    result = planted_bugs.find(planted_bugs.BUGS[name])
    assert result is not None
    again = simulate(result.seed)
    assert not again.error, "the seed fails without the bug, too"


def test_failure_shows_a_timeline_without_prompts() -> None:
    with planted_bugs.lost_abort():
        found = planted_bugs.find(planted_bugs.lost_abort)
        assert found is not None
        shown = simulate(found.seed, timeline=True)
    assert shown.error == found.error
    assert any("FAILED" in line and "abort" in line for line in shown.lines)
    assert any("FAULT" in line for line in shown.lines)
    assert shown.num_events == found.num_events


_SHOW = """
import sys
from forebay.simulator.scenario import simulate
for seed in range(int(sys.argv[1]), int(sys.argv[2])):
    result = simulate(seed, timeline=True)
    print(seed, result.num_events, result.virtual_s, result.error)
    print("\\n".join(result.lines))
"""


def test_same_seed_same_timeline_in_any_process() -> None:
    """Whatever the hash seed and whatever ran before."""

    def show(hash_seed: str, first: int) -> str:
        environ = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = [sys.executable, "-c", _SHOW, str(first), "13"]
        output = subprocess.run(run, env=environ, capture_output=True, text=True, check=True).stdout
        return output[output.index("10 ") if first < 10 else 0 :]

    assert show("1", 10) == show("2", 10)


def test_timeline_does_not_change_the_run() -> None:
    quiet, shown = simulate(3), simulate(3, timeline=True)
    assert (quiet.num_events, quiet.virtual_s) == (shown.num_events, shown.virtual_s)
    assert not quiet.lines and shown.lines
