"""A running local platform, its faults, and its commands: with the sim engine."""

from __future__ import annotations

import os
import signal

import pytest

from local_platform import LocalPlatform

pytestmark = pytest.mark.e2e


def assert_answers(platform: LocalPlatform) -> None:
    # The sim engine may end an answer at once, or draw nothing but blanks: tokens are counted.
    answer = platform.chat("Are you there?", max_tokens=5, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 5


def test_up_says_what_the_sim_engine_is(sim_platform: LocalPlatform) -> None:
    assert "nonsense" in sim_platform.up_output


def test_one_ready_worker_a_pool(sim_platform: LocalPlatform) -> None:
    status = sim_platform.status()
    assert status["ready"] is True
    assert status["pools"] == {
        "prefill": {"started_with": 1, "ready": 1},
        "decode": {"started_with": 1, "ready": 1},
    }
    assert {worker["engine"] for worker in status["workers"]} == {"sim"}
    shown = sim_platform.run("status")
    assert shown.returncode == 0
    assert "prefill" in shown.stdout and "ready" in shown.stdout


def test_models_lists_the_model(sim_platform: LocalPlatform) -> None:
    done = sim_platform.run("models")
    assert done.returncode == 0
    assert sim_platform.status()["model"] in done.stdout


def test_a_second_up_refuses(sim_platform: LocalPlatform) -> None:
    before = sim_platform.run_state()
    done = sim_platform.up("--engine=sim")
    assert done.returncode == 1
    assert "runs already" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sim_platform.run_state() == before


def test_secrets_are_private(sim_platform: LocalPlatform) -> None:
    state = sim_platform.run_state()
    assert (sim_platform.state_dir / "run.json").stat().st_mode & 0o077 == 0
    assert os.stat(state["temp_dir"]).st_mode & 0o077 == 0
    assert os.stat(os.path.join(state["temp_dir"], "token")).st_mode & 0o077 == 0
    password = state["redis_url"].split(":")[2].split("@")[0]
    assert password
    assert not any(password in command for command in sim_platform.processes().values())
    assert password not in sim_platform.logs()


def test_a_killed_worker_is_replaced(sim_platform: LocalPlatform) -> None:
    (before,) = sim_platform.workers("decode")
    os.kill(sim_platform.pid_of("ServeReplica:decode"), signal.SIGKILL)

    def replaced() -> bool:
        return any(item["epoch"] != before["epoch"] for item in sim_platform.workers("decode"))

    sim_platform.wait_until(replaced)
    assert_answers(sim_platform)


def test_a_killed_gateway_starts_again(sim_platform: LocalPlatform) -> None:
    killed = sim_platform.pid_of("forebay.gateway")
    os.kill(killed, signal.SIGKILL)
    sim_platform.wait_until(lambda: sim_platform.status()["gateway"]["ready"])
    assert sim_platform.pid_of("forebay.gateway") != killed
    assert_answers(sim_platform)


def test_a_killed_valkey_starts_again(sim_platform: LocalPlatform) -> None:
    """Everything in it is reconstructible: the workers register themselves again."""
    killed = sim_platform.pid_of("valkey-server")
    os.kill(killed, signal.SIGKILL)
    sim_platform.wait_until(lambda: len(sim_platform.status()["workers"]) == 2)
    assert sim_platform.pid_of("valkey-server") != killed
    assert_answers(sim_platform)


def test_the_data_path_outlives_rays_control_store(sim_platform: LocalPlatform) -> None:
    epochs = {item["epoch"] for item in sim_platform.status()["workers"]}
    killed = sim_platform.pid_of("gcs_server")
    os.kill(killed, signal.SIGKILL)
    assert_answers(sim_platform)
    sim_platform.wait_until(
        lambda: any("gcs_server" in command for command in sim_platform.processes().values())
    )
    assert sim_platform.pid_of("gcs_server") != killed
    assert {item["epoch"] for item in sim_platform.status()["workers"]} == epochs


def test_a_lost_raylet_brings_new_workers(sim_platform: LocalPlatform) -> None:
    epochs = {item["epoch"] for item in sim_platform.status()["workers"]}
    os.kill(sim_platform.run_state_pid("raylet"), signal.SIGKILL)

    def renewed() -> bool:
        workers = [*sim_platform.workers("prefill"), *sim_platform.workers("decode")]
        return len([item for item in workers if item["epoch"] not in epochs]) == 2

    sim_platform.wait_until(renewed)
    assert_answers(sim_platform)


def test_scaling_up_and_down(sim_platform: LocalPlatform) -> None:
    # Those that an earlier test has replaced may still be draining.
    sim_platform.wait_until(lambda: len(sim_platform.workers("decode")) == 1)
    (before,) = sim_platform.workers("decode")
    assert sim_platform.run("scale", "decode", "2").returncode == 0
    sim_platform.wait_until(lambda: len(sim_platform.workers("decode")) == 2)
    assert sim_platform.run("scale", "decode", "1").returncode == 0
    sim_platform.wait_until(lambda: len(sim_platform.workers("decode")) == 1)
    assert sim_platform.workers("decode")[0]["epoch"] == before["epoch"]
    assert_answers(sim_platform)
