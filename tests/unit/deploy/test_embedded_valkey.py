from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from forebay.core.errors import ConfigurationError
from forebay.deploy import valkey
from forebay.deploy.ports import LOOPBACK, check_port, free_ports
from forebay.deploy.valkey import EmbeddedValkey


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[EmbeddedValkey, subprocess.Popen[bytes]]]:
    server = EmbeddedValkey.prepare(LOOPBACK, free_ports(1)[0])
    process = server.spawn(tmp_path, tmp_path / "log", os.environ)
    while not server.answers():
        assert process.poll() is None, (tmp_path / "log").read_text()
    yield server, process
    process.terminate()
    process.wait(timeout=10)


def test_wants_its_password(running: tuple[EmbeddedValkey, subprocess.Popen[bytes]]) -> None:
    server, process = running
    assert not replace(server, password="guess").answers()
    with socket.create_connection((LOOPBACK, server.port)) as link:
        link.sendall(b"KEYS *\r\n")
        assert link.recv(100).startswith(b"-NOAUTH")
    command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    assert server.password.encode() not in command


def test_writes_nothing(
    running: tuple[EmbeddedValkey, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    _, process = running
    process.terminate()
    assert process.wait(timeout=10) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_nobody_there() -> None:
    server = EmbeddedValkey.prepare(LOOPBACK, free_ports(1)[0])
    assert not server.answers()


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(valkey.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="FOREBAY_REDIS_URL"):
        EmbeddedValkey.prepare(LOOPBACK, 1)


def test_ports() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    check_port(LOOPBACK, ports[0])
    with socket.socket() as taken:
        taken.bind((LOOPBACK, ports[0]))
        taken.listen()
        with pytest.raises(ConfigurationError, match=f"port {ports[0]} is in use"):
            check_port(LOOPBACK, ports[0])
    check_port(LOOPBACK, ports[0])


def test_a_host_that_is_not_ours() -> None:
    with pytest.raises(ConfigurationError, match=r"192\.0\.2\.1"):
        check_port("192.0.2.1", free_ports(1)[0])
