"""Platforms started by the `forebay` command, each with a state folder and ports of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from local_platform import LocalPlatform


@pytest.fixture
def fresh_platform(tmp_path: Path) -> Iterator[LocalPlatform]:
    """Not started; whatever the test starts is ended."""
    platform = LocalPlatform.prepare(tmp_path / "state")
    yield platform
    assert platform.run("down").returncode == 0
    platform.assert_nothing_left()


def started(platform: LocalPlatform, *arguments: str) -> Iterator[LocalPlatform]:
    done = platform.up(*arguments)
    assert done.returncode == 0, done.stderr + platform.logs()
    yield replace(platform, up_output=done.stdout)
    down = platform.run("down")
    assert down.returncode == 0, down.stderr
    platform.assert_nothing_left()


@pytest.fixture(scope="session")
def sim_platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalPlatform]:
    """One prefill and one decode worker of the sim engine."""
    platform = LocalPlatform.prepare(tmp_path_factory.mktemp("sim") / "state")
    yield from started(platform, "--engine=sim", "--kv-memory-mib=64")


@pytest.fixture(scope="session")
def model_platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalPlatform]:
    """One prefill and one decode worker with the real model in fp32."""
    platform = LocalPlatform.prepare(tmp_path_factory.mktemp("model") / "state")
    yield from started(platform, "--dtype=fp32", "--kv-memory-mib=256")
