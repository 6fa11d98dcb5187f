"""OpenAI's request bodies -> GenerationRequest."""

from __future__ import annotations

from typing import Final

from forebay.core.errors import InvalidRequest
from forebay.core.sampling import MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, SamplingParams
from forebay.gateway.generation import (
    CHAT_ROLES,
    ChatPrompt,
    GenerationRequest,
    Prompt,
    TextPrompt,
    TokenPrompt,
)
from forebay.gateway.openai_schema import ChatBody, CompletionBody, GenerationBody, Message

MAX_PROMPTS = 32
"""Prompts in one /v1/completions request."""
COMPLETION_MAX_TOKENS: Final = 16
"""OpenAI's default for /v1/completions; a chat answer is bounded by the context alone."""
_MAX_TOKEN_ID_DIGITS = 10


def chat_request(body: ChatBody, request_id: str) -> GenerationRequest:
    if not body.messages:
        raise InvalidRequest("messages: needs at least one message", param="messages")
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(body.messages)]
    max_tokens, max_tokens_param = _chat_max_tokens(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")
    return GenerationRequest(
        model=body.model,
        prompt=ChatPrompt(messages),
        prompt_param="messages",
        params=_sampling(body, top_logprobs=(body.top_logprobs or 0) if body.logprobs else None),
        max_tokens=max_tokens,
        max_tokens_param=max_tokens_param,
        seed=body.seed,
        request_id=request_id,
    )


def completion_requests(body: CompletionBody, request_id: str) -> list[GenerationRequest]:
    """One a prompt; each has the whole body's parameters."""
    prompts = _prompts(body.prompt)
    if body.best_of is not None and body.best_of != (1 if body.n is None else body.n):
        raise InvalidRequest("best_of: not supported unless it equals n", param="best_of")
    if body.logprobs is not None and not 0 <= body.logprobs <= MAX_TOP_LOGPROBS:
        raise InvalidRequest(
            f"logprobs: {body.logprobs} is not in [0, {MAX_TOP_LOGPROBS}]", param="logprobs"
        )
    max_tokens = COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    _check_max_tokens("max_tokens", max_tokens)
    params = _sampling(body, top_logprobs=body.logprobs)
    return [
        GenerationRequest(
            model=body.model,
            prompt=prompt,
            params=params,
            max_tokens=max_tokens,
            seed=body.seed,
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{i}",
        )
        for i, prompt in enumerate(prompts)
    ]


def _sampling(body: GenerationBody, *, top_logprobs: int | None) -> SamplingParams:
    default = SamplingParams()
    return SamplingParams(
        temperature=_or(body.temperature, default.temperature),
        top_p=_or(body.top_p, default.top_p),
        top_k=0 if body.top_k in (None, -1) else body.top_k,
        min_p=_or(body.min_p, default.min_p),
        presence_penalty=_or(body.presence_penalty, default.presence_penalty),
        frequency_penalty=_or(body.frequency_penalty, default.frequency_penalty),
        repetition_penalty=_or(body.repetition_penalty, default.repetition_penalty),
        logit_bias=_logit_bias(body.logit_bias),
        n=1 if body.n is None else body.n,
        stop=_stop(body.stop),
        stop_token_ids=_stop_token_ids(body.stop_token_ids),
        ignore_eos=bool(body.ignore_eos),
        top_logprobs=top_logprobs,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _chat_max_tokens(body: ChatBody) -> tuple[int | None, str]:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            "max_completion_tokens: differs from max_tokens; give one of them",
            param="max_completion_tokens",
        )
    name = "max_tokens" if new is None else "max_completion_tokens"
    value = old if new is None else new
    if value is not None:
        _check_max_tokens(name, value)
    return value, name


def _check_max_tokens(name: str, value: int) -> None:
    if not 1 <= value < 2**31:
        raise InvalidRequest(f"{name}: {value} is not in [1, {2**31 - 1}]", param=name)


def _stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise InvalidRequest("stop: should be a string or a list of strings", param="stop")


def _stop_token_ids(value: object) -> tuple[int, ...]:
    return () if value is None else _token_ids(value, "stop_token_ids")


def _logit_bias(value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest("logit_bias: should be an object", param="logit_bias")
    if len(value) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias: at most {MAX_LOGIT_BIAS} ids", param="logit_bias")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= _MAX_TOKEN_ID_DIGITS):
            raise InvalidRequest("logit_bias: each key should be a token id", param="logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not abs(bias) <= 100:
            raise InvalidRequest(
                "logit_bias: each value should be a number in [-100, 100]", param="logit_bias"
            )
        biases[int(key)] = float(bias)
    return biases


def _message(message: Message, param: str) -> dict[str, object]:
    role = CHAT_ROLES.get(message.role)
    if role is None:
        raise InvalidRequest(
            f"{param}.role: should be one of {', '.join(CHAT_ROLES)}", param=f"{param}.role"
        )
    for name in ("tool_calls", "function_call"):
        if getattr(message, name):
            raise InvalidRequest(f"{param}.{name}: not supported", param=f"{param}.{name}")
    rendered: dict[str, object] = {
        "role": role,
        "content": _content(message.content, f"{param}.content"),
    }
    if message.name is not None:
        rendered["name"] = message.name
    return rendered


def _content(content: object, param: str) -> str:
    """Text parts become one text, a line each."""
    if isinstance(content, str):
        return content
    if content is None:
        raise InvalidRequest(f"{param}: is required", param=param, code="missing_field")
    if not isinstance(content, list) or not content:
        raise InvalidRequest(
            f"{param}: should be a string or a non-empty list of text parts", param=param
        )
    return "\n".join(_part(part, f"{param}[{i}]") for i, part in enumerate(content))


def _part(part: object, param: str) -> str:
    if not isinstance(part, dict):
        raise InvalidRequest(f"{param}: should be an object", param=param)
    if part.get("type") != "text":
        raise InvalidRequest(
            f"{param}.type: only text parts are supported",
            param=f"{param}.type",
            code="unsupported_content",
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{param}.text: should be a string", param=f"{param}.text")
    return text


def _prompts(value: object) -> list[Prompt]:
    """A text, token ids, or a list of either."""
    if isinstance(value, str):
        return [_text_prompt(value, "prompt")]
    if not isinstance(value, list) or not value:
        raise InvalidRequest(
            "prompt: should be a string, a list of token ids, or a non-empty list of either",
            param="prompt",
        )
    if isinstance(value[0], int):
        return [_token_prompt(value, "prompt")]
    if len(value) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt: at most {MAX_PROMPTS} prompts a request", param="prompt")
    return [
        _text_prompt(item, f"prompt[{i}]")
        if isinstance(item, str)
        else _token_prompt(item, f"prompt[{i}]")
        for i, item in enumerate(value)
    ]


def _text_prompt(text: str, param: str) -> TextPrompt:
    if not text:
        raise InvalidRequest(f"{param}: is empty", param=param)
    return TextPrompt(text)


def _token_prompt(value: object, param: str) -> TokenPrompt:
    if not isinstance(value, list):
        raise InvalidRequest(f"{param}: should be a string or a list of token ids", param=param)
    if not value:
        raise InvalidRequest(f"{param}: is empty", param=param)
    return TokenPrompt(_token_ids(value, param))


def _token_ids(value: object, param: str) -> tuple[int, ...]:
    """Whether the vocabulary has them is checked where the vocabulary is known."""
    if not isinstance(value, list):
        raise InvalidRequest(f"{param}: should be a list of token ids", param=param)
    for i, item in enumerate(value):
        if type(item) is not int or not 0 <= item < 2**31:
            raise InvalidRequest(f"{param}[{i}]: should be a token id", param=f"{param}[{i}]")
    return tuple(value)
