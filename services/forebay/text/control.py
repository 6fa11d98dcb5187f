"""Which added tokens are control tokens, where they stand in a rendered prompt, and how text that
comes from clients is kept from spelling one.

A control token has to start somewhere. Every character of a client's string at which one could
start is replaced by a placeholder (a private-use character that occurs in no input) before the
chat template is rendered, and put back after the rendered prompt was cut at its control tokens. So
a control token's first character always comes from the template, also when the template joins or
trims the client's strings. Strings that would complete a control token whose first characters
the template writes (`im_end` in `'<|' + name + '|>'`) lose their first character too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

_MARKER = re.compile(r"\s*(?:<\S(?:.*\S)?>|\[/?[A-Z][A-Z0-9_]*\])\s*", re.DOTALL)
_WHITESPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
PRIVATE_USE = re.compile("[\ue000-\uf8ff]")
_REASONING_MARKER = re.compile("(</?think>)")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """An entry of `added_tokens` in tokenizer.json; `lstrip` and `rstrip` swallow whitespace."""

    id: int
    content: str
    special: bool
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool

    @property
    def is_control(self) -> bool:
        """Special, or looking like a marker: DeepSeek's mark of a user's turn is not flagged."""
        if not self.content.strip():
            return False
        return self.special or _MARKER.fullmatch(self.content) is not None


class _Matcher:
    """Finds added tokens in a text: leftmost first, the longest of those that start together."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._tokens = {token.content: token for token in tokens}
        longest_first = sorted(self._tokens, key=lambda content: (-len(content), content))
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def cut(self, text: str) -> Iterator[str | AddedToken]:
        """Spans of text between tokens, and the tokens. A token's own whitespace is swallowed."""
        start = 0
        for match in self._pattern.finditer(text):
            token = self._tokens[match.group()]
            left, right = match.span()
            if token.single_word and (
                _is_word(text[left - 1 : left]) or _is_word(text[right : right + 1])
            ):
                continue
            if token.lstrip:
                left = start + len(text[start:left].rstrip(_WHITESPACE))
            if token.rstrip:
                right = len(text) - len(text[right:].lstrip(_WHITESPACE))
            if left > start:
                yield text[start:left]
            yield token
            start = right
        if start < len(text):
            yield text[start:]


class ControlTokens:
    """The control tokens of one tokenizer. Immutable."""

    def __init__(self, added: Sequence[AddedToken]) -> None:
        control = {token.content: token for token in added if token.is_control}
        self.ids = frozenset(token.id for token in control.values())
        self._exact = _Matcher(token for token in added if not token.normalized)
        normalized = [token for token in added if token.normalized]
        self._normalized = _Matcher(normalized) if any(t.is_control for t in normalized) else None
        self.start_chars = "".join(sorted({content.strip()[0] for content in control}))
        self._suffixes, self._cores = _completions(control)
        self.protected_chars = "".join(sorted({*self.start_chars, *self._suffixes}))

    def split(self, text: str) -> Iterator[str | int]:
        """Text spans and ids of control tokens, in order. Added tokens that are not control tokens
        take part in the matching, as they do in the tokenizer, and end up in the spans."""
        span = ""
        for piece in self._cut(text):
            if isinstance(piece, str):
                span += piece
                continue
            if span:
                yield span
                span = ""
            yield piece.id
        if span:
            yield span

    def _cut(self, text: str) -> Iterator[str | AddedToken]:
        """Control tokens and text. Tokens flagged `normalized` are looked for between the others,
        as the tokenizer does; here in the text as it is."""
        for piece in self._exact.cut(text):
            if isinstance(piece, str) and self._normalized is not None:
                yield from map(_text_unless_control, self._normalized.cut(piece))
            else:
                yield _text_unless_control(piece)

    def completes(self, text: str) -> bool:
        """Whether `text` is, or starts with, what is missing of a control token when its leading
        (and trailing) punctuation is already there."""
        stripped = text.strip()
        return stripped in self._cores or stripped.startswith(self._suffixes.get(stripped[:1], ()))


def _completions(
    contents: Iterable[str],
) -> tuple[Mapping[str, tuple[str, ...]], frozenset[str]]:
    """For each spelling: its ends after one or more characters of leading punctuation, grouped by
    first character, and the same without some of the trailing punctuation."""
    suffixes: dict[str, list[str]] = {}
    cores: set[str] = set()
    for content in contents:
        inner = content.strip()
        lead = next((i for i, char in enumerate(inner) if char.isalnum()), 0)
        tail = next((i for i, char in enumerate(reversed(inner)) if char.isalnum()), 0)
        for begin in range(1, lead + 1):
            suffixes.setdefault(inner[begin], []).append(inner[begin:])
            cores.update(inner[begin : len(inner) - cut] for cut in range(1, tail + 1))
    return {first: tuple(found) for first, found in suffixes.items()}, frozenset(cores)


def _text_unless_control(piece: str | AddedToken) -> str | AddedToken:
    return piece if isinstance(piece, str) or piece.is_control else piece.content


def _is_word(text: str) -> bool:
    return re.match(r"\w", text) is not None


class Placeholders:
    """One request's placeholders: `protect` before rendering, `restore` after cutting."""

    def __init__(
        self, control: ControlTokens, texts: Iterable[str], reserved: frozenset[str] = frozenset()
    ) -> None:
        """`texts`: the client's strings; their private-use characters and those in `reserved` are
        not chosen. Deterministic. Raises ValueError when too few are left."""
        used = set(reserved)
        for text in texts:
            if not text.isascii():
                used.update(PRIVATE_USE.findall(text))
        free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
        chars = control.protected_chars
        self._control = control
        self._placeholder = dict(zip(chars, free, strict=False))
        if len(self._placeholder) < len(chars):
            raise ValueError("too many different private-use characters")
        self._starts = [(char, self._placeholder[char]) for char in control.start_chars]

    def protect(self, text: str, *, keep_reasoning: bool) -> str:
        """keep_reasoning: `<think>` and `</think>` stay, for templates that cut by them."""
        head = ""
        if self._control.completes(text):
            first = len(text) - len(text.lstrip())
            head = text[:first] + self._placeholder[text[first]]
            text = text[first + 1 :]
        if keep_reasoning and "think>" in text:
            parts = _REASONING_MARKER.split(text)
            parts[::2] = [self._replace_starts(part) for part in parts[::2]]
            return head + "".join(parts)
        return head + self._replace_starts(text)

    def _replace_starts(self, text: str) -> str:
        for char, placeholder in self._starts:
            text = text.replace(char, placeholder)
        return text

    def restore(self, text: str) -> str:
        if text.isascii():
            return text
        for char, placeholder in self._placeholder.items():
            text = text.replace(placeholder, char)
        return text
