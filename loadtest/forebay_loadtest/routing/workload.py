"""Request sets whose prefixes repeat: conversations over shared system prompts, a trace scaled
down, and prompts that never repeat. The same for the same seed.

All lengths are in tokens of the sim engine's tokenizer, which has one token for every byte: with
it a text of n letters is a prompt of n tokens, and any server that is given the same tokenizer
counts the same.
"""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from forebay.kv.block_hash import HashChain, cache_root

TRACE_BLOCK = 512
"""Prompt tokens that one hash id of a Mooncake trace stands for."""
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_LETTERS_AND_GAPS = _LETTERS + "     "
_LENGTH_SPREAD = 0.8
"""Sigma of the log-normal lengths."""


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """`messages`: (role, text) pairs. `after`: the number of the request that has to end before
    this one is sent, the turn before it."""

    number: int
    messages: tuple[tuple[str, str], ...]
    after: int | None = None

    def rendered(self) -> str:
        """The prompt with one character for every token, as the sim engine's template lays it
        out: its control tokens become characters that no text here has."""
        turns = "".join(f"\x01{role}\n{text}\x02\n" for role, text in self.messages)
        return f"{turns}\x01assistant\n"

    def body(self, model: str, max_tokens: int) -> dict[str, object]:
        return {
            "model": model,
            "messages": [{"role": role, "content": text} for role, text in self.messages],
            "max_tokens": max_tokens,
            "temperature": 0,
        }


@dataclass(frozen=True, slots=True)
class ConversationMix:
    """Lengths are bounds for system prompts and medians for the rest. `num_live`: conversations
    under way at any moment; each gets its next turn after at least half as many other turns."""

    num_system_prompts: int = 16
    zipf: float = 1.0
    system_tokens: tuple[int, int] = (256, 1024)
    mean_turns: float = 5.0
    max_turns: int = 12
    question_tokens: int = 120
    answer_tokens: int = 160
    max_message_tokens: int = 800
    num_live: int = 48


@dataclass(slots=True)
class _Conversation:
    messages: list[tuple[str, str]]
    num_turns_left: int
    last: int | None = None


def conversations(mix: ConversationMix, seed: int) -> Iterator[RoutedRequest]:
    """Without end. Answers in the histories are made up here, so that what a prompt holds does not
    depend on what a server answered."""
    rng = random.Random(seed)
    systems = [filler(rng, rng.randint(*mix.system_tokens)) for _ in range(mix.num_system_prompts)]
    weights = [1.0 / (rank + 1) ** mix.zipf for rank in range(mix.num_system_prompts)]

    def begin() -> _Conversation:
        (system,) = rng.choices(systems, weights)
        turns = 1 + int(math.log(1.0 - rng.random()) / math.log(1.0 - 1.0 / mix.mean_turns))
        return _Conversation([("system", system)], min(turns, mix.max_turns))

    def message(median: int) -> str:
        length = int(median * math.exp(rng.gauss(0.0, _LENGTH_SPREAD)))
        return filler(rng, max(1, min(length, mix.max_message_tokens)))

    live = [begin() for _ in range(mix.num_live)]
    number = 0
    while True:
        talk = live.pop(rng.randrange((mix.num_live + 1) // 2))
        talk.messages.append(("user", message(mix.question_tokens)))
        yield RoutedRequest(number, tuple(talk.messages), talk.last)
        talk.messages.append(("assistant", message(mix.answer_tokens)))
        talk.last = number
        talk.num_turns_left -= 1
        live.append(talk if talk.num_turns_left else begin())
        number += 1


def scaled_trace(trace: Path, scale: int, seed: int) -> Iterator[RoutedRequest]:
    """A Mooncake trace (JSON lines, gzip or not) in its own order, `scale` times shorter: equal
    hash ids become equal texts of 512 / `scale` letters."""
    with gzip.open(trace, "rt") if trace.suffix == ".gz" else trace.open() as lines:
        for number, line in enumerate(lines):
            row = json.loads(line)
            length = max(1, row["input_length"] // scale)
            text = "".join(_block(seed, each, TRACE_BLOCK // scale) for each in row["hash_ids"])
            yield RoutedRequest(number, (("user", text[:length]),))


def random_prompts(num_tokens: int, seed: int) -> Iterator[RoutedRequest]:
    """Without end, and without anything in common."""
    rng = random.Random(seed)
    number = 0
    while True:
        yield RoutedRequest(number, (("user", filler(rng, num_tokens)),))
        number += 1


def filler(rng: random.Random, length: int) -> str:
    """Letters and spaces, with a letter at each end: nobody trims it."""
    inside = "".join(rng.choices(_LETTERS_AND_GAPS, k=max(0, length - 2)))
    ends = rng.choices(_LETTERS, k=min(2, length))
    return ends[0] + inside + "".join(ends[1:])


def _block(seed: int, hash_id: int, length: int) -> str:
    return filler(random.Random(f"{seed}/{hash_id}"), length)


class InfiniteCache:
    """One cache without end that sees requests in the order in which they are sent: what no
    router can beat."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._root = cache_root(b"", "ideal")
        self._known: set[bytes] = set()

    @property
    def num_blocks(self) -> int:
        return len(self._known)

    def num_cached_tokens(self, prompt: str) -> int:
        """Of the prompt's leading full blocks, at least one token being left to compute. The
        prompt is known from then on."""
        tokens = list(map(ord, prompt))
        hashes: Sequence[bytes] = HashChain(self._root, self._block_size).upto(tokens)
        num_blocks = 0
        while num_blocks < len(hashes) and hashes[num_blocks] in self._known:
            num_blocks += 1
        self._known.update(hashes)
        return min(num_blocks, (len(tokens) - 1) // self._block_size) * self._block_size
