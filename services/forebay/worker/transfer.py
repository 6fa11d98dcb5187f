"""KV from a prefill worker to a decode worker: the sending and the receiving half.

The receiver writes only under a lease it holds, accepts each layer's tokens in order and without
gaps, and hands the blocks over only after a commit whose counts and checksums agree.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from crc32c import crc32c

from forebay.core.clock import Deadline
from forebay.core.errors import KvTransferError, Unavailable
from forebay.core.executor import Executor
from forebay.engine.engine import Prefilled
from forebay.engine.interface import Runner
from forebay.kv.leases import Lease, LeaseTable
from forebay.rpc.connector import Channel, Connector
from forebay.rpc.methods import KV_PUSH
from forebay.rpc.v1 import kv_transfer_pb2, worker_pb2
from forebay.worker.frames import (
    Frame,
    FrameSlice,
    decode_message,
    encode_commit,
    encode_frame,
    plan_frames,
)


class KvTransport(Protocol):
    """Moves the messages of one push to an address; raises KvTransferError or Unavailable."""

    async def push(
        self, address: str, messages: AsyncIterator[bytes], deadline: Deadline
    ) -> kv_transfer_pb2.PushResponse: ...


class ConnectorKvTransport:
    """Over the connector, which is gRPC in production; keeps one channel per address, until a push
    finds nobody there."""

    def __init__(self, connector: Connector) -> None:
        self._connector = connector
        self._channels: dict[str, Channel] = {}

    async def push(
        self, address: str, messages: AsyncIterator[bytes], deadline: Deadline
    ) -> kv_transfer_pb2.PushResponse:
        if address not in self._channels:
            self._channels[address] = self._connector.connect(address)
        channel = self._channels[address]
        try:
            return await channel.push(KV_PUSH, messages, deadline)
        except Unavailable:
            if self._channels.get(address) is channel:
                del self._channels[address]
                await channel.close()
            raise

    async def close(self) -> None:
        while self._channels:
            _, channel = self._channels.popitem()
            await channel.close()


class KvSender:
    """Reads KV out of the runner's memory and pushes it."""

    def __init__(
        self, runner: Runner, executor: Executor, transport: KvTransport, max_frame_bytes: int
    ) -> None:
        self.num_bytes = 0
        self._runner = runner
        self._executor = executor
        self._transport = transport
        self._max_frame_bytes = max_frame_bytes

    async def push(
        self, prefilled: Prefilled, target: worker_pb2.TransferTarget, deadline: Deadline
    ) -> None:
        """Returns when the target has committed. Raises KvTransferError, Unavailable or
        DeadlineExceeded; the source blocks must stay held until then."""
        messages = self._messages(prefilled, target)
        response = await self._transport.push(target.address, messages, deadline)
        self.num_bytes += response.num_bytes

    async def _messages(
        self, prefilled: Prefilled, target: worker_pb2.TransferTarget
    ) -> AsyncIterator[bytes]:
        sequence = prefilled.sequence
        layout = self._runner.kv_layout
        num_tokens = sequence.num_prompt_tokens - target.start_token
        slices = plan_frames(layout, target.start_token, num_tokens, self._max_frame_bytes)
        checksum_of_all = num_bytes = 0
        for number, part in enumerate(slices):
            payload, checksum = await self._executor.run(self._read, sequence.block_table, part)
            checksum_of_all = _chain(checksum_of_all, checksum)
            num_bytes += len(payload)
            header = kv_transfer_pb2.KvFrameHeader(
                lease_id=target.lease_id,
                epoch=target.epoch,
                frame=number,
                layout=layout,
                codec=kv_transfer_pb2.KV_CODEC_RAW,
                num_heads=layout.num_kv_heads,
                layer_start=part.layer_start,
                num_layers=part.num_layers,
                token_start=part.token_start,
                num_tokens=part.num_tokens,
                crc32c=checksum,
            )
            yield encode_frame(header, payload)
        first_tokens = list(prefilled.first_tokens)
        yield encode_commit(
            kv_transfer_pb2.KvCommit(
                lease_id=target.lease_id,
                epoch=target.epoch,
                num_frames=len(slices),
                num_bytes=num_bytes,
                crc32c=_chain_tokens(checksum_of_all, first_tokens),
                first_tokens=[
                    kv_transfer_pb2.FirstToken(choice=choice, token_id=token_id)
                    for choice, token_id in first_tokens
                ],
            )
        )

    def _read(self, block_table: list[int], part: FrameSlice) -> tuple[bytes, int]:
        payload = self._runner.export_kv(
            block_table, part.token_start, part.num_tokens, part.layer_start, part.num_layers
        )
        return payload, crc32c(payload)


def _chain(checksum: int, next_checksum: int) -> int:
    """CRC-32C over the checksums of all frames so far, each as four little-endian bytes."""
    return crc32c(next_checksum.to_bytes(4, "little"), checksum)


def _chain_tokens(checksum: int, first_tokens: list[tuple[int, int]]) -> int:
    """Goes on over each first token's choice and id."""
    for choice, token_id in first_tokens:
        checksum = _chain(_chain(checksum, choice), token_id)
    return checksum


@dataclass(slots=True)
class _Progress:
    """What has arrived for one lease. next_token: per layer, the first token still missing."""

    lease: Lease
    next_token: list[int]
    checksum: int = 0
    num_frames: int = 0
    num_bytes: int = 0


