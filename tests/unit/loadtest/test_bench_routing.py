from __future__ import annotations

import json
import random
from dataclasses import fields, replace
from pathlib import Path

import pytest

from forebay_loadtest.routing.offline import main
from forebay_loadtest.routing.replay_lineup import (
    FOREBAY,
    LINEUP,
    LONGEST_PREFIX,
    ROUND_ROBIN,
    Entrant,
)
from forebay_loadtest.routing.replay_runs import Figures, Ground, Setting, play, survey
from forebay_loadtest.routing.replay_targets import targets, verdict

BLOCK = 512


def write(path: Path, rows: list[tuple[int, list[int]]]) -> Path:
    """Rows of (timestamp in ms, hash ids); one token beyond the full blocks."""
    lines = [
        {"timestamp": at, "input_length": len(ids) * BLOCK + 1, "output_length": 1, "hash_ids": ids}
        for at, ids in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def conversations(num_requests: int) -> list[tuple[int, list[int]]]:
    """Turns of conversations that all begin with one block, and grow by one or two each time."""
    dice = random.Random(7)
    turns: list[list[int]] = []
    rows = []
    for number in range(num_requests):
        if not turns or dice.random() < 0.3:
            turns.append([0])
        ids = dice.choice(turns[-12:])
        ids += [1000 * number + i + 1 for i in range(dice.randint(1, 2))]
        rows.append((number * 100, list(ids)))
    return rows


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """Four equal prompts of two blocks, an hour apart, between two workers that can hold them."""
    hour_ms = 3_600_000
    trace = write(tmp_path / "trace.jsonl", [(n * hour_ms, [1, 2]) for n in range(4)])
    return Setting(trace, 1, num_workers=2, cache_share=2.0, event_delay_s=0.2)


def ground(setting: Setting) -> Ground:
    return replace(survey(setting), tokens_per_s=1025.0)


def test_bounds(setting: Setting) -> None:
    found = survey(setting)
    assert (found.num_requests, found.num_distinct_blocks, found.num_blocks) == (4, 2, 4)
    assert found.infinite == found.shared == pytest.approx(3 * 1024 / (4 * 1025))


def test_round_robin_computes_the_prompt_once_a_worker(setting: Setting) -> None:
    played = play(setting, ground(setting), Entrant(ROUND_ROBIN))
    assert played.figures.hit_rate == pytest.approx(2 * 1024 / (4 * 1025))
    assert played.figures.of_shared == pytest.approx(2 / 3)
    assert played.figures.mean_ttft == pytest.approx((1 + 1 + 2 / 1025) / 4)
    assert played.figures.p99_queued == 0
    assert played.figures.imbalance == pytest.approx(1)
    assert played.curves.busy_s == pytest.approx([1.001, 1.001], abs=1e-3)


def test_the_longest_prefix_leaves_one_worker_idle(setting: Setting) -> None:
    played = play(setting, ground(setting), Entrant(LONGEST_PREFIX))
    assert played.figures.of_shared == pytest.approx(1)
    assert played.figures.imbalance == pytest.approx(2)
    assert sorted(played.curves.busy_s) == pytest.approx([0, 1.003], abs=1e-3)


@pytest.mark.parametrize("name", LINEUP)
def test_every_point_of_every_grid_can_be_played(setting: Setting, name: str) -> None:
    for entrant in LINEUP[name]:
        assert len(play(setting, ground(setting), entrant).curves.ttft) > 0
        described = json.loads(json.dumps(entrant.described()))
        assert bool(described) == (entrant.parameters is not None)


def test_the_bench_on_three_hundred_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write(tmp_path / "trace.jsonl", conversations(300))
    output, plots = tmp_path / "results" / "routing.json", tmp_path / "plots"
    arguments = [
        *("--trace", str(trace), "--workers", "3", "--seeds", "1", "--processes", "1"),
        *("--policies", "round-robin,least-loaded,forebay", "--no-sweeps"),
        *("--output", str(output), "--plots", str(plots)),
    ]
    code = main(arguments)
    *_, last = capsys.readouterr().out.splitlines()
    report = json.loads(output.read_text())
    assert last == report["verdict"]
    assert last.startswith("OK: " if code == 0 else "SHORT: ")
    assert set(report["policies"]) == {"round-robin", "least-loaded", "forebay"}
    ours, turns = report["policies"]["forebay"], report["policies"]["round-robin"]
    assert ours["mean"]["hit_rate"] > turns["mean"]["hit_rate"]
    assert ours["mean"]["mean_ttft"] < turns["mean"]["mean_ttft"]
    assert [one["utilisation"] for one in turns["by_seed"]] == pytest.approx([0.95], abs=0.01)
    assert len(ours["busy_s"]) == 3
    assert {path.name for path in plots.iterdir()} == {
        "routing-bars.png",
        "routing-busy.png",
        "routing-queues.png",
        "routing-ttft.png",
    }


def test_a_trace_that_is_not_there_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--trace", str(tmp_path / "none.jsonl"), "--processes", "1"]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def figures(**changes: float) -> Figures:
    values = {field.name: 1.0 for field in fields(Figures)} | changes
    return Figures(**values)


def test_targets_say_what_falls_short() -> None:
    good = figures(of_shared=0.97, hit_rate=0.33, mean_ttft=2.0, p99_queued=5.0, imbalance=1.05)
    others = {
        "round-robin": [figures(mean_ttft=31.0, p99_queued=90.0)],
        "least-loaded": [figures(mean_ttft=5.5, p99_queued=9.0)],
        "longest-prefix": [figures(imbalance=8.0)],
        "dynamo": [figures(mean_ttft=2.4, hit_rate=0.32)],
    }
    found = targets({FOREBAY: [good], **others})
    assert all(target.held for target in found)
    assert verdict(found).startswith("OK: ")
    worse = targets(
        {FOREBAY: [replace(good, of_shared=0.9, hit_rate=0.3, mean_ttft=2.3)], **others}
    )
    missed = [target.name for target in worse if not target.held]
    assert missed == [
        "hit rate over one shared cache's",
        "mean TTFT, least-loaded over ours",
        "mean TTFT, round-robin over ours",
        "hit rate, ours over dynamo",
    ]
    assert verdict(worse).startswith("SHORT: hit rate over one shared cache's 0.900")
    assert targets({"round-robin": [good]}) == []
    assert verdict([]).startswith("SHORT: ")
