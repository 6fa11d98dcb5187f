"""run.json: what a running platform tells the other commands, and what `down` needs to end it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from forebay.core.errors import ConfigurationError
from forebay.deploy.processes import ProcessRecord

FILE_NAME = "run.json"
LOG_FOLDER = "logs"
"""Beside run.json; kept until the next platform starts."""
LOG_NAME = "supervisor.log"
RAY_LOG_FOLDER = "ray"
"""In LOG_FOLDER: what Ray itself has logged, kept when the platform ends."""
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """`ready`: the platform answers; until then it is starting. `redis_url` holds a password, so
    the file is readable for its owner only. `temp_dir`: removed when the platform ends.
    `end_limit_s`: how long the supervisor may take from SIGTERM to its end."""

    instance: str
    ready: bool
    supervisor: ProcessRecord
    processes: tuple[ProcessRecord, ...]
    host: str
    http_port: int
    grpc_port: int
    redis_url: str
    ray_address: str
    temp_dir: str
    log_dir: str
    end_limit_s: float
    model_id: str
    engine: str
    pools: dict[str, int]

    @property
    def alive(self) -> bool:
        return self.supervisor.alive

    @property
    def http_url(self) -> str:
        return f"http://{self.host}:{self.http_port}"

    @property
    def grpc_address(self) -> str:
        return f"{self.host}:{self.grpc_port}"


def read_run_state(folder: Path) -> RunState | None:
    """None when no platform was started here. Raises ConfigurationError on a file of another
    version of this program."""
    path = folder / FILE_NAME
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {error}") from error
    try:
        if data.pop("version") != _VERSION:
            raise KeyError("version")
        data["supervisor"] = ProcessRecord(**data["supervisor"])
        data["processes"] = tuple(ProcessRecord(**record) for record in data["processes"])
        return RunState(**data)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{path}: written by another version of forebay; remove it when nothing runs"
        ) from error


def write_run_state(folder: Path, state: RunState) -> None:
    """Atomic, mode 0600."""
    path = folder / FILE_NAME
    partial = folder / f"{FILE_NAME}.new"
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        json.dump({"version": _VERSION, **asdict(state)}, file, indent=1)
    os.replace(partial, path)


def remove_run_state(folder: Path) -> None:
    (folder / FILE_NAME).unlink(missing_ok=True)
