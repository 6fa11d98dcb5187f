"""Whatever goes wrong with a pull, the prompt is computed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from pull_scene import PULLED, REQUEST, Scene, check_answer, in_scene, scene, stalled
from worker_benches import abort_of, spec

from forebay.core.errors import KvTransferError
from forebay.kv.block_pool import Holder
from forebay.rpc.methods import PROTOCOL_VERSION
from forebay.rpc.v1 import worker_pb2
from forebay.simulator import loop
from forebay.worker.pull import PULL_S


def nobody(there: Scene) -> dict[str, Any]:
    return {"address": "nowhere"}


def another_life(there: Scene) -> dict[str, Any]:
    return {"epoch": "an earlier one"}


def draining(there: Scene) -> dict[str, Any]:
    there.source.worker.draining = True
    return {}


def stopped(there: Scene) -> dict[str, Any]:
    there.source.worker._stopped = True
    return {}


def evicted(there: Scene) -> dict[str, Any]:
    pool = there.source.worker.engine.pool
    pool.release(pool.allocate(pool.num_available, Holder.SEQUENCE), Holder.SEQUENCE)
    return {}


def no_answer(there: Scene) -> dict[str, Any]:
    there.hall.asking.clear()
    return {"timeout_ms": 300}


def corrupt(there: Scene) -> dict[str, Any]:
    there.hall.alter = lambda message: [message[:-1] + bytes([message[-1] ^ 1])]
    return {}


def frame_lost(there: Scene) -> dict[str, Any]:
    messages: list[bytes] = []

    def alter(message: bytes) -> list[bytes]:
        messages.append(message)
        return [] if len(messages) == 2 else [message]

    there.hall.alter = alter
    return {}


def last_frame_lost(there: Scene) -> dict[str, Any]:
    """Indistinguishable from a sender that holds less, but for the commit's counts."""
    held_back: list[bytes] = []

    def alter(message: bytes) -> list[bytes]:
        if message[:1] == b"\x1a":
            return [message]
        held_back.append(message)
        return held_back[-2:-1]

    there.hall.alter = alter
    return {}


def commit_lost(there: Scene) -> dict[str, Any]:
    there.hall.alter = lambda message: [] if message[:1] == b"\x1a" else [message]
    return {}


def source_closes(there: Scene) -> dict[str, Any]:
    def alter(message: bytes) -> list[bytes]:
        there.hall.open.clear()
        there.source.worker._traffic.prefix_sends.close()
        return [message]

    there.hall.alter = alter
    return {}


def unreadable(there: Scene) -> dict[str, Any]:
    def export(*_: Any) -> int:
        raise KvTransferError("the memory cannot be read")

    there.source.worker._runner.export_kv = export  # type: ignore[method-assign]
    return {}


FAULTS = [
    nobody,
    another_life,
    draining,
    stopped,
    evicted,
    no_answer,
    stalled,
    corrupt,
    frame_lost,
    last_frame_lost,
    commit_lost,
    source_closes,
    unreadable,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_goes_wrong_the_prompt_is_computed(
    fault: Callable[[Scene], dict[str, Any]],
) -> None:
    @in_scene
    async def check(there: Scene) -> None:
        values = fault(there)
        await there.pull(REQUEST, **values)
        await asyncio.sleep(3)
        check_answer(there.puller)
        assert there.figures() == (0, 0)
        assert there.num_failures == 1
        there.hall.open.set()
        there.hall.asking.set()
        await asyncio.sleep(1)
        there.check_empty()

    check()


def test_workers_of_two_versions_exchange_no_kv() -> None:
    async def main() -> None:
        async with scene(protocol_version=PROTOCOL_VERSION + 1) as there:
            await there.pull(REQUEST)
            await asyncio.sleep(2)
            check_answer(there.puller)
            assert there.figures() == (0, 0) and there.num_failures == 1
            assert there.hall.num_messages == 0
            there.check_empty()

    loop.run(main())


@in_scene
async def test_without_a_time_of_the_gateways_the_wait_is_short(there: Scene) -> None:
    there.hall.asking.clear()
    await there.pull(REQUEST)
    await asyncio.sleep(PULL_S - 0.1)
    assert there.puller.tokens("r") == []
    await asyncio.sleep(2)
    assert there.num_failures == 1
    await there.puller.worker.abort(abort_of(REQUEST))
    there.hall.asking.set()
    there.check_empty()


@in_scene
async def test_another_tenants_kv_is_not_sent(there: Scene) -> None:
    request = worker_pb2.SequenceSpec.FromString(REQUEST.SerializeToString())
    request.cache_root = b"another root 16B"
    await there.pull(request)
    await asyncio.sleep(2)
    check_answer(there.puller)
    assert there.figures() == (0, 0)
    assert there.hall.num_messages == 0


@in_scene
async def test_what_the_source_reads_is_not_evicted_meanwhile(there: Scene) -> None:
    there.hall.open.clear()
    await there.pull(REQUEST)
    await asyncio.sleep(0.1)
    pool = there.source.worker.engine.pool
    assert pool.counts().used == PULLED // 4
    await there.source.prefill(spec("crowd", prompt=200, max_tokens=1))
    await asyncio.sleep(1)
    there.source.worker.check_integrity()
    there.hall.open.set()
    await asyncio.sleep(1)
    check_answer(there.puller)
    assert there.figures() == (PULLED, PULLED)
    there.check_empty()


# Ends, in every phase.
