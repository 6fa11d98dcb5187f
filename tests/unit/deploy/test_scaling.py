"""Refusals, and a helper that finds no Ray; scaling itself is in tests/e2e."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from forebay.core.errors import ConfigurationError, Unavailable
from forebay.core.roles import WorkerRole
from forebay.deploy import scaling
from forebay.deploy.options import MAX_REPLICAS
from forebay.deploy.processes import ProcessRecord
from forebay.deploy.run_state import RunState


@pytest.fixture
def run(tmp_path: Path) -> RunState:
    supervisor = ProcessRecord.of(os.getpid())
    assert supervisor is not None
    (tmp_path / "token").write_text("0" * 64)
    return RunState(
        instance="00",
        ready=True,
        supervisor=supervisor,
        processes=(),
        host="127.0.0.1",
        http_port=1,
        grpc_port=2,
        redis_url="redis://127.0.0.1:1",
        ray_address="127.0.0.1:1",
        temp_dir=str(tmp_path),
        log_dir=str(tmp_path),
        end_limit_s=1.0,
        model_id="m",
        engine="sim",
        pools={"prefill": 1, "decode": 1},
    )


def test_only_pools_that_there_are(run: RunState) -> None:
    with pytest.raises(ConfigurationError, match="no mixed pool"):
        scaling.scale(run, WorkerRole.MIXED, 2)


def test_not_too_many(run: RunState) -> None:
    with pytest.raises(ConfigurationError, match=f"at most {MAX_REPLICAS}"):
        scaling.scale(run, WorkerRole.DECODE, MAX_REPLICAS + 1)


def test_a_ray_that_does_not_answer(run: RunState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "SCALE_LIMIT_S", 0.01)
    with pytest.raises(Unavailable, match="Ray did not answer"):
        scaling.scale(dataclasses.replace(run), WorkerRole.DECODE, 2)
