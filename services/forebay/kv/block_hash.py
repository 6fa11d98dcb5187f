"""Content hashes of full KV blocks, chained so that equal hashes mean equal prefixes.

hash_i = BLAKE2b-128(hash_{i-1} || token ids of block i as little-endian uint32), and hash_{-1}
is the root: BLAKE2b-128 keyed with the tenant's salt over everything else that changes the KV.
Without the salt nobody can predict a hash, so tenants neither share nor probe each other's cache.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b, sha256

HASH_BYTES = 16


def cache_root(salt: bytes, *identity: str) -> bytes:
    """`identity`: model, revision, adapter, dtype and whatever else changes the KV."""
    digest = blake2b(digest_size=HASH_BYTES, key=sha256(salt).digest())
    for part in identity:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(4, "little"))
        digest.update(encoded)
    return digest.digest()


class HashChain:
    """The block hashes of one growing token list; each block is hashed once."""

    def __init__(self, root: bytes, block_size: int) -> None:
        self._parent = root
        self._block_size = block_size
        self._hashes: list[bytes] = []

    def upto(self, tokens: Sequence[int], num_tokens: int | None = None) -> list[bytes]:
        """Hashes of the full blocks of tokens[:num_tokens]. `tokens` must begin with all tokens
        of earlier calls. The list is the chain's own: read it, do not change it."""
        size = self._block_size
        wanted = (len(tokens) if num_tokens is None else num_tokens) // size
        done = len(self._hashes)
        if done < wanted:
            packed = _little_endian(tokens[done * size : wanted * size])
            parent, width = self._parent, 4 * size
            for start in range(0, len(packed), width):
                block = packed[start : start + width]
                parent = blake2b(parent + block, digest_size=HASH_BYTES).digest()
                self._hashes.append(parent)
            self._parent = parent
        return self._hashes if len(self._hashes) == wanted else self._hashes[:wanted]

    def copy(self) -> HashChain:
        twin = HashChain(self._parent, self._block_size)
        twin._hashes = list(self._hashes)
        return twin


def _little_endian(tokens: Sequence[int]) -> bytes:
    words = array("I", tokens)
    assert words.itemsize == 4
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()
