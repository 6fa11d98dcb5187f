"""Processes are told apart by id and start time: all of this runs on real ones."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from forebay.deploy.processes import (
    INSTANCE_VARIABLE,
    ProcessRecord,
    command_of,
    descendants,
    end_processes,
    marked,
)

SLEEP = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True);"
    "sys.stdin.read()",
]


def spawn(command: list[str], **environment: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = spawn(SLEEP)
    yield process
    process.kill()
    process.communicate()


def record_of(process: subprocess.Popen[bytes]) -> ProcessRecord:
    record = ProcessRecord.of(process.pid)
    assert record is not None
    return record


def test_a_running_process_is_alive(sleeper: subprocess.Popen[bytes]) -> None:
    assert record_of(sleeper).alive


def test_a_zombie_is_not_alive(sleeper: subprocess.Popen[bytes]) -> None:
    record = record_of(sleeper)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert not record.alive
    assert ProcessRecord.of(sleeper.pid) is None


def test_a_reused_id_is_never_signalled(sleeper: subprocess.Popen[bytes]) -> None:
    real = record_of(sleeper)
    ours_once = dataclasses.replace(real, started=real.started - 1)
    assert not ours_once.alive
    ours_once.signal(signal.SIGKILL)
    assert end_processes([ours_once], grace_s=1.0) == []
    assert sleeper.poll() is None
    assert real.alive


def test_signals_to_the_gone_are_nothing(sleeper: subprocess.Popen[bytes]) -> None:
    record = record_of(sleeper)
    sleeper.kill()
    sleeper.wait()
    record.signal(signal.SIGTERM)


def test_end_terminates_first_and_kills_then() -> None:
    polite, stubborn = spawn(SLEEP), spawn(STUBBORN)
    assert end_processes([record_of(polite), record_of(stubborn)], grace_s=0.5) == []
    polite.communicate()
    stubborn.communicate()
    assert polite.returncode == -signal.SIGTERM
    assert stubborn.returncode == -signal.SIGKILL


def test_marked_finds_by_environment(sleeper: subprocess.Popen[bytes]) -> None:
    process = spawn(SLEEP, **{INSTANCE_VARIABLE: "0123abcd"})
    try:
        assert marked("0123abcd") == [record_of(process)]
        assert marked("0123abc") == []
    finally:
        process.kill()
        process.communicate()


def test_descendants_reach_grandchildren() -> None:
    script = (
        "import subprocess, sys;"
        f"p = subprocess.Popen({SLEEP!r}, stdin=subprocess.PIPE, stdout=subprocess.PIPE);"
        "p.stdout.readline(); print(p.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    grandchild = int(parent.stdout.readline())
    # A run of tests has other children too.
    found = [item for item in descendants(os.getpid()) if item.pid in (parent.pid, grandchild)]
    assert [item.pid for item in found] == [parent.pid, grandchild]
    end_processes(found, grace_s=5.0)
    parent.communicate()


def test_subreaper_adopts_and_reaps_orphans() -> None:
    """In a process of its own: the setting cannot be taken back."""
    script = """
import os, subprocess, sys
from forebay.deploy.processes import ProcessRecord, become_subreaper, descendants, reap_adopted
become_subreaper()
middle = subprocess.run([sys.executable, "-c",
    "import subprocess, sys; p = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL,"
    "stderr=subprocess.DEVNULL);"
    "print(p.pid)"], capture_output=True, text=True, check=True)
orphan = int(middle.stdout)
assert [r.pid for r in descendants(os.getpid())] == [orphan]
os.kill(orphan, 9)
os.waitid(os.P_PID, orphan, os.WEXITED | os.WNOWAIT)
reap_adopted([])
assert not os.path.exists(f"/proc/{orphan}")
print("ok")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr


def test_command_of() -> None:
    process = spawn(SLEEP, FOREBAY_TEST_ENTRY="a=b c")
    try:
        arguments, environment = command_of(record_of(process))
        assert arguments == SLEEP
        assert environment["FOREBAY_TEST_ENTRY"] == "a=b c"
    finally:
        process.kill()
        process.communicate()
