from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from forebay.core.errors import ConfigurationError
from forebay.deploy.processes import ProcessRecord
from forebay.deploy.run_state import RunState, read_run_state, remove_run_state, write_run_state

ME = ProcessRecord.of(os.getpid())
assert ME is not None

STATE = RunState(
    instance="abc",
    ready=True,
    supervisor=ME,
    processes=(ProcessRecord(1, 2, "init"), ProcessRecord(3, 4, "a b")),
    host="127.0.0.1",
    http_port=8000,
    grpc_port=8001,
    redis_url="redis://:secret@127.0.0.1:6379/0",
    ray_address="127.0.0.1:6380",
    temp_dir="/x/forebay-1",
    log_dir="/x/logs",
    end_limit_s=60.0,
    model_id="m",
    engine="sim",
    pools={"prefill": 1, "decode": 2},
)


def test_round_trip(tmp_path: Path) -> None:
    write_run_state(tmp_path, STATE)
    assert read_run_state(tmp_path) == STATE
    assert STATE.http_url == "http://127.0.0.1:8000"
    assert STATE.grpc_address == "127.0.0.1:8001"


def test_nothing_there(tmp_path: Path) -> None:
    assert read_run_state(tmp_path) is None
    remove_run_state(tmp_path)


def test_holds_a_password_and_is_private(tmp_path: Path) -> None:
    write_run_state(tmp_path, STATE)
    write_run_state(tmp_path, STATE)
    assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_alive_means_this_very_supervisor() -> None:
    assert ME is not None
    assert STATE.alive
    reused = dataclasses.replace(ME, started=ME.started + 1)
    assert not dataclasses.replace(STATE, supervisor=reused).alive


@pytest.mark.parametrize("change", [{"version": 99}, {"extra": 1}, {"supervisor": {"pid": 1}}])
def test_another_version(tmp_path: Path, change: dict[str, object]) -> None:
    write_run_state(tmp_path, STATE)
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigurationError, match="another version"):
        read_run_state(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ConfigurationError, match=r"run\.json"):
        read_run_state(tmp_path)
