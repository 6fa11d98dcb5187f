"""One client of the platform: reads an answer event by event, or leaves, and checks what it gets
against the answer of an undisturbed run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import StrEnum

from forebay.core import clock
from forebay.core.errors import DeadlineExceeded, ForebayError, InvalidRequest, Overloaded
from forebay.core.sampling import SamplingParams
from forebay.gateway.generation import (
    ChoiceEnd,
    Chunk,
    Completion,
    Generation,
    Generator,
    Migrated,
    Placed,
)
from forebay.simulator.workload import Kind, expected

POISON_CODE = "poisoned_request"


class Phase(StrEnum):
    QUEUED = "queued"
    PLACED = "placed"
    FIRST_TOKEN = "first token"
    DECODE = "decode"
    LAST_TOKEN = "last token"
    OVER = "over"


class End(StrEnum):
    """How a request ended for its client."""

    COMPLETE = "complete"
    LEFT = "client left"
    REFUSED = "refused"
    LATE = "deadline passed"
    POISONED = "blocked as poison"
    FAILED = "failed"
    GATEWAY_DIED = "gateway died"


class WrongAnswer(AssertionError):
    """An invariant, as a client sees it."""


class SimClient:
    """`on_phase(client)` is called at every step of its life, on its gateway's node. pause_s: how
    long it thinks after each event."""

    def __init__(
        self,
        number: int,
        kind: Kind,
        timeout_s: float,
        pause_s: float,
        on_phase: Callable[[SimClient], None],
    ) -> None:
        self.number = number
        self.kind = kind
        self.timeout_s = timeout_s
        self.phase = Phase.QUEUED
        self.end: End | None = None
        self.error: ForebayError | None = None
        self.task: asyncio.Task[None] | None = None
        self.began_at = 0.0
        self.num_seconds = 0.0
        """Its whole life."""
        self.paused_s = 0.0
        self.num_events = 0
        self.num_cached_tokens = 0
        self.num_migrations = 0
        self._started = False
        self._pause_s = pause_s
        self._on_phase = on_phase
        self._expected = expected(kind)
        self._num_tokens = [0] * kind.params.n
        self._text = [""] * kind.params.n
        self._ended = [False] * kind.params.n

    @property
    def name(self) -> str:
        return f"client {self.number}"

    @property
    def params(self) -> SamplingParams:
        return self.kind.params

    async def run(self, gateway: Generator) -> None:
        """In its gateway's node. Raises WrongAnswer."""
        self.began_at = clock.now()
        self._started = True
        try:
            generation = gateway.prepare(self.kind.request(self.number, self.timeout_s))
            await self._read(generation)
        except ForebayError as error:
            self._failed(error)
        except asyncio.CancelledError:
            self.end = End.LEFT
            raise
        finally:
            self.phase = Phase.OVER
            self.num_seconds = clock.now() - self.began_at
            self._on_phase(self)

    def leave(self) -> bool:
        """Closes the connection. False if the request was over already."""
        if self.task is None or self.task.done() or self.end is not None:
            return False
        self.task.cancel()
        if not self._started:  # its gateway is frozen: a task that has not begun has no `finally`
            self.end = End.LEFT
        return True

    async def _read(self, generation: Generation) -> None:
        self._on_phase(self)
        events = generation.events()
        try:
            async for event in events:
                self._take(event)
                self.num_events += 1
                self._on_phase(self)
                if self._pause_s:
                    self.paused_s += self._pause_s
                    await asyncio.sleep(self._pause_s)
        finally:
            await events.aclose()
        if self.end is not End.COMPLETE:
            raise WrongAnswer(f"{self.name}: the stream ended without a terminal event")

    def _take(self, event: Placed | Migrated | Chunk | ChoiceEnd | Completion) -> None:
        if self.end is not None:
            raise WrongAnswer(f"{self.name}: {type(event).__name__} after the terminal event")
        match event:
            case Placed():
                if self.phase is not Phase.QUEUED:
                    raise WrongAnswer(f"{self.name}: placed twice")
                self.phase = Phase.PLACED
            case Migrated():
                self.num_migrations += 1
            case Chunk():
                self._take_chunk(event)
            case ChoiceEnd():
                self._take_choice_end(event)
            case Completion():
                self._take_completion(event)

    def _take_chunk(self, chunk: Chunk) -> None:
        choice, before = chunk.choice, self._num_tokens[chunk.choice]
        if self._ended[choice]:
            raise WrongAnswer(f"{self.name}: tokens of choice {choice} after its end")
        wanted = self._expected[choice].tokens[before : before + len(chunk.tokens)]
        if chunk.tokens != wanted:
            raise WrongAnswer(
                f"{self.name}: tokens {before} to {before + len(chunk.tokens) - 1} of choice "
                f"{choice} are not those of an undisturbed run"
            )
        self._num_tokens[choice] += len(chunk.tokens)
        self._text[choice] += chunk.text
        is_first = self.phase is Phase.PLACED
        self.phase = Phase.FIRST_TOKEN if is_first else Phase.DECODE

    def _take_choice_end(self, end: ChoiceEnd) -> None:
        choice = self._expected[end.choice]
        if self._ended[end.choice]:
            raise WrongAnswer(f"{self.name}: choice {end.choice} ended twice")
        self._ended[end.choice] = True
        if self._num_tokens[end.choice] != len(choice.tokens):
            raise WrongAnswer(
                f"{self.name}: choice {end.choice} ended after {self._num_tokens[end.choice]} of "
                f"{len(choice.tokens)} tokens"
            )
        if (self._text[end.choice], end.reason) != (choice.text, choice.reason):
            raise WrongAnswer(f"{self.name}: text or finish reason of choice {end.choice} differs")
        if all(self._ended):
            self.phase = Phase.LAST_TOKEN

    def _take_completion(self, completion: Completion) -> None:
        usage = completion.usage
        wanted = (len(self.kind.prompt), sum(len(choice.tokens) for choice in self._expected))
        if not all(self._ended):
            raise WrongAnswer(f"{self.name}: complete before all of its choices have ended")
        if (usage.prompt_tokens, usage.completion_tokens) != wanted:
            raise WrongAnswer(f"{self.name}: usage {usage} where {wanted} belong")
        if not 0 <= usage.cached_tokens <= usage.prompt_tokens:
            raise WrongAnswer(f"{self.name}: {usage.cached_tokens} cached tokens")
        self.num_cached_tokens = usage.cached_tokens
        self.end = End.COMPLETE

    def _failed(self, error: ForebayError) -> None:
        if self.end is not None:
            raise WrongAnswer(f"{self.name}: an error after the terminal event") from error
        self.error = error
        if isinstance(error, DeadlineExceeded):
            self.end = End.LATE
        elif isinstance(error, Overloaded):
            self.end = End.REFUSED
        elif isinstance(error, InvalidRequest) and error.code == POISON_CODE:
            self.end = End.POISONED
        else:
            self.end = End.FAILED
