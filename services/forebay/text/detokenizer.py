"""Generated ids to text, piece by piece, and stop strings in that text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from forebay.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """One choice's text. What `push` and `finish` return adds up to the decoding of all ids:
    characters split over tokens come out whole, special tokens not at all, and where the
    tokenizer puts a space before the first word, that one space is dropped."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_space = tokenizer.strips_leading_space

    def push(self, token_id: int) -> str:
        """Text that is complete now; may be empty."""
        return self._text(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """The rest: U+FFFD where the last character is incomplete. Call once."""
        return self._text(self._decoder.decode(b"", final=True))

    def _text(self, text: str) -> str:
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text


class StopWatcher:
    """Finds the stop string that is complete first; of two that end together, the one that starts
    first. What was pushed in how many pieces does not matter."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: no empty strings."""
        assert all(stops)
        self._stops = tuple(stops)
        self._beginnings = frozenset(stop[:end] for stop in stops for end in range(1, len(stop)))
        self._longest = max(map(len, self._beginnings), default=0)
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text to send, the stop string if one is complete). A stop string and what follows it
        are never sent; after a match nothing is."""
        if self._matched is not None:
            return "", self._matched
        text = self._held + text
        found = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        if found:
            _, start, self._matched = min(found)
            self._held = ""
            return text[:start], self._matched
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None

    def finish(self) -> str:
        """The text held back, which turned out not to begin a stop string. Call once."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0
