"""Pulled prefixes between workers over real gRPC: the sim engine for faults, the default model in
fp32 for the same answer, token for token."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from forebay.core.clock import Deadline
from forebay.core.settings import EngineSettings
from forebay.rpc import methods
from forebay.rpc.v1 import worker_pb2
from served_workers import PROMPT, PULLED, Served, served, spec, until


def slow_reads(there: Served, seconds: float) -> None:
    """Each frame takes so long to be read."""
    runner: Any = there.worker._runner
    export = runner.export_kv

    def slowly(*args: Any) -> int:
        time.sleep(seconds)
        return export(*args)  # type: ignore[no-any-return]

    runner.export_kv = slowly


async def test_pulled_and_computed_answers_agree() -> None:
    async with served() as source, served() as puller:
        expected = await source.answer(spec("computed"))
        request = spec("pulled")
        assert await puller.answer(request, source.source()) == expected
        assert puller.pulled(request) == (PULLED, PULLED)
        await until(lambda: source.is_empty and puller.is_empty)
        counters = puller.worker.description().counters
        assert (counters.kv_pulled_tokens, counters.kv_pull_failures) == (PULLED, 0)
        assert counters.kv_bytes_received == PULLED * 4 * 8


async def test_a_source_that_dies_in_the_middle_costs_only_time() -> None:
    async with served() as source, served() as puller:
        expected = await source.answer(spec("computed"))
        slow_reads(source, 0.05)
        request = spec("pulled")
        await puller.prefill(request, source.source())
        await until(lambda: puller.worker.description().counters.kv_bytes_received > 0)
        await source.listener.stop(0)
        assert await puller.rest(request) == expected
        assert puller.pulled(request) == (0, 0)
        assert puller.worker.description().counters.kv_pull_failures == 1
        await until(lambda: puller.is_empty and source.is_empty)


async def test_nobody_at_the_address() -> None:
    async with served() as puller:
        expected = await puller.answer(spec("one"))
    async with served() as puller:
        nowhere = worker_pb2.PullSource(address="127.0.0.1:1", epoch="e", num_tokens=PROMPT)
        assert await puller.answer(spec("two"), nowhere) == expected
        assert puller.worker.description().counters.kv_pull_failures == 1


async def test_a_pull_that_takes_too_long_is_given_up_on_both_sides() -> None:
    async with served() as source, served() as puller:
        expected = await source.answer(spec("computed"))
        slow_reads(source, 0.05)
        request = spec("pulled")
        assert await puller.answer(request, source.source(timeout_ms=100)) == expected
        assert puller.pulled(request) == (0, 0)
        await until(lambda: puller.is_empty and source.is_empty)


async def test_an_abort_reaches_the_source() -> None:
    async with served() as source, served() as puller:
        await source.answer(spec("computed"))
        slow_reads(source, 0.05)
        request = spec("pulled")
        await puller.prefill(request, source.source())
        await until(lambda: len(source.worker._traffic.prefix_sends) == 1)
        abort = worker_pb2.AbortRequest(request_id="pulled", gateway_id="g", attempt=1)
        answer = await puller.channel.unary(methods.ABORT, abort, Deadline.after(5))
        assert answer.found
        await until(lambda: puller.is_empty and source.is_empty)
        assert source.worker.description().counters.kv_bytes_sent == 0
        assert [o for o in puller.outputs if o.request_id == "pulled"] == []


async def test_the_real_model_answers_the_same_from_pulled_kv(default_model_path: Path) -> None:
    """fp32: what was pulled is bit for bit what would have been computed, wherever the rest of the
    prompt begins."""
    engine = EngineSettings(
        model_path=str(default_model_path), dtype="fp32", num_blocks=64, num_threads=1
    )
    async with (
        served(engine, kv_frame_kib=1024) as source,
        served(engine, kv_frame_kib=1024) as puller,
    ):
        for number, pulled in enumerate((PULLED, 96)):
            prompt = [(17 * i * i + (5 + number) * i) % 20_000 + 100 for i in range(PROMPT)]
            expected = await source.answer(spec(f"computed {number}", prompt))
            request = spec(f"pulled {number}", prompt)
            assert await puller.answer(request, source.source(pulled, 60_000)) == expected
            assert puller.pulled(request) == (pulled, pulled)
        await until(lambda: source.is_empty and puller.is_empty)
