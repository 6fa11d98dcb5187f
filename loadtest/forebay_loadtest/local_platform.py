"""A platform of a run's own, started and ended through the `forebay` command."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from forebay.deploy.ports import free_ports
from forebay.deploy.run_state import LOG_FOLDER, RunState, read_run_state
from forebay.deploy.status import PlatformStatus, platform_status

COMMAND_LIMIT_S = 300.0


class PlatformError(Exception):
    """The platform under test did not do what a command asked for."""


@dataclass(frozen=True, slots=True)
class LocalPlatform:
    """`settings`: environment variables of its own, beside the state folder."""

    state_dir: Path
    http_port: int
    grpc_port: int
    settings: Mapping[str, str]

    @classmethod
    def prepare(cls, state_dir: Path, settings: Mapping[str, str]) -> LocalPlatform:
        http_port, grpc_port = free_ports(2)
        return cls(state_dir, http_port, grpc_port, settings)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def run_state(self) -> RunState:
        state = read_run_state(self.state_dir)
        if state is None:
            raise PlatformError("the platform has ended")
        return state

    def command(self, *arguments: str) -> str:
        """Runs `forebay ARGUMENTS`; returns what it printed. Raises PlatformError."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("FOREBAY_")}
        if (cache := os.environ.get("FOREBAY_CACHE_DIR")) is not None:
            inherited["FOREBAY_CACHE_DIR"] = cache
        own = {**self.settings, "FOREBAY_STATE_DIR": str(self.state_dir)}
        done = subprocess.run(
            [sys.executable, "-m", "forebay.cli.main", *arguments],
            env={**inherited, **own},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_LIMIT_S,
        )
        if done.returncode != 0:
            raise PlatformError(f"forebay {arguments[0]}: {done.stderr.strip()}")
        return done.stdout

    @contextmanager
    def started(self, *options: str) -> Iterator[None]:
        """Ended in any case, SIGTERM to this process included; a supervisor that was stopped goes
        on first."""
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        ports = [f"--http-port={self.http_port}", f"--grpc-port={self.grpc_port}"]
        self.command("up", *ports, *options)
        try:
            yield
        finally:
            state = read_run_state(self.state_dir)
            if state is not None:
                state.supervisor.signal(signal.SIGCONT)
            self.command("down")

    def copy_logs(self, folder: Path) -> None:
        source = self.state_dir / LOG_FOLDER
        if source.is_dir():
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore_dangling_symlinks=True)

    async def status(self) -> PlatformStatus:
        return await platform_status(self.run_state)
