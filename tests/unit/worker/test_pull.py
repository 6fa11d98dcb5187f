"""KV pulled from another worker instead of computed."""

from __future__ import annotations

import asyncio

import pytest
from pull_scene import BIG, EXPECTED, PROMPT, PULLED, REQUEST, Scene, check_answer, in_scene
from worker_benches import running, spec, start_on

from forebay.core.roles import WorkerRole
from forebay.engine.sim import SimRunner
from forebay.kv.block_pool import Holder
from forebay.rpc.v1 import worker_pb2


@in_scene
async def test_a_pulled_prefix_is_as_good_as_a_computed_one(there: Scene) -> None:
    await there.pull(REQUEST)
    await asyncio.sleep(2)
    check_answer(there.puller)
    assert there.figures() == (PULLED, PULLED)
    counters = there.puller.worker.description().counters
    assert (counters.kv_pulled_tokens, counters.kv_pull_failures) == (PULLED, 0)
    assert counters.kv_bytes_received == PULLED * 4 * 8
    assert there.source.worker.description().counters.kv_bytes_sent == PULLED * 4 * 8
    there.check_empty()


@in_scene
async def test_the_answer_is_made_of_the_pulled_kv(there: Scene) -> None:
    runner = there.source.worker._runner
    assert isinstance(runner, SimRunner)
    runner._memory[:, :, 0] ^= runner._memory.dtype.type(1)
    await there.pull(REQUEST)
    await asyncio.sleep(2)
    assert there.figures() == (PULLED, PULLED)
    assert there.puller.tokens("r", 0) != EXPECTED[0]


@in_scene
async def test_the_source_is_told_which_codecs_the_puller_takes(there: Scene) -> None:
    send, asked = there.source.worker.send_prefix, []

    async def note(message: worker_pb2.SendPrefixRequest) -> worker_pb2.SendPrefixResponse:
        asked.append(list(message.target.kv_codecs))
        return await send(message)

    there.source.worker.send_prefix = note  # type: ignore[method-assign]
    await there.pull(REQUEST)
    await asyncio.sleep(2)
    assert asked == [[worker_pb2.KV_CODEC_RAW]]


@in_scene
async def test_pulled_blocks_stay_in_the_cache(there: Scene) -> None:
    await there.pull(REQUEST)
    await asyncio.sleep(2)
    again = spec("s", prompt=PROMPT, max_tokens=8, n=2)
    await there.pull(again)
    await asyncio.sleep(2)
    check_answer(there.puller, "s")
    assert there.figures("s") == (PULLED, 0)
    assert there.hall.asked.count("source") == 1, "what is here is not asked for"


@in_scene
async def test_only_what_is_missing_is_pulled(there: Scene) -> None:
    shorter = spec("h", prompt=16, max_tokens=1)
    await there.puller.prefill(shorter)
    await asyncio.sleep(1)
    await there.pull(REQUEST)
    await asyncio.sleep(2)
    check_answer(there.puller)
    assert there.figures() == (PULLED, PULLED - 16)
    assert there.puller.worker.description().counters.kv_bytes_received == (PULLED - 16) * 4 * 8
    there.check_empty()


@pytest.mark.parametrize(
    ("claimed", "pulled"), [(0, 0), (3, 0), (4, 4), (21, 20), (PROMPT, PULLED), (10_000, PULLED)]
)
def test_as_much_as_the_source_is_said_to_hold(claimed: int, pulled: int) -> None:
    @in_scene
    async def check(there: Scene) -> None:
        await there.pull(REQUEST, num_tokens=claimed)
        await asyncio.sleep(2)
        check_answer(there.puller)
        assert there.figures() == (pulled, pulled)
        assert there.num_failures == 0
        there.check_empty()

    check()


@in_scene
async def test_as_much_as_the_source_still_holds(there: Scene) -> None:
    """Its index entry was older than an eviction."""
    pool = there.source.worker.engine.pool
    blocks = pool.allocate(pool.num_available - 5, Holder.SEQUENCE)
    await there.pull(REQUEST)
    await asyncio.sleep(2)
    pool.release(blocks, Holder.SEQUENCE)
    check_answer(there.puller)
    cached, pulled = there.figures()
    assert cached == pulled == 20
    assert there.num_failures == 0
    there.check_empty()


@in_scene
async def test_a_prompt_for_another_worker_can_have_a_source(there: Scene) -> None:
    async with running(WorkerRole.DECODE, BIG, there.hall) as decode:
        await start_on(there.puller, decode, REQUEST, there.pull_source())
        await asyncio.sleep(2)
        for choice in range(2):
            answer = there.puller.tokens("r", choice) + decode.tokens("r", choice)
            assert answer == EXPECTED[choice]
        assert there.figures() == (PULLED, PULLED)
        decode.check_empty()
    there.check_empty()


@in_scene
async def test_the_decode_worker_itself_can_be_the_source(there: Scene) -> None:
    """It holds the conversation so far, and the prefill worker does not."""
    await start_on(there.puller, there.source, REQUEST, there.pull_source())
    await asyncio.sleep(2)
    for choice in range(2):
        answer = there.puller.tokens("r", choice) + there.source.tokens("r", choice)
        assert answer == EXPECTED[choice]
    assert there.figures() == (PULLED, PULLED)
    there.check_empty()


# What goes wrong.
