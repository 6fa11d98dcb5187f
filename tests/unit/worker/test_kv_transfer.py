"""A transfer commits when every byte has arrived as it was sent, and otherwise never."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
from kv_pairs import KEY, KvPair, Messages, as_iterator

from forebay.core.clock import Deadline
from forebay.core.errors import KvTransferError
from forebay.core.executor import InlineExecutor
from forebay.kv.block_pool import Holder
from forebay.kv.leases import Lease
from forebay.rpc.v1 import kv_transfer_pb2, worker_pb2
from forebay.simulator import loop
from forebay.worker.frames import encode_commit

ChangeHeader = Callable[[kv_transfer_pb2.KvFrameHeader], None]


def with_header(message: bytes, change: ChangeHeader) -> bytes:
    request = kv_transfer_pb2.PushRequest.FromString(message)
    change(request.header)
    return request.SerializeToString()


def edited(change: ChangeHeader, number: int = 1) -> Callable[[Messages], Messages]:
    """Changes the header of one frame."""

    def alter(messages: Messages) -> Messages:
        messages[number] = with_header(messages[number], change)
        return messages

    return alter


def committed(**values: object) -> Callable[[Messages], Messages]:
    """Changes the commit."""

    def alter(messages: Messages) -> Messages:
        commit = kv_transfer_pb2.PushRequest.FromString(messages[-1]).commit
        for name, value in values.items():
            setattr(commit, name, value)
        messages[-1] = encode_commit(commit)
        return messages

    return alter


def refused(
    pair: KvPair, match: str | None = None, num_failures: int = 1, **target: object
) -> None:
    async def main() -> None:
        with pytest.raises(KvTransferError, match=match):
            await pair.transfer(**target)

    loop.run(main())
    assert pair.commits == []
    assert pair.receiver.num_failures == num_failures
    assert pair.sender.num_bytes == 0
    pair.leases.check_integrity()
    pair.target.pool.check_integrity()


@pytest.mark.parametrize("max_frame_bytes", [1, 8, 40, 104, 300, 10_000])
@pytest.mark.parametrize("num_prompt_tokens", [1, 4, 13])
def test_a_whole_transfer_commits_once(num_prompt_tokens: int, max_frame_bytes: int) -> None:
    pair = KvPair(num_prompt_tokens=num_prompt_tokens, max_frame_bytes=max_frame_bytes, n=3)
    loop.run(pair.transfer())
    assert pair.commits == [(pair.lease, list(pair.prefilled.first_tokens))]
    assert pair.arrived_whole()
    assert pair.sender.num_bytes == pair.receiver.num_bytes == num_prompt_tokens * 4 * 8
    assert pair.receiver.num_failures == 0


def test_what_the_receiver_holds_is_not_sent() -> None:
    pair = KvPair()
    pair.leases.release(pair.lease)
    (block,) = pair.target.pool.allocate(1, Holder.SEQUENCE)
    pair.target.pool.register(block, b"h" * 16)
    lease = pair.leases.grant("other", "owner", [b"h" * 16], 13)
    assert lease.num_cached_tokens == 4
    loop.run(pair.transfer(lease_id="other", start_token=4))
    assert [lease for lease, _ in pair.commits] == [lease]
    assert pair.sender.num_bytes == 9 * 4 * 8


def test_a_prompt_that_is_cached_whole_is_a_commit_alone() -> None:
    pair = KvPair(num_prompt_tokens=4)
    pair.leases.release(pair.lease)
    (block,) = pair.target.pool.allocate(1, Holder.SEQUENCE)
    pair.target.pool.register(block, b"h" * 16)
    lease = pair.leases.grant("other", "owner", [b"h" * 16], 4)
    loop.run(pair.transfer(lease_id="other", start_token=4))
    assert [lease for lease, _ in pair.commits] == [lease]
    assert pair.sender.num_bytes == 0


@pytest.mark.parametrize("start_token", [4, 13])
def test_a_sender_that_skips_tokens_is_refused(start_token: int) -> None:
    refused(KvPair(), start_token=start_token)


@pytest.mark.parametrize(
    "alter",
    [
        pytest.param(lambda m: m[:1] + m[2:], id="lost frame"),
        pytest.param(lambda m: m[:-2] + m[-1:], id="last frame lost"),
        pytest.param(lambda m: m[-1:], id="all frames lost"),
        pytest.param(lambda m: [*m[2:], *m[:2]], id="first frames last"),
        pytest.param(lambda m: [m[1], m[0], *m[2:]], id="reordered frames"),
        pytest.param(lambda m: [m[-1], *m[:-1]], id="commit first"),
        pytest.param(lambda m: [m[0][:-1], *m[1:]], id="truncated frame"),
        pytest.param(lambda m: [*m[:-1], m[-1][:-1]], id="truncated commit"),
        pytest.param(lambda m: [m[0][:-1] + bytes([m[0][-1] ^ 1]), *m[1:]], id="corrupt payload"),
        pytest.param(edited(lambda h: setattr(h, "lease_id", "other")), id="another lease"),
        pytest.param(edited(lambda h: setattr(h, "epoch", "other")), id="another life"),
        pytest.param(edited(lambda h: setattr(h, "frame", 0)), id="frame passed off as another"),
        pytest.param(edited(lambda h: setattr(h, "frame", 2)), id="frame too early"),
        pytest.param(edited(lambda h: setattr(h, "protocol_version", 1)), id="older protocol"),
        pytest.param(edited(lambda h: setattr(h, "protocol_version", 3)), id="newer protocol"),
        pytest.param(edited(lambda h: setattr(h.layout, "version", 2)), id="layout version"),
        pytest.param(edited(lambda h: setattr(h.layout, "dtype", 2)), id="another dtype"),
        pytest.param(edited(lambda h: setattr(h.layout, "num_kv_heads", 2)), id="other heads"),
        pytest.param(edited(lambda h: setattr(h.layout, "kv_group", 1)), id="another group"),
        pytest.param(edited(lambda h: h.ClearField("layout")), id="no layout"),
        pytest.param(edited(lambda h: setattr(h, "codec", 0)), id="codec"),
        pytest.param(edited(lambda h: setattr(h, "codec", 2)), id="codec not taken here"),
        pytest.param(edited(lambda h: setattr(h, "codec", 77)), id="unknown codec"),
        pytest.param(edited(lambda h: setattr(h, "num_heads", 0)), id="no heads"),
        pytest.param(edited(lambda h: setattr(h, "head_start", 1)), id="head past the model"),
        pytest.param(edited(lambda h: setattr(h, "num_heads", 2)), id="too many heads"),
        pytest.param(edited(lambda h: setattr(h, "source_rank", 1)), id="another rank"),
        pytest.param(edited(lambda h: setattr(h, "layer_start", 3)), id="layer again"),
        pytest.param(edited(lambda h: setattr(h, "layer_start", 4)), id="layer past the model"),
        pytest.param(edited(lambda h: setattr(h, "num_layers", 0)), id="no layer"),
        pytest.param(edited(lambda h: setattr(h, "num_layers", 2**32 - 1)), id="many layers"),
        pytest.param(edited(lambda h: setattr(h, "token_start", 4)), id="tokens skipped"),
        pytest.param(edited(lambda h: setattr(h, "num_tokens", 0)), id="no tokens"),
        pytest.param(edited(lambda h: setattr(h, "num_tokens", 14)), id="too many tokens"),
        pytest.param(edited(lambda h: setattr(h, "num_tokens", 3)), id="payload too long"),
        pytest.param(edited(lambda h: setattr(h, "crc32c", 1)), id="checksum"),
        pytest.param(committed(lease_id="other"), id="commit of another lease"),
        pytest.param(committed(epoch="other"), id="commit of another life"),
        pytest.param(committed(num_frames=1), id="commit counts frames"),
        pytest.param(committed(num_bytes=1), id="commit counts bytes"),
        pytest.param(committed(crc32c=1), id="commit checksum"),
    ],
)
def test_anything_else_is_refused(alter: Callable[[Messages], Messages]) -> None:
    pair = KvPair()
    pair.alter = alter
    refused(pair)
    assert len(pair.leases) == 1


@pytest.mark.parametrize("num_messages", [0, 1, 2])
def test_messages_that_end_too_early_are_the_senders_failure(num_messages: int) -> None:
    pair = KvPair()
    pair.alter = lambda messages: messages[:num_messages]
    refused(pair, match="without a commit", num_failures=0)
    assert len(pair.leases) == 1


@pytest.mark.parametrize("again", [[0], [1], [0, 0, 1], [2, 1, 0]])
def test_frames_that_came_already_are_skipped(again: list[int]) -> None:
    """A late duplicate is not even looked into: what it would write is never written."""
    pair = KvPair()

    def alter(messages: Messages) -> Messages:
        corrupt = [messages[i][:-1] + bytes([messages[i][-1] ^ 1]) for i in again]
        return [*messages[:3], *corrupt, *messages[3:]]

    pair.alter = alter
    loop.run(pair.transfer())
    assert pair.receiver.num_duplicates == len(again)
    assert pair.receiver.num_bytes == 13 * 4 * 8
    assert len(pair.commits) == 1
    assert pair.arrived_whole()


def test_a_duplicate_for_a_lease_that_has_ended_is_refused() -> None:
    pair = KvPair()
    pair.alter = lambda messages: [*messages[:2], messages[1], *messages[2:]]
    pair.before_message = lambda number: pair.leases.release(pair.lease) if number == 2 else None
    refused(pair, match="no lease")


def test_a_commit_without_first_tokens_is_refused() -> None:
    pair = KvPair()

    def alter(messages: Messages) -> Messages:
        commit = kv_transfer_pb2.PushRequest.FromString(messages[-1]).commit
        del commit.first_tokens[:]
        return [*messages[:-1], encode_commit(commit)]

    pair.alter = alter
    refused(pair)


def test_no_flipped_bit_of_any_message_commits_something_else() -> None:
    """Fields that the receiver has no use for may change; what is committed may not."""
    messages = loop.run(KvPair(num_prompt_tokens=1, max_frame_bytes=16, n=2).messages())
    num_commits = 0
    for number, message in enumerate(messages):
        for bit in range(8 * len(message)):
            pair = KvPair(num_prompt_tokens=1, max_frame_bytes=16, n=2)
            flipped = bytearray(message)
            flipped[bit // 8] ^= 1 << bit % 8
            changed = [*messages[:number], bytes(flipped), *messages[number + 1 :]]
            pair.alter = lambda _, changed=changed: changed  # type: ignore[misc]

            async def main(pair: KvPair = pair) -> bool:
                try:
                    await pair.transfer()
                except KvTransferError:
                    return False
                return True

            if loop.run(main()):
                num_commits += 1
                assert pair.commits == [(pair.lease, list(pair.prefilled.first_tokens))]
                assert pair.arrived_whole()
            else:
                assert pair.commits == []
    assert num_commits < 8 * len(messages)


def test_frames_for_a_lease_released_in_between_are_refused() -> None:
    pair = KvPair()
    pair.before_message = lambda number: pair.leases.release(pair.lease) if number == 2 else None
    refused(pair, match="no lease")
    assert pair.target.pool.counts().free == pair.target.pool.num_blocks


def test_a_refused_transfer_may_be_sent_again() -> None:
    pair = KvPair()
    pair.alter = lambda messages: messages[:2]

    async def main() -> None:
        with pytest.raises(KvTransferError):
            await pair.transfer()
        pair.alter = None
        await pair.transfer()

    loop.run(main())
    assert len(pair.commits) == 1
    assert pair.arrived_whole()


def test_a_second_commit_of_a_lease_changes_nothing() -> None:
    pair = KvPair()

    async def main() -> None:
        messages = await pair.messages()
        await pair.transfer()
        before = pair.target.pool.counts()
        for replayed in (messages, messages[-1:]):
            with pytest.raises(KvTransferError, match="no lease"):
                await pair.receiver.push(as_iterator(replayed))
        assert pair.target.pool.counts() == before

    loop.run(main())
    assert len(pair.commits) == 1


def test_a_commit_that_comes_twice_in_a_push_is_taken_once() -> None:
    pair = KvPair()
    pair.alter = lambda messages: [*messages, messages[-1]]
    loop.run(pair.transfer())
    assert len(pair.commits) == 1
    assert pair.receiver.num_failures == 0


class GatedExecutor(InlineExecutor):
    """Functions wait, begun, until the gate opens."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.num_waiting = 0

    async def run(self, function: object, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        self.num_waiting += 1
        await self.gate.wait()
        self.num_waiting -= 1
        return function(*args, **kwargs)  # type: ignore[operator]


def test_blocks_of_a_lease_released_during_a_write_are_not_given_away() -> None:
    async def main() -> None:
        executor = GatedExecutor()
        pair = KvPair(executor=executor)
        task = asyncio.create_task(pair.transfer())
        while not executor.num_waiting:
            await asyncio.sleep(0)
        pair.leases.release(pair.lease)
        counts = pair.target.pool.counts()
        assert (counts.quarantined, counts.free) == (4, pair.target.pool.num_blocks - 4)
        executor.gate.set()
        with pytest.raises(KvTransferError, match="no lease"):
            await task
        assert pair.target.pool.counts().free == pair.target.pool.num_blocks
        assert pair.commits == []

    loop.run(main())


def test_a_replayed_push_cannot_disturb_the_one_under_way() -> None:
    async def main() -> None:
        pair = KvPair()
        messages = await pair.messages()
        late = asyncio.Event()

        async def arriving() -> AsyncIterator[bytes]:
            for message in messages[:-1]:
                yield message
            await late.wait()
            yield messages[-1]

        first = asyncio.create_task(pair.receiver.push(arriving()))
        await asyncio.sleep(1)
        for replayed in (messages, messages[-1:]):
            with pytest.raises(KvTransferError, match="another push"):
                await pair.receiver.push(as_iterator(replayed))
        late.set()
        await first
        assert len(pair.commits) == 1
        assert pair.arrived_whole()
        pair.leases.check_integrity()

    loop.run(main())


def test_a_push_that_is_cancelled_makes_way_for_another() -> None:
    async def main() -> None:
        executor = GatedExecutor()
        pair = KvPair(executor=executor)
        messages = await pair.messages()
        first = asyncio.create_task(pair.receiver.push(as_iterator(messages)))
        while not executor.num_waiting:
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert pair.lease.num_writes == 0
        executor.gate.set()
        await pair.transfer()
        assert len(pair.commits) == 1

    loop.run(main())


def prefix_pair(num_leased: int = 16) -> tuple[KvPair, Lease]:
    """A prompt of 16 tokens, all of it computed, and a lease for a prefix."""
    pair = KvPair(num_prompt_tokens=16)
    pair.leases.release(pair.lease)
    return pair, pair.leases.grant("prefix", KEY, [], num_leased, is_prefix=True)


async def send_prefix(pair: KvPair, first_tokens: tuple[tuple[int, int], ...] = ()) -> None:
    where = worker_pb2.TransferTarget(lease_id="prefix", epoch="epoch")
    push = pair.sender.open(pair.prefilled.sequence, where)
    push.complete(first_tokens)
    await pair.sender.send(push, Deadline.after(10))


@pytest.mark.parametrize("num_leased", [16, 20, 40])
def test_a_prefix_may_be_shorter_than_its_lease(num_leased: int) -> None:
    pair, lease = prefix_pair(num_leased)
    loop.run(send_prefix(pair))
    assert pair.prefixes == [(lease, 16)] and pair.commits == []
    table = pair.prefilled.sequence.block_table
    assert pair.kv_of(pair.target, lease.block_table) == pair.kv_of(pair.source, table)


def test_a_prefix_longer_than_its_lease_is_refused() -> None:
    pair, _ = prefix_pair(12)
    with pytest.raises(KvTransferError, match="past the leased"):
        loop.run(send_prefix(pair))
    assert pair.prefixes == []


@pytest.mark.parametrize(
    "alter",
    [
        pytest.param(lambda m: m[:-2] + m[-1:], id="last frame lost"),
        pytest.param(lambda m: m[-1:], id="all frames lost"),
        pytest.param(lambda m: m[:1] + m[2:], id="lost frame"),
        pytest.param(lambda m: m[:-1], id="no commit"),
        pytest.param(committed(num_frames=1), id="commit counts frames"),
        pytest.param(committed(num_bytes=1), id="commit counts bytes"),
        pytest.param(committed(crc32c=1), id="commit checksum"),
    ],
)
def test_a_prefix_that_lost_something_is_refused(alter: Callable[[Messages], Messages]) -> None:
    """It is not taken for a shorter one."""
    pair, lease = prefix_pair()
    pair.alter = alter
    with pytest.raises(KvTransferError):
        loop.run(send_prefix(pair))
    assert pair.prefixes == [] and not lease.ended


def test_first_tokens_come_with_prompts_only() -> None:
    pair, lease = prefix_pair()
    with pytest.raises(KvTransferError, match="first tokens"):
        loop.run(send_prefix(pair, ((0, 1),)))
    assert pair.prefixes == [] and pair.commits == [] and not lease.ended
    pair = KvPair()
    pair.prefilled = replace(pair.prefilled, first_tokens=())
    refused(pair, "first tokens")
