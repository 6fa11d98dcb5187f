"""Several prompts that wait for pulls, and calls that come twice."""

from __future__ import annotations

import asyncio

import pytest
from pull_scene import PROMPT, PULLED, REQUEST, Scene, check_answer, in_scene
from worker_benches import abort_of, spec

from forebay.core.errors import InvalidRequest, KvTransferError, Overloaded, Unavailable
from forebay.rpc.methods import PROTOCOL_VERSION
from forebay.rpc.v1 import worker_pb2
from forebay.worker.prefix_sends import MAX_SENDS
from forebay.worker.pull import MAX_PULLS


@in_scene
async def test_a_repeated_call_waits_for_the_same_pull(there: Scene) -> None:
    there.hall.asking.clear()
    await there.pull(REQUEST)
    await there.pull(REQUEST)
    with pytest.raises(InvalidRequest):
        await there.puller.reserve(REQUEST)
    there.hall.asking.set()
    await asyncio.sleep(2)
    assert there.hall.asked.count("source") == 1
    check_answer(there.puller)
    there.check_empty()


# One prefix, several prompts.


def twins(count: int) -> list[worker_pb2.SequenceSpec]:
    return [spec("abcdefghijklmnop"[i], prompt=PROMPT, max_tokens=8, n=2) for i in range(count)]


@in_scene
async def test_one_pull_serves_all_who_wait_for_the_same_blocks(there: Scene) -> None:
    there.hall.asking.clear()
    for request in twins(3):
        await there.pull(request)
    await asyncio.sleep(0.1)
    assert there.hall.asked.count("source") == 1
    there.hall.asking.set()
    await asyncio.sleep(3)
    assert there.hall.asked.count("source") == 1
    for request in twins(3):
        check_answer(there.puller, request.request_id)
    assert [there.figures(twin.request_id) for twin in twins(3)] == [
        (PULLED, PULLED),
        (PULLED, 0),
        (PULLED, 0),
    ]
    there.check_empty()


@in_scene
async def test_when_the_first_leaves_the_next_one_asks(there: Scene) -> None:
    there.hall.asking.clear()
    for request in twins(3):
        await there.pull(request)
    await asyncio.sleep(0.1)
    await there.puller.worker.abort(abort_of(twins(1)[0]))
    await asyncio.sleep(0.1)
    assert there.hall.asked.count("source") == 2
    there.hall.asking.set()
    await asyncio.sleep(3)
    for request in twins(3)[1:]:
        check_answer(there.puller, request.request_id)
    assert there.num_failures == 0
    there.check_empty()


@in_scene
async def test_nobody_waits_longer_for_another_ones_pull(there: Scene) -> None:
    there.hall.asking.clear()
    first, second = twins(2)
    await there.pull(first, timeout_ms=4000)
    await there.pull(second, timeout_ms=300)
    await asyncio.sleep(2)
    check_answer(there.puller, second.request_id)
    assert there.puller.tokens(first.request_id) == []
    there.hall.asking.set()
    await asyncio.sleep(2)
    check_answer(there.puller, first.request_id)
    there.check_empty()


# Room.


@in_scene
async def test_room_counts_what_waits(there: Scene) -> None:
    there.hall.asking.clear()
    before = there.puller.worker.load()
    await there.pull(REQUEST)
    for _ in range(2):
        load = there.puller.worker.load()
        assert load.num_waiting == before.num_waiting + 1
        assert load.num_pending_prefill_tokens == PROMPT - PULLED
        assert load.prefill_room_tokens == before.prefill_room_tokens - (PROMPT - PULLED)
        await asyncio.sleep(0.1)
    with pytest.raises(Overloaded, match="KV blocks"):
        await there.puller.prefill(spec("too big", prompt=219))
    await there.puller.prefill(spec("fits", prompt=215, max_tokens=1))
    await asyncio.sleep(1)
    there.hall.asking.set()
    await asyncio.sleep(2)
    check_answer(there.puller)
    there.check_empty()


def _others(count: int) -> list[worker_pb2.SequenceSpec]:
    """Prompts of a few blocks that share none."""
    return [spec("x" * (i + 2), prompt=9, max_tokens=1) for i in range(count)]


@in_scene
async def test_only_so_many_wait(there: Scene) -> None:
    there.hall.asking.clear()
    *waiting, one_more = _others(MAX_PULLS + 1)
    for request in waiting:
        assert there.puller.worker.load().prefill_room_tokens > 0
        await there.pull(request)
    assert there.puller.worker.load().prefill_room_tokens == 0
    with pytest.raises(Overloaded):
        await there.pull(one_more)
    there.hall.asking.set()
    await asyncio.sleep(3)
    assert there.puller.worker.load().prefill_room_tokens > 0
    there.check_empty()


@in_scene
async def test_a_source_serves_only_so_many(there: Scene) -> None:
    there.hall.open.clear()
    message = worker_pb2.SendPrefixRequest(
        cache_root=bytes(16),
        token_ids=REQUEST.prompt_token_ids,
        target=worker_pb2.TransferTarget(address="puller", lease_id="none", epoch="none"),
        epoch=there.source.worker.epoch,
        timeout_ms=500,
        protocol_version=PROTOCOL_VERSION,
    )
    calls = [
        asyncio.create_task(there.source.worker.send_prefix(message)) for _ in range(MAX_SENDS)
    ]
    await asyncio.sleep(0.1)
    with pytest.raises(Overloaded):
        await there.source.worker.send_prefix(message)
    assert there.source.worker.load().kv_blocks.used == PROMPT // 4
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert len([r for r in results if isinstance(r, Exception)]) == MAX_SENDS
    there.hall.open.set()
    there.check_empty()


@in_scene
async def test_a_call_that_is_cancelled_gives_the_blocks_back(there: Scene) -> None:
    there.hall.open.clear()
    await there.pull(REQUEST)
    await asyncio.sleep(0.1)
    assert len(there.source.worker._traffic.prefix_sends) == 1
    assert not there.source.worker.idle and not there.puller.worker.idle
    await there.puller.worker.close()
    await asyncio.sleep(0.1)
    there.source.check_empty()
    there.hall.open.set()


@in_scene
async def test_bad_sources_are_named(there: Scene) -> None:
    for values in ({"address": ""}, {"epoch": ""}):
        with pytest.raises(InvalidRequest) as caught:
            await there.pull(REQUEST, **values)
        assert caught.value.param == "source"
    there.check_empty()


@in_scene
async def test_a_late_second_call_for_a_prefix_changes_nothing(there: Scene) -> None:
    """The network may double it; its lease is over by then."""
    messages: list[worker_pb2.SendPrefixRequest] = []
    send = there.source.worker.send_prefix

    async def noted(message: worker_pb2.SendPrefixRequest) -> worker_pb2.SendPrefixResponse:
        messages.append(message)
        return await send(message)

    there.source.worker.send_prefix = noted  # type: ignore[method-assign]
    await there.pull(REQUEST)
    await asyncio.sleep(2)
    with pytest.raises(KvTransferError):
        await send(messages[0])
    check_answer(there.puller)
    there.check_empty()


@in_scene
async def test_a_worker_that_ends_asks_and_serves_no_longer(there: Scene) -> None:
    there.hall.open.clear()
    await there.pull(REQUEST)
    await asyncio.sleep(0.1)
    await there.source.worker.close()
    there.source.worker._stopped = True
    await asyncio.sleep(0.5)
    check_answer(there.puller)
    with pytest.raises(Unavailable):
        await there.source.worker.send_prefix(worker_pb2.SendPrefixRequest())
    there.check_empty()
