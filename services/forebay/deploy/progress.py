"""What the supervisor tells `forebay up` while it starts: one JSON object a line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TextIO


class Stage(StrEnum):
    MODEL = "model"
    REDIS = "redis"
    GATEWAY = "gateway"
    RAY = "ray"
    WORKERS = "workers"
    READY = "ready"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """`done` False: the stage begins. `error` set: the start has failed, for the reason in it,
    and nothing more comes but STOPPING."""

    stage: Stage
    done: bool = False
    seconds: float = 0.0
    detail: str = ""
    error: str = ""
    log: str = ""

    @classmethod
    def parse(cls, line: str) -> Event:
        data = json.loads(line)
        return cls(**{**data, "stage": Stage(data["stage"])})


class ProgressWriter:
    """Falls silent when the reader goes away or `close` is called."""

    def __init__(self, out: TextIO) -> None:
        self._out: TextIO | None = out

    def emit(self, event: Event) -> None:
        if self._out is None:
            return
        try:
            self._out.write(json.dumps(asdict(event)) + "\n")
            self._out.flush()
        except BrokenPipeError:
            self._out = None

    def close(self) -> None:
        self._out = None
