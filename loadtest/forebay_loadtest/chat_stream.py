"""One chat stream over HTTP, read event by event, and everything that can be wrong with it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import httpx

READ_LIMIT_S = 120.0
"""A stream that is silent this long, keep-alive comments included, counts as lost."""
CONNECT_LIMIT_S = 5.0
_REFUSALS = (429, 503)


class Ending(StrEnum):
    RUNNING = "running"
    COMPLETE = "complete"
    """Finish reason, usage and [DONE], in this order, and no error."""
    REFUSED = "refused"
    """Nothing was begun: no connection, 429 or 503."""
    CUT = "cut"
    """The connection ended in the middle."""
    FAILED = "failed"
    """The gateway said that it failed, or broke the protocol."""
    LEFT = "left"
    """The client went away by itself."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What must be the same with and without faults."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class ChatStream:
    """Times on `time.monotonic`. `client`: who asked; `spec`: the number of the request's kind."""

    client: int
    spec: int
    began: float
    ended: float = 0.0
    ending: Ending = Ending.RUNNING
    error: str = ""
    chunk_times: list[float] = field(default_factory=list)
    answer: Answer | None = None

    def running_at(self, moment: float) -> bool:
        return self.began <= moment and (self.ending is Ending.RUNNING or moment < self.ended)


class EventReader:
    """Puts a stream's SSE events together; pure. `feed` takes them one by one."""

    def __init__(self) -> None:
        self.error = ""
        self.done = False
        self._parts: list[str] = []
        self._finish = ""
        self._usage: tuple[int, int] | None = None

    def feed(self, data: str) -> bool:
        """Whether the event held text. `data` without its `data: ` prefix."""
        if self.done or self.error:
            self.error = self.error or "an event after [DONE]"
            if data == "[DONE]":
                self.error = f"[DONE] after an error: {self.error}"
            return False
        if data == "[DONE]":
            self.done = True
            return False
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            self.error = str(event["error"].get("message", event["error"]))
            return False
        if (usage := event.get("usage")) is not None:
            self._usage = (usage["prompt_tokens"], usage["completion_tokens"])
        text = ""
        for choice in event["choices"]:
            text += choice["delta"].get("content") or ""
            self._finish = choice.get("finish_reason") or self._finish
        self._parts.append(text)
        return bool(text)

    def answer(self) -> Answer | None:
        """None unless the stream was complete."""
        if not self.done or self.error or not self._finish or self._usage is None:
            return None
        return Answer("".join(self._parts), self._finish, *self._usage)


async def run_chat(
    http: httpx.AsyncClient, url: str, body: Mapping[str, object], stream: ChatStream
) -> None:
    """Sends `body` to `url` and fills `stream` in until it has ended, one way or another."""
    reader = EventReader()
    try:
        async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                refused = response.status_code in _REFUSALS
                stream.ending = Ending.REFUSED if refused else Ending.FAILED
                stream.error = f"{response.status_code}: {text[:300]}"
                return
            async for line in response.aiter_lines():
                if line.startswith("data: ") and reader.feed(line.removeprefix("data: ")):
                    stream.chunk_times.append(time.monotonic())
        stream.answer = reader.answer()
        stream.error = reader.error
        if stream.answer is not None:
            stream.ending = Ending.COMPLETE
        else:
            stream.ending = Ending.FAILED
            stream.error = stream.error or "the stream ended without finish reason, usage or [DONE]"
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        stream.ending, stream.error = Ending.REFUSED, f"{type(error).__name__}: {error}"
    except httpx.TransportError as error:
        stream.ending, stream.error = Ending.CUT, f"{type(error).__name__}: {error}"
    finally:
        stream.ended = time.monotonic()
        if stream.ending is Ending.RUNNING:
            stream.ending = Ending.LEFT


def http_client(num_streams: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        timeout=httpx.Timeout(READ_LIMIT_S, connect=CONNECT_LIMIT_S),
        limits=httpx.Limits(max_connections=num_streams + 8, max_keepalive_connections=0),
        trust_env=False,
    )
