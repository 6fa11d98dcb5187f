"""What must hold in a worker at any moment, checked from outside while its own code runs."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from forebay.core.kv_codec import KvCodec
from forebay.engine.interface import Batch, KvSlice, LayerHook, Runner, StepResult
from forebay.engine.sequence import RequestKey
from forebay.kv.block_pool import Holder
from forebay.kv.leases import Lease
from forebay.rpc.v1 import worker_pb2
from forebay.simulator.loop import Node
from forebay.worker.worker import Worker

LATE_SWEEP_S = 1.0
"""How long after its lease a request may still be there, on its worker's own clock."""


class Violation(AssertionError):
    """A broken invariant."""


class WatchedRunner:
    """Implements `Runner` over another one, and holds every access to KV memory against the block
    pool: I3 (no write lands in a block that is not held for it) and I5 (no block is read that was
    written under another root)."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._worker: Worker | None = None
        self._root_of_block: dict[int, bytes] = {}
        self._root_of_request: dict[RequestKey, bytes] = {}

    def watch(self, worker: Worker) -> None:
        self._worker = worker

    @property
    def model(self) -> worker_pb2.ModelInfo:
        return self._runner.model

    @property
    def kv_layout(self) -> worker_pb2.KvLayout:
        return self._runner.kv_layout

    @property
    def kv_codecs(self) -> tuple[KvCodec, ...]:
        return self._runner.kv_codecs

    @property
    def num_blocks(self) -> int:
        return self._runner.num_blocks

    @property
    def tokenizer_spec(self) -> bytes:
        return self._runner.tokenizer_spec

    def run(self, batch: Batch, on_layer: LayerHook | None = None) -> StepResult:
        self._check_batch(batch)
        return self._runner.run(batch, on_layer)

    def kv_payload_bytes(self, part: KvSlice, codec: KvCodec) -> int:
        return self._runner.kv_payload_bytes(part, codec)

    def export_kv(
        self, block_table: Seq[int], part: KvSlice, codec: KvCodec, payload: memoryview
    ) -> int:
        held = self._pool_refs(Holder.SEQUENCE)
        for block in self._blocks(block_table, part):
            if not held[block]:
                raise Violation(f"I3: KV is read from block {block}, which no sequence holds")
        return self._runner.export_kv(block_table, part, codec, payload)

    def import_kv(
        self,
        block_table: Seq[int],
        part: KvSlice,
        codec: KvCodec,
        payload: memoryview,
        checksum: int,
    ) -> None:
        worker = self._known_worker
        blocks = self._blocks(block_table, part)
        lease = self._lease_of(block_table)
        if lease is None:
            raise Violation(f"I3: a write lands in blocks {list(blocks)}, which no lease holds")
        leased, quarantined = self._pool_refs(Holder.LEASE), self._pool_refs(Holder.QUARANTINE)
        for block in blocks:
            if not (quarantined if lease.ended else leased)[block]:
                raise Violation(f"I3: a write lands in block {block}, which is not held for it")
            if worker.engine.pool.num_holds(block) > 1:
                raise Violation(f"I3: a write lands in block {block}, which others hold too")
        assert isinstance(lease.owner, RequestKey)
        root = self._root(lease.owner)
        for block in blocks:
            self._root_of_block[block] = root
        self._runner.import_kv(block_table, part, codec, payload, checksum)

    @property
    def _known_worker(self) -> Worker:
        assert self._worker is not None
        return self._worker

    def _lease_of(self, block_table: Seq[int]) -> Lease | None:
        leases = self._known_worker.leases
        for held in (leases._leases, leases._quarantined):
            for lease in held.values():
                if lease.block_table is block_table:
                    return lease
        return None

    def _pool_refs(self, holder: Holder) -> list[int]:
        return self._known_worker.engine.pool._refs[holder]

    def _blocks(self, block_table: Seq[int], part: KvSlice) -> Seq[int]:
        size = self._runner.kv_layout.block_size
        return block_table[part.token_start // size : -(-part.token_end // size)]

    def _root(self, key: RequestKey) -> bytes:
        request = self._known_worker._requests.get(key)
        if request is not None:
            self._root_of_request[key] = request.start.cache_root
        return self._root_of_request.get(key, b"")

    def _check_batch(self, batch: Batch) -> None:
        engine = self._known_worker.engine
        held = self._pool_refs(Holder.SEQUENCE)
        size = self._runner.kv_layout.block_size
        for source, target in batch.block_copies:
            self._root_of_block[target] = self._root_of_block[source]
        for item, sequence in zip(batch.sequences, engine.in_step, strict=True):
            root = self._root(sequence.key)
            end = item.start + item.num_tokens
            first_written = item.start // size
            for index in range(-(-end // size)):
                block = item.block_table[index]
                if not held[block]:
                    raise Violation(f"I3: a step uses block {block}, which no sequence holds")
                is_read = index < first_written or (index == first_written and item.start % size)
                if is_read and root and self._root_of_block.get(block) != root:
                    raise Violation(f"I5: a step reads block {block} of another cache root")
                if index >= first_written:
                    if engine.pool.num_holds(block) > 1:
                        raise Violation(f"a step writes block {block}, which others hold too")
                    self._root_of_block[block] = root


class WorkerWatch:
    """`aborted`: newest attempt of each request whose abort has been delivered."""

    def __init__(self, worker: Worker, node: Node) -> None:
        self.worker = worker
        self.node = node
        self.aborted: dict[RequestKey, int] = {}
        self._counts = worker.engine.pool._counts
        self._num_blocks = worker.engine.pool.num_blocks

    def check_event(self) -> None:
        """Cheap, after every event of the worker's. I2."""
        if sum(self._counts.values()) != self._num_blocks:
            raise Violation(f"I2: block counts {self._counts} of {self._num_blocks}")

    def on_abort(self, request: worker_pb2.AbortRequest) -> None:
        """After the worker has handled it: nothing of the attempt is left but what the step under
        way reads and writes."""
        if request.choices:
            return
        key = RequestKey(request.gateway_id, request.request_id)
        self.aborted[key] = max(request.attempt, self.aborted.get(key, 0))
        self._check_aborted(key)

    def check_all(self, now: float) -> None:
        """Everything, from scratch. `now`: on the worker's clock."""
        try:
            self.worker.check_integrity()
        except AssertionError as error:
            raise Violation(f"I2: {error}") from error
        for key in self.aborted:
            self._check_aborted(key)
        for request in self.worker._requests:
            self._check_choices(request.key)
        for request in self.worker._requests:
            if request.lease.at + LATE_SWEEP_S < now:
                raise Violation(f"I6: {request.key.request_id} outlives its lease")

    @property
    def at_rest(self) -> bool:
        """Whether nothing is left of any request. I7."""
        return self.worker.idle and not any(self.what_is_held().values())

    def what_is_held(self) -> dict[str, int]:
        worker, counts = self.worker, self.worker.engine.pool.counts()
        return {
            "used": counts.used,
            "leased": counts.leased,
            "quarantined": counts.quarantined,
            "requests": len(worker._requests),
            "sequences": worker.engine.num_sequences,
            "leases": len(worker.leases),
            "transfers": len(worker._traffic.transfers),
            "pulls": len(worker._traffic.pulls),
            "prefixes sent": len(worker._traffic.prefix_sends),
        }

    def _check_choices(self, key: RequestKey) -> None:
        """A choice is computed once."""
        choices = [c for sequence in self.worker.engine.sequences(key) for c in sequence.choices]
        if len(set(choices)) < len(choices):
            raise Violation(f"{key.request_id} has two sequences for one choice")

    def _check_aborted(self, key: RequestKey) -> None:
        attempt = self.aborted[key]
        worker = self.worker
        request = worker._requests.get(key)
        if request is not None and request.attempt <= attempt:
            raise Violation(f"abort of {key.request_id} was delivered, and the request is here")
        if any(sequence.attempt <= attempt for sequence in worker.engine.sequences(key)):
            raise Violation(f"abort of {key.request_id} was delivered, and sequences are here")
