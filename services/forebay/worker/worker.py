"""The worker service: what a gateway or another worker may ask of an engine.

No sockets, threads or clocks of its own: it runs as it is in the simulator.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import aclosing

from forebay.core import clock
from forebay.core.errors import InternalError, InvalidRequest, Overloaded, Unavailable
from forebay.core.executor import Executor
from forebay.core.randomness import Rng
from forebay.core.settings import WorkerSettings
from forebay.engine.engine import Engine, StepOutcome
from forebay.engine.interface import Runner
from forebay.engine.sequence import RequestKey, Sequence
from forebay.engine.wire import counters_of, error_to_proto, output_to_proto
from forebay.kv.block_pool import OutOfBlocks
from forebay.kv.leases import Lease, LeaseTable
from forebay.rpc import methods
from forebay.rpc.connector import Connector, Routes
from forebay.rpc.conversions import codec_to_proto, role_to_proto
from forebay.rpc.v1 import kv_transfer_pb2, worker_pb2
from forebay.worker.decode import Reservations
from forebay.worker.engine_loop import EngineLoop
from forebay.worker.kv_traffic import KvTraffic
from forebay.worker.metrics import WorkerMetrics
from forebay.worker.request_table import RequestTable
from forebay.worker.requests import WorkerRequest, accept
from forebay.worker.room import Room
from forebay.worker.step_streams import StepStreams, read_hello

SWEEP_S = 0.25
"""How often leases, health, absent gateways and silent streams are looked at."""
IDLE_POLL_S = 0.05
FLUSH_S = 1.0
"""How long a worker that has drained waits for gateways to read the last outputs."""


class Worker:
    """`endpoint` is set by whoever opens the listener, before the worker is published."""

    def __init__(
        self,
        settings: WorkerSettings,
        runner: Runner,
        executor: Executor,
        connector: Connector,
        rng: Rng,
        protocol_version: int = methods.PROTOCOL_VERSION,
    ) -> None:
        """Raises ConfigurationError for a codec that the runner's KV does not have."""
        self.worker_id = rng.token(settings.role.value)
        self.epoch = rng.token("epoch")
        self.endpoint = ""
        self.metrics_url = ""
        self.draining = False
        self._stopped = False
        self._said_full = False
        self._settings = settings
        self._runner = runner
        self._protocol_version = protocol_version
        self._requests = RequestTable(settings.lease_s)
        self.engine = Engine(
            runner,
            max_batch_tokens=settings.engine.max_batch_tokens,
            max_num_seqs=settings.engine.max_num_seqs,
        )
        self.leases = LeaseTable(self.engine.pool, self.epoch)
        self._streams = StepStreams(self._message, self._on_message)
        self._reservations = Reservations(self.engine, self.leases, rng)
        self._traffic = KvTraffic(
            self.engine,
            self.leases,
            executor,
            connector,
            rng,
            codec=settings.kv_codec,
            max_frame_bytes=settings.kv_frame_kib * 1024,
            protocol_version=protocol_version,
            on_transfer_end=self._on_transfer_end,
            on_commit=self._on_commit,
            on_change=lambda: self._loop.wake(),
        )
        self._room = Room(
            self.engine, self._traffic.pulls, self._requests, settings.engine.max_batch_tokens
        )
        self._loop = EngineLoop(
            self.engine, executor, self._on_outcome, self._on_failed_step, self._traffic.layer_hook
        )
        self.metrics = WorkerMetrics(self.description)

    def routes(self) -> Routes:
        return Routes(
            unary=[
                (methods.DESCRIBE, self.describe),
                (methods.GET_TOKENIZER, self.get_tokenizer),
                (methods.RESERVE, self.reserve),
                (methods.PREFILL, self.prefill),
                (methods.SEND_PREFIX, self.send_prefix),
                (methods.ABORT, self.abort),
                (methods.DRAIN, self.drain_on_call),
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
            self._stopped = True
            self._streams.close("the worker stops")

    async def drain(self, deadline: clock.Deadline) -> int:
        """Refuses new work and tells the gateways so; lets what is here finish until `deadline`,
        then hands it back to them as resumable errors. Returns how many sequences those were."""
        if not self.draining:
            self.draining = True
            self._streams.announce()
        while not self.idle and not deadline.expired:
            await asyncio.sleep(min(IDLE_POLL_S, deadline.remaining_s()))
        num_left = self._requests.num_sequences
        for request in self._requests:
            self.metrics.count_handed_over()
            self._fail(request, request.going_on, "the worker is draining", resumable=True)
        flushing = clock.Deadline.after(FLUSH_S)
        while not self._streams.all_taken and not flushing.expired:
            await asyncio.sleep(IDLE_POLL_S)
        return num_left

    async def close(self) -> None:
        """After `run` has ended: cuts what is still open."""
        await self._traffic.close()

    def check_health(self) -> None:
        """Raises InternalError when the engine hangs or keeps failing."""
        self._loop.check_health(self._settings.step_timeout_s)

    def check_integrity(self) -> None:
        """Between steps; AssertionError names the first broken invariant."""
        self.engine.check_integrity()
        self.leases.check_integrity()
        self._requests.check_integrity()
        self._traffic.pulls.check_integrity()
        num_leases = len(self._reservations) + self._traffic.pulls.num_leases
        assert num_leases == len(self.leases)

    @property
    def idle(self) -> bool:
        return not (self._requests or self.engine.num_sequences or self._traffic)

    def load(self) -> worker_pb2.WorkerLoad:
        return self._room.load()

    def description(self) -> worker_pb2.WorkerDescription:
        """Only reads, so that the metrics listener's thread may call it too."""
        counters = counters_of(self.engine)
        self._traffic.count(counters)
        counters.expired_leases = self._requests.num_expired
        counters.requests = self._requests.num_accepted
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
            protocol_version=self._protocol_version,
            counters=counters,
            kv_codecs=[codec_to_proto(codec) for codec in self._runner.kv_codecs],
        )

    async def describe(self, _: worker_pb2.DescribeRequest) -> worker_pb2.DescribeResponse:
        return worker_pb2.DescribeResponse(worker=self.description())

    async def get_tokenizer(
        self, _: worker_pb2.GetTokenizerRequest
    ) -> worker_pb2.GetTokenizerResponse:
        return worker_pb2.GetTokenizerResponse(tokenizer_spec=self._runner.tokenizer_spec)

    async def reserve(self, message: worker_pb2.ReserveRequest) -> worker_pb2.ReserveResponse:
        """A repeated call for the same attempt gets the blocks it got before."""
        request = self._accept(message.sequence)
        lease = self._reservations.find(request.key)
        if lease is None:
            if self._traffic.has_prompt(request.key):
                raise InvalidRequest("the request is decoded here already", param="request_id")
            self._room.check(request)
            try:
                lease = self._reservations.reserve(request)
            except OutOfBlocks as error:
                raise Overloaded(f"no KV memory for the prompt: {error}") from error
            self._enter(request)
        known = self._requests.get(request.key)
        assert known is not None
        return worker_pb2.ReserveResponse(
            lease_id=lease.lease_id,
            epoch=self.epoch,
            lease_ms=known.lease.remaining_ms(),
            num_cached_tokens=lease.num_cached_tokens,
        )

    async def prefill(self, message: worker_pb2.PrefillRequest) -> worker_pb2.PrefillResponse:
        """A repeated call for the same attempt has no effect."""
        request = self._accept(message.sequence)
        if self._reservations.find(request.key) is not None:
            raise InvalidRequest("its KV is awaited here already", param="request_id")
        if not self._traffic.has_prompt(request.key):
            self._room.check_prefill(request)
            self._traffic.begin(request, message, self.endpoint)
            self._enter(request)
        return worker_pb2.PrefillResponse()

    async def send_prefix(
        self, message: worker_pb2.SendPrefixRequest
    ) -> worker_pb2.SendPrefixResponse:
        """Ends with its caller's interest, or its time."""
        self._check_accepting()
        return await self._traffic.prefix_sends.send(message)

    async def push(self, messages: AsyncIterator[bytes]) -> kv_transfer_pb2.PushResponse:
        try:
            return await self._traffic.receiver.push(messages)
        finally:
            self._loop.wake()  # blocks may have left quarantine

    async def steps(
        self, messages: AsyncIterator[worker_pb2.StepsRequest]
    ) -> AsyncGenerator[worker_pb2.StepsResponse, None]:
        """What a gateway left here under an earlier stream ends with the next one's hello: it goes
        on by migration, if at all."""
        gateway_id = await read_hello(messages)
        self._check_alive()
        self._end_all((gateway_id,))
        async with aclosing(self._streams.serve(gateway_id, messages)) as stream:
            async for message in stream:
                yield message

    async def abort(self, message: worker_pb2.AbortRequest) -> worker_pb2.AbortResponse:
        key = RequestKey(message.gateway_id, message.request_id)
        request = self._requests.get(key)
        if not message.choices and (request is None or request.attempt < message.attempt):
            self._requests.remember_end(key, message.attempt)
        if request is None or request.attempt > message.attempt:
            return worker_pb2.AbortResponse(found=False)
        choices = request.going_on.intersection(message.choices or request.going_on)
        self._end_choices(request, choices)
        if choices and request in self._requests:
            self._reservations.abort(key, frozenset(choices))
            self.engine.abort(key, frozenset(choices))
            self._loop.wake()
        return worker_pb2.AbortResponse(found=bool(choices))

    async def drain_on_call(self, message: worker_pb2.DrainRequest) -> worker_pb2.DrainResponse:
        num_left = await self.drain(clock.Deadline.after_ms(message.timeout_ms))
        return worker_pb2.DrainResponse(num_left=num_left)

    def _check_alive(self) -> None:
        """Raises Unavailable."""
        if self._stopped:
            raise Unavailable("the worker stops")
        try:
            self.check_health()
        except InternalError as error:
            raise Unavailable(error.message) from error

    def _check_accepting(self) -> None:
        """Raises Unavailable."""
        if self.draining:
            raise Unavailable("the worker is draining")
        self._check_alive()

    def _accept(self, spec: worker_pb2.SequenceSpec) -> WorkerRequest:
        """Validates, and makes a newer attempt of a request end the older one."""
        self._check_accepting()
        request = accept(spec, self._runner.model, self._settings.lease_s)
        if not self._streams.is_attached(request.key.gateway_id):
            raise Unavailable("the gateway has no step stream to this worker")
        self._requests.check_attempt(request)
        known = self._requests.get(request.key)
        if known is not None and known.attempt < request.attempt:
            self._end(known)
        return request

    def _enter(self, request: WorkerRequest) -> None:
        self._requests.enter(request)
        self._loop.wake()

    def _end(self, request: WorkerRequest) -> None:
        """Frees all that is held for a request that is here."""
        self._requests.remove(request.key)
        self._reservations.abort(request.key, frozenset())
        self._traffic.abort(request.key)
        self.engine.abort(request.key)
        self._loop.wake()
        if self._said_full and self._room.prefill_tokens:
            self._streams.announce()

    def _end_all(self, gateway_ids: Collection[str]) -> None:
        for request in self._requests.of_gateways(gateway_ids):
            self._end(request)

    def _end_choices(self, request: WorkerRequest, choices: Collection[int]) -> None:
        request.going_on.difference_update(choices)
        if not request.going_on and request in self._requests:
            self._end(request)

    def _fail(
        self, request: WorkerRequest, choices: Collection[int], message: str, *, resumable: bool
    ) -> None:
        if request not in self._requests:
            return
        ended = sorted(choices)
        outputs = [
            error_to_proto(request.start, choice, message, resumable=resumable) for choice in ended
        ]
        self._end_choices(request, ended)
        self._streams.send(request.key.gateway_id, self._message(outputs))

    def _message(
        self, outputs: Collection[worker_pb2.SequenceOutput] = ()
    ) -> worker_pb2.StepsResponse:
        load = self.load()
        self._said_full = load.prefill_room_tokens == 0
        return worker_pb2.StepsResponse(
            step=self._loop.num_steps, outputs=outputs, load=load, draining=self.draining
        )

    def _on_message(self, gateway_id: str, message: worker_pb2.StepsRequest) -> None:
        if not message.HasField("renewal"):
            raise InvalidRequest("a hello is followed by renewals only", param="renewal")
        self._requests.renew(gateway_id, message.renewal.request_ids)

    def _on_outcome(self, outcome: StepOutcome) -> None:
        by_gateway: dict[str, list[worker_pb2.SequenceOutput]] = {}
        for output in outcome.outputs:
            request = self._requests.get(output.key)
            if request is None or output.choice not in request.going_on:
                self.engine.abort(output.key, frozenset((output.choice,)))
                continue
            is_first, is_last = output.num_cached_tokens is not None, output.finish is not None
            self.metrics.observe_token(request, is_first=is_first, is_last=is_last)
            if is_last:
                self._end_choices(request, (output.choice,))
            message = output_to_proto(output, request.num_pulled_tokens)
            by_gateway.setdefault(output.key.gateway_id, []).append(message)
        for prefilled in outcome.prefilled:
            self._traffic.transfers.complete(prefilled)
        for gateway_id, outputs in by_gateway.items():
            self._streams.send(gateway_id, self._message(outputs))

    def _on_failed_step(self, sequences: list[Sequence], message: str) -> None:
        for sequence in sequences:
            request = self._requests.get(sequence.key)
            if request is not None and not sequence.aborted:
                choices = request.going_on.intersection(sequence.choices)
                self._fail(request, choices, message, resumable=True)

    def _on_transfer_end(self, request: WorkerRequest, error: str | None) -> None:
        if error is not None:
            self._fail(request, request.going_on, error, resumable=True)
        elif request in self._requests:
            self.metrics.observe_transfer(clock.now() - request.since)
            self._end(request)

    def _on_commit(self, lease: Lease, first_tokens: list[tuple[int, int]]) -> None:
        request = self._reservations.commit(lease, first_tokens)
        request.since = clock.now()
        self._end_choices(request, request.going_on - {choice for choice, _ in first_tokens})
        self._loop.wake()

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._sweep()

    def _sweep(self) -> None:
        try:
            self.check_health()
        except InternalError as error:
            self._streams.close(error.message)
        self._traffic.transfers.sweep()
        for request in self._requests.expired():
            if request.deadline.expired:
                message, resumable = "the request's deadline passed", False
            else:
                message, resumable = "its lease ran out", True
                self._requests.num_expired += 1
            self._fail(request, request.going_on, message, resumable=resumable)
        self._requests.forget_ended()
        self._end_all(self._streams.expire(clock.now() - self._settings.gateway_grace_s))
        self._streams.send_signs_of_life()
