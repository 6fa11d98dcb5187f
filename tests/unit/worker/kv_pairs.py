"""A KV sender and a receiver over a transport in memory that does what a test tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from crc32c import crc32c

from forebay.core.clock import Deadline
from forebay.core.executor import Executor, InlineExecutor
from forebay.core.kv_codec import KvCodec
from forebay.core.sampling import SamplingParams
from forebay.engine.engine import Engine, Prefilled
from forebay.engine.interface import KvSlice, Runner
from forebay.engine.profile import StepProfile
from forebay.engine.sequence import RequestKey, SequenceStart
from forebay.engine.sim import SimRunner
from forebay.kv.block_hash import cache_root
from forebay.kv.leases import Lease, LeaseTable
from forebay.rpc.v1 import kv_transfer_pb2, worker_pb2
from forebay.worker.transfer import KvReceiver, KvSender

ROOT = cache_root(b"salt", "sim")
KEY = RequestKey("gateway", "request")
VERSION = 2
Messages = list[bytes]


def start_of(tokens: list[int], params: SamplingParams, key: RequestKey = KEY) -> SequenceStart:
    return SequenceStart(
        key=key,
        attempt=1,
        tokens=tuple(tokens),
        num_prompt_tokens=len(tokens),
        params=params,
        choices=tuple(range(params.n)),
        cache_root=ROOT,
    )


def sim_engine(num_blocks: int = 32, block_size: int = 4, max_batch_tokens: int = 64) -> Engine:
    runner = SimRunner(
        model_id="sim",
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_len=512,
        profile=StepProfile(((1, 1e-9),), 0.0, 0.0, 0.0),
        time_scale=0.0,
        mean_output_tokens=64,
    )
    return Engine(runner, max_batch_tokens=max_batch_tokens, max_num_seqs=8)


def kv_part(
    runner: Runner,
    token_start: int,
    num_tokens: int,
    layer_start: int = 0,
    num_layers: int | None = None,
) -> KvSlice:
    """Of all heads, and by default of all layers."""
    layout = runner.kv_layout
    return KvSlice(
        layer_start=layer_start,
        num_layers=layout.num_layers if num_layers is None else num_layers,
        token_start=token_start,
        num_tokens=num_tokens,
        head_start=0,
        num_heads=layout.num_kv_heads,
    )


def read_kv(runner: Runner, table: list[int], part: KvSlice, codec: KvCodec = KvCodec.RAW) -> bytes:
    payload = bytearray(runner.kv_payload_bytes(part, codec))
    assert runner.export_kv(table, part, codec, memoryview(payload)) == crc32c(payload)
    return bytes(payload)


def write_kv(
    runner: Runner,
    table: list[int],
    part: KvSlice,
    payload: bytes,
    codec: KvCodec = KvCodec.RAW,
) -> None:
    runner.import_kv(table, part, codec, memoryview(payload), crc32c(payload))


async def as_iterator(messages: Messages) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


class KvPair:
    """A prompt computed in `source`, and blocks leased for it in `target`.

    `alter`, if set, may change the list of all messages before any is received; `before_message` is
    called with each one's number."""

    def __init__(
        self,
        *,
        num_prompt_tokens: int = 13,
        max_frame_bytes: int = 64,
        n: int = 1,
        executor: Executor | None = None,
    ) -> None:
        self.prompt = list(range(num_prompt_tokens))
        self.params = SamplingParams(n=n, seed=3, max_tokens=20)
        self.source, self.target = sim_engine(), sim_engine()
        self.leases = LeaseTable(self.target.pool, "epoch")
        self.commits: list[tuple[Lease, list[tuple[int, int]]]] = []
        self.prefixes: list[tuple[Lease, int]] = []
        self.alter: Callable[[Messages], Messages] | None = None
        self.before_message: Callable[[int], None] = lambda number: None
        self.sender = KvSender(
            self.source.runner, InlineExecutor(), self, KvCodec.RAW, max_frame_bytes, VERSION
        )
        self.receiver = KvReceiver(
            self.target.runner,
            executor or InlineExecutor(),
            self.leases,
            self._commit,
            lambda lease, num_tokens: self.prefixes.append((lease, num_tokens)),
            VERSION,
        )
        self.prefilled = self._prefill()
        self.lease = self.leases.grant("lease", KEY, [], num_prompt_tokens)

    async def push(
        self, address: str, messages: AsyncIterator[bytes], deadline: Deadline
    ) -> kv_transfer_pb2.PushResponse:
        """Implements `KvTransport`."""
        if self.alter is not None:
            messages = as_iterator(self.alter([message async for message in messages]))

        async def arriving() -> AsyncIterator[bytes]:
            number = 0
            async for message in messages:
                self.before_message(number)
                yield message
                number += 1

        return await self.receiver.push(arriving())

    async def transfer(self, **target: object) -> None:
        where = worker_pb2.TransferTarget(lease_id="lease", epoch="epoch")
        for name, value in target.items():
            setattr(where, name, value)
        push = self.sender.open(self.prefilled.sequence, where)
        push.complete(self.prefilled.first_tokens)
        await self.sender.send(push, Deadline.after(10))

    async def messages(self) -> Messages:
        """What a transfer sends, received by nobody."""
        where = worker_pb2.TransferTarget(lease_id="lease", epoch="epoch")
        push = self.sender.open(self.prefilled.sequence, where)
        push.complete(self.prefilled.first_tokens)
        reading = asyncio.create_task(push.read_between_steps())
        messages = [message async for message in push]
        await reading
        return messages

    def kv_of(self, engine: Engine, table: list[int]) -> bytes:
        return read_kv(engine.runner, table, kv_part(engine.runner, 0, len(self.prompt)))

    def arrived_whole(self) -> bool:
        table = self.prefilled.sequence.block_table
        return self.kv_of(self.target, self.lease.block_table) == self.kv_of(self.source, table)

    def _prefill(self) -> Prefilled:
        self.source.submit(start_of(self.prompt, self.params), prefill_only=True)
        batch = self.source.begin_step()
        assert batch is not None
        outcome = self.source.end_step(batch, self.source.runner.run(batch))
        return outcome.prefilled[0]

    def _commit(self, lease: Lease, first_tokens: list[tuple[int, int]]) -> None:
        self.leases.take(lease)
        self.commits.append((lease, first_tokens))
