"""Complete JSON bodies of the OpenAI-compatible API. Streamed ones are in openai_stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

from forebay.core.errors import ForebayError, InvalidRequest, NotFound
from forebay.core.finish import FinishReason
from forebay.engine.interface import SampledToken
from forebay.gateway.generation import (
    ChoiceEnd,
    Chunk,
    Event,
    Generation,
    ModelCard,
    Usage,
)
from forebay.rpc.status import mapped

MAX_ERROR_CHARS = 500
MAX_PARAM_CHARS = 200
_LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""

Json = dict[str, object]


def to_json(value: object) -> bytes:
    """ASCII only: some clients split event streams at U+2028 and the like."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def error_json(error: ForebayError) -> Json:
    param = code = None
    if isinstance(error, InvalidRequest | NotFound):
        param, code = error.param, error.code
    return error_fields(error.message, type_=mapped(error).type, param=param, code=code)


def error_fields(
    message: str, *, type_: str, param: str | None = None, code: str | None = None
) -> Json:
    """Bounded: a client must not get back what it sent."""
    return {
        "error": {
            "message": message[:MAX_ERROR_CHARS],
            "type": type_,
            "param": None if param is None else param[:MAX_PARAM_CHARS],
            "code": code,
        }
    }


def model_json(card: ModelCard) -> Json:
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": "forebay",
        "max_model_len": card.max_model_len,
        "engine": card.engine,
    }


def usage_json(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "prompt_cache_hit_tokens": usage.cached_tokens,
        "prompt_cache_miss_tokens": usage.prompt_tokens - usage.cached_tokens,
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


@dataclass(slots=True)
class Choice:
    """What has arrived of one choice."""

    parts: list[str] = field(default_factory=list)
    tokens: list[SampledToken] = field(default_factory=list)
    reason: FinishReason | None = None

    @property
    def text(self) -> str:
        return "".join(self.parts)


async def collect(events: AsyncIterator[Event], num_choices: int) -> tuple[list[Choice], Usage]:
    """`events` must end with a Completion or raise, as observed_events makes sure."""
    choices = [Choice() for _ in range(num_choices)]
    async for event in events:
        if isinstance(event, Chunk):
            choice = choices[event.choice]
            choice.parts.append(event.text)
            choice.tokens.extend(event.tokens)
        elif isinstance(event, ChoiceEnd):
            choices[event.choice].reason = event.reason
        else:
            return choices, event.usage
    raise AssertionError("events end with a Completion")


def chat_json(
    response_id: str, created: int, model: str, choices: list[Choice], usage: Usage, logs: Logprobs
) -> Json:
    return {
        "id": response_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": i,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": logs.chat(choice.tokens),
                "finish_reason": choice.reason,
            }
            for i, choice in enumerate(choices)
        ],
        "usage": usage_json(usage),
    }


def completion_json(
    response_id: str, created: int, model: str, choices: list[Choice], usage: Usage, logs: Logprobs
) -> Json:
    return {
        "id": response_id,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": i,
                "text": choice.text,
                "logprobs": logs.completion(choice.tokens, 0),
                "finish_reason": choice.reason,
            }
            for i, choice in enumerate(choices)
        ],
        "usage": usage_json(usage),
    }


class Logprobs:
    """Tokens in OpenAI's two forms; null where the request did not ask."""

    def __init__(self, generation: Generation, *, wanted: bool) -> None:
        self._generation = generation
        self.wanted = wanted

    def chat(self, tokens: Iterable[SampledToken]) -> Json | None:
        if not self.wanted:
            return None
        return {
            "content": [
                {
                    **self._chat_token(token.token_id, token.logprob),
                    "top_logprobs": [self._chat_token(*pair) for pair in token.top],
                }
                for token in tokens
            ],
            "refusal": None,
        }

    def completion(self, tokens: Iterable[SampledToken], offset: int) -> Json | None:
        """`offset`: characters of this choice before `tokens`."""
        if not self.wanted:
            return None
        texts: list[str] = []
        offsets: list[int] = []
        logprobs: list[float] = []
        tops: list[dict[str, float]] = []
        for token in tokens:
            text = self._generation.token_text(token.token_id)
            logprob = _finite(token.logprob)
            top = {self._generation.token_text(i): _finite(value) for i, value in token.top}
            texts.append(text)
            offsets.append(offset)
            logprobs.append(logprob)
            tops.append({**top, text: logprob})
            offset += len(text)
        return {
            "text_offset": offsets,
            "token_logprobs": logprobs,
            "tokens": texts,
            "top_logprobs": tops,
        }

    def num_chars(self, tokens: Iterable[SampledToken]) -> int:
        return sum(len(self._generation.token_text(token.token_id)) for token in tokens)

    def _chat_token(self, token_id: int, logprob: float | None) -> Json:
        return {
            "token": self._generation.token_text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._generation.token_bytes(token_id)),
        }


def _finite(logprob: float | None) -> float:
    """NaN falls to the floor as well."""
    return logprob if logprob is not None and logprob > _LOWEST_LOGPROB else _LOWEST_LOGPROB
