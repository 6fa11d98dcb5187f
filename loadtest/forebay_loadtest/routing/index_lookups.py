"""What one request costs in the index, and what hashing its prompt costs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import count

from forebay.kv.block_hash import HashChain, cache_root
from forebay.router.index import KvIndex, Tier
from forebay_loadtest.routing.call_times import CallTimes

_NUM_CHAINS = 50
_NUM_CALLS = 3000


def long_prompts(index: KvIndex, rng: random.Random, num_workers: int) -> dict[str, object]:
    """2,000 blocks of which each of `num_workers` has a different leading part; cold and warm: how
    often the same chain is asked for in a row."""
    slots = [index.join(f"long-{n}") for n in range(num_workers)]
    chains = [_chain(rng, 2000) for _ in range(_NUM_CHAINS)]
    for chain in chains:
        _store_parts(
            index, slots, chain, [len(chain) * (n + 1) // num_workers for n in range(num_workers)]
        )
    absent = [_chain(rng, 2000) for _ in range(_NUM_CHAINS)]
    figures = {
        "cold": _times(index, chains),
        "warm": _times(index, chains[:1]),
        "nobody has it": _times(index, absent),
    }
    now = count()
    predicted = CallTimes()
    for number in range(_NUM_CHAINS):
        chain, slot = chains[number], slots[number % num_workers]
        predicted.call(lambda s=slot, c=chain: index.predict(s, c, next(now) + 1000.0))  # type: ignore[misc]
    figures["with predictions"] = _times(index, chains)
    expiring = CallTimes()
    while index.num_predictions:
        expiring.call(lambda: index.expire(1e9))
    return {
        **{name: times.as_json() for name, times in figures.items()},
        "predict": predicted.as_json(),
        "expire": expiring.as_json(),
    }


def short_prompts(index: KvIndex, rng: random.Random, slots: Sequence[int]) -> dict[str, object]:
    """64 blocks of which all workers have the first ones, and each a different number more."""
    chains = [_chain(rng, 64) for _ in range(_NUM_CHAINS)]
    for chain in chains[1:]:
        _store_parts(index, slots, chain, [8 if n % 16 else 64 for n in range(len(slots))])
    _store_parts(index, slots, chains[0], [rng.randrange(8, 65) for _ in slots])
    return {
        "one in sixteen has all": _times(index, chains[1:]).as_json(),
        "everyone has another part": _times(index, chains[:1]).as_json(),
    }


def hashing(rng: random.Random, num_tokens: int) -> dict[str, object]:
    tokens = [rng.randrange(150_000) for _ in range(num_tokens)]
    root = cache_root(b"salt", "model")
    figures: dict[str, object] = {}
    for size in (16, 64):
        times = CallTimes()
        for _ in range(30):
            times.call(lambda s=size: HashChain(root, s).upto(tokens))  # type: ignore[misc]
        figures[str(size)] = times.as_json()
    return figures


def _chain(rng: random.Random, length: int) -> list[bytes]:
    return [rng.randbytes(16) for _ in range(length)]


def _store_parts(
    index: KvIndex, slots: Sequence[int], chain: Sequence[bytes], lengths: Sequence[int]
) -> None:
    for slot, length in zip(slots, lengths, strict=True):
        index.apply(slot, Tier.DEVICE, b"".join(chain[:length]), b"")


def _times(index: KvIndex, chains: Sequence[list[bytes]]) -> CallTimes:
    """Each call with hashes made anew, as a gateway has them."""
    times = CallTimes()
    match: Callable[[list[bytes]], object] = index.match
    for number in range(_NUM_CALLS):
        hashes = [bytes(bytearray(h)) for h in chains[number % len(chains)]]
        times.call(lambda h=hashes: match(h))  # type: ignore[misc]
    return times
