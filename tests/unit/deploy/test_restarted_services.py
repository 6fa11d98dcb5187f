"""Restarts with real, very short processes and a clock of our own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from forebay.deploy.processes import ProcessRecord
from forebay.deploy.services import (
    FIRST_DELAY_S,
    MAX_DELAY_S,
    SETTLED_S,
    AdoptedService,
    Service,
)

FAILING = [sys.executable, "-c", "raise SystemExit(3)"]
WAITING = [sys.executable, "-c", "import sys; sys.stdin.read()"]


class Spawner:
    """Counts, and waits until each process it started has ended."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.count = 0

    def __call__(self) -> subprocess.Popen[bytes]:
        self.count += 1
        process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL)
        process.wait()
        return process


def test_restarts_after_growing_delays() -> None:
    spawn = Spawner(FAILING)
    service = Service("it", spawn)
    assert service.exit_code() is None
    service.start(now=0.0)
    assert service.exit_code() == 3
    now, delay = 0.0, FIRST_DELAY_S
    for expected in range(2, 10):
        service.tend(now)
        service.tend(now + 0.99 * delay)
        assert spawn.count == expected - 1
        now += delay
        service.tend(now)
        assert spawn.count == expected
        delay = min(2 * delay, MAX_DELAY_S)
    assert delay == MAX_DELAY_S


def test_a_settled_process_starts_again_at_once() -> None:
    spawn = Spawner(FAILING)
    service = Service("it", spawn)
    service.start(now=0.0)
    service.tend(0.0)
    service.tend(FIRST_DELAY_S)
    later = FIRST_DELAY_S + SETTLED_S
    service.tend(later)
    service.tend(later + FIRST_DELAY_S)
    assert spawn.count == 3


def test_a_running_process_is_left_alone() -> None:
    process = subprocess.Popen(WAITING, stdin=subprocess.PIPE)
    service = Service("it", lambda: process)
    service.start(now=0.0)
    service.tend(1000.0)
    assert service.pid == process.pid
    assert service.record == ProcessRecord.of(process.pid)
    process.communicate()


def test_an_adopted_process_lives_until_its_record_dies() -> None:
    process = subprocess.Popen(WAITING, stdin=subprocess.PIPE)
    record = ProcessRecord.of(process.pid)
    assert record is not None
    spawn = Spawner(FAILING)
    service = AdoptedService("it", record, spawn, now=0.0)
    service.tend(1.0)
    assert service.record == record
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    service.tend(2.0)
    assert spawn.count == 0
    service.tend(2.0 + FIRST_DELAY_S)
    assert spawn.count == 1
    assert service.exit_code() == 3
    process.communicate()
