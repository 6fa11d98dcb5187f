from __future__ import annotations

from dataclasses import replace

import pytest
from crc32c import crc32c
from sim_engines import (
    Answers,
    Job,
    adopt_from,
    all_blocks_back,
    alone,
    answers_to,
    run_out,
    sim_engine,
    step,
    submit,
)

from forebay.core.finish import FinishReason
from forebay.core.kv_codec import KvCodec
from forebay.core.sampling import SamplingParams
from forebay.engine.interface import KvSlice
from forebay.engine.sequence import RequestKey, Status, finish_reason
from forebay.kv.block_pool import Holder
from forebay.kv.leases import LeaseTable

LONG = SamplingParams(max_tokens=20, seed=1)


def job(name: str, num_tokens: int, params: SamplingParams = LONG, first: int = 0) -> Job:
    return Job(name, [(first + i) % 250 for i in range(num_tokens)], params)


def test_a_prompt_is_cut_into_chunks_of_the_step_budget() -> None:
    engine = sim_engine(64, max_batch_tokens=5)
    submit(engine, job("a", 13))
    sizes = []
    answers = Answers()
    while not answers.tokens:
        batch = engine.begin_step()
        assert batch is not None
        sizes.append([(item.start, item.num_tokens, item.choices) for item in batch.sequences])
        answers.add(engine.end_step(batch, engine.runner.run(batch)))
    assert sizes == [[(0, 5, ())], [(5, 5, ())], [(10, 3, (0,))]]
    assert run_out(engine, answers).tokens == alone(job("a", 13))


def test_running_streams_go_before_prompts_and_prompts_in_order() -> None:
    engine = sim_engine(64, max_batch_tokens=6)
    answers = Answers()
    submit(engine, job("a", 4))
    step(engine, answers)
    submit(engine, job("b", 8, first=50))
    submit(engine, job("c", 3, first=90))
    batch = engine.begin_step()
    assert batch is not None
    assert [(item.tokens[0], item.num_tokens) for item in batch.sequences] == [(0, 1), (50, 5)]
    answers.add(engine.end_step(batch, engine.runner.run(batch)))
    batch = engine.begin_step()
    assert batch is not None
    assert [(i.tokens[0], i.num_tokens) for i in batch.sequences] == [(0, 1), (50, 3), (90, 2)]
    answers.add(engine.end_step(batch, engine.runner.run(batch)))
    run_out(engine, answers)
    assert all_blocks_back(engine)


def test_no_more_than_max_num_seqs_start() -> None:
    engine = sim_engine(64, max_num_seqs=2, max_batch_tokens=64)
    for i in range(4):
        submit(engine, job(f"{i}", 4, first=20 * i))
    step(engine, Answers())
    assert (engine.num_running, engine.num_waiting) == (2, 2)


def test_prefix_cache_hits_are_counted_and_leave_the_answer_alone() -> None:
    engine = sim_engine(64)
    answers = run_out(engine, Answers())
    submit(engine, job("a", 12))
    run_out(engine, answers)
    submit(engine, job("b", 12))
    run_out(engine, answers)
    assert answers.cached == {"a": 0, "b": 8}  # the last block's logits are computed anew
    assert answers.tokens[("a", 0)] == answers.tokens[("b", 0)]
    counters = engine.counters
    assert (counters.prefix_cache_queries, counters.prefix_cache_hits) == (24, 8)
    assert counters.prompt_tokens == 24
    assert counters.generation_tokens == sum(map(len, answers.tokens.values()))


def test_other_roots_share_nothing() -> None:
    engine = sim_engine(64)
    answers = Answers()
    one = job("a", 12)
    submit(engine, one)
    run_out(engine, answers)
    other = replace(one.start, key=RequestKey("g", "b"), cache_root=bytes(16))
    engine.submit(other, prefill_only=False)
    run_out(engine, answers)
    assert answers.cached["b"] == 0


@pytest.mark.parametrize("num_tokens", [3, 4, 5])
def test_choices_share_the_prompt_and_copy_on_their_first_write(num_tokens: int) -> None:
    engine = sim_engine(64)
    three = job("a", num_tokens, SamplingParams(n=3, seed=5, max_tokens=6))
    submit(engine, three)
    answers = Answers()
    step(engine, answers)
    assert engine.num_sequences == 3
    assert engine.pool.counts().used == engine.pool.blocks_for(num_tokens)
    batch = engine.begin_step()
    assert batch is not None
    assert len(batch.block_copies) == (0 if num_tokens % 4 == 0 else 2)
    tables = [item.block_table[-1] for item in batch.sequences]
    assert len(set(tables)) == 3
    answers.add(engine.end_step(batch, engine.runner.run(batch)))
    assert run_out(engine, answers).tokens == alone(three)
    assert all_blocks_back(engine)


