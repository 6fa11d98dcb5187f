"""Traces of requests with the hashes of their prompts' blocks, in the format of Mooncake's."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from forebay.core.errors import ConfigurationError
from forebay.kv.block_hash import HASH_BYTES

BLOCK_TOKENS = 512
"""Tokens behind one hash id."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """at_s: arrival. hashes: of the full blocks; what is left of the prompt is cached nowhere."""

    at_s: float
    num_tokens: int
    hashes: tuple[bytes, ...]


def load_trace(path: Path, seed: int) -> list[TraceRequest]:
    """Requests in the order of arrival. Where several share a timestamp, as in a trace whose clock
    runs in steps, they are spread over the time to the next one, each at random. Raises
    ConfigurationError naming the line that cannot be read."""
    rows = list(_rows(path))
    if not rows:
        raise ConfigurationError(f"{path}: no requests")
    stamps = sorted({at_ms for at_ms, _, _ in rows})
    step_ms = _step_ms(stamps, len(rows))
    dice = random.Random(seed)
    known: dict[int, bytes] = {}
    requests = [
        TraceRequest(
            at_s=(at_ms + dice.random() * step_ms) / 1000,
            num_tokens=num_tokens,
            hashes=tuple(_hash(i, known) for i in ids[: num_tokens // BLOCK_TOKENS]),
        )
        for at_ms, num_tokens, ids in rows
    ]
    return sorted(requests, key=lambda request: request.at_s)


def num_distinct_blocks(requests: Sequence[TraceRequest]) -> int:
    return len({block for request in requests for block in request.hashes})


def _rows(path: Path) -> Iterator[tuple[float, int, list[int]]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt") as lines:
            for number, line in enumerate(lines, 1):
                yield _row(f"{path}:{number}", line)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from error


def _row(where: str, line: str) -> tuple[float, int, list[int]]:
    try:
        row: dict[str, Any] = json.loads(line)
        at_ms, num_tokens = float(row["timestamp"]), int(row["input_length"])
        ids = [int(i) for i in row["hash_ids"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{where}: {error!r}") from error
    if num_tokens < 1 or len(ids) < num_tokens // BLOCK_TOKENS:
        raise ConfigurationError(f"{where}: {len(ids)} hashes for {num_tokens} tokens")
    return at_ms, num_tokens, ids


def _step_ms(stamps: Sequence[float], num_requests: int) -> float:
    """The clock's step: the median gap between stamps that most requests share; 0 where stamps are
    mostly a request's own."""
    gaps = sorted(b - a for a, b in pairwise(stamps))
    if not gaps or num_requests < 2 * len(stamps):
        return 0.0
    return gaps[len(gaps) // 2]


def _hash(block_id: int, known: dict[int, bytes]) -> bytes:
    if block_id not in known:
        data = block_id.to_bytes(8, "little", signed=True)
        known[block_id] = hashlib.blake2b(data, digest_size=HASH_BYTES).digest()
    return known[block_id]
