"""The KV of one prompt, or of a prefix, on its way to another worker: read layer group by layer
group, while the next layers are computed, and handed to the transport."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from forebay.core import clock
from forebay.core.executor import Executor
from forebay.core.kv_codec import KvCodec
from forebay.engine.interface import Batch, KvSlice, LayerHook, Runner
from forebay.engine.sequence import Sequence
from forebay.rpc.conversions import codec_to_proto
from forebay.rpc.v1 import kv_transfer_pb2, worker_pb2
from forebay.worker.frames import chained, encode_commit, encode_frame, plan_frames

MAX_FRAMES_AHEAD = 8
"""Encoded frames of one push that may wait for the network. The rest stays in the KV memory, where
it takes no room of its own, and is read when there is a place."""


@dataclass(frozen=True, slots=True)
class Extent:
    """What may be read of a sequence's KV: tokens [0, start) of every layer, and tokens [0, end) of
    the layers that the step under way has gone through."""

    block_table: list[int]
    start: int
    end: int

    def covers(self, part: KvSlice, num_layers: int) -> bool:
        """num_layers: how many the step has gone through."""
        return part.token_end <= (self.end if part.layer_end <= num_layers else self.start)


class FrameReader:
    """Turns one sequence's tokens from start_token on into frames, on the executor's thread.

    Each stretch of tokens that becomes readable is cut into frames for all layers, and frames are
    made in the order of these plans: a layer's tokens come in order and without gaps. Where a
    preempted sequence is computed again, in other steps than before, the plan stays and waits.

    num_needed: how many tokens every layer must hold before the next frame can be read, if not
    sooner. Past the prompt's end when there is no next frame.
    """

    def __init__(
        self,
        runner: Runner,
        target: worker_pb2.TransferTarget,
        codec: KvCodec,
        max_frame_bytes: int,
        protocol_version: int,
    ) -> None:
        self.num_frames = 0
        self.num_bytes = 0
        self.checksum = 0
        self._runner = runner
        self._target = target
        self._codec = codec
        self._max_frame_bytes = max_frame_bytes
        self._protocol_version = protocol_version
        one_token = KvSlice(0, 1, 0, 1, 0, runner.kv_layout.num_kv_heads)
        self._token_bytes = runner.kv_payload_bytes(one_token, codec)
        self._plan: deque[KvSlice] = deque()
        self._planned_end = target.start_token

    @property
    def num_needed(self) -> int:
        return self._plan[0].token_end if self._plan else self._planned_end + 1

    def next_frame(self, extent: Extent, num_layers: int) -> bytes | None:
        """The next frame as a message, or None while what it carries has not been computed."""
        for end in (extent.start, extent.end):
            if end > self._planned_end:
                self._plan.extend(
                    plan_frames(
                        self._runner.kv_layout,
                        self._token_bytes,
                        self._planned_end,
                        end - self._planned_end,
                        self._max_frame_bytes,
                    )
                )
                self._planned_end = end
        if not self._plan or not extent.covers(self._plan[0], num_layers):
            return None
        return self._encode(extent.block_table, self._plan.popleft())

    def _encode(self, block_table: list[int], part: KvSlice) -> bytes:
        header = kv_transfer_pb2.KvFrameHeader(
            lease_id=self._target.lease_id,
            epoch=self._target.epoch,
            frame=self.num_frames,
            layout=self._runner.kv_layout,
            codec=codec_to_proto(self._codec),
            layer_start=part.layer_start,
            num_layers=part.num_layers,
            head_start=part.head_start,
            num_heads=part.num_heads,
            token_start=part.token_start,
            num_tokens=part.num_tokens,
            protocol_version=self._protocol_version,
        )
        num_bytes = self._runner.kv_payload_bytes(part, self._codec)
        message, checksum = encode_frame(
            header,
            num_bytes,
            lambda payload: self._runner.export_kv(block_table, part, self._codec, payload),
        )
        self.num_frames += 1
        self.num_bytes += num_bytes
        self.checksum = chained(self.checksum, checksum)
        return message


class KvPush:
    """An iterator of the push's messages, for the transport, and the reading that feeds it.

    Two threads meet here. `read`, on the executor's thread, appends frames; the loop takes them:
    append and popleft of a deque are atomic, and every other attribute is written by one side only.

    Why a block table may be read. Steps, reads and the imports of received KV run one after another
    in the order in which the loop hands them to the executor, and a read (by itself, or as the hook
    of a step) takes its extent on the loop at the moment it is handed over. The sequence holds its
    blocks at that moment. Should it lose them before the read runs, because it was preempted,
    aborted or released, then whoever gets them next is put into a step or an import that is handed
    over later, and so writes to them after the read. Nothing has to be pinned for a read, and a
    transfer that ends gives its blocks back at once. Nor does a step write to blocks that another
    sequence's extent covers: shared blocks are full, or copied before they are written to.
    """

    def __init__(
        self,
        reader: FrameReader,
        executor: Executor,
        target: worker_pb2.TransferTarget,
        sequence: Sequence,
    ) -> None:
        self.target = target
        self.sequence = sequence
        self.committed = False
        self._reader = reader
        self._executor = executor
        self._num_tokens = len(sequence.tokens)
        self._frames: deque[bytes] = deque()
        self._num_needed = reader.num_needed
        self._first_tokens: tuple[tuple[int, int], ...] | None = None
        self._closed = False
        self._error: Exception | None = None
        self._waiting_since: float | None = None
        self._more = asyncio.Event()
        self._room = asyncio.Event()

    def __aiter__(self) -> KvPush:
        return self

    async def __anext__(self) -> bytes:
        """The transport has taken a message when it asks for the next one."""
        while not (self.committed or self._closed):
            whole = self._all_read  # asked before the frames: the last may come in between
            if self._frames:
                self._room.set()
                return self._handed_over(self._frames.popleft())
            if whole and self._first_tokens is not None:
                self.committed = True
                return self._handed_over(self._commit(self._first_tokens))
            self._waiting_since = None
            self._more.clear()
            await self._more.wait()
        raise StopAsyncIteration

    def extent(self, step_end: int = 0) -> Extent | None:
        """For a read that is handed to the executor now; None without anything to read.
        `step_end`: where the chunk ends that the step computes, when the read is its hook."""
        sequence = self.sequence
        start = sequence.num_computed_tokens
        end = max(start, step_end)
        if self._closed or end < self._num_needed or not sequence.block_table:
            return None
        return Extent(list(sequence.block_table), start, end)

    def read(self, extent: Extent, num_layers: int) -> None:
        """On the executor's thread: makes the frames that can be made and have a place.
        `num_layers`: how many the step under way has gone through."""
        while not self._closed and len(self._frames) < MAX_FRAMES_AHEAD:
            frame = self._reader.next_frame(extent, num_layers)
            if frame is None:
                return
            self._frames.append(frame)
            self._num_needed = self._reader.num_needed
            self._executor.post(self._stir)

    def read_in_step(self, extent: Extent, num_layers: int) -> None:
        """`read` for a step's hook: an error ends this push and not the step."""
        if self._error is not None:
            return
        try:
            self.read(extent, num_layers)
        except Exception as error:
            self._error = error
            self._executor.post(self._stir)

    async def read_between_steps(self) -> None:
        """Reads what no step's hook reads: what had no place then, and the end. Returns when
        everything has been read. Raises what a read has raised."""
        while not self._all_read:
            self._room.clear()
            if self._error is not None:
                raise self._error
            extent = self.extent()
            if extent is not None and len(self._frames) < MAX_FRAMES_AHEAD:
                await self._executor.run(self.read, extent, 0)
            else:
                await self._room.wait()

    def complete(self, first_tokens: tuple[tuple[int, int], ...]) -> None:
        """All KV is there: what is left may be read, and the commit follows it. A prefix has no
        first tokens."""
        self._first_tokens = first_tokens
        self._stir()

    def close(self) -> None:
        """Nothing more is read or sent."""
        self._closed = True
        self._frames.clear()
        self._stir()

    def waits_for_s(self) -> float:
        """How long something has waited without the receiver taking anything."""
        return 0.0 if self._waiting_since is None else clock.now() - self._waiting_since

    @property
    def _all_read(self) -> bool:
        return self._num_needed > self._num_tokens

    def _handed_over(self, message: bytes) -> bytes:
        self._waiting_since = clock.now()
        return message

    def _stir(self) -> None:
        if self._frames and self._waiting_since is None:
            self._waiting_since = clock.now()
        self._more.set()
        self._room.set()

    def _commit(self, first_tokens: tuple[tuple[int, int], ...]) -> bytes:
        reader = self._reader
        return encode_commit(
            kv_transfer_pb2.KvCommit(
                lease_id=self.target.lease_id,
                epoch=self.target.epoch,
                num_frames=reader.num_frames,
                num_bytes=reader.num_bytes,
                crc32c=chained(reader.checksum, *(n for first in first_tokens for n in first)),
                first_tokens=[
                    kv_transfer_pb2.FirstToken(choice=choice, token_id=token_id)
                    for choice, token_id in first_tokens
                ],
            )
        )


def layer_hook(
    pushes: Collection[KvPush], batch: Batch, sequences: list[Sequence]
) -> LayerHook | None:
    """For the step of `batch`, whose `sequences` these are; on the loop, right before the step is
    handed to the executor. The hook reads for every push, also for those whose prompt is not in the
    batch: between layers is sooner than after the step."""
    if not pushes:
        return None
    ends = {
        sequence: item.start + item.num_tokens
        for sequence, item in zip(sequences, batch.sequences, strict=True)
    }
    reads = []
    for push in pushes:
        extent = push.extent(ends.get(push.sequence, 0))
        if extent is not None:
            reads.append((push, extent))
    if not reads:
        return None

    def on_layer(layer: int) -> None:
        for push, extent in reads:
            push.read_in_step(extent, layer + 1)

    return on_layer
