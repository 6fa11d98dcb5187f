"""Whatever a worker holds for a request, it holds under one lease of the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

import pytest
from worker_benches import (
    LEASE_S,
    SLOW,
    Bench,
    abort_of,
    in_virtual_time,
    running,
    running_pair,
    spec,
    start_on,
)

from forebay.core.errors import InvalidRequest, KvTransferError
from forebay.core.finish import FinishReason
from forebay.core.roles import WorkerRole
from forebay.kv.block_pool import Holder
from forebay.rpc.v1 import worker_pb2
from forebay.worker.worker import SWEEP_S


@dataclass
class Scene:
    """Request `r` stays in one phase on `bench`, until `release` is called."""

    bench: Bench
    release: Callable[[], None] = field(default=lambda: None)


@asynccontextmanager
async def reserved() -> AsyncIterator[Scene]:
    async with running(WorkerRole.DECODE) as bench:
        await bench.reserve(spec())
        yield Scene(bench)


@asynccontextmanager
async def queued() -> AsyncIterator[Scene]:
    async with running() as bench:
        pool = bench.worker.engine.pool
        await bench.prefill(spec())
        others = pool.allocate(pool.num_available, Holder.LEASE)
        yield Scene(bench, lambda: pool.release(others, Holder.LEASE))


@asynccontextmanager
async def in_step() -> AsyncIterator[Scene]:
    async with running() as bench:
        bench.executor.held = {"run"}
        await bench.prefill(spec())
        yield Scene(bench, bench.executor.release)


@asynccontextmanager
async def decoded() -> AsyncIterator[Scene]:
    async with running(engine=SLOW) as bench:
        await bench.prefill(spec(max_tokens=50))
        yield Scene(bench)


@asynccontextmanager
async def sent() -> AsyncIterator[Scene]:
    async with running_pair() as (prefill, decode):
        prefill.hall.open.clear()
        decode.renewing = ["r"]
        await start_on(prefill, decode, spec(max_tokens=50))
        yield Scene(prefill, prefill.hall.open.set)


@asynccontextmanager
async def received() -> AsyncIterator[Scene]:
    async with running_pair() as (prefill, decode):
        prefill.renewing = ["r"]
        decode.executor.held = {"import_kv"}
        await start_on(prefill, decode, spec(max_tokens=50))
        yield Scene(decode, decode.executor.release)


PHASES = [reserved, queued, in_step, decoded, sent, received]
Phase = Callable[[], AbstractAsyncContextManager[Scene]]


@pytest.mark.parametrize("phase", PHASES)
def test_a_request_nobody_renews_ends_in_any_phase(phase: Phase) -> None:
    @in_virtual_time
    async def check() -> None:
        async with phase() as scene:
            bench = scene.bench
            await asyncio.sleep(LEASE_S - 0.1)
            assert bench.ends("r") == []
            assert not bench.worker.idle
            await asyncio.sleep(0.1 + 2 * SWEEP_S)
            assert bench.ends("r") == [FinishReason.ERROR]
            assert bench.outputs[-1].resumable
            assert "lease ran out" in bench.outputs[-1].error
            assert bench.worker.description().counters.expired_leases == 1
            scene.release()
            await asyncio.sleep(1)
            bench.check_empty()
            assert bench.ends("r") == [FinishReason.ERROR]

    check()


@pytest.mark.parametrize("phase", PHASES)
def test_renewals_keep_a_request_in_any_phase(phase: Phase) -> None:
    @in_virtual_time
    async def check() -> None:
        async with phase() as scene:
            bench = scene.bench
            bench.renewing = ["unknown", "r"]
            await asyncio.sleep(1.8 * LEASE_S)
            assert bench.ends("r") == []
            assert not bench.worker.idle
            bench.renewing = []
            scene.release()
            await asyncio.sleep(LEASE_S + 2 * SWEEP_S + 1)
            bench.check_empty()

    check()


@pytest.mark.parametrize("phase", PHASES)
def test_an_abort_ends_a_request_in_any_phase(phase: Phase) -> None:
    @in_virtual_time
    async def check() -> None:
        async with phase() as scene:
            bench = scene.bench
            await asyncio.sleep(1)
            assert (await bench.worker.abort(abort_of(spec()))).found
            assert not (await bench.worker.abort(abort_of(spec()))).found
            scene.release()
            await asyncio.sleep(1)
            bench.check_empty()
            assert bench.ends("r") == []

    check()


@in_virtual_time
async def test_blocks_of_a_write_under_way_outlive_the_lease() -> None:
    async with received() as scene:
        worker = scene.bench.worker
        await asyncio.sleep(LEASE_S + 2 * SWEEP_S)
        blocks = worker.load().kv_blocks
        assert (blocks.leased, blocks.quarantined) == (0, 2)
        worker.check_integrity()
        scene.release()
        await asyncio.sleep(0.1)
        assert worker.load().kv_blocks.quarantined == 0
        scene.bench.check_empty()


@in_virtual_time
async def test_kv_for_a_lease_that_ran_out_is_refused_and_the_sender_told() -> None:
    async with running_pair() as (prefill, decode):
        prefill.hall.open.clear()
        prefill.renewing = ["r"]
        lease = await start_on(prefill, decode, spec(max_tokens=50))
        await asyncio.sleep(LEASE_S + 2 * SWEEP_S)
        assert decode.ends("r") == [FinishReason.ERROR]
        prefill.hall.open.set()
        await asyncio.sleep(1)
        assert prefill.ends("r") == [FinishReason.ERROR]
        assert prefill.outputs[-1].resumable
        with pytest.raises(KvTransferError):
            decode.worker.leases.get(lease.lease_id, lease.epoch)
        for bench in (prefill, decode):
            bench.check_empty()


@in_virtual_time
async def test_another_gateway_renews_nothing_here() -> None:
    async with running(WorkerRole.DECODE) as bench:
        await bench.attach("other", renewing=["r"])
        await bench.reserve(spec())
        await asyncio.sleep(LEASE_S + 2 * SWEEP_S)
        assert bench.ends("r") == [FinishReason.ERROR]
        bench.check_empty()


@in_virtual_time
async def test_no_renewal_goes_past_the_deadline() -> None:
    async with running(WorkerRole.DECODE) as bench:
        bench.renewing = ["r"]
        request = spec()
        request.timeout_ms = 8_000
        await bench.reserve(request)
        await asyncio.sleep(7.9)
        assert bench.ends("r") == []
        await asyncio.sleep(0.1 + 2 * SWEEP_S)
        assert bench.ends("r") == [FinishReason.ERROR]
        assert not bench.outputs[-1].resumable
        assert bench.worker.description().counters.expired_leases == 0
        bench.check_empty()


@in_virtual_time
async def test_a_reservation_tells_the_time_left() -> None:
    async with running(WorkerRole.DECODE) as bench:
        first = await bench.reserve(spec())
        assert first.lease_ms == LEASE_S * 1000
        await asyncio.sleep(0.5)
        assert (await bench.reserve(spec())).lease_ms == LEASE_S * 1000 - 500
        bench.renewing = ["r"]
        await bench.attach()  # ends what the gateway had here
        assert (await bench.reserve(spec(attempt=2))).lease_ms == LEASE_S * 1000
        await asyncio.sleep(0.5)
        short = spec("short")
        short.timeout_ms = 1500
        assert (await bench.reserve(short)).lease_ms == 1500


@in_virtual_time
async def test_a_stream_of_anything_but_renewals_is_cut() -> None:
    async with running() as bench:

        async def said() -> AsyncIterator[worker_pb2.StepsRequest]:
            for _ in range(2):
                hello = worker_pb2.GatewayHello(gateway_id="other")
                yield worker_pb2.StepsRequest(hello=hello)

        stream = bench.worker.steps(said())
        await anext(stream)
        with pytest.raises(InvalidRequest) as caught:
            await anext(stream)
        assert caught.value.param == "renewal"
