from __future__ import annotations

import os

import pytest

from forebay.core.errors import ConfigurationError
from forebay.core.roles import WorkerRole
from forebay.core.settings import DEFAULT_MODEL
from forebay.deploy.options import (
    PlatformPlan,
    UpOptions,
    child_environment,
    make_plan,
    with_model,
)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FOREBAY_")]:
        monkeypatch.delenv(name)


def test_defaults() -> None:
    plan = make_plan(UpOptions())
    assert plan.pools == {WorkerRole.PREFILL: 1, WorkerRole.DECODE: 1}
    assert (plan.http_port, plan.grpc_port) == (8000, 8001)
    assert plan.model == DEFAULT_MODEL
    assert plan.redis_url is None
    assert set(plan.environment) == {"FOREBAY_ENGINE_NUM_THREADS"}


def test_options_become_settings() -> None:
    plan = make_plan(UpOptions(engine="sim", dtype="fp32", http_port=9000, threads=3))
    assert plan.environment == {
        "FOREBAY_ENGINE_ENGINE": "sim",
        "FOREBAY_ENGINE_DTYPE": "fp32",
        "FOREBAY_ENGINE_NUM_THREADS": "3",
        "FOREBAY_GATEWAY_HTTP_PORT": "9000",
    }
    assert plan.engine == "sim"
    assert plan.http_port == 9000


def test_the_kv_codec_becomes_a_setting_of_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = make_plan(UpOptions(kv_codec="fp8")).environment
    assert environment["FOREBAY_WORKER_KV_CODEC"] == "fp8"
    monkeypatch.setenv("FOREBAY_WORKER_KV_CODEC", "fp9")
    with pytest.raises(ConfigurationError, match="FOREBAY_WORKER_KV_CODEC: 'fp9'"):
        make_plan(UpOptions())
    assert make_plan(UpOptions(kv_codec="raw")).environment["FOREBAY_WORKER_KV_CODEC"] == "raw"


def test_the_environment_counts_where_no_option_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_GATEWAY_HTTP_PORT", "7000")
    monkeypatch.setenv("FOREBAY_ENGINE_ENGINE", "sim")
    monkeypatch.setenv("FOREBAY_ENGINE_NUM_THREADS", "5")
    monkeypatch.setenv("FOREBAY_REDIS_URL", "redis://elsewhere:1")
    plan = make_plan(UpOptions())
    assert (plan.http_port, plan.engine) == (7000, "sim")
    assert plan.redis_url == "redis://elsewhere:1"
    assert plan.environment == {}
    assert make_plan(UpOptions(http_port=7001)).http_port == 7001


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    plan = make_plan(UpOptions(prefill=1, decode=3))
    assert plan.environment["FOREBAY_ENGINE_NUM_THREADS"] == "2"


def test_mixed_replaces_both_pools() -> None:
    assert make_plan(UpOptions(mixed=2)).pools == {WorkerRole.MIXED: 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (UpOptions(prefill=0), "at least one prefill"),
        (UpOptions(decode=0), "at least one prefill"),
        (UpOptions(decode=100), "at most 64"),
        (UpOptions(http_port=9, grpc_port=9), "both HTTP and gRPC"),
        (UpOptions(engine="magic"), "torch or sim"),
        (UpOptions(dtype="int1"), "fp32"),
        (UpOptions(kv_codec="zip"), "FOREBAY_WORKER_KV_CODEC"),
        (UpOptions(engine="sim", kv_codec="fp8"), "sim engine's KV is raw"),
        (UpOptions(mixed=1, prefill=2), "takes the place of"),
        (UpOptions(mixed=1, decode=1), "takes the place of"),
        (UpOptions(threads=99_999), "too many"),
        (UpOptions(model=""), "empty"),
    ],
)
def test_refused(options: UpOptions, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_plan(options)


def test_a_misspelt_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_ENGINE_BLOCKSIZE", "16")
    with pytest.raises(ConfigurationError, match="FOREBAY_ENGINE_BLOCKSIZE"):
        make_plan(UpOptions())


def test_travels_as_one_line() -> None:
    plan = make_plan(UpOptions(mixed=3, engine="sim"))
    assert "\n" not in plan.serialise()
    assert PlatformPlan.parse(plan.serialise()) == plan


def test_with_model(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = with_model(make_plan(UpOptions()), "/m/x.gguf", "x")
    assert plan.environment["FOREBAY_ENGINE_MODEL_PATH"] == "/m/x.gguf"
    assert plan.environment["FOREBAY_ENGINE_MODEL_ID"] == plan.model_id == "x"
    monkeypatch.setenv("FOREBAY_ENGINE_MODEL_ID", "mine")
    assert with_model(make_plan(UpOptions()), "/m/x.gguf", "x").model_id == "mine"


def test_child_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "a:/b")
    monkeypatch.setenv("FOREBAY_STATE_DIR", "old")
    environment = child_environment({"FOREBAY_STATE_DIR": "new"})
    assert environment["FOREBAY_STATE_DIR"] == "new"
    assert list(environment)[-1] == "FOREBAY_STATE_DIR"
    assert environment["PYTHONPATH"] == f"{os.getcwd()}/a:/b"
