"""The client's part of a chat prompt: checked, and walked string by string.

Fields are named in errors by their path (`messages[0].content`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from forebay.core.errors import InvalidRequest

MAX_TEXT_CHARS = 8_000_000
"""Of one request. Far beyond any context window; bounds what the template engine is fed."""

_MAX_DEPTH = 64
_ROLES = frozenset(
    {"system", "developer", "user", "assistant", "tool", "function", "ipython", "model"}
)
_NAMED_BY_CLIENT = frozenset({"properties", "arguments", "$defs", "definitions"})
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def check_messages(messages: Sequence[Mapping[str, object]]) -> None:
    """Raises InvalidRequest for no messages, or one that is not a mapping with a known role. Roles
    are what templates build control tokens from, so only known ones pass unprotected."""
    if not messages:
        raise InvalidRequest(
            "messages: at least one is needed", param="messages", code="empty_messages"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidRequest(
                f"messages[{index}]: must be an object", param=f"messages[{index}]"
            )
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise InvalidRequest(
                f"messages[{index}].role: must be one of {', '.join(sorted(_ROLES))}",
                param=f"messages[{index}].role",
                code="invalid_role",
            )


def check_text(text: str, path: str) -> None:
    """Raises InvalidRequest for lone surrogates, which no UTF-8 text contains."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{path}: character {error.start} is a lone surrogate", param=path, code="invalid_text"
        ) from error


def check_length(num_chars: int, path: str, max_chars: int) -> None:
    limit = min(max_chars, MAX_TEXT_CHARS)
    if num_chars > limit:
        raise InvalidRequest(
            f"{path}: {num_chars} characters are more than the {limit} that can fit",
            param=path,
            code="context_length_exceeded",
        )


def strings_in(value: object, path: str, depth: int = 0) -> Iterator[str]:
    """Every key and string in `value`, checked. Raises InvalidRequest for what is not JSON."""
    if isinstance(value, str):
        check_text(value, path)
        yield value
    elif isinstance(value, Mapping):
        _check_depth(depth, path)
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidRequest(f"{path}: keys must be strings", param=path)
            check_text(key, path)
            yield key
            yield from strings_in(item, f"{path}.{key}", depth + 1)
    elif isinstance(value, list | tuple):
        _check_depth(depth, path)
        for index, item in enumerate(value):
            yield from strings_in(item, f"{path}[{index}]", depth + 1)
    elif value is not None and not isinstance(value, bool | int | float):
        raise InvalidRequest(f"{path}: {type(value).__name__} is not JSON", param=path)


def _check_depth(depth: int, path: str) -> None:
    if depth >= _MAX_DEPTH:
        raise InvalidRequest(f"{path}: nested more than {_MAX_DEPTH} deep", param=path)


def rewrite(
    value: object,
    change: Callable[[str, bool], str],
    *,
    assistant: bool = False,
    parent: str = "",
) -> object:
    """A copy of `value` in plain dicts and lists, its strings replaced by `change(string,
    assistant)`; `assistant`: whether `value` is (in) an assistant message. What templates look up
    and compare stays: keys of the protocol (not those that clients invent, such as names of
    arguments), roles, and words under `type`."""
    if isinstance(value, str):
        return value if parent == "type" and value.isidentifier() else change(value, assistant)
    if isinstance(value, Mapping):
        copy: dict[str, object] = {}
        for key, item in value.items():
            invented = parent in _NAMED_BY_CLIENT or not key.isidentifier()
            name = change(key, assistant) if invented else key
            if key == "role" and isinstance(item, str) and item in _ROLES:
                copy[name] = item
            else:
                copy[name] = rewrite(item, change, assistant=assistant, parent=key)
        return copy
    if isinstance(value, list | tuple):
        return [rewrite(item, change, assistant=assistant, parent=parent) for item in value]
    return value


def with_reasoning_aliases(message: Mapping[str, object]) -> Mapping[str, object]:
    """Templates read a message's reasoning as `reasoning_content` or `thinking`; clients send it
    under either name, or as `reasoning`."""
    for name in _REASONING_FIELDS:
        reasoning = message.get(name)
        if reasoning is not None:
            return {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message
