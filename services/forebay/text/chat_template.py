"""A model's chat template, compiled once and rendered the way transformers does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from forebay.core.errors import ModelFileError

_MAX_LOOP_COUNT = 1_000_000
"""Of all `range()` calls of one rendering together: bounds nested loops that print nothing."""

_TEMPLATE_CHARS = 1_000_000
_CHARS_PER_CLIENT_CHAR = 8

_RENDERING_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class TemplateRejected(Exception):
    """The template does not accept its input; the text is the template's own."""


class ChatTemplate:
    """`wall_clock` is what templates that print today's date read."""

    def __init__(self, source: str, wall_clock: Callable[[], datetime]) -> None:
        """Raises ModelFileError when `source` is not a jinja2 template."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _GenerationBlock],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: wall_clock().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelFileError(f"the model's chat template is broken: {error}") from error

    def render(self, variables: Mapping[str, object], *, num_client_chars: int) -> str:
        """Raises TemplateRejected, or ModelFileError for a template whose output or loops grow
        out of proportion to `num_client_chars`."""
        limit = _TEMPLATE_CHARS + _CHARS_PER_CLIENT_CHAR * num_client_chars
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate({"range": _BoundedRange(), **variables}):
                size += len(part)
                if size > limit:
                    raise ModelFileError(
                        f"the model's chat template writes over {limit} characters"
                    )
                parts.append(part)
        except _RENDERING_ERRORS as error:
            raise TemplateRejected(str(error)) from error
        return "".join(parts)


class _BoundedRange:
    def __init__(self) -> None:
        self._left = _MAX_LOOP_COUNT

    def __call__(self, *args: int) -> range:
        wanted = range(*args)
        self._left -= len(wanted)
        if self._left < 0:
            raise ModelFileError(
                f"the model's chat template counts over {_MAX_LOOP_COUNT} in its loops"
            )
        return wanted


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's tokens for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter it escapes no HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