class KvReceiver:
    """Writes pushed KV into leased blocks. `on_commit(lease, first_tokens)` is called once per
    whole transfer and takes the lease over."""

    def __init__(
        self,
        runner: Runner,
        executor: Executor,
        leases: LeaseTable,
        on_commit: Callable[[Lease, list[tuple[int, int]]], None],
    ) -> None:
        self.num_bytes = 0
        self.num_failures = 0
        self._runner = runner
        self._executor = executor
        self._leases = leases
        self._on_commit = on_commit

    async def push(self, messages: AsyncIterator[bytes]) -> kv_transfer_pb2.PushResponse:
        """Handles one Push call. Raises KvTransferError at the first message that does not fit;
        the lease then stays as it is, until it is released or expires."""
        try:
            return await self._receive(messages)
        except KvTransferError:
            self.num_failures += 1
            raise

    async def _receive(self, messages: AsyncIterator[bytes]) -> kv_transfer_pb2.PushResponse:
        progress: _Progress | None = None
        async for data in messages:
            message = decode_message(data)
            if isinstance(message, Frame):
                header = message.header
                lease = self._leases.get(header.lease_id, header.epoch)
                if progress is None:
                    progress = self._begin(lease)
                await self._write(progress, lease, message)
                continue
            lease = self._leases.get(message.lease_id, message.epoch)
            progress = progress or self._begin(lease)
            first_tokens = [(first.choice, first.token_id) for first in message.first_tokens]
            self._check_commit(progress, lease, message, first_tokens)
            self._on_commit(lease, first_tokens)
            return kv_transfer_pb2.PushResponse(num_bytes=progress.num_bytes)
        raise KvTransferError("KV transfer ended without a commit")

    def _begin(self, lease: Lease) -> _Progress:
        start = [lease.num_cached_tokens] * self._runner.kv_layout.num_layers
        return _Progress(lease, start)

    async def _write(self, progress: _Progress, lease: Lease, frame: Frame) -> None:
        header = frame.header
        self._check_frame(progress, lease, header)
        self._leases.begin_write(lease)
        try:
            await self._executor.run(self._import, lease.block_table, frame)
        finally:
            self._leases.end_write(lease)
        for layer in range(header.layer_start, header.layer_start + header.num_layers):
            progress.next_token[layer] += header.num_tokens
        progress.checksum = _chain(progress.checksum, header.crc32c)
        progress.num_frames += 1
        progress.num_bytes += len(frame.payload)
        self.num_bytes += len(frame.payload)

    def _check_frame(
        self, progress: _Progress, lease: Lease, header: kv_transfer_pb2.KvFrameHeader
    ) -> None:
        layout = self._runner.kv_layout
        layers = range(header.layer_start, header.layer_start + header.num_layers)
        if lease is not progress.lease:
            raise KvTransferError("frames of two leases in one push")
        if header.layout != layout:
            raise KvTransferError("the sender's KV layout is not this worker's")
        if header.codec != kv_transfer_pb2.KV_CODEC_RAW:
            raise KvTransferError(f"unknown KV codec {header.codec}")
        if header.source_rank != 0:
            raise KvTransferError(f"a frame of rank {header.source_rank}; there is only rank 0")
        if header.head_start != 0 or header.num_heads != layout.num_kv_heads:
            raise KvTransferError("the frame does not carry all heads")
        if header.frame != progress.num_frames:
            raise KvTransferError(f"frame {header.frame} where {progress.num_frames} belongs")
        if not layers or layers[-1] >= layout.num_layers:
            raise KvTransferError(f"the frame's layers {layers} are not the model's")
        if header.num_tokens == 0:
            raise KvTransferError("the frame carries no tokens")
        if any(progress.next_token[layer] != header.token_start for layer in layers):
            raise KvTransferError(f"the frame starts at token {header.token_start}, out of order")
        if header.token_start + header.num_tokens > lease.num_tokens:
            raise KvTransferError("the frame reaches past the leased prompt")

    def _check_commit(
        self,
        progress: _Progress,
        lease: Lease,
        commit: kv_transfer_pb2.KvCommit,
        first_tokens: list[tuple[int, int]],
    ) -> None:
        if lease is not progress.lease:
            raise KvTransferError("a commit for another lease than the frames")
        if lease.num_writes:
            raise KvTransferError("a commit while another push writes to the lease")
        if any(token != lease.num_tokens for token in progress.next_token):
            raise KvTransferError("commit before all of the KV has arrived")
        checksum = _chain_tokens(progress.checksum, first_tokens)
        counted = (progress.num_frames, progress.num_bytes, checksum)
        if counted != (commit.num_frames, commit.num_bytes, commit.crc32c):
            raise KvTransferError("the commit's counts or checksum differ from what arrived")
        if not first_tokens:
            raise KvTransferError("a commit without first tokens")

    def _import(self, block_table: list[int], frame: Frame) -> None:
        header = frame.header
        if crc32c(frame.payload) != header.crc32c:
            raise KvTransferError(f"KV frame {header.frame} is corrupt: checksum differs")
        self._runner.import_kv(
            block_table,
            header.token_start,
            header.num_tokens,
            header.layer_start,
            header.num_layers,
            frame.payload,
        )
