"""Requests come, go and fail between the parts of steps; what is left must not notice."""

from __future__ import annotations

import random

import pytest
from sim_engines import (
    Answers,
    Job,
    adopt_from,
    all_blocks_back,
    alone,
    answers_to,
    run_out,
    sim_engine,
    submit,
)

from forebay.core.sampling import SamplingParams
from forebay.engine.interface import Batch
from forebay.kv.leases import LeaseTable


class Play:
    """One engine in a small pool, a seed, and everything that may happen to it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.engine = sim_engine(
            self.random.randint(14, 24),
            max_batch_tokens=self.random.choice((3, 8, 32)),
            max_num_seqs=self.random.choice((2, 4, 16)),
        )
        self.prefill = sim_engine(256)
        self.leases = LeaseTable(self.engine.pool, "epoch")
        self.answers = Answers()
        self.jobs: list[Job] = []
        self.disturbed: set[str] = set()
        self.dropped: set[tuple[str, int]] = set()

    def act(self) -> None:
        action = self.random.choice((self._submit, self._submit, self._adopt, self._abort))
        action()
        self.engine.check_integrity()
        self.leases.check_integrity()

    def turn(self) -> bool:
        """A step with things happening before, during and after the computation."""
        batch = self.engine.begin_step()
        self.engine.check_integrity()
        if batch is None:
            return False
        self._maybe_act()
        if self.random.random() < 0.04:
            self._fail(batch)
        else:
            result = self.engine.runner.run(batch)
            self._maybe_act()
            self.answers.add(self.engine.end_step(batch, result))
        self.engine.check_integrity()
        return True

    def _maybe_act(self) -> None:
        if self.random.random() < 0.3:
            self.act()

    def _fail(self, batch: Batch) -> None:
        failed = self.engine.fail_step()
        assert len(failed) == len(batch.sequences)
        self.disturbed |= {sequence.key.request_id for sequence in failed}

    def _job(self) -> Job:
        shared = [7, 7, 7, 7, 7, 7, 7, 7][: self.random.choice((0, 4, 8))]
        own = [self.random.randrange(250) for _ in range(self.random.randint(1, 12))]
        params = SamplingParams(
            n=self.random.choice((1, 1, 3)),
            seed=self.random.randrange(2**32),
            max_tokens=self.random.randint(1, 16),
            stop_token_ids=(257,),
        )
        job = Job(f"job-{len(self.jobs)}", shared + own, params)
        if self.random.random() < 0.3:
            job = self._left_elsewhere(job)
        self.jobs.append(job)
        self.answers.given[job.name] = job.generated
        return job

    def _left_elsewhere(self, job: Job) -> Job:
        """One choice of `job`, to go on with after some of its tokens; or `job`, when all of its
        choices have ended with their first."""
        whole = {choice: tokens for (_, choice), tokens in alone(job).items() if len(tokens) > 1}
        if not whole:
            return job
        choice = self.random.choice(sorted(whole))
        return job.resumed(choice, whole[choice][: self.random.randrange(1, len(whole[choice]))])

    def _submit(self) -> None:
        submit(self.engine, self._job())

    def _adopt(self) -> None:
        job = self._job()
        submit(self.prefill, job, prefill_only=True)
        first = run_out(self.prefill, answers_to(job))
        moved = True
        if first.prefilled:
            moved = adopt_from(self.prefill, first.prefilled[0], self.engine, self.leases, job)
            self.prefill.release(first.prefilled[0].sequence)
        if not moved:
            self.jobs.pop()
            return
        self.answers.tokens |= first.tokens
        self.answers.ended |= first.ended

    def _abort(self) -> None:
        if not self.jobs:
            return
        job = self.random.choice(self.jobs[-6:])
        choice = self.random.choice(job.start.choices)
        if self.random.random() < 0.5:
            self.engine.abort(job.key)
            self.disturbed.add(job.name)
        elif self.engine.abort(job.key, frozenset({choice})):
            self.dropped.add((job.name, choice))


@pytest.mark.parametrize("seed", range(40))
def test_any_order_of_events_leaves_every_other_answer_as_it_was(seed: int) -> None:
    play = Play(seed)
    for _ in range(60):
        play.act() if play.random.random() < 0.35 else play.turn()
    play.random = random.Random(1)
    while play.engine.num_sequences:
        batch = play.engine.begin_step()
        assert batch is not None, "sequences wait, and nothing runs"
        play.answers.add(play.engine.end_step(batch, play.engine.runner.run(batch)))
        play.engine.check_integrity()
    assert all_blocks_back(play.engine)
    assert all_blocks_back(play.prefill)
    for job in play.jobs:
        for choice, expected in alone(job).items():
            got = play.answers.tokens.get(choice, [])
            if job.name in play.disturbed or choice in play.dropped:
                assert got == expected[: len(got)]
            else:
                assert got == expected
                assert choice in play.answers.ended


def test_the_seeds_reach_preemption_failure_and_the_prefix_cache() -> None:
    num_preemptions = num_cached = num_disturbed = 0
    for seed in range(12):
        play = Play(seed)
        for _ in range(60):
            play.act() if play.random.random() < 0.35 else play.turn()
        num_preemptions += play.engine.num_preemptions
        num_cached += sum(play.answers.cached.values())
        num_disturbed += len(play.disturbed)
    assert min(num_preemptions, num_cached, num_disturbed) > 0
