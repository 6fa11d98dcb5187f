"""The worker service: what a gateway or another worker may ask of an engine.

No sockets, threads or clocks of its own: it runs as it is in the simulator.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import aclosing

from forebay.core import clock
from forebay.core.errors import InvalidRequest, Overloaded, RequestCancelled, Unavailable
from forebay.core.executor import Executor
from forebay.core.randomness import Rng
from forebay.core.settings import WorkerSettings
from forebay.engine.engine import Engine, Prefilled, StepOutcome
from forebay.engine.interface import Runner
from forebay.engine.sequence import RequestKey, Sequence
from forebay.engine.wire import counters_of, error_to_proto, load_of, output_to_proto
from forebay.kv.block_pool import OutOfBlocks
from forebay.kv.leases import Lease, LeaseTable
from forebay.rpc import methods
from forebay.rpc.connector import Connector, Routes
from forebay.rpc.conversions import role_to_proto
from forebay.rpc.v1 import kv_transfer_pb2, worker_pb2
from forebay.worker.decode import Reservations
from forebay.worker.engine_loop import EngineLoop
from forebay.worker.metrics import WorkerMetrics
from forebay.worker.prefill import Transfers
from forebay.worker.requests import WorkerRequest, accept
from forebay.worker.step_streams import StepStreams
from forebay.worker.transfer import ConnectorKvTransport, KvReceiver, KvSender

PROTOCOL_VERSION = 1
SWEEP_S = 0.25
"""How often leases, deadlines and absent gateways are looked at."""
ABORT_MEMORY_S = 30.0
"""How long an abort that found nothing is remembered: its request may have been overtaken."""
PREFILL_QUEUE_STEPS = 2
"""Prompt tokens that may wait here, in full steps: the rest waits in the gateways' queues."""


