"""An index that is too small: whether its bytes stay bounded, and what forgetting costs."""

from __future__ import annotations

import os
import random
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from forebay.router.index import KvIndex, Tier
from forebay_loadtest.proc import rss_bytes

_HASH_BYTES = 16


def endless_prompts(
    rng: random.Random, max_bytes: int, num_workers: int, num_blocks: int
) -> dict[str, object]:
    """Random prompts, of which no block is ever removed, until `num_blocks` have been stored."""
    before = rss_bytes(os.getpid())
    index = KvIndex(max_bytes)
    slots = [index.join(f"worker-{n}") for n in range(num_workers)]
    most, stored = 0, 0
    while stored < num_blocks:
        count = rng.randrange(1, 128)
        index.apply(rng.choice(slots), Tier.DEVICE, rng.randbytes(count * _HASH_BYTES), b"")
        stored += count
        most = max(most, index.num_bytes)
    return {
        "max_bytes": max_bytes,
        "blocks_stored": stored,
        "blocks_kept": index.num_blocks,
        "evictions": index.num_evictions,
        "most_accounted_bytes": most,
        "rss_bytes": rss_bytes(os.getpid()) - before,
        "within_bound": most <= max_bytes,
    }


def hit_quality(rng: random.Random, max_bytes: int, num_requests: int) -> dict[str, object]:
    """Conversations that are asked for with Zipf's popularity, each a chain that begins with one of
    few system prompts: leading blocks found by this index, by an exact LRU of as many blocks (which
    loses the ends of chains first) and by one without bound."""
    chains = [_conversation(rng) for _ in range(20_000)]
    weights = list(accumulate(1 / rank**0.8 for rank in range(1, len(chains) + 1)))
    index, unbounded = KvIndex(max_bytes), set[bytes]()
    slot = index.join("worker")
    asked: list[list[bytes]] = []
    found = total = known = 0
    for _ in range(num_requests):
        chain = chains[bisect_left(weights, rng.random() * weights[-1])]
        asked.append(chain)
        total += len(chain)
        found += int(index.match(chain).num_blocks[slot])
        known += _leading(chain, unbounded)
        index.apply(slot, Tier.DEVICE, b"".join(chain), b"")
        unbounded.update(chain)
    exact = exact_lru_hits(asked, index.num_blocks)
    return {
        "requests": num_requests,
        "blocks_asked": total,
        "distinct_blocks": len(unbounded),
        "blocks_kept": index.num_blocks,
        "hit_rate": round(found / total, 4),
        "hit_rate_exact_lru": round(exact / total, 4),
        "hit_rate_unbounded": round(known / total, 4),
    }


def _conversation(rng: random.Random) -> list[bytes]:
    system = random.Random(rng.randrange(20))
    shared = [system.randbytes(_HASH_BYTES) for _ in range(16)]
    return shared + [rng.randbytes(_HASH_BYTES) for _ in range(rng.randrange(8, 120))]


def _leading(chain: Sequence[bytes], known: set[bytes] | dict[bytes, None]) -> int:
    return next((n for n, block in enumerate(chain) if block not in known), len(chain))


def exact_lru_hits(asked: Sequence[Sequence[bytes]], capacity: int) -> int:
    cached: dict[bytes, None] = {}
    found = 0
    for chain in asked:
        found += _leading(chain, cached)
        for block in reversed(chain):
            cached.pop(block, None)
            cached[block] = None
        while len(cached) > capacity:
            del cached[next(iter(cached))]
    return found
