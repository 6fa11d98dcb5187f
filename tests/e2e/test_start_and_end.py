"""Starts that work, starts that fail, and ends: none leaves a process behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from forebay.client import ForebayClient
from forebay.rpc.v1 import inference_pb2
from local_platform import COMMAND_LIMIT_S, LocalPlatform

pytestmark = pytest.mark.e2e


def test_mixed_pool_and_idempotent_down(fresh_platform: LocalPlatform) -> None:
    done = fresh_platform.up("--engine=sim", "--mixed=1", "--kv-memory-mib=64")
    assert done.returncode == 0, done.stderr + fresh_platform.logs()
    status = fresh_platform.status()
    assert [worker["role"] for worker in status["workers"]] == ["mixed"]
    assert status["totals"]["kv_bytes_sent"] == 0
    assert status["totals"]["generation_tokens"] > 0
    assert fresh_platform.run("down").returncode == 0
    fresh_platform.assert_nothing_left()
    again = fresh_platform.run("down")
    assert (again.returncode, again.stdout) == (0, "No platform runs here.\n")
    assert fresh_platform.run("status").returncode == 1


async def test_down_lets_streams_finish(fresh_platform: LocalPlatform) -> None:
    assert fresh_platform.up("--engine=sim", "--kv-memory-mib=64").returncode == 0
    request = inference_pb2.GenerateRequest(
        model=fresh_platform.status()["model"],
        text="Once upon a time",
        sampling=inference_pb2.SamplingParams(max_tokens=200, ignore_eos=True),
    )
    async with ForebayClient(f"127.0.0.1:{fresh_platform.grpc_port}") as client:
        events = client.generate(request, timeout_s=COMMAND_LIMIT_S)
        received = [await anext(events)]
        down = asyncio.create_task(asyncio.to_thread(fresh_platform.run, "down"))
        received += [event async for event in events]
        assert not down.done()
    assert isinstance(received[-1], inference_pb2.GenerateComplete)
    assert received[-1].usage.completion_tokens == 200
    assert (await down).returncode == 0
    fresh_platform.assert_nothing_left()


def test_port_taken(fresh_platform: LocalPlatform) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", fresh_platform.http_port))
        taken.listen()
        done = fresh_platform.up("--engine=sim")
    assert done.returncode == 1
    assert done.stderr == f"forebay: port {fresh_platform.http_port} is in use\n"
    fresh_platform.assert_nothing_left()


def test_a_platform_that_cannot_answer_is_ended(fresh_platform: LocalPlatform) -> None:
    done = fresh_platform.up("--engine=sim", "--max-model-len=8")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no answer" in done.stderr
    fresh_platform.assert_nothing_left()


def test_a_worker_that_cannot_start(fresh_platform: LocalPlatform, tmp_path: Path) -> None:
    """Its own reason is shown, once, and Serve's retries are not waited for."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    done = fresh_platform.up(f"--model={broken}")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "worker did not start" in done.stderr
    assert str(broken) in done.stderr
    assert "did not start" in (fresh_platform.state_dir / "logs" / "supervisor.log").read_text()
    fresh_platform.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_up(fresh_platform: LocalPlatform, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*fresh_platform.up_command, "--engine=sim"],
        env=fresh_platform.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    fresh_platform.wait_until(lambda: "raylet" in str(fresh_platform.processes()))
    os.kill(process.pid, number)
    _, stderr = process.communicate(timeout=COMMAND_LIMIT_S)
    if number is signal.SIGINT:
        assert process.returncode == 130
        assert stderr == "Interrupted: nothing is left running.\n"
        fresh_platform.assert_nothing_left()
    fresh_platform.wait_until(lambda: not fresh_platform.processes())


def test_down_while_up_is_under_way(fresh_platform: LocalPlatform) -> None:
    process = subprocess.Popen(
        [*fresh_platform.up_command, "--engine=sim"],
        env=fresh_platform.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    fresh_platform.wait_until(lambda: "raylet" in str(fresh_platform.processes()))
    assert fresh_platform.run("down").returncode == 0
    _, stderr = process.communicate(timeout=COMMAND_LIMIT_S)
    assert (process.returncode, stderr) == (1, "forebay: the start was ended from elsewhere\n")
    fresh_platform.assert_nothing_left()


def test_down_after_the_supervisor_was_killed(fresh_platform: LocalPlatform) -> None:
    assert fresh_platform.up("--engine=sim", "--kv-memory-mib=64").returncode == 0
    temp_dir = fresh_platform.run_state()["temp_dir"]
    os.kill(fresh_platform.run_state()["supervisor"]["pid"], signal.SIGKILL)
    fresh_platform.wait_until(lambda: fresh_platform.run("status").returncode == 1)
    assert fresh_platform.run("down").returncode == 0
    fresh_platform.assert_nothing_left()
    assert not os.path.exists(temp_dir)