class Worker:
    """`endpoint` is set by whoever opens the listener, before the worker is published."""

    def __init__(
        self,
        settings: WorkerSettings,
        runner: Runner,
        executor: Executor,
        connector: Connector,
        rng: Rng,
    ) -> None:
        self.worker_id = rng.token(settings.role.value)
        self.epoch = rng.token("epoch")
        self.endpoint = ""
        self.metrics_url = ""
        self.draining = False
        self._settings = settings
        self._runner = runner
        self._max_queued_tokens = PREFILL_QUEUE_STEPS * settings.engine.max_batch_tokens
        self._requests: dict[RequestKey, WorkerRequest] = {}
        self._aborted: dict[RequestKey, tuple[int, float]] = {}
        self._num_requests = 0
        self.engine = Engine(
            runner,
            max_batch_tokens=settings.engine.max_batch_tokens,
            max_num_seqs=settings.engine.max_num_seqs,
        )
        self.leases = LeaseTable(self.engine.pool, self.epoch)
        self._streams = StepStreams()
        self._loop = EngineLoop(self.engine, executor, self._on_outcome, self._on_failed_step)
        self._reservations = Reservations(self.engine, self.leases, rng, settings.lease_s)
        self._transport = ConnectorKvTransport(connector)
        self._sender = KvSender(runner, executor, self._transport, settings.kv_frame_kib * 1024)
        self._transfers = Transfers(self.engine, self._sender, self._on_transfer_end)
        self._receiver = KvReceiver(runner, executor, self.leases, self._on_commit)
        self.metrics = WorkerMetrics(self.description)

    def routes(self) -> Routes:
        return Routes(
            unary=[
                (methods.DESCRIBE, self.describe),
                (methods.GET_TOKENIZER, self.get_tokenizer),
                (methods.RESERVE, self.reserve),
                (methods.PREFILL, self.prefill),
                (methods.ABORT, self.abort),
                (methods.DRAIN, self.drain),
            ],
            push=[(methods.KV_PUSH, self.push)],
            duplex=[(methods.STEPS, self.steps)],
        )

    async def run(self) -> None:
        """The engine's steps and the sweeps, until cancelled. However it ends, it ends the step
        streams too, so that no gateway waits for steps that will not come."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._loop.run())
                tasks.create_task(self._sweep_forever())
        finally:
            self._streams.close()

    async def close(self) -> None:
        """After `run` has ended: cuts what is still open."""
        await self._transfers.close()
        await self._transport.close()

    def check_health(self) -> None:
        """Raises InternalError when the engine hangs or keeps failing."""
        self._loop.check_health(self._settings.step_timeout_s)

    def check_integrity(self) -> None:
        """Between steps; AssertionError names the first broken invariant."""
        self.engine.check_integrity()
        self.leases.check_integrity()
        assert len(self._reservations) == len(self.leases)

    @property
    def idle(self) -> bool:
        return not (self.engine.num_sequences or self._reservations or self._transfers)

    def load(self) -> worker_pb2.WorkerLoad:
        return load_of(self.engine, self._prefill_room())

    def description(self) -> worker_pb2.WorkerDescription:
        """Only reads, so that the metrics listener's thread may call it too."""
        counters = counters_of(self.engine)
        counters.kv_bytes_sent = self._sender.num_bytes
        counters.kv_bytes_received = self._receiver.num_bytes
        counters.kv_transfer_failures = self._transfers.num_failures + self._receiver.num_failures
        counters.expired_leases = self.leases.num_expired
        counters.requests = self._num_requests
        return worker_pb2.WorkerDescription(
            worker_id=self.worker_id,
            epoch=self.epoch,
            role=role_to_proto(self._settings.role),
            draining=self.draining,
            endpoints=[worker_pb2.RankEndpoint(rank=0, address=self.endpoint)],
            model=self._runner.model,
            kv_layout=self._runner.kv_layout,
            load=self.load(),
            metrics_url=self.metrics_url,
            protocol_version=PROTOCOL_VERSION,
            counters=counters,
        )

    async def describe(self, _: worker_pb2.DescribeRequest) -> worker_pb2.DescribeResponse:
        return worker_pb2.DescribeResponse(worker=self.description())

    async def get_tokenizer(
        self, _: worker_pb2.GetTokenizerRequest
    ) -> worker_pb2.GetTokenizerResponse:
        return worker_pb2.GetTokenizerResponse(tokenizer_spec=self._runner.tokenizer_spec)

    async def reserve(self, message: worker_pb2.ReserveRequest) -> worker_pb2.ReserveResponse:
        """A repeated call for the same attempt gets the lease it got before."""
        request = self._accept(message.sequence)
        lease = self._reservations.find(request.key)
        if lease is None:
            if self.engine.sequences(request.key):
                raise InvalidRequest("the request is decoded here already", param="request_id")
            self._check_room(request)
            try:
                lease = self._reservations.reserve(request)
            except OutOfBlocks as error:
                raise Overloaded(f"no KV memory for the prompt: {error}") from error
            self._enter(request)
        return self._reserved(lease)

    async def prefill(self, message: worker_pb2.PrefillRequest) -> worker_pb2.PrefillResponse:
        """A repeated call for the same attempt has no effect."""
        request = self._accept(message.sequence)
        if self.engine.sequences(request.key):
            return worker_pb2.PrefillResponse()
        self._check_room(request)
        if self._prefill_room() == 0:
            raise Overloaded("enough prompt tokens wait here already")
        request.target = message.target if message.HasField("target") else None
        if message.target.start_token > len(request.prompt):
            raise InvalidRequest("start_token lies past the prompt", param="target.start_token")
        self.engine.submit(
            request.key,
            request.attempt,
            request.prompt,
            request.params,
            request.cache_root,
            prefill_only=request.target is not None,
        )
        self._enter(request)
        return worker_pb2.PrefillResponse()

    async def push(self, messages: AsyncIterator[bytes]) -> kv_transfer_pb2.PushResponse:
        try:
            return await self._receiver.push(messages)
        finally:
            self._loop.wake()  # blocks may have left quarantine

    async def steps(
        self, messages: AsyncIterator[worker_pb2.StepsRequest]
    ) -> AsyncGenerator[worker_pb2.StepsResponse, None]:
        hello: worker_pb2.StepsRequest | None = await anext(messages, None)
        if hello is None or not hello.hello.gateway_id:
            raise InvalidRequest("a step stream begins with a hello", param="hello.gateway_id")
        self._abort_all((hello.hello.gateway_id,))  # of an earlier stream: it is not resumed
        answer = worker_pb2.StepsResponse(load=self.load())
        async with aclosing(self._streams.serve(hello.hello.gateway_id, answer)) as stream:
            async for message in stream:
                yield message

    async def abort(self, message: worker_pb2.AbortRequest) -> worker_pb2.AbortResponse:
        key = RequestKey(message.gateway_id, message.request_id)
        request = self._requests.get(key)
        if request is not None and request.attempt > message.attempt:
            return worker_pb2.AbortResponse(found=False)
        found = self._abort(key, frozenset(message.choices))
        if not found and not message.choices:
            before, _ = self._aborted.get(key, (0, 0.0))
            self._aborted[key] = (max(before, message.attempt), clock.now())
        return worker_pb2.AbortResponse(found=found)

    async def drain(self, message: worker_pb2.DrainRequest) -> worker_pb2.DrainResponse:
        """Refuses new work at once; the registry says so with the next heartbeat."""
        self.draining = True
        deadline = clock.Deadline.after_ms(message.timeout_ms)
        while not self.idle and not deadline.expired:
            await asyncio.sleep(min(SWEEP_S, deadline.remaining_s()))
        num_left = self.engine.num_sequences + len(self._reservations)
        return worker_pb2.DrainResponse(num_left=num_left)

    def _accept(self, spec: worker_pb2.SequenceSpec) -> WorkerRequest:
        """Validates, and makes a newer attempt of a request end the older one."""
        if self.draining:
            raise Unavailable("the worker is draining")
        request = accept(spec, self._runner.model)
        if not self._streams.is_attached(request.key.gateway_id):
            raise Unavailable("the gateway has no step stream to this worker")
        if request.key in self._aborted and self._aborted[request.key][0] >= request.attempt:
            raise RequestCancelled(f"attempt {request.attempt} was aborted before it came")
        known = self._requests.get(request.key)
        if known is not None and known.attempt > request.attempt:
            raise InvalidRequest(f"attempt {request.attempt} is over", param="attempt")
        if known is not None and known.attempt < request.attempt:
            self._abort(request.key, frozenset())
        return request

    def _prefill_room(self) -> int:
        return max(0, self._max_queued_tokens - self.engine.num_pending_prefill_tokens)

    def _check_room(self, request: WorkerRequest) -> None:
        """Raises Overloaded: a prompt is let in only if every running sequence could still grow by
        a block, those that wait (preempted ones too) could start, and a slot of the batch is free
        for each of its choices."""
        pool, engine = self.engine.pool, self.engine
        num_seqs = sum(len(known.going_on) for known in self._requests.values())
        if num_seqs and num_seqs + request.params.n > engine.max_num_seqs:
            raise Overloaded(f"{num_seqs} sequences are here already")
        wanted = engine.num_waiting_blocks + pool.blocks_for(len(request.prompt))
        if pool.num_available - wanted < engine.num_running:
            raise Overloaded("not enough free KV blocks")

    def _reserved(self, lease: Lease) -> worker_pb2.ReserveResponse:
        return worker_pb2.ReserveResponse(
            lease_id=lease.lease_id,
            epoch=self.epoch,
            lease_ms=clock.Deadline(lease.expires_at).remaining_ms(),
            num_cached_tokens=lease.num_cached_tokens,
        )

    def _enter(self, request: WorkerRequest) -> None:
        self._requests[request.key] = request
        self._num_requests += 1
        self._loop.wake()

    def _abort(self, key: RequestKey, choices: frozenset[int]) -> bool:
        request = self._requests.get(key)
        if request is not None and (not choices or choices >= request.going_on):
            choices = frozenset()
            del self._requests[key]
        elif request is not None:
            request.going_on -= choices
        parts = (
            self._reservations.abort(key, choices),
            self.engine.abort(key, choices),
            not choices and self._transfers.abort(key),
        )
        self._loop.wake()
        return any(parts)

    def _abort_all(self, gateway_ids: Collection[str]) -> None:
        for key in [key for key in self._requests if key.gateway_id in gateway_ids]:
            self._abort(key, frozenset())

    def _on_outcome(self, outcome: StepOutcome) -> None:
        by_gateway: dict[str, list[worker_pb2.SequenceOutput]] = {}
        for output in outcome.outputs:
            request = self._requests.get(output.key)
            if request is None or output.choice not in request.going_on:
                self.engine.abort(output.key, frozenset((output.choice,)))
                continue
            if output.offset == 0 and not request.first_token_sent:
                request.first_token_sent = True
                self.metrics.observe_prefill(clock.now() - request.since)
                request.since = clock.now()
            if output.finish is not None:
                if output.offset > 0:
                    self.metrics.observe_decode(clock.now() - request.since)
                self._end_choice(request, output.choice)
            message = output_to_proto(output)
            by_gateway.setdefault(output.key.gateway_id, []).append(message)
        for prefilled in outcome.prefilled:
            wanting = self._requests.get(prefilled.sequence.key)
            if wanting is None:
                self.engine.release(prefilled.sequence)
            else:
                self._transfers.start(wanting, prefilled)
        for gateway_id, outputs in by_gateway.items():
            self._send(gateway_id, outputs)

    def _on_failed_step(self, sequences: list[Sequence], message: str) -> None:
        for sequence in sequences:
            if not sequence.aborted and sequence.key in self._requests:
                self._fail(self._requests[sequence.key], sequence.choices, message)

    def _on_transfer_end(
        self, request: WorkerRequest, prefilled: Prefilled, error: str | None
    ) -> None:
        choices = tuple(choice for choice, _ in prefilled.first_tokens)
        if error is not None:
            self._fail(request, choices, error)
        else:
            self.metrics.observe_transfer(clock.now() - request.since)
            for choice in choices:
                self._end_choice(request, choice)
        self._loop.wake()

    def _on_commit(self, lease: Lease, first_tokens: list[tuple[int, int]]) -> None:
        request = self._reservations.commit(lease, first_tokens)
        request.since = clock.now()
        for choice in request.going_on - {choice for choice, _ in first_tokens}:
            self._end_choice(request, choice)
        self._loop.wake()

    def _end_choice(self, request: WorkerRequest, choice: int) -> None:
        request.going_on.discard(choice)
        if not request.going_on and self._requests.get(request.key) is request:
            del self._requests[request.key]

    def _fail(self, request: WorkerRequest, choices: tuple[int, ...], message: str) -> None:
        if self._requests.get(request.key) is not request:
            return
        key = request.key
        outputs = [error_to_proto(key.request_id, request.attempt, c, message) for c in choices]
        for choice in choices:
            self._end_choice(request, choice)
        self._send(key.gateway_id, outputs)

    def _send(self, gateway_id: str, outputs: list[worker_pb2.SequenceOutput]) -> None:
        message = worker_pb2.StepsResponse(
            step=self._loop.num_steps, outputs=outputs, load=self.load()
        )
        self._streams.send(gateway_id, message)

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._sweep()

    def _sweep(self) -> None:
        for request in self._reservations.expire():
            self._fail(request, tuple(sorted(request.going_on)), "the KV did not arrive in time")
            self._loop.wake()
        for request in [r for r in self._requests.values() if r.deadline.expired]:
            choices = tuple(sorted(request.going_on))
            self._fail(request, choices, "the request's deadline passed")
            self._abort(request.key, frozenset())
        forgotten = clock.now() - ABORT_MEMORY_S
        for key in [key for key, (_, since) in self._aborted.items() if since <= forgotten]:
            del self._aborted[key]
        gone = self._streams.expire(clock.now() - self._settings.gateway_grace_s)
        self._abort_all(gone)
