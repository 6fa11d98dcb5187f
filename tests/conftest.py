"""Fixtures that need more than a test's own process."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from hypothesis import settings

from forebay.deploy.models import ensure_default_model
from forebay.deploy.ports import free_ports
from forebay.deploy.valkey import EmbeddedValkey

# No test fails for being slow: a machine that does something else is no fault.
settings.register_profile("forebay", deadline=None)
settings.load_profile("forebay")


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The default model's GGUF file, fetched once into the user's cache."""
    return ensure_default_model()


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Valkey of this run's own."""
    folder = tmp_path_factory.mktemp("valkey")
    (port,) = free_ports(1)
    server = EmbeddedValkey.prepare("127.0.0.1", port)
    process = server.spawn(folder, folder / "log", os.environ)
    try:
        _wait_for(process, server.url)
        yield server.url
    finally:
        process.terminate()
        process.wait(timeout=10)


def _wait_for(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + 10
    with redis.Redis.from_url(url) as client:
        while True:
            try:
                client.ping()
                return
            except redis.exceptions.ConnectionError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
