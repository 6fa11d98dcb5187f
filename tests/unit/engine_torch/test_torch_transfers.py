"""KV of a computed prompt between two torch runners, through the worker's sender and receiver."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch
from tiny_models import Stream, advance, kv_part, load_tiny, random_tokens, read_kv, save_tiny_llama

from forebay.core.clock import Deadline
from forebay.core.errors import KvTransferError
from forebay.core.executor import InlineExecutor
from forebay.core.kv_codec import KvCodec
from forebay.core.sampling import SamplingParams
from forebay.engine.interface import KvSlice
from forebay.engine.sequence import RequestKey, Sequence, SequenceStart
from forebay.engine.torch_runner import TorchRunner
from forebay.kv.block_pool import BlockPool
from forebay.kv.leases import Lease, LeaseTable
from forebay.rpc.conversions import codec_to_proto
from forebay.rpc.v1 import kv_transfer_pb2, worker_pb2
from forebay.simulator import loop
from forebay.worker.frames import chained, encode_commit, encode_frame
from forebay.worker.transfer import KvReceiver, KvSender

PROMPT = random_tokens(37, seed=5)
KEY = RequestKey("gateway", "request")
VERSION = 2
FP32_BYTES = 3 * 2 * 37 * 2 * 8 * 4
FP8_BYTES = 3 * 2 * 37 * 2 * (8 + 4)
EVERY_CODEC = tuple(codec_to_proto(codec) for codec in KvCodec)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_llama(folder)
    return folder


class Pair:
    """A prompt computed by `source`, and blocks of `target`'s leased for it. `alter` may change the
    messages on their way."""

    def __init__(
        self,
        folder: Path,
        codec: KvCodec = KvCodec.RAW,
        *,
        block_sizes: tuple[int, int] = (16, 16),
        max_frame_bytes: int = 1500,
        num_blocks: int = 40,
        dtype: str = "fp32",
    ) -> None:
        self.source, self.target = (
            load_tiny(folder, block_size=size, num_blocks=num_blocks, dtype=dtype)
            for size in block_sizes
        )
        self.pools = [BlockPool(num_blocks, size) for size in block_sizes]
        self.leases = LeaseTable(self.pools[1], "epoch")
        self.lease = self.leases.grant("lease", KEY, [], len(PROMPT))
        self.commits: list[Lease] = []
        self.alter: Callable[[list[bytes]], list[bytes]] = lambda messages: messages
        self.sender = KvSender(self.source, InlineExecutor(), self, codec, max_frame_bytes, VERSION)
        self.receiver = KvReceiver(
            self.target,
            InlineExecutor(),
            self.leases,
            lambda lease, _: self.commits.append(lease),
            lambda *_: None,
            VERSION,
        )
        self.table = list(range(num_blocks - 1, num_blocks - 1 - self.pools[0].blocks_for(37), -1))
        advance(self.source, Stream(list(PROMPT), self.table))

    async def push(
        self, address: str, messages: AsyncIterator[bytes], deadline: Deadline
    ) -> kv_transfer_pb2.PushResponse:
        """Implements `KvTransport`."""
        return await self.receive(self.alter([message async for message in messages]))

    async def receive(self, messages: list[bytes]) -> kv_transfer_pb2.PushResponse:
        async def arriving() -> AsyncIterator[bytes]:
            for message in messages:
                yield message

        return await self.receiver.push(arriving())

    def transfer(self, takes: tuple[worker_pb2.KvCodec.ValueType, ...] = EVERY_CODEC) -> None:
        start = SequenceStart(KEY, 1, tuple(PROMPT), len(PROMPT), SamplingParams(), (0,), b"")
        sequence = Sequence.begin(start, self.pools[0].block_size)
        sequence.block_table, sequence.num_computed_tokens = self.table, len(PROMPT)
        target = worker_pb2.TransferTarget(lease_id="lease", epoch="epoch", kv_codecs=takes)

        async def main() -> None:
            push = self.sender.open(sequence, target)
            push.complete(((0, 1),))
            await self.sender.send(push, Deadline.after(60))

        loop.run(main())

    def received(self, codec: KvCodec = KvCodec.RAW) -> bytes:
        return read_kv(self.target, self.lease.block_table, kv_part(self.target, 0, 37), codec)

    def sent(self, codec: KvCodec = KvCodec.RAW) -> bytes:
        return read_kv(self.source, self.table, kv_part(self.source, 0, 37), codec)


@pytest.mark.parametrize("block_sizes", [(16, 16), (16, 4), (5, 16), (1, 64)])
@pytest.mark.parametrize("max_frame_bytes", [1, 700, 10_000_000])
def test_raw_kv_arrives_as_it_is(
    folder: Path, block_sizes: tuple[int, int], max_frame_bytes: int
) -> None:
    pair = Pair(folder, block_sizes=block_sizes, max_frame_bytes=max_frame_bytes)
    pair.transfer()
    assert pair.commits == [pair.lease]
    assert pair.received() == pair.sent()
    assert pair.sender.num_bytes == pair.receiver.num_bytes == FP32_BYTES


@pytest.mark.parametrize("block_sizes", [(16, 16), (16, 4), (5, 16)])
@pytest.mark.parametrize("max_frame_bytes", [1, 700, 10_000_000])
def test_fp8_kv_arrives_as_near_as_its_codec_is(
    folder: Path, block_sizes: tuple[int, int], max_frame_bytes: int
) -> None:
    """And is the same however it is cut into frames."""
    pair = Pair(folder, KvCodec.FP8, block_sizes=block_sizes, max_frame_bytes=max_frame_bytes)
    pair.transfer()
    assert pair.commits == [pair.lease]
    assert pair.sender.num_bytes == pair.receiver.num_bytes == FP8_BYTES
    codes, scales = pair.sent(KvCodec.FP8)[: FP8_BYTES * 8 // 12], FP8_BYTES * 8 // 12
    expected = torch.frombuffer(bytearray(codes), dtype=torch.float8_e4m3fn).float().view(-1, 8)
    expected *= torch.frombuffer(
        bytearray(pair.sent(KvCodec.FP8)[scales:]), dtype=torch.float32
    ).view(-1, 1)
    arrived = torch.frombuffer(bytearray(pair.received()), dtype=torch.float32).view(-1, 8)
    assert torch.equal(arrived, expected)
    assert pair.received() != pair.sent()


def test_frames_of_fp8_carry_more_tokens_in_as_many_bytes(folder: Path) -> None:
    numbers: dict[KvCodec, int] = {}
    for codec in KvCodec:
        pair = Pair(folder, codec, max_frame_bytes=1500)

        def note(messages: list[bytes], pair: Pair = pair, codec: KvCodec = codec) -> list[bytes]:
            frames = [kv_transfer_pb2.PushRequest.FromString(m) for m in messages[:-1]]
            assert {frame.header.codec for frame in frames} == {codec_to_proto(codec)}
            assert max(len(frame.payload) for frame in frames) in range(1000, 1501)
            numbers[codec] = len(frames)
            return messages

        pair.alter = note
        pair.transfer()
    assert 2 * numbers[KvCodec.FP8] <= numbers[KvCodec.RAW]


@pytest.mark.parametrize("takes", [(), (worker_pb2.KV_CODEC_RAW,), (worker_pb2.KV_CODEC_RAW, 77)])
def test_a_receiver_that_does_not_name_the_codec_gets_raw(
    folder: Path, takes: tuple[worker_pb2.KvCodec.ValueType, ...]
) -> None:
    """One of an older version names none."""
    pair = Pair(folder, KvCodec.FP8)
    pair.transfer(takes)
    assert pair.received() == pair.sent()
    assert pair.sender.num_bytes == FP32_BYTES


@pytest.mark.parametrize("codec", KvCodec)
@pytest.mark.parametrize("at", [0.3, 0.999])
def test_a_flipped_bit_is_refused_and_leaves_nothing(
    folder: Path, codec: KvCodec, at: float
) -> None:
    pair = Pair(folder, codec)

    def alter(messages: list[bytes]) -> list[bytes]:
        request = kv_transfer_pb2.PushRequest.FromString(messages[2])
        payload = bytearray(request.payload)
        payload[int(at * len(payload))] ^= 0x40
        request.payload = bytes(payload)
        return [*messages[:2], request.SerializeToString(), *messages[3:]]

    pair.alter = alter
    with pytest.raises(KvTransferError, match="corrupt"):
        pair.transfer()
    assert pair.commits == [] and pair.receiver.num_failures == 1 and pair.sender.num_bytes == 0
    held = torch.frombuffer(bytearray(pair.received()), dtype=torch.float32)
    assert held.isfinite().all() and not held.all()
    pool = pair.pools[1]
    assert (pool.counts().leased, pool.counts().cached) == (len(pair.lease.block_table), 0)
    pair.alter = lambda messages: messages
    pair.transfer()
    assert pair.commits == [pair.lease]
    if codec is KvCodec.RAW:
        assert pair.received() == pair.sent()


def by_heads(pair: Pair, codec: KvCodec, cuts: list[KvSlice]) -> list[bytes]:
    """A whole push, cut as `cuts` say."""
    messages, checksum, num_bytes = [], 0, 0
    for number, part in enumerate(cuts):
        header = kv_transfer_pb2.KvFrameHeader(
            lease_id="lease",
            epoch="epoch",
            frame=number,
            layout=pair.source.kv_layout,
            codec=codec_to_proto(codec),
            layer_start=part.layer_start,
            num_layers=part.num_layers,
            head_start=part.head_start,
            num_heads=part.num_heads,
            token_start=part.token_start,
            num_tokens=part.num_tokens,
            protocol_version=VERSION,
        )
        size = pair.source.kv_payload_bytes(part, codec)

        def fill(payload: memoryview, part: KvSlice = part) -> int:
            return pair.source.export_kv(pair.table, part, codec, payload)

        message, crc = encode_frame(header, size, fill)
        messages.append(message)
        checksum, num_bytes = chained(checksum, crc), num_bytes + size
    commit = kv_transfer_pb2.KvCommit(
        lease_id="lease",
        epoch="epoch",
        num_frames=len(cuts),
        num_bytes=num_bytes,
        crc32c=chained(checksum, 0, 1),
        first_tokens=[kv_transfer_pb2.FirstToken(choice=0, token_id=1)],
    )
    return [*messages, encode_commit(commit)]


@pytest.mark.parametrize("codec", KvCodec)
def test_heads_may_come_apart(folder: Path, codec: KvCodec) -> None:
    """As from senders that share out the heads between them."""
    pair, whole = Pair(folder, codec, block_sizes=(16, 4)), Pair(folder, codec)
    whole.transfer()
    cuts = [KvSlice(0, 3, 0, 20, 1, 1), KvSlice(0, 2, 0, 37, 0, 1)]
    cuts += [KvSlice(2, 1, 0, 37, 0, 1), KvSlice(0, 3, 20, 17, 1, 1)]
    asyncio.run(pair.receive(by_heads(pair, codec, cuts)))
    assert pair.commits == [pair.lease]
    assert pair.received() == whole.received()


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ([KvSlice(0, 3, 0, 37, 0, 1)], "before all of the KV"),
        ([KvSlice(0, 3, 0, 37, 1, 1)], "before all of the KV"),
        ([KvSlice(0, 3, 0, 37, 0, 1), KvSlice(0, 2, 0, 37, 1, 1)], "before all of the KV"),
        ([KvSlice(0, 3, 0, 37, 0, 1), KvSlice(0, 3, 0, 37, 0, 2)], "out of order"),
        ([KvSlice(0, 3, 0, 30, 0, 1), KvSlice(0, 3, 30, 7, 0, 2)], "out of order"),
    ],
)
def test_heads_that_are_missing_or_come_twice_are_refused(
    folder: Path, cuts: list[KvSlice], message: str
) -> None:
    pair = Pair(folder)
    with pytest.raises(KvTransferError, match=message):
        asyncio.run(pair.receive(by_heads(pair, KvCodec.RAW, cuts)))
    assert pair.commits == []


def test_an_answer_goes_on_from_raw_kv_as_if_nothing_had_moved(folder: Path) -> None:
    """In blocks of another size too."""
    pair = Pair(folder, block_sizes=(16, 5))
    pair.transfer()
    here = Stream(list(PROMPT), [*pair.table, 0, 1, 2])
    there = Stream(list(PROMPT), [*pair.lease.block_table, 30, 31, 32, 33])
    answers = []
    for runner, stream in ((pair.source, here), (pair.target, there)):
        stream.start = len(PROMPT) - 1
        advance(runner, stream, steps=12)
        answers.append(stream.generated)
    assert answers[0] == answers[1]


def test_torch_runners_take_every_codec(folder: Path) -> None:
    runner: TorchRunner = load_tiny(folder)
    assert set(runner.kv_codecs) == set(KvCodec)
