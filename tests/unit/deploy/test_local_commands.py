"""`up` and `down` where no platform gets started; the real thing is in tests/e2e."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from forebay.core.errors import ConfigurationError, ModelFileError, Unavailable
from forebay.deploy import local
from forebay.deploy.options import PlatformPlan, UpOptions, make_plan
from forebay.deploy.ports import LOOPBACK, free_ports
from forebay.deploy.processes import INSTANCE_VARIABLE, ProcessRecord
from forebay.deploy.progress import Event, Stage
from forebay.deploy.run_state import RunState, read_run_state, write_run_state

SLEEP = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
INSTANCE = "00ff" * 8


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOREBAY_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("FOREBAY_REDIS_URL", raising=False)
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


def test_a_slim_install_is_told_what_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "NEEDED_PACKAGES", ("json", "no_such_package"))
    with pytest.raises(ConfigurationError, match=r"forebay\[local\].*no_such_package"):
        local.start(make_plan(UpOptions(engine="sim")), lambda event: None)
    assert not list(folder.iterdir())


def spawn(**environment: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        SLEEP, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **environment}
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """A supervisor, a recorded child, an unrecorded but marked one, and a foreign process."""
    marked = {INSTANCE_VARIABLE: INSTANCE}
    started = [spawn(), spawn(), spawn(**marked), spawn()]
    yield started
    for process in started:
        process.kill()
        process.communicate()


def record_of(process: subprocess.Popen[bytes]) -> ProcessRecord:
    record = ProcessRecord.of(process.pid)
    assert record is not None
    return record


def state_of(processes: list[subprocess.Popen[bytes]], temp_dir: Path) -> RunState:
    supervisor, child, _, foreign = (record_of(process) for process in processes)
    reused = dataclasses.replace(foreign, started=foreign.started - 1)
    return RunState(
        instance=INSTANCE,
        ready=True,
        supervisor=supervisor,
        processes=(child, reused),
        host=LOOPBACK,
        http_port=1,
        grpc_port=2,
        redis_url="",
        ray_address="",
        temp_dir=str(temp_dir),
        log_dir="",
        end_limit_s=10.0,
        model_id="m",
        engine="sim",
        pools={},
    )


def sim_plan() -> PlatformPlan:
    http_port, grpc_port = free_ports(2)
    return make_plan(UpOptions(engine="sim", http_port=http_port, grpc_port=grpc_port))


def ignore(event: Event) -> None:
    pass


def test_down_with_nothing_there(folder: Path) -> None:
    assert local.stop() is False


def test_down_after_the_supervisor_died(
    folder: Path, tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    temp_dir = tmp_path / "forebay-x"
    temp_dir.mkdir()
    write_run_state(folder, state_of(processes, temp_dir))
    supervisor, child, marked, foreign = processes
    supervisor.kill()
    supervisor.wait()
    assert local.stop() is True
    assert child.wait(timeout=10) < 0
    assert marked.wait(timeout=10) < 0
    assert foreign.poll() is None
    assert not temp_dir.exists()
    assert read_run_state(folder) is None
    assert local.stop() is False


def test_down_signals_the_supervisor(
    folder: Path, tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    write_run_state(folder, state_of(processes, tmp_path / "forebay-x"))
    assert local.stop() is True
    assert processes[0].wait(timeout=10) < 0
    assert processes[3].poll() is None


def test_up_refuses_while_one_runs(
    folder: Path, tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    state = state_of(processes, tmp_path / "forebay-x")
    write_run_state(folder, state)
    with pytest.raises(ConfigurationError, match="runs already"):
        local.start(sim_plan(), ignore)
    write_run_state(folder, dataclasses.replace(state, ready=False))
    with pytest.raises(ConfigurationError, match="is starting already"):
        local.start(sim_plan(), ignore)
    assert all(process.poll() is None for process in processes)


def test_up_with_a_port_taken(folder: Path) -> None:
    plan = sim_plan()
    with socket.socket() as taken:
        taken.bind((LOOPBACK, plan.grpc_port))
        taken.listen()
        with pytest.raises(ConfigurationError, match=f"port {plan.grpc_port} is in use"):
            local.start(plan, ignore)
    assert list(folder.iterdir()) == []


def test_up_with_a_bad_model(folder: Path) -> None:
    http_port, grpc_port = free_ports(2)
    plan = make_plan(UpOptions(model="/none.gguf", http_port=http_port, grpc_port=grpc_port))
    with pytest.raises(ModelFileError, match="no such model"):
        local.start(plan, ignore)
    assert list(folder.iterdir()) == []


def test_up_with_a_redis_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes through a real supervisor."""
    port = free_ports(1)[0]
    monkeypatch.setenv("FOREBAY_REDIS_URL", f"redis://127.0.0.1:{port}/0")
    events: list[Event] = []
    with pytest.raises(Unavailable, match="Redis") as caught:
        local.start(sim_plan(), events.append)
    assert "\n" not in caught.value.message
    assert [event.stage for event in events] == [Stage.REDIS, Stage.STOPPING]
    assert read_run_state(folder) is None
    assert "Redis" in (folder / "logs" / "supervisor.log").read_text()


def test_up_where_sockets_do_not_fit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_path = tmp_path / ("x" * 60)
    long_path.mkdir()
    monkeypatch.setenv("TMPDIR", str(long_path))
    with pytest.raises(Unavailable, match="set TMPDIR to a shorter one"):
        local.start(sim_plan(), ignore)
    assert list(long_path.iterdir()) == []


def test_two_at_once(folder: Path) -> None:
    """The lock, not run.json, decides."""
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); "
    process = subprocess.Popen(
        [sys.executable, "-c", holder + "print(flush=True); sys.stdin.read()", folder / "lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(Unavailable, match="another platform"):
        local.start(sim_plan(), ignore)
    process.communicate()
