"""A decode worker that computes a prompt itself, beside those whose KV it gets."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from worker_benches import ENGINE, in_virtual_time, running, running_pair, spec, start_on

from forebay.core.errors import InvalidRequest, Overloaded
from forebay.core.finish import FinishReason
from forebay.core.roles import WorkerRole

BIG = replace(ENGINE, num_blocks=64, max_num_seqs=4)


@in_virtual_time
async def test_a_decode_worker_answers_alone() -> None:
    async with running() as mixed, running(WorkerRole.DECODE) as decode:
        for bench in (mixed, decode):
            await bench.prefill(spec(n=2, prompt=13))
        await asyncio.sleep(5)
        assert [decode.tokens("r", c) for c in range(2)] == [mixed.tokens("r", c) for c in range(2)]
        assert decode.ends("r") == [FinishReason.LENGTH] * 2
        decode.check_empty()


@in_virtual_time
async def test_local_and_transferred_prompts_run_side_by_side() -> None:
    async with running(engine=BIG) as alone:
        for name in ("a", "local", "b"):
            await alone.prefill(spec(name, prompt=20, max_tokens=9))
        await asyncio.sleep(5)
        async with running_pair(BIG) as (prefill, decode):
            await start_on(prefill, decode, spec("a", prompt=20, max_tokens=9))
            await decode.prefill(spec("local", prompt=20, max_tokens=9))
            await start_on(prefill, decode, spec("b", prompt=20, max_tokens=9))
            await asyncio.sleep(5)
            assert decode.tokens("local") == alone.tokens("local")
            for name in ("a", "b"):
                assert prefill.tokens(name) + decode.tokens(name) == alone.tokens(name)
            for bench in (prefill, decode):
                bench.check_empty()


@in_virtual_time
async def test_a_local_prompt_leaves_its_prefix_behind() -> None:
    """Also for prompts that another worker computes."""
    async with running_pair(BIG) as (prefill, decode):
        await decode.prefill(spec("r", prompt=20, max_tokens=9))
        await asyncio.sleep(3)
        answer = await start_on(prefill, decode, spec("s", prompt=20, max_tokens=9))
        assert answer.num_cached_tokens == 20
        await asyncio.sleep(3)
        assert prefill.tokens("s") + decode.tokens("s") == decode.tokens("r")


@in_virtual_time
async def test_a_decode_worker_says_what_room_it_has() -> None:
    """Reserved blocks and slots are gone; tokens that others compute are not its load."""
    async with running(WorkerRole.DECODE, BIG) as decode:
        load = decode.worker.load()
        full = 2 * BIG.max_batch_tokens
        assert load.prefill_room_tokens == full
        await decode.reserve(spec("aa", prompt=100))
        load = decode.worker.load()
        assert (load.prefill_room_tokens, load.num_pending_prefill_tokens) == (full, 0)
        assert load.kv_blocks.leased == 25
        with pytest.raises(Overloaded, match="KV blocks"):
            await decode.prefill(spec("b", prompt=160))
        await decode.prefill(spec("cc", prompt=30))
        load = decode.worker.load()
        assert load.prefill_room_tokens == full - 30 == full - load.num_pending_prefill_tokens
        for name in ("d", "ee"):
            await decode.reserve(spec(name, prompt=8))
        assert decode.worker.load().prefill_room_tokens == 0, "no slot is left"
        with pytest.raises(Overloaded):
            await decode.prefill(spec("f"))
        decode.worker.check_integrity()


@in_virtual_time
async def test_a_prompt_is_either_computed_here_or_awaited() -> None:
    async with running(WorkerRole.DECODE, BIG) as decode:
        await decode.reserve(spec("a"))
        with pytest.raises(InvalidRequest):
            await decode.prefill(spec("a"))
        await decode.prefill(spec("b"))
        with pytest.raises(InvalidRequest):
            await decode.reserve(spec("b"))
        decode.worker.check_integrity()
        await decode.prefill(spec("a", attempt=2))
        await asyncio.sleep(3)
        assert len(decode.tokens("a")) == len(decode.tokens("b")) == 5
        decode.check_empty()
