"""What the edges (HTTP, gRPC) hand to the request state machine, and what they get back."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from forebay.core.finish import FinishReason
from forebay.core.sampling import SamplingParams
from forebay.engine.interface import SampledToken
from forebay.gateway.timeline import RequestTimeline

CHAT_ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
"""The roles that both edges take, and what the chat template calls them."""


@dataclass(frozen=True, slots=True)
class TextPrompt:
    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """`messages` as the model's chat template wants them."""

    messages: Sequence[Mapping[str, object]]


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One client request. `params.max_tokens` and `params.seed` are placeholders: the gateway
    fills them in from `max_tokens` and `seed`, or by itself where these are None.

    request_id: empty lets the gateway choose. prompt_param, max_tokens_param: the fields' names in
    errors.
    timeout_s: None takes the gateway's limit, which also bounds it.
    """

    model: str
    prompt: Prompt
    params: SamplingParams
    prompt_param: str = "prompt"
    max_tokens: int | None = None
    max_tokens_param: str = "max_tokens"
    seed: int | None = None
    request_id: str = ""
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """New text of one choice, and the tokens received since its last chunk. Text that may still
    become part of a stop string or of a split character is held back, so a chunk can have tokens
    and no text, or text and no tokens."""

    choice: int
    text: str
    tokens: tuple[SampledToken, ...]


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    choice: int
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Completion:
    """The last event of a request that succeeded."""

    usage: Usage


@dataclass(frozen=True, slots=True)
class Placed:
    """The request has its workers and has left the queue; not for clients."""


@dataclass(frozen=True, slots=True)
class Migrated:
    """Choices of the request go on elsewhere; not for clients."""


Event = Chunk | ChoiceEnd | Completion
Progress = Placed | Migrated
"""What the gateway's metrics want to know besides."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """`engine` is torch or sim; `max_model_len` counts prompt and answer, in tokens."""

    id: str
    max_model_len: int
    engine: str
    created: int


class Generation(Protocol):
    """A validated, tokenized request, ready to run once."""

    @property
    def request_id(self) -> str: ...

    @property
    def num_prompt_tokens(self) -> int: ...

    @property
    def timeline(self) -> RequestTimeline: ...

    def token_text(self, token_id: int) -> str:
        """How a token is shown in logprobs."""

    def token_bytes(self, token_id: int) -> bytes: ...

    def events(self) -> AsyncGenerator[Progress | Event, None]:
        """Begins with Placed; ends after Completion, or by raising a ForebayError. Closing the
        iterator early (or cancelling the task that reads it) aborts the request on every worker."""


class Generator(Protocol):
    """The gateway behind its edges."""

    @property
    def ready(self) -> bool:
        """Whether a request could be placed now: every pool that is needed has a worker."""

    def models(self) -> list[ModelCard]: ...

    def prepare(self, request: GenerationRequest) -> Generation:
        """Raises InvalidRequest, NotFound (unknown model) or Unavailable."""
