from __future__ import annotations

import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from forebay.core import settings
from forebay.core.errors import ConfigurationError
from forebay.core.roles import WorkerRole
from forebay.core.settings import EngineSettings, GatewaySettings, WorkerSettings, load
from forebay.rpc.grpc_connector import MAX_MESSAGE_BYTES

PREFIXES: dict[type[Any], str] = {
    EngineSettings: "FOREBAY_ENGINE_",
    WorkerSettings: "FOREBAY_WORKER_",
    GatewaySettings: "FOREBAY_GATEWAY_",
}


def variables() -> list[tuple[type[Any], str, str]]:
    return [
        (group, field.name, prefix + field.name.upper())
        for group, prefix in PREFIXES.items()
        for field in fields(group)
        if field.name != "engine" or group is EngineSettings
    ]


def is_number(group: type[Any], name: str) -> bool:
    hint = typing.get_type_hints(group)[name]
    return bool({int, float} & {hint, *typing.get_args(hint)})


@pytest.mark.parametrize("group", PREFIXES)
def test_nothing_set_gives_the_defaults(group: type[Any]) -> None:
    assert load(group, {}) == group()
    assert load(group, {"PATH": "/bin", "FOREBAY_CACHE_DIR": "/x"}) == group()


@pytest.mark.parametrize(("group", "name", "variable"), variables())
def test_every_field_is_read_from_its_variable(group: type[Any], name: str, variable: str) -> None:
    text = "7" if is_number(group, name) else "fp8" if name == "kv_codec" else "decode"
    value = getattr(load(group, {variable: text}), name)
    assert value in (7, "decode", "fp8")
    assert type(value) is not str or not is_number(group, name)


@pytest.mark.parametrize("text", ["x", "", "-1", "nan", "inf", "-inf", "1e400", "1 2"])
@pytest.mark.parametrize(
    ("group", "name", "variable"), [v for v in variables() if is_number(v[0], v[1])]
)
def test_every_bad_number_names_its_variable(
    group: type[Any], name: str, variable: str, text: str
) -> None:
    if text == "" and type(None) in typing.get_args(typing.get_type_hints(group)[name]):
        assert getattr(load(group, {variable: text}), name) is None
        return
    with pytest.raises(ConfigurationError, match=variable):
        load(group, {variable: text})


@pytest.mark.parametrize("text", ["", "PREFILL", "both", "0"])
def test_a_bad_role_names_its_variable(text: str) -> None:
    with pytest.raises(ConfigurationError, match="FOREBAY_WORKER_ROLE"):
        load(WorkerSettings, {"FOREBAY_WORKER_ROLE": text})


@pytest.mark.parametrize("text", ["", "RAW", "fp16", "0"])
def test_a_bad_codec_names_its_variable(text: str) -> None:
    with pytest.raises(ConfigurationError, match="FOREBAY_WORKER_KV_CODEC"):
        load(WorkerSettings, {"FOREBAY_WORKER_KV_CODEC": text})


def test_roles_are_read() -> None:
    for role in WorkerRole:
        assert load(WorkerSettings, {"FOREBAY_WORKER_ROLE": role.value}).role is role


@pytest.mark.parametrize(
    ("group", "variable"),
    [
        (EngineSettings, "FOREBAY_ENGINE_NUM_BLOCK"),
        (WorkerSettings, "FOREBAY_WORKER_LEASE"),
        (WorkerSettings, "FOREBAY_ENGINE_TYPO"),
        (GatewaySettings, "FOREBAY_GATEWAY_"),
    ],
)
def test_an_unknown_variable_is_refused(group: type[Any], variable: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{variable}: no such setting"):
        load(group, {variable: "1"})


def test_a_worker_brings_its_engine() -> None:
    loaded = load(WorkerSettings, {"FOREBAY_ENGINE_NUM_BLOCKS": "12"})
    assert loaded.engine.num_blocks == 12
    with pytest.raises(ConfigurationError, match="FOREBAY_ENGINE_NUM_BLOCKS"):
        load(WorkerSettings, {"FOREBAY_ENGINE_NUM_BLOCKS": "many"})


def test_one_redis_serves_all_but_a_group_may_have_its_own() -> None:
    shared = {"FOREBAY_REDIS_URL": "redis://shared"}
    assert load(WorkerSettings, shared).redis_url == "redis://shared"
    assert load(GatewaySettings, shared).redis_url == "redis://shared"
    own = {**shared, "FOREBAY_GATEWAY_REDIS_URL": "redis://own"}
    assert load(GatewaySettings, own).redis_url == "redis://own"
    assert load(WorkerSettings, own).redis_url == "redis://shared"


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_ENGINE_BLOCK_SIZE", "32")
    assert load(EngineSettings).block_size == 32
    monkeypatch.setenv("FOREBAY_REDIS_URL", "")
    assert settings.external_redis_url() is None
    monkeypatch.setenv("FOREBAY_REDIS_URL", "redis://x")
    assert settings.external_redis_url() == "redis://x"


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for own, xdg, folder in (
        ("FOREBAY_CACHE_DIR", "XDG_CACHE_HOME", settings.cache_dir),
        ("FOREBAY_STATE_DIR", "XDG_STATE_HOME", settings.state_dir),
    ):
        monkeypatch.delenv(own, raising=False)
        monkeypatch.delenv(xdg, raising=False)
        assert folder().is_relative_to(Path.home())
        monkeypatch.setenv(xdg, str(tmp_path))
        assert folder() == tmp_path / "forebay"
        monkeypatch.setenv(own, str(tmp_path / "own"))
        assert folder() == tmp_path / "own"
        monkeypatch.setenv(own, "")
        assert folder() == tmp_path / "forebay"
        monkeypatch.setenv(own, "~no-such-user/x")
        with pytest.raises(ConfigurationError, match=own):
            folder()


@pytest.mark.parametrize("name", ["block_size", "num_threads", "max_num_seqs", "kv_memory_mib"])
def test_what_must_be_one_or_more(name: str) -> None:
    variable = f"FOREBAY_ENGINE_{name.upper()}"
    with pytest.raises(ConfigurationError, match=variable):
        settings.load(settings.EngineSettings, {variable: "0"})
    assert getattr(settings.load(settings.EngineSettings, {variable: "1"}), name) == 1


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (WorkerSettings, "heartbeat_s"),
        (WorkerSettings, "lease_s"),
        (WorkerSettings, "registry_ttl_s"),
        (WorkerSettings, "step_timeout_s"),
        (GatewaySettings, "registry_poll_s"),
        (GatewaySettings, "keep_alive_s"),
        (GatewaySettings, "worker_silence_s"),
    ],
)
def test_a_period_of_nothing_is_refused(group: type[Any], name: str) -> None:
    variable = PREFIXES[group] + name.upper()
    with pytest.raises(ConfigurationError, match=f"{variable}: must be more than 0"):
        load(group, {variable: "0"})
    assert getattr(load(group, {variable: "0.1"}), name) == 0.1


def test_a_frame_is_no_larger_than_a_message_may_be() -> None:
    variable = "FOREBAY_WORKER_KV_FRAME_KIB"
    assert load(WorkerSettings, {variable: "32768"}).kv_frame_kib * 1024 < MAX_MESSAGE_BYTES
    with pytest.raises(ConfigurationError, match=f"{variable}: must be at most 32768"):
        load(WorkerSettings, {variable: "32769"})
