"""The JSON bodies of /v1/chat/completions and /v1/completions, and how bad ones are refused.

Fields of OpenAI's API (and of vLLM's and SGLang's) that would change the answer and that Forebay
does not have are refused by name; those that would not, and unknown ones, are ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from forebay.core.errors import InvalidRequest

_MAX_DIAGNOSED_BYTES = 1024 * 1024
"""Bodies that are not JSON are parsed again to name the field at fault only up to this size."""
_MAX_KEY_CHARS = 40
_MAX_INT_DIGITS = 40

Int = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True, extra="ignore")


class StreamOptions(_Body):
    include_usage: bool | None = None


class GenerationBody(_Body):
    """What both routes share. `Any` fields have several shapes; openai_requests takes them apart.

    Ranges are SamplingParams.validate's business, so that HTTP and gRPC have the same ones.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Any = None
    seed: Int | None = None
    n: Int | None = None
    stop: Any = None
    stop_token_ids: Any = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Message(_Body):
    role: str
    content: Any = None
    name: str | None = None
    tool_calls: Any = None
    function_call: Any = None


class ChatBody(GenerationBody):
    messages: Annotated[list[Message], FailFast()]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None


class CompletionBody(GenerationBody):
    prompt: Any
    logprobs: Int | None = None
    best_of: Int | None = None


# Field -> values with which it changes nothing. null is always one of them.
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "audio": (),
    "modalities": (["text"], []),
    "prediction": (),
    "web_search_options": (),
    "echo": (False,),
    "suffix": ("",),
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "ebnf": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "json_schema": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "lora_path": (),
    "min_tokens": (0,),
    "no_stop_trim": (False,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "regex": (),
    "skip_special_tokens": (True,),
    "stop_regex": ("", []),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}

AnyBody = TypeVar("AnyBody", ChatBody, CompletionBody)


def parse_body(model: type[AnyBody], raw: bytes) -> AnyBody:
    """Raises InvalidRequest with `param` set wherever a field is to blame."""
    try:
        body = model.model_validate_json(raw)
    except ValidationError as error:
        first = _first_error(error)
        if first["type"] != "json_invalid":
            raise _refusal(first) from None
        if len(raw) > _MAX_DIAGNOSED_BYTES:
            raise InvalidRequest(f"the body is not valid: {first['msg']}") from None
        body = _parse_again(model, raw)
    for name, value in (body.model_extra or {}).items():
        neutral = _UNSUPPORTED.get(name)
        if neutral is not None and value is not None and value not in neutral:
            raise InvalidRequest(f"{name}: not supported", param=name, code="unsupported_field")
    return body


def _parse_again(model: type[AnyBody], raw: bytes) -> AnyBody:
    """For what the fast parser refuses without naming a field: surrogates, endless numbers."""
    value = parse_json(raw)
    _refuse_surrogates(value)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _refusal(_first_error(error)) from None


def parse_json(raw: bytes) -> object:
    """Numbers with more digits than any field can take become infinite, which no field takes."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not UTF-8") from None
    try:
        value: object = json.loads(text, parse_int=_parse_int)
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    return value


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_INT_DIGITS else math.inf


def is_unicode(text: str) -> bool:
    """False with a lone surrogate in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_surrogates(value: object) -> None:
    stack: list[tuple[tuple[int | str, ...], object]] = [((), value)]
    while stack:
        path, item = stack.pop()
        if isinstance(item, str):
            if not is_unicode(item):
                param = param_path(path)
                raise InvalidRequest(
                    f"{param or 'the body'}: has a lone surrogate, which is not Unicode text",
                    param=param,
                )
        elif isinstance(item, dict):
            for key, child in item.items():
                if not is_unicode(key):
                    raise InvalidRequest("a field's name is not Unicode text")
                stack.append(((*path[-4:], key), child))
        elif isinstance(item, list):
            stack.extend(((*path[-4:], index), child) for index, child in enumerate(item))


def _first_error(error: ValidationError) -> dict[str, Any]:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return dict(first)


def _refusal(first: Mapping[str, Any]) -> InvalidRequest:
    param = param_path(first["loc"])
    if param is None:
        return InvalidRequest("the body must be a JSON object")
    if first["type"] == "missing":
        return InvalidRequest(f"{param}: is required", param=param, code="missing_field")
    return InvalidRequest(f"{param}: {first['msg'].removeprefix('Input ')}", param=param)


def param_path(location: tuple[int | str, ...]) -> str | None:
    """`messages[0].content`; long names are cut, since a client chose them."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            path += f".{step[:_MAX_KEY_CHARS]}" if path else step[:_MAX_KEY_CHARS]
    return path or None
