"""Which blocks were sent to which worker, as far back as there is room to remember."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

_MAX_WORKERS = 4096


class RoutedPrefixes:
    """A block's hash stands for all blocks before it too, so a map from hashes is a tree of
    prefixes. What was sent longest ago is forgotten first, the end of a prompt before its start,
    and everything once more workers than can be told apart have come and gone."""

    def __init__(self, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self._sent_to: OrderedDict[bytes, int] = OrderedDict()
        self._workers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._sent_to)

    def match(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """Leading blocks that were sent there, by worker that was sent any."""
        runs: dict[int, int] = {}
        left = (1 << len(self._workers)) - 1 if hashes else 0
        for num_blocks, block in enumerate(hashes):
            here = left & self._sent_to.get(block, 0)
            if num_blocks and here != left:
                runs.update(dict.fromkeys(_bits(left & ~here), num_blocks))
            left = here
            if not left:
                break
        runs.update(dict.fromkeys(_bits(left), len(hashes)))
        return {worker: runs[bit] for worker, bit in self._workers.items() if bit in runs}

    def add(self, hashes: Sequence[bytes], worker_id: str) -> None:
        bit = 1 << self._number(worker_id)
        for block in reversed(hashes):
            self._sent_to[block] = self._sent_to.get(block, 0) | bit
            self._sent_to.move_to_end(block)
        while len(self._sent_to) > self.max_blocks:
            self._sent_to.popitem(last=False)

    def _number(self, worker_id: str) -> int:
        if worker_id not in self._workers and len(self._workers) == _MAX_WORKERS:
            self._workers.clear()
            self._sent_to.clear()
        return self._workers.setdefault(worker_id, len(self._workers))


def _bits(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
