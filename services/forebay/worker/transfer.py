"""KV from one worker to another: the sending and the receiving half.

The receiver writes only under a lease it holds, accepts each layer's tokens in order and without
gaps, and hands the blocks over only after a commit whose counts and checksums agree. What came
already is skipped; everything else that does not fit ends the push and leaves the lease as it is.

A prompt comes whole, with its first tokens; a prefix comes without them, and may be shorter than
what was asked for: the sender had no more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from forebay.core.clock import Deadline
from forebay.core.errors import ConfigurationError, KvTransferError, Unavailable
from forebay.core.executor import Executor
from forebay.core.kv_codec import KvCodec
from forebay.engine.interface import KvSlice, Runner
from forebay.engine.sequence import Sequence
from forebay.kv.leases import Lease, LeaseTable
from forebay.rpc import conversions
from forebay.rpc.connector import Channel, Connector
from forebay.rpc.methods import KV_PUSH, SEND_PREFIX
from forebay.rpc.v1 import kv_transfer_pb2, worker_pb2
from forebay.worker.frames import Frame, chained, decode_message
from forebay.worker.kv_push import FrameReader, KvPush


class KvTransport(Protocol):
    """Moves the messages of one push to an address; raises KvTransferError or Unavailable."""

    async def push(
        self, address: str, messages: AsyncIterator[bytes], deadline: Deadline
    ) -> kv_transfer_pb2.PushResponse: ...


@dataclass(slots=True, eq=False)
class _Line:
    """A channel and the calls on it."""

    channel: Channel
    num_calls: int = 0
    lost: bool = False


class ConnectorKvTransport:
    """Over the connector, which is gRPC in production; keeps one channel per address, until a call
    finds nobody there: the next one connects anew, and the channel closes after its last call."""

    def __init__(self, connector: Connector) -> None:
        self._connector = connector
        self._lines: dict[str, _Line] = {}

    async def push(
        self, address: str, messages: AsyncIterator[bytes], deadline: Deadline
    ) -> kv_transfer_pb2.PushResponse:
        async with self._channel(address) as channel:
            return await channel.push(KV_PUSH, messages, deadline)

    async def send_prefix(
        self, address: str, message: worker_pb2.SendPrefixRequest, deadline: Deadline
    ) -> worker_pb2.SendPrefixResponse:
        """Raises what the worker there raises, Unavailable, or DeadlineExceeded."""
        async with self._channel(address) as channel:
            return await channel.unary(SEND_PREFIX, message, deadline)

    async def close(self) -> None:
        """After the last call."""
        while self._lines:
            _, line = self._lines.popitem()
            await line.channel.close()

    @asynccontextmanager
    async def _channel(self, address: str) -> AsyncIterator[Channel]:
        if address not in self._lines:
            self._lines[address] = _Line(self._connector.connect(address))
        line = self._lines[address]
        line.num_calls += 1
        try:
            yield line.channel
        except Unavailable:
            line.lost = True
            if self._lines.get(address) is line:
                del self._lines[address]
            raise
        finally:
            line.num_calls -= 1
            if line.lost and line.num_calls == 0:
                await line.channel.close()


class KvSender:
    """Pushes KV out of the runner's memory, written down with `codec` where the target takes that,
    else raw. `num_bytes`: of pushes that were committed."""

    def __init__(
        self,
        runner: Runner,
        executor: Executor,
        transport: KvTransport,
        codec: KvCodec,
        max_frame_bytes: int,
        protocol_version: int,
    ) -> None:
        """Raises ConfigurationError for a codec that the runner's KV does not have."""
        if codec not in runner.kv_codecs:
            raise ConfigurationError(
                f"kv_codec: the {runner.model.engine} engine's KV has no {codec.value}"
            )
        self.num_bytes = 0
        self._runner = runner
        self._executor = executor
        self._transport = transport
        self._codec = codec
        self._max_frame_bytes = max_frame_bytes
        self._protocol_version = protocol_version

    def open(self, sequence: Sequence, target: worker_pb2.TransferTarget) -> KvPush:
        """A push of all of `sequence`'s tokens from target.start_token on, not begun yet."""
        takes_it = conversions.codec_to_proto(self._codec) in target.kv_codecs
        reader = FrameReader(
            self._runner,
            target,
            self._codec if takes_it else KvCodec.RAW,
            self._max_frame_bytes,
            self._protocol_version,
        )
        return KvPush(reader, self._executor, target, sequence)

    async def send(self, push: KvPush, deadline: Deadline) -> None:
        """Connects at once; returns when the target has committed. Raises KvTransferError,
        Unavailable, DeadlineExceeded, or what reading the KV has raised."""
        reading = asyncio.create_task(push.read_between_steps())
        sending = asyncio.create_task(self._transport.push(push.target.address, push, deadline))
        try:
            await asyncio.wait((reading, sending), return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                await reading
            response = await sending
        finally:
            reading.cancel()
            sending.cancel()
            await asyncio.gather(reading, sending, return_exceptions=True)
        if not push.committed:
            raise KvTransferError("the receiver ended the push before its commit")
        self.num_bytes += response.num_bytes


@dataclass(slots=True)
class _Progress:
    """What has arrived for one lease. next_token: per layer and head, the first token still
    missing."""

    lease: Lease
    next_token: npt.NDArray[np.int64]
    checksum: int = 0
    num_frames: int = 0
    num_bytes: int = 0


class KvReceiver:
    """Writes pushed KV into leased blocks. `on_commit(lease, first_tokens)` is called once per
    whole prompt, `on_prefix(lease, num_tokens)` once per prefix, of which so many leading tokens
    are here; they take the lease over, or raise KvTransferError, and then have not.

    num_failures: pushes refused for something that came in them; one that merely ends too early is
    its sender's to count. num_duplicates: frames that had come before."""

    def __init__(
        self,
        runner: Runner,
        executor: Executor,
        leases: LeaseTable,
        on_commit: Callable[[Lease, list[tuple[int, int]]], None],
        on_prefix: Callable[[Lease, int], None],
        protocol_version: int,
    ) -> None:
        self.num_bytes = 0
        self.num_failures = 0
        self.num_duplicates = 0
        self._runner = runner
        self._executor = executor
        self._leases = leases
        self._on_commit = on_commit
        self._on_prefix = on_prefix
        self._protocol_version = protocol_version
        self._under_way: set[str] = set()

    async def push(self, messages: AsyncIterator[bytes]) -> kv_transfer_pb2.PushResponse:
        """Handles one Push call. Raises KvTransferError at the first message that does not fit, or
        when the messages end without a commit; the lease then stays as it is, until it is released
        or a push that is whole takes it."""
        progress: _Progress | None = None
        try:
            async for data in messages:
                message = decode_message(data)
                addressed = message.header if isinstance(message, Frame) else message
                lease = self._leases.get(addressed.lease_id, addressed.epoch)
                progress = progress or self._begin(lease)
                if lease is not progress.lease:
                    raise KvTransferError("messages for two leases in one push")
                if isinstance(message, Frame):
                    await self._take_frame(progress, message)
                else:
                    self._take_commit(progress, message)
                    return kv_transfer_pb2.PushResponse(num_bytes=progress.num_bytes)
        except KvTransferError:
            self.num_failures += 1
            raise
        finally:
            if progress is not None:
                self._under_way.remove(progress.lease.lease_id)
        raise KvTransferError("KV transfer ended without a commit")

    def _begin(self, lease: Lease) -> _Progress:
        if lease.lease_id in self._under_way:
            raise KvTransferError("another push for this lease is under way")
        self._under_way.add(lease.lease_id)
        layout = self._runner.kv_layout
        shape = (layout.num_layers, layout.num_kv_heads)
        return _Progress(lease, np.full(shape, lease.num_cached_tokens, np.int64))

    async def _take_frame(self, progress: _Progress, frame: Frame) -> None:
        header = frame.header
        if header.protocol_version != self._protocol_version:
            raise KvTransferError(
                f"the sender speaks protocol version {header.protocol_version}, "
                f"not {self._protocol_version}"
            )
        if header.frame < progress.num_frames:
            self.num_duplicates += 1
            return
        part, codec = frame.part, _codec_of(header)
        self._check_frame(progress, header, part)
        lease = progress.lease
        self._leases.begin_write(lease)
        try:
            await self._executor.run(
                self._runner.import_kv,
                lease.block_table,
                part,
                codec,
                frame.payload,
                header.crc32c,
            )
        finally:
            self._leases.end_write(lease)
        _covered(progress.next_token, part)[...] = part.token_end
        progress.checksum = chained(progress.checksum, header.crc32c)
        progress.num_frames += 1
        progress.num_bytes += len(frame.payload)
        self.num_bytes += len(frame.payload)

    def _check_frame(
        self, progress: _Progress, header: kv_transfer_pb2.KvFrameHeader, part: KvSlice
    ) -> None:
        layout = self._runner.kv_layout
        if not _same_but_for_blocks(header.layout, layout):
            raise KvTransferError("the sender's KV layout is not this worker's")
        if header.source_rank != 0:
            raise KvTransferError(f"a frame of rank {header.source_rank}; there is only rank 0")
        if header.frame != progress.num_frames:
            raise KvTransferError(f"frame {header.frame} where {progress.num_frames} belongs")
        if part.num_layers == 0 or part.layer_end > layout.num_layers:
            raise KvTransferError(
                f"layers {part.layer_start} to {part.layer_end} of {layout.num_layers}"
            )
        if part.num_heads == 0 or part.head_end > layout.num_kv_heads:
            raise KvTransferError(
                f"KV heads {part.head_start} to {part.head_end} of {layout.num_kv_heads}"
            )
        if part.num_tokens == 0:
            raise KvTransferError("the frame carries no tokens")
        if (_covered(progress.next_token, part) != part.token_start).any():
            raise KvTransferError(f"the frame starts at token {part.token_start}, out of order")
        if part.token_end > progress.lease.num_tokens:
            raise KvTransferError("the frame reaches past the leased prompt")

    def _take_commit(self, progress: _Progress, commit: kv_transfer_pb2.KvCommit) -> None:
        """Once per lease: it ends with it, and a later commit finds none."""
        lease = progress.lease
        first_tokens = [(first.choice, first.token_id) for first in commit.first_tokens]
        num_tokens = int(progress.next_token[0, 0]) if lease.is_prefix else lease.num_tokens
        if (progress.next_token != num_tokens).any():
            raise KvTransferError("commit before all of the KV has arrived")
        checksum = chained(progress.checksum, *(n for first in first_tokens for n in first))
        counted = (progress.num_frames, progress.num_bytes, checksum)
        if counted != (commit.num_frames, commit.num_bytes, commit.crc32c):
            raise KvTransferError("the commit's counts or checksum differ from what arrived")
        if lease.is_prefix == bool(first_tokens):
            raise KvTransferError("a prompt comes with first tokens, a prefix without")
        if lease.is_prefix:
            self._on_prefix(lease, num_tokens)
        else:
            self._on_commit(lease, first_tokens)


def _codec_of(header: kv_transfer_pb2.KvFrameHeader) -> KvCodec:
    try:
        return conversions.codec_from_proto(header.codec)
    except KeyError:
        raise KvTransferError(f"unknown KV codec {header.codec}") from None


def _same_but_for_blocks(one: worker_pb2.KvLayout, other: worker_pb2.KvLayout) -> bool:
    """Payloads are cut by tokens, not by blocks."""
    copy = worker_pb2.KvLayout()
    copy.CopyFrom(one)
    copy.block_size = other.block_size
    return copy == other


def _covered(next_token: npt.NDArray[np.int64], part: KvSlice) -> npt.NDArray[np.int64]:
    return next_token[part.layer_start : part.layer_end, part.head_start : part.head_end]
