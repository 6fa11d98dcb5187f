"""Workers without a raylet: real processes, a registry's lists and a clock of our own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from forebay.deploy.left_workers import (
    DRAIN_MARGIN_S,
    PARTIAL_S,
    REPLACED_LIMIT_S,
    TAKEOVER_S,
    LeftWorkers,
)
from forebay.deploy.processes import ProcessRecord
from forebay.rpc.v1 import worker_pb2

DRAIN_S = 10.0
PREFILL, DECODE = worker_pb2.WORKER_ROLE_PREFILL, worker_pb2.WORKER_ROLE_DECODE
IGNORING = (
    "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True);"
    "sys.stdin.read()"
)
OBEYING = "import sys; print(flush=True); sys.stdin.read()"


def worker(name: str, role: worker_pb2.WorkerRole) -> worker_pb2.WorkerDescription:
    return worker_pb2.WorkerDescription(worker_id=name, epoch=name, role=role)


OLD = [worker("a", PREFILL), worker("b", DECODE)]
NEW = [worker("c", PREFILL), worker("d", DECODE)]


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    yield from running(OBEYING)


@pytest.fixture
def stubborn() -> Iterator[subprocess.Popen[bytes]]:
    yield from running(IGNORING)


def running(code: str) -> Iterator[subprocess.Popen[bytes]]:
    made = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert made.stdout is not None
    made.stdout.readline()
    yield made
    made.kill()
    made.communicate()


def record(process: subprocess.Popen[bytes]) -> ProcessRecord:
    found = ProcessRecord.of(process.pid)
    assert found is not None
    return found


def test_they_serve_until_others_have_taken_over(process: subprocess.Popen[bytes]) -> None:
    left = LeftWorkers([record(process)], OLD, now=0.0)
    assert not left.tend(OLD, 1.0, DRAIN_S)
    assert not left.tend([*OLD, NEW[0]], 2.0, DRAIN_S)
    assert not left.tend([*OLD, *NEW], 3.0, DRAIN_S)
    assert process.poll() is None
    assert not left.tend([*OLD, *NEW], 3.0 + TAKEOVER_S, DRAIN_S)
    assert process.wait(10) == -signal.SIGTERM
    assert left.tend(NEW, 9.0, DRAIN_S)


def test_a_worker_that_will_not_drain_is_killed(stubborn: subprocess.Popen[bytes]) -> None:
    left = LeftWorkers([record(stubborn)], OLD, now=0.0)
    assert not left.tend([*OLD, *NEW], 0.0, DRAIN_S)
    assert not left.tend([*OLD, *NEW], TAKEOVER_S, DRAIN_S)
    assert not left.tend(NEW, TAKEOVER_S + DRAIN_S, DRAIN_S)
    assert stubborn.poll() is None
    left.tend(NEW, TAKEOVER_S + DRAIN_S + DRAIN_MARGIN_S, DRAIN_S)
    assert stubborn.wait(10) == -signal.SIGKILL


def test_fewer_new_workers_take_over_later(process: subprocess.Popen[bytes]) -> None:
    """The registry still listed two that had ended before."""
    left = LeftWorkers([record(process)], [*OLD, worker("e", PREFILL), worker("f", DECODE)], 0.0)
    assert not left.tend([*OLD, NEW[0]], 1.0, DRAIN_S)
    assert not left.tend([*OLD, NEW[0]], 2.0 + PARTIAL_S, DRAIN_S)
    assert not left.tend([*OLD, *NEW], 40.0, DRAIN_S)
    assert not left.tend([*OLD, *NEW], 39.0 + PARTIAL_S, DRAIN_S)
    assert process.poll() is None
    assert not left.tend([*OLD, *NEW], 40.0 + PARTIAL_S, DRAIN_S)
    assert process.wait(10) == -signal.SIGTERM


@pytest.mark.parametrize("registered", [None, OLD])
def test_without_a_registry_time_decides(
    process: subprocess.Popen[bytes], registered: list[worker_pb2.WorkerDescription] | None
) -> None:
    left = LeftWorkers([record(process)], registered, now=0.0)
    assert not left.tend(None, REPLACED_LIMIT_S - 1.0, DRAIN_S)
    assert process.poll() is None
    assert not left.tend(None, REPLACED_LIMIT_S, DRAIN_S)
    assert process.wait(10) == -signal.SIGTERM


def test_none_were_left() -> None:
    assert LeftWorkers([], OLD, now=0.0).tend(OLD, 0.0, DRAIN_S)
