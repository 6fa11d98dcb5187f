"""Content hashes of full KV blocks, chained so that equal hashes mean equal prefixes.

hash_i = BLAKE2b-128(hash_{i-1} || token ids of block i as little-endian uint32), and hash_{-1}
is the root: BLAKE2b-128 keyed with the tenant's salt over everything else that changes the KV.
Without the salt nobody can predict a hash, so tenants neither share nor probe each other's cache.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

HASH_BYTES = 16


def cache_root(salt: bytes, *identity: str) -> bytes:
    """`identity`: model, revision, adapter, dtype and whatever else changes the KV."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES, key=hashlib.sha256(salt).digest())
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
        self._pack = struct.Struct(f"<{block_size}I").pack
        self._hashes: list[bytes] = []

    def upto(self, tokens: Sequence[int], num_tokens: int | None = None) -> list[bytes]:
        """Hashes of the full blocks of tokens[:num_tokens]. `tokens` must begin with all tokens
        of earlier calls. The list is the chain's own: read it, do not change it."""
        size = self._block_size
        wanted = (len(tokens) if num_tokens is None else num_tokens) // size
        while len(self._hashes) < wanted:
            start = len(self._hashes) * size
            block = self._pack(*tokens[start : start + size])
            self._parent = hashlib.blake2b(self._parent + block, digest_size=HASH_BYTES).digest()
            self._hashes.append(self._parent)
        return self._hashes if len(self._hashes) == wanted else self._hashes[:wanted]

    def copy(self) -> HashChain:
        twin = HashChain(self._parent, self._block_size)
        twin._hashes = list(self._hashes)
        return twin