def test_newest_is_preempted_and_its_answer_is_whole() -> None:
    engine = sim_engine(7, max_batch_tokens=32)
    jobs = [job("old", 8), job("new", 8, first=100)]
    for each in jobs:
        submit(engine, each)
    answers = Answers()
    while not engine.num_preemptions:
        assert step(engine, answers)
    assert (engine.num_running, engine.num_waiting) == (1, 1)
    assert engine.sequences(jobs[1].key)[0].status is Status.WAITING
    assert engine.num_waiting_blocks == engine.pool.blocks_for(8 + len(answers.tokens["new", 0]))
    assert run_out(engine, answers).tokens == alone(jobs[0]) | alone(jobs[1])


def test_one_sequence_fills_the_whole_pool() -> None:
    engine = sim_engine(4)
    only = job("a", 10, SamplingParams(max_tokens=50, seed=2))
    submit(engine, only)
    answers = run_out(engine, Answers())
    assert len(answers.tokens["a", 0]) == 6
    assert ("a", 0) in answers.ended
    assert all_blocks_back(engine)


def test_a_stream_that_makes_room_lets_an_older_one_start_at_once() -> None:
    """The only running stream gives up its blocks: whoever waits must not wait for an event."""
    engine = sim_engine(4)
    leases = LeaseTable(engine.pool, "epoch")
    older = job("old", 4, SamplingParams(max_tokens=4, seed=1))
    younger = job("new", 12, SamplingParams(max_tokens=4, seed=1), first=100)
    submit(engine, older)
    prefill = sim_engine(64)
    submit(prefill, younger, prefill_only=True)
    first = run_out(prefill, Answers())
    assert adopt_from(prefill, first.prefilled[0], engine, leases, younger)
    held = engine.pool.allocate(1, Holder.LEASE)
    batch = engine.begin_step()
    assert batch is not None
    assert [item.tokens[0] for item in batch.sequences] == [0]
    answers = first
    answers.add(engine.end_step(batch, engine.runner.run(batch)))
    engine.pool.release(held, Holder.LEASE)
    while engine.num_sequences:
        assert step(engine, answers)
    assert answers.tokens == alone(older) | alone(younger)


def test_a_prompt_for_another_worker_is_held_until_released() -> None:
    engine = sim_engine(16)
    one = job("a", 10)
    submit(engine, one, prefill_only=True)
    answers = run_out(engine, Answers())
    (prefilled,) = answers.prefilled
    assert prefilled.first_tokens == ((0, answers.tokens["a", 0][0]),)
    assert engine.pool.counts().used == 3
    assert (engine.num_running, engine.num_waiting, engine.num_sequences) == (0, 0, 1)
    engine.release(prefilled.sequence)
    engine.release(prefilled.sequence)
    assert all_blocks_back(engine)


def test_a_prompt_whose_choices_all_end_at_once_is_not_held() -> None:
    engine = sim_engine(16)
    submit(engine, job("a", 10, SamplingParams(n=2, max_tokens=1)), prefill_only=True)
    answers = run_out(engine, Answers())
    assert answers.prefilled == []
    assert len(answers.ended) == 2
    assert all_blocks_back(engine)


def test_blocks_of_a_sequence_aborted_in_a_step_stay_until_the_step_ends() -> None:
    engine = sim_engine(16)
    one = job("a", 10)
    submit(engine, one)
    batch = engine.begin_step()
    assert batch is not None
    assert engine.abort(one.key)
    assert not engine.abort(one.key)
    assert engine.pool.counts().used == 3
    outcome = engine.end_step(batch, engine.runner.run(batch))
    assert outcome.outputs == []
    assert all_blocks_back(engine)


def test_single_choices_end_by_themselves() -> None:
    engine = sim_engine(32)
    three = job("a", 5, SamplingParams(n=3, seed=5, max_tokens=6))
    submit(engine, three)
    answers = Answers()
    assert not engine.abort(three.key, frozenset({1}))
    step(engine, answers)
    assert engine.abort(three.key, frozenset({1}))
    run_out(engine, answers)
    expected = alone(three)
    assert answers.tokens["a", 1] == expected["a", 1][:1]
    assert {c: answers.tokens["a", c] for c in (0, 2)} == {c: expected["a", c] for c in (0, 2)}
    assert all_blocks_back(engine)


def test_a_failed_step_ends_its_sequences_only() -> None:
    engine = sim_engine(32, max_batch_tokens=4)
    submit(engine, job("a", 4))
    submit(engine, job("b", 4, first=50))
    batch = engine.begin_step()
    assert batch is not None
    (failed,) = engine.fail_step()
    assert failed.key.request_id == "a"
    engine.check_integrity()
    assert run_out(engine, Answers()).tokens == alone(job("b", 4, first=50))
    assert all_blocks_back(engine)


def test_kv_that_is_lost_changes_the_answer() -> None:
    """What all comparisons here rest on."""
    one = job("a", 8)
    engine = sim_engine(16)
    submit(engine, one)
    answers = Answers()
    step(engine, answers)
    table = engine.sequences(one.key)[0].block_table
    part, zeros = KvSlice(1, 1, 2, 1, 0, 1), bytes(8)
    engine.runner.import_kv(table, part, KvCodec.RAW, memoryview(zeros), crc32c(zeros))
    assert run_out(engine, answers).tokens != alone(one)


