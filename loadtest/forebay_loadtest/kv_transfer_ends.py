"""Both ends of the KV transfers that `forebay_loadtest.kv_transfer` times: a worker's sender and
receiver, transport and KV memory, without a model around them.

    python -m forebay_loadtest.kv_transfer_ends DTYPE NUM_TOKENS NUM_THREADS

is the receiving process: it answers lines on its standard input, each with a line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any, cast

import torch
from crc32c import crc32c

from forebay.core.executor import Executor
from forebay.core.kv_codec import KvCodec
from forebay.core.sampling import SamplingParams
from forebay.engine.interface import KvSlice, Runner
from forebay.engine.kv_memory import KvMemory
from forebay.engine.sequence import RequestKey, Sequence, SequenceStart
from forebay.kv.block_pool import BlockPool, Holder
from forebay.kv.leases import Lease, LeaseTable
from forebay.rpc.connector import Method, Routes
from forebay.rpc.grpc_listener import GrpcListener
from forebay.rpc.methods import KV_PUSH, PROTOCOL_VERSION
from forebay.rpc.v1 import kv_transfer_pb2, worker_pb2
from forebay.worker.malloc import keep_freed_memory
from forebay.worker.thread_executor import ThreadExecutor
from forebay.worker.transfer import KvReceiver

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 30, 3, 64
"""Of SmolLM2-135M."""
BLOCK_SIZE = 16
DTYPES = {
    "fp32": (torch.float32, worker_pb2.KV_DTYPE_FP32),
    "bf16": (torch.bfloat16, worker_pb2.KV_DTYPE_BF16),
    "fp16": (torch.float16, worker_pb2.KV_DTYPE_FP16),
}


def _identity(data: bytes) -> bytes:
    return data


SINK: Method[bytes, kv_transfer_pb2.PushResponse] = Method(
    service="forebay.loadtest.Sink",
    name="Push",
    encode_request=_identity,
    decode_request=_identity,
    encode_response=kv_transfer_pb2.PushResponse.SerializeToString,
    decode_response=kv_transfer_pb2.PushResponse.FromString,
)
"""As KV_PUSH, and nobody looks at what comes."""


class KvHolder:
    """The half of a `Runner` that moves KV: random numbers of a prompt, in shuffled blocks."""

    def __init__(self, dtype: str, num_tokens: int, seed: int) -> None:
        torch_dtype, kv_dtype = DTYPES[dtype]
        generator = torch.Generator().manual_seed(seed)
        self.num_blocks = -(-num_tokens // BLOCK_SIZE)
        self._memory = KvMemory(
            num_layers=NUM_LAYERS,
            num_blocks=self.num_blocks,
            block_size=BLOCK_SIZE,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=torch_dtype,
            device=torch.device("cpu"),
        )
        cache = self._memory.cache
        cache.copy_(torch.randn(cache.shape, generator=generator))
        self.block_table = torch.randperm(self.num_blocks, generator=generator).tolist()
        self.whole = KvSlice(0, NUM_LAYERS, 0, num_tokens, 0, NUM_KV_HEADS)
        self.kv_layout = worker_pb2.KvLayout(
            version=1,
            num_layers=NUM_LAYERS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=kv_dtype,
            block_size=BLOCK_SIZE,
            bytes_per_token_layer=2 * NUM_KV_HEADS * HEAD_DIM * torch_dtype.itemsize,
        )
        self.kv_codecs = tuple(KvCodec)
        self.kv_payload_bytes = self._memory.payload_bytes
        self.export_kv = self._memory.pack
        self.import_kv = self._memory.unpack

    @property
    def as_runner(self) -> Runner:
        return cast(Runner, self)

    def content(self, block_table: list[int], *, through: KvCodec = KvCodec.RAW) -> int:
        """CRC-32C of the prompt's numbers: as they are, or as they are once they have gone through
        a codec, which they then have."""
        if through is not KvCodec.RAW:
            payload = memoryview(bytearray(self.kv_payload_bytes(self.whole, through)))
            checksum = self.export_kv(block_table, self.whole, through, payload)
            self.import_kv(block_table, self.whole, through, payload, checksum)
        raw = memoryview(bytearray(self.kv_payload_bytes(self.whole, KvCodec.RAW)))
        self.export_kv(block_table, self.whole, KvCodec.RAW, raw)
        return crc32c(raw)

    def sequence(self) -> Sequence:
        """The prompt, computed."""
        num_tokens = self.whole.num_tokens
        start = SequenceStart(
            key=RequestKey("loadtest", "prompt"),
            attempt=1,
            tokens=(0,) * num_tokens,
            num_prompt_tokens=num_tokens,
            params=SamplingParams(),
            choices=(0,),
            cache_root=b"",
        )
        sequence = Sequence.begin(start, BLOCK_SIZE)
        sequence.block_table = self.block_table
        sequence.num_computed_tokens = num_tokens
        return sequence


class ReceivingEnd:
    """Answers `lease`: a new lease in place of the last one, and this process's CPU time so far;
    `content`: the CRC-32C of what lies in its blocks."""

    def __init__(self, dtype: str, num_tokens: int, executor: Executor) -> None:
        self._holder = KvHolder(dtype, num_tokens, seed=2)
        self._num_tokens = num_tokens
        self._pool = BlockPool(self._holder.num_blocks, BLOCK_SIZE)
        self._leases = LeaseTable(self._pool, "epoch")
        self._lease: Lease | None = None
        self._num_leases = 0
        self._receiver = KvReceiver(
            self._holder.as_runner,
            executor,
            self._leases,
            self._commit,
            lambda *_: None,
            PROTOCOL_VERSION,
        )
        routes = Routes(push=[(KV_PUSH, self._receiver.push), (SINK, self._swallow)])
        self._listener = GrpcListener(routes, "127.0.0.1", 0)

    async def serve(self) -> None:
        await self._listener.start()
        self._say(port=self._listener.port)
        while line := await asyncio.to_thread(sys.stdin.readline):
            match line.strip():
                case "lease":
                    self._say(**self._grant())
                case "cpu":
                    self._say(cpu_s=time.process_time())
                case "content":
                    assert self._lease is not None
                    self._say(content=self._holder.content(self._lease.block_table))
        await self._listener.stop(0)

    def _grant(self) -> dict[str, Any]:
        if self._lease is not None and not self._lease.ended:
            self._leases.release(self._lease)
        self._num_leases += 1
        self._lease = self._leases.grant(f"lease-{self._num_leases}", self, [], self._num_tokens)
        return {"lease_id": self._lease.lease_id, "epoch": self._leases.epoch}

    def _commit(self, lease: Lease, _: list[tuple[int, int]]) -> None:
        self._pool.release(self._leases.take(lease), Holder.SEQUENCE)

    async def _swallow(self, messages: AsyncIterator[bytes]) -> kv_transfer_pb2.PushResponse:
        num_bytes = 0
        async for message in messages:
            num_bytes += len(message)
        return kv_transfer_pb2.PushResponse(num_bytes=num_bytes)

    def _say(self, **values: object) -> None:
        print(json.dumps(values), flush=True)


async def _serve(dtype: str, num_tokens: int) -> None:
    executor = ThreadExecutor()
    await ReceivingEnd(dtype, num_tokens, executor).serve()
    executor.close()


if __name__ == "__main__":
    keep_freed_memory()
    torch.set_num_threads(int(sys.argv[3]))
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2])))
