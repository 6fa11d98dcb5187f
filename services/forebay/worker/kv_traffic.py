"""All KV that goes in or out of a worker."""

from __future__ import annotations

from collections.abc import Callable

from forebay.core.errors import InvalidRequest
from forebay.core.executor import Executor
from forebay.core.kv_codec import KvCodec
from forebay.core.randomness import Rng
from forebay.engine.engine import Engine
from forebay.engine.interface import Batch, LayerHook
from forebay.engine.sequence import RequestKey, Sequence
from forebay.kv.leases import Lease, LeaseTable
from forebay.rpc.connector import Connector
from forebay.rpc.v1 import worker_pb2
from forebay.worker.kv_push import layer_hook
from forebay.worker.prefill import Transfers
from forebay.worker.prefix_sends import PrefixSends
from forebay.worker.pull import Pulls
from forebay.worker.requests import WorkerRequest
from forebay.worker.transfer import ConnectorKvTransport, KvReceiver, KvSender


class KvTraffic:
    """`transfers` and `prefix_sends` go out, over one sender; for `pulls` and for the reservations
    it comes in, over one receiver. `on_change` is called when the engine has got a prompt, or may
    have got blocks back."""

    def __init__(
        self,
        engine: Engine,
        leases: LeaseTable,
        executor: Executor,
        connector: Connector,
        rng: Rng,
        *,
        codec: KvCodec,
        max_frame_bytes: int,
        protocol_version: int,
        on_transfer_end: Callable[[WorkerRequest, str | None], None],
        on_commit: Callable[[Lease, list[tuple[int, int]]], None],
        on_change: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._on_change = on_change
        self._transport = ConnectorKvTransport(connector)
        self._sender = KvSender(
            engine.runner, executor, self._transport, codec, max_frame_bytes, protocol_version
        )
        self.transfers = Transfers(engine, self._sender, on_transfer_end)
        self.prefix_sends = PrefixSends(
            engine, self._sender, rng, on_change, leases.epoch, protocol_version
        )
        self.pulls = Pulls(engine, leases, self._transport, rng, self._queue, protocol_version)
        self.receiver = KvReceiver(
            engine.runner, executor, leases, on_commit, self.pulls.commit, protocol_version
        )

    def __len__(self) -> int:
        """0: nothing is under way that this worker began or was asked for."""
        return len(self.transfers) + len(self.prefix_sends) + len(self.pulls)

    def has_prompt(self, key: RequestKey) -> bool:
        """Whether one is computed here, or is going to be."""
        return bool(self._engine.sequences(key)) or key in self.pulls

    def begin(
        self, request: WorkerRequest, message: worker_pb2.PrefillRequest, address: str
    ) -> None:
        """Puts a prompt into the engine, once what another worker holds of it has been fetched.
        `message`: what was asked for. `address`: this worker's own. Raises InvalidRequest."""
        if message.target.start_token > len(request.start.tokens):
            raise InvalidRequest("start_token lies past the prompt", param="target.start_token")
        request.target = message.target if message.HasField("target") else None
        is_pulled = message.HasField("source") and self.pulls.begin(
            request, message.source, address
        )
        if not is_pulled:
            self._queue(request)

    def layer_hook(self, batch: Batch, sequences: list[Sequence]) -> LayerHook | None:
        """As the engine's loop wants it."""
        pushes = [*self.transfers.pushes, *self.prefix_sends.pushes]
        return layer_hook(pushes, batch, sequences)

    def abort(self, key: RequestKey) -> None:
        """Of a request that ends: nothing is called back for it any more."""
        self.transfers.abort(key)
        self.pulls.abort(key)

    def count(self, counters: worker_pb2.WorkerCounters) -> None:
        """Adds what was counted here."""
        counters.kv_bytes_sent = self._sender.num_bytes
        counters.kv_bytes_received = self.receiver.num_bytes
        counters.kv_transfer_failures = self.transfers.num_failures + self.receiver.num_failures
        counters.kv_pulled_tokens = self.pulls.num_tokens
        counters.kv_pull_failures = self.pulls.num_failures

    async def close(self) -> None:
        self.prefix_sends.close()
        await self.pulls.close()
        await self.transfers.close()
        await self._transport.close()

    def _queue(self, request: WorkerRequest) -> None:
        sequence = self._engine.submit(request.start, prefill_only=request.target is not None)
        if request.target is not None:
            self.transfers.open(request, sequence)
        self._on_change()
