"""One worker's sequences, KV blocks and steps: the same for every runner.

A step has three parts, so that only the middle one needs another thread: `begin_step` decides,
`runner.run` computes, `end_step` books the result. Requests may come and go between the parts;
blocks that a step under way writes to are released when it ends.
"""

from __future__ import annotations

from dataclasses import dataclass

from forebay.engine.interface import Batch, Runner, SampledToken, StepResult
from forebay.engine.scheduler import Scheduler
from forebay.engine.sequence import (
    RequestKey,
    Sequence,
    SequenceStart,
    Status,
    TokenOutput,
    finish_reason,
)
from forebay.kv.block_pool import BlockPool, Holder


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt computed for another worker. `first_tokens`: (choice, token id) of the choices
    that go on. Its blocks are held until `Engine.release`."""

    sequence: Sequence
    first_tokens: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class StepOutcome:
    outputs: list[TokenOutput]
    prefilled: list[Prefilled]


@dataclass(slots=True)
class EngineCounters:
    """Totals since the start, in tokens. What a resumed answer had generated elsewhere is computed
    like a prompt and counts as one."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0


class Engine:
    def __init__(self, runner: Runner, *, max_batch_tokens: int, max_num_seqs: int) -> None:
        self.runner = runner
        self.pool = BlockPool(runner.num_blocks, runner.kv_layout.block_size)
        self.counters = EngineCounters()
        self.max_num_seqs = max_num_seqs
        self._scheduler = Scheduler(self.pool, max_batch_tokens, max_num_seqs)
        self._by_key: dict[RequestKey, list[Sequence]] = {}
        self._in_step: list[Sequence] = []
        self._num_arrivals = 0

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def num_preemptions(self) -> int:
        return self._scheduler.num_preemptions

    @property
    def num_sequences(self) -> int:
        """Including prompts whose KV is still being sent."""
        return sum(len(sequences) for sequences in self._by_key.values())

    @property
    def num_pending_prefill_tokens(self) -> int:
        """Without those that were in the prefix cache when their prompt came."""
        waiting = sum(s.num_uncomputed_tokens - s.num_found_tokens for s in self._scheduler.waiting)
        computing = (s.num_uncomputed_tokens for s in self._scheduler.running)
        return waiting + sum(count for count in computing if count > 1)

    @property
    def num_waiting_blocks(self) -> int:
        """Blocks that the waiting sequences will take, preempted ones included."""
        return sum(self.pool.blocks_for(len(s.tokens)) for s in self._scheduler.waiting)

    def sequences(self, key: RequestKey) -> list[Sequence]:
        return self._by_key.get(key, [])

    @property
    def in_step(self) -> list[Sequence]:
        """Between `begin_step` and its end: the sequences behind the batch's, in their order."""
        return self._in_step

    def submit(self, start: SequenceStart, *, prefill_only: bool) -> Sequence:
        """Queues tokens to be computed. `prefill_only`: their KV goes to another worker."""
        sequence = Sequence.begin(start, self.pool.block_size)
        sequence.prefill_only = prefill_only
        found = self.pool.match(sequence.chain.upto(sequence.tokens, len(sequence.tokens) - 1))
        sequence.num_found_tokens = len(found) * self.pool.block_size
        self._enter(sequence)
        return sequence

    def adopt(
        self,
        start: SequenceStart,
        block_table: list[int],
        first_tokens: list[tuple[int, int]],
    ) -> None:
        """Goes on with tokens whose KV lies in `block_table` already, held once as a sequence's.
        Each (choice, token id) of `first_tokens` becomes a running sequence."""
        assert first_tokens
        sequence = Sequence.begin(start, self.pool.block_size)
        sequence.block_table = block_table
        sequence.num_computed_tokens = len(start.tokens)
        sequence.status = Status.RUNNING
        self._register_full_blocks(sequence, 0)
        self._enter(sequence)
        self._branch(sequence, first_tokens)

    def begin_step(self) -> Batch | None:
        """The next step, or None when nothing can run. Its `end_step` must follow."""
        assert not self._in_step
        scheduled = self._scheduler.schedule()
        if scheduled is None:
            return None
        batch, self._in_step = scheduled
        return batch

    def end_step(self, batch: Batch, result: StepResult) -> StepOutcome:
        outcome = StepOutcome([], [])
        sequences, self._in_step = self._in_step, []
        for sequence, item, tokens in zip(sequences, batch.sequences, result.tokens, strict=True):
            if sequence.aborted:
                self._drop_blocks(sequence)
                continue
            sequence.num_computed_tokens += item.num_tokens
            self._register_full_blocks(sequence, item.start)
            if tokens:
                self._book_tokens(sequence, tokens, outcome)
        return outcome

    def fail_step(self) -> list[Sequence]:
        """Ends every sequence of a step that could not be computed, and returns them."""
        failed, self._in_step = self._in_step, []
        for sequence in failed:
            if not sequence.aborted:
                self._leave(sequence)
            self._drop_blocks(sequence)
        return failed

    def hold(self, start: SequenceStart) -> Sequence:
        """A sequence of as many leading full blocks of `start` as are in the prefix cache, perhaps
        none: it never runs, and holds them until `release`."""
        sequence = Sequence.begin(start, self.pool.block_size)
        sequence.block_table = self.pool.match(sequence.chain.upto(sequence.tokens))
        self.pool.retain(sequence.block_table, Holder.SEQUENCE)
        sequence.num_computed_tokens = len(sequence.block_table) * self.pool.block_size
        del sequence.tokens[sequence.num_computed_tokens :]
        sequence.status = Status.HOLDING
        self._by_key.setdefault(sequence.key, []).append(sequence)
        return sequence

    def release(self, sequence: Sequence) -> None:
        """Lets go of a prompt that was held for its transfer. No effect after an abort."""
        if sequence.status is Status.HOLDING:
            self._finish(sequence)

    def abort(self, key: RequestKey, choices: frozenset[int] = frozenset()) -> bool:
        """Ends a request, or the named choices of it; False when there was nothing to end. Before
        its first tokens a prompt has no single choices that could be ended."""
        ended = [
            sequence
            for sequence in self.sequences(key)
            if not choices or choices.issuperset(sequence.choices)
        ]
        for sequence in ended:
            self._finish(sequence)
        return bool(ended)

    def count_cache_lookup(self, num_tokens: int, num_cached_tokens: int) -> None:
        self.counters.prefix_cache_queries += num_tokens
        self.counters.prefix_cache_hits += num_cached_tokens

    def check_integrity(self) -> None:
        """Between steps: every used block belongs to a sequence that is here."""
        self.pool.check_integrity()
        self._scheduler.check_integrity()
        held = {b for seqs in self._by_key.values() for s in seqs for b in s.block_table}
        held |= {b for s in self._in_step for b in s.block_table}
        assert len(held) == self.pool.counts().used, "a used block has no sequence"

    def _enter(self, sequence: Sequence) -> None:
        sequence.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._by_key.setdefault(sequence.key, []).append(sequence)
        self._scheduler.add(sequence)

    def _leave(self, sequence: Sequence) -> None:
        siblings = self._by_key[sequence.key]
        siblings.remove(sequence)
        if not siblings:
            del self._by_key[sequence.key]
        if sequence.status is not Status.HOLDING:
            self._scheduler.remove(sequence)
        sequence.status = Status.FINISHED

    def _finish(self, sequence: Sequence) -> None:
        self._leave(sequence)
        if sequence in self._in_step:
            sequence.aborted = True
        else:
            self._drop_blocks(sequence)

    def _drop_blocks(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table, Holder.SEQUENCE)
        sequence.block_table = []

    def _branch(self, prompt: Sequence, first_tokens: list[tuple[int, int]]) -> None:
        """From one sequence that stands for several choices to one per (choice, token id); all
        share the prompt's blocks."""
        for choice, token_id in first_tokens[1:]:
            twin = prompt.fork(choice)
            twin.tokens.append(token_id)
            self.pool.retain(twin.block_table, Holder.SEQUENCE)
            self._enter(twin)
        choice, token_id = first_tokens[0]
        prompt.choices = (choice,)
        prompt.tokens.append(token_id)

    def _book_tokens(
        self, sequence: Sequence, tokens: tuple[SampledToken, ...], outcome: StepOutcome
    ) -> None:
        going_on: list[tuple[int, int]] = []
        offset = sequence.num_generated_tokens
        first = not sequence.has_sampled
        for choice, token in zip(sequence.choices, tokens, strict=True):
            finish = finish_reason(
                sequence.params,
                token.token_id,
                offset + 1,
                len(sequence.tokens) + 1,
                self.runner.model.max_model_len,
            )
            outcome.outputs.append(
                TokenOutput(
                    sequence.key,
                    sequence.attempt,
                    choice,
                    offset,
                    token,
                    finish,
                    sequence.num_cached_tokens if first else None,
                )
            )
            if finish is None:
                going_on.append((choice, token.token_id))
        self.counters.generation_tokens += len(tokens)
        if first:
            self.counters.prompt_tokens += sequence.num_start_tokens
            self.count_cache_lookup(sequence.num_start_tokens, sequence.num_cached_tokens)
        if not going_on:
            self._finish(sequence)
        elif sequence.prefill_only:
            self._scheduler.remove(sequence)
            sequence.status = Status.HOLDING
            outcome.prefilled.append(Prefilled(sequence, tuple(going_on)))
        else:
            self._branch(sequence, going_on)

    def _register_full_blocks(self, sequence: Sequence, start: int) -> None:
        """Makes the blocks findable that were filled by computing from token `start` on."""
        hashes = sequence.chain.upto(sequence.tokens, sequence.num_computed_tokens)
        for index in range(start // self.pool.block_size, len(hashes)):
            self.pool.register(sequence.block_table[index], hashes[index])
