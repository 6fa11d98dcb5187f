"""A local platform as a user sees it: through the `forebay` command, /proc and its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from forebay.deploy.ports import free_ports

COMMAND_LIMIT_S = 240.0
HEALING_LIMIT_S = 90.0


@dataclass(frozen=True, slots=True)
class LocalPlatform:
    """`up_output`: what the `up` that started it printed."""

    state_dir: Path
    http_port: int
    grpc_port: int
    up_output: str = ""

    @classmethod
    def prepare(cls, state_dir: Path) -> LocalPlatform:
        return cls(state_dir, *free_ports(2))

    @property
    def environment(self) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("FOREBAY_")}
        if "FOREBAY_CACHE_DIR" in os.environ:
            clean["FOREBAY_CACHE_DIR"] = os.environ["FOREBAY_CACHE_DIR"]
        return {**clean, "FOREBAY_STATE_DIR": str(self.state_dir)}

    @property
    def up_command(self) -> list[str]:
        ports = [f"--http-port={self.http_port}", f"--grpc-port={self.grpc_port}"]
        return [sys.executable, "-m", "forebay.cli.main", "up", *ports]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "forebay.cli.main", *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_LIMIT_S,
        )

    def up(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(*self.up_command[3:], *arguments)

    def status(self) -> Any:
        done = self.run("status", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def run_state(self) -> Any:
        return json.loads((self.state_dir / "run.json").read_text())

    def chat(self, question: str, **fields: object) -> Any:
        """Body of the reply to one chat request over HTTP."""
        body = {
            "model": self.status()["model"],
            "messages": [{"role": "user", "content": question}],
            **fields,
        }
        url = f"http://127.0.0.1:{self.http_port}/v1/chat/completions"
        reply = httpx.post(url, json=body, timeout=COMMAND_LIMIT_S)
        assert reply.status_code == 200, reply.text + self.logs()
        return reply.json()

    def workers(self, role: str, state: str = "ready") -> list[Any]:
        found = [item for item in self.status()["workers"] if item["role"] == role]
        return [item for item in found if item["state"] == state]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + HEALING_LIMIT_S
        while not condition():
            assert time.monotonic() < end, self.logs()
            time.sleep(0.3)

    def processes(self) -> dict[int, str]:
        """Everything that runs with this state folder in its environment: id, command line."""
        entry = f"FOREBAY_STATE_DIR={self.state_dir}".encode()
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal() or int(folder.name) == os.getpid():
                continue
            try:
                if entry in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(folder.name)] = command.decode(errors="replace").strip()
            except OSError:
                continue
        return found

    def pid_of(self, part: str) -> int:
        """Of the one process with `part` in its command line."""
        (pid,) = (pid for pid, command in self.processes().items() if part in command)
        return pid

    def run_state_pid(self, name: str) -> int:
        (pid,) = (item["pid"] for item in self.run_state()["processes"] if item["name"] == name)
        assert isinstance(pid, int)
        return pid

    def logs(self) -> str:
        paths = sorted((self.state_dir / "logs").glob("*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in paths)

    def assert_nothing_left(self) -> None:
        assert self.processes() == {}
        left = (
            {path.name for path in self.state_dir.iterdir()} if self.state_dir.exists() else set()
        )
        assert left <= {"lock", "logs"}
