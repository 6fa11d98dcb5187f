"""Which tokens of which sequences are computed in the next step.

Running streams first, one token each; then the chunks of prompts, oldest first, within
`max_batch_tokens`. A sequence gets the blocks for all its tokens when it starts, and one more each
time it grows past them; when none is left the newest running sequence is preempted, to be
recomputed later, before anything newer starts.
"""

from __future__ import annotations

from bisect import insort
from operator import attrgetter

from forebay.engine.interface import Batch, ScheduledSequence
from forebay.engine.sequence import Sequence, Status
from forebay.kv.block_pool import BlockPool, Holder

_BY_ARRIVAL = attrgetter("arrival")


class Scheduler:
    """Both queues are kept in order of arrival."""

    def __init__(self, pool: BlockPool, max_batch_tokens: int, max_num_seqs: int) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._pool = pool
        self._max_batch_tokens = max_batch_tokens
        self._max_num_seqs = max_num_seqs

    def add(self, sequence: Sequence) -> None:
        """`sequence` is WAITING, or RUNNING with the blocks of its computed tokens."""
        insort(
            self.running if sequence.status is Status.RUNNING else self.waiting,
            sequence,
            key=_BY_ARRIVAL,
        )

    def remove(self, sequence: Sequence) -> None:
        (self.running if sequence.status is Status.RUNNING else self.waiting).remove(sequence)

    def schedule(self) -> tuple[Batch, list[Sequence]] | None:
        """The next step and the sequences behind its entries, in the same order."""
        budget = self._max_batch_tokens
        chosen: list[tuple[Sequence, int]] = []
        copies: list[tuple[int, int]] = []
        preemptions = self.num_preemptions
        for sequence in [s for s in self.running if s.num_uncomputed_tokens == 1]:
            if budget and sequence.status is Status.RUNNING and self._grow(sequence, copies):
                chosen.append((sequence, 1))
                budget -= 1
        for sequence in [s for s in self.running if s.num_uncomputed_tokens > 1]:
            if budget:
                chosen.append((sequence, min(budget, sequence.num_uncomputed_tokens)))
                budget -= chosen[-1][1]
        while budget and self.waiting and preemptions == self.num_preemptions:
            sequence = self.waiting[0]
            if len(self.running) >= self._max_num_seqs or not self._start(sequence):
                break
            chosen.append((sequence, min(budget, sequence.num_uncomputed_tokens)))
            budget -= chosen[-1][1]
        if not chosen:
            # The only stream that ran made room for nobody but those who wait.
            return self.schedule() if preemptions != self.num_preemptions else None
        batch = Batch(tuple(_scheduled(s, n) for s, n in chosen), tuple(copies))
        return batch, [sequence for sequence, _ in chosen]

    def _grow(self, sequence: Sequence, copies: list[tuple[int, int]]) -> bool:
        """Makes the slot of the last token writable; False when `sequence` itself had to go."""
        table = sequence.block_table
        missing = self._pool.blocks_for(len(sequence.tokens)) - len(table)
        shared = not missing and self._pool.num_holds(table[-1]) > 1
        if not missing and not shared:
            return True
        while self._pool.num_available < 1:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        (block,) = self._pool.allocate(1, Holder.SEQUENCE)
        if shared:
            copies.append((table[-1], block))
            self._pool.release(table[-1:], Holder.SEQUENCE)
            table[-1] = block
        else:
            table.append(block)
        return True

    def _start(self, sequence: Sequence) -> bool:
        """Moves a waiting sequence to running if blocks for all its tokens are there. At least
        the last token is computed anew: its logits are wanted."""
        pool = self._pool
        hashes = sequence.chain.upto(sequence.tokens, len(sequence.tokens) - 1)
        cached = pool.match(hashes)
        pool.retain(cached, Holder.SEQUENCE)
        needed = pool.blocks_for(len(sequence.tokens)) - len(cached)
        if needed > pool.num_available:
            pool.release(cached, Holder.SEQUENCE)
            return False
        sequence.block_table = cached + pool.allocate(needed, Holder.SEQUENCE)
        sequence.num_computed_tokens = len(cached) * pool.block_size
        if not sequence.has_sampled:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        self.waiting.remove(sequence)
        sequence.status = Status.RUNNING
        self.add(sequence)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._pool.release(sequence.block_table, Holder.SEQUENCE)
        sequence.block_table = []
        sequence.num_computed_tokens = 0
        sequence.status = Status.WAITING
        self.add(sequence)
        self.num_preemptions += 1

    def check_integrity(self) -> None:
        for queue, status in ((self.waiting, Status.WAITING), (self.running, Status.RUNNING)):
            assert all(s.status is status for s in queue)
            assert [s.arrival for s in queue] == sorted(s.arrival for s in queue)
        for s in self.running:
            assert s.num_computed_tokens <= len(s.block_table) * self._pool.block_size
        assert all(not s.block_table for s in self.waiting)


def _scheduled(sequence: Sequence, num_tokens: int) -> ScheduledSequence:
    start = sequence.num_computed_tokens
    reaches_end = start + num_tokens == len(sequence.tokens)
    return ScheduledSequence(
        tokens=sequence.tokens,
        num_prompt_tokens=sequence.num_prompt_tokens,
        start=start,
        num_tokens=num_tokens,
        block_table=sequence.block_table,
        params=sequence.params,
        choices=sequence.choices if reaches_end else (),
    )