STOPPING = SamplingParams(n=2, seed=11, max_tokens=40, stop_token_ids=(257,))
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.mark.parametrize("transferred", [False, True])
@pytest.mark.parametrize("params", [LONG, GREEDY, STOPPING])
def test_an_answer_goes_on_from_any_of_its_tokens(
    params: SamplingParams, transferred: bool
) -> None:
    whole = job("a", 6, params)
    for (_, choice), tokens in alone(whole).items():
        for cut in range(1, len(tokens)):
            rest = whole.resumed(choice, tokens[:cut])
            engine, answers = sim_engine(32), answers_to(rest)
            submit(engine, rest, prefill_only=transferred)
            run_out(engine, answers)
            for prefilled in answers.prefilled:
                target = sim_engine(32)
                leases = LeaseTable(target.pool, "epoch")
                assert adopt_from(engine, prefilled, target, leases, rest)
                engine.release(prefilled.sequence)
                run_out(target, answers)
                assert all_blocks_back(target)
            assert answers.tokens == {(rest.name, choice): tokens}
            assert answers.ended == {(rest.name, choice)}
            assert all_blocks_back(engine)


def test_generated_tokens_are_cached_and_counted_like_a_prompt() -> None:
    whole = job("a", 6)
    (tokens,) = alone(whole).values()
    engine, rest = sim_engine(32), whole.resumed(0, tokens[:8])
    answers = answers_to(rest)
    submit(engine, whole)
    run_out(engine, answers)
    submit(engine, rest)
    run_out(engine, answers)
    assert answers.cached == {"a": 0, "a.0": 12}
    counters = engine.counters
    assert (counters.prefix_cache_queries, counters.prefix_cache_hits) == (6 + 14, 12)
    assert counters.prompt_tokens == 6 + 14
    assert counters.generation_tokens == len(tokens) + len(tokens) - 8


def test_a_resumed_answer_survives_preemption() -> None:
    whole = job("new", 8, first=100)
    (tokens,) = alone(whole).values()
    old, rest = job("old", 8), whole.resumed(0, tokens[:5])
    engine, answers = sim_engine(8, max_batch_tokens=32), answers_to(rest)
    submit(engine, old)
    submit(engine, rest)
    run_out(engine, answers)
    assert engine.num_preemptions > 0
    assert answers.tokens == alone(old) | {("new.0", 0): tokens}


def test_only_the_choices_asked_for_are_sampled() -> None:
    three = job("a", 5, SamplingParams(n=3, seed=5, max_tokens=6))
    engine = sim_engine(32)
    submit(engine, replace(three, choices=(0, 2)))
    answers = run_out(engine, Answers())
    expected = alone(three)
    assert answers.tokens == {choice: expected[choice] for choice in (("a", 0), ("a", 2))}
    assert engine.counters.prompt_tokens == 5


def test_the_sequences_in_step_are_those_of_the_batch() -> None:
    engine = sim_engine(32)
    for i, name in enumerate("abc"):
        submit(engine, job(name, 4, first=40 * i))
    assert engine.in_step == []
    batch = engine.begin_step()
    assert batch is not None
    assert [sequence.tokens for sequence in engine.in_step] == [s.tokens for s in batch.sequences]
    engine.end_step(batch, engine.runner.run(batch))
    assert engine.in_step == []


@pytest.mark.parametrize(
    ("token_id", "num_generated", "num_tokens", "expected"),
    [
        (9, 1, 5, FinishReason.STOP),
        (9, 8, 5, FinishReason.STOP),
        (1, 8, 5, FinishReason.LENGTH),
        (1, 2, 100, FinishReason.LENGTH),
        (1, 7, 99, None),
    ],
)
def test_finish_reason(
    token_id: int, num_generated: int, num_tokens: int, expected: FinishReason | None
) -> None:
    params = SamplingParams(max_tokens=8, stop_token_ids=(9,))
    assert finish_reason(params, token_id, num_generated, num_tokens, 100) is expected


def test_a_held_prefix_stays_until_it_is_released() -> None:
    engine = sim_engine(8, max_batch_tokens=64)
    submit(engine, job("a", 14, replace(LONG, max_tokens=1)))
    step(engine, Answers())
    held = engine.hold(job("b", 14).start)
    assert len(held.tokens) == held.num_computed_tokens == 12
    assert engine.pool.counts().used == len(held.block_table) == 3
    assert engine.num_sequences == 1 and engine.begin_step() is None
    engine.check_integrity()
    blocks = engine.pool.allocate(engine.pool.num_available, Holder.LEASE)
    assert not set(blocks) & set(held.block_table)
    engine.pool.release(blocks, Holder.LEASE)
    engine.release(held)
    engine.release(held)
    assert all_blocks_back(engine)


def test_nothing_is_held_of_what_is_not_there() -> None:
    engine = sim_engine(8)
    held = engine.hold(job("b", 14).start)
    assert (held.tokens, held.block_table) == ([], [])
    engine.release(held)
    assert all_blocks_back(engine)
