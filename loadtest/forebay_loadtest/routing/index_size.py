"""An index of many blocks over many workers: its memory, its pace, its pauses."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from forebay.router.index import KvIndex, Tier
from forebay_loadtest.proc import rss_bytes
from forebay_loadtest.routing.call_times import CallTimes

_SHARED_BLOCKS = 8
_CHAIN_BLOCKS = 64
_SECOND_HOME = 0.2
"""Share of chains whose first half a second worker has, too."""
_BATCH_SIZES = (2, 8, 32, 256)
_HASH_BYTES = 16


@dataclass(slots=True)
class FullIndex:
    """1,000 workers that share the first blocks of a system prompt; chains of 64 blocks, each on
    one worker at random, some in part on a second. `pauses`: longest calls by name."""

    rng: random.Random
    num_workers: int
    max_bytes: int
    index: KvIndex = field(init=False)
    slots: list[int] = field(init=False)
    pauses: dict[str, CallTimes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.index = KvIndex(self.max_bytes)
        self.slots = [self.index.join(f"worker-{n}") for n in range(self.num_workers)]
        shared = self.rng.randbytes(_SHARED_BLOCKS * _HASH_BYTES)
        for slot in self.slots:
            self.index.apply(slot, Tier.DEVICE, shared, b"")

    def timed(self, name: str, work: Callable[[], object]) -> None:
        self.pauses.setdefault(name, CallTimes()).call(work)

    def fill(self, num_blocks: int) -> dict[str, object]:
        before = rss_bytes(os.getpid())
        placed = 0
        while self.index.num_blocks < num_blocks:
            chain = self.rng.randbytes(_CHAIN_BLOCKS * _HASH_BYTES)
            self.store(self.rng.choice(self.slots), chain)
            placed += _CHAIN_BLOCKS
            if self.rng.random() < _SECOND_HOME:
                self.store(self.rng.choice(self.slots), chain[: len(chain) // 2])
                placed += _CHAIN_BLOCKS // 2
        grown = rss_bytes(os.getpid()) - before
        num = self.index.num_blocks
        return {
            "blocks": num,
            "placements": placed,
            "workers": self.num_workers,
            "accounted_bytes": self.index.num_bytes,
            "rss_bytes": grown,
            "accounted_bytes_per_block": round(self.index.num_bytes / num, 1),
            "rss_bytes_per_block": round(grown / num, 1),
            "evictions": self.index.num_evictions,
            "blocks_per_cpu_s": round(placed / self.pauses["store"].cpu_s),
        }

    def store(self, slot: int, chain: bytes) -> None:
        self.timed("store", lambda: self.index.apply(slot, Tier.DEVICE, chain, b""))

    def churn(self, num_blocks: int) -> dict[str, object]:
        """Blocks stored and removed again a CPU second, by the size of a batch."""
        rates: dict[str, object] = {}
        for size in _BATCH_SIZES:
            times = CallTimes()
            told = [
                (self.rng.choice(self.slots), self.rng.randbytes(size * _HASH_BYTES))
                for _ in range(num_blocks // size)
            ]
            for slot, chain in told:
                times.call(lambda s=slot, c=chain: self.index.apply(s, Tier.DEVICE, c, b""))  # type: ignore[misc]
            for slot, chain in told:
                times.call(lambda s=slot, c=chain: self.index.apply(s, Tier.DEVICE, b"", c))  # type: ignore[misc]
            rates[str(size)] = round(2 * size * len(told) / times.cpu_s)
            self.pauses[f"apply of {size}"] = times
        return rates

    def sweep(self, num_leaving: int, budget: int) -> dict[str, object]:
        before = self.index.num_blocks
        times = self.pauses["sweep"] = CallTimes()
        for number in range(num_leaving):
            self.timed("join again", lambda n=number: self.index.join(f"worker-{n}"))  # type: ignore[misc]
        more = True
        while more:
            more = times.call(lambda: self.index.sweep(budget))
        return {
            "left": num_leaving,
            "blocks_freed": before - self.index.num_blocks,
            "rows_a_call": budget,
            "cpu_s": round(times.cpu_s, 3),
            **times.as_json(),
        }
