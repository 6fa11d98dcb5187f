"""One worker as this gateway knows it: a step stream that stays open, and calls beside it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from enum import Enum, IntEnum, auto
from typing import Any, Protocol

from forebay.core import clock
from forebay.core.clock import Deadline
from forebay.core.errors import (
    DeadlineExceeded,
    ForebayError,
    InvalidRequest,
    Overloaded,
    Unavailable,
    WorkerLost,
)
from forebay.rpc import methods
from forebay.rpc.connector import Channel, Duplex, Method, Request, Response
from forebay.rpc.v1 import worker_pb2

log = logging.getLogger(__name__)

CALL_S = 5.0
"""Limit of one call to a worker; the request's own deadline bounds it further."""
TICK_S = 0.5
"""How often silence is looked for. Counted in ticks of this process, so that a gateway that was
itself stopped for a while does not take that for its workers' silence."""
RENEW_TICKS = 2

StepsStream = Duplex[worker_pb2.StepsRequest, worker_pb2.StepsResponse]


class Exposure(IntEnum):
    """What a worker that died was doing for a request, the more suspicious the higher."""

    NONE = 0
    """Nothing that runs: KV is awaited there, or was sent away."""
    PROVEN = 1
    """It had computed tokens of it before."""
    UNPROVEN = 2
    """It had just begun."""
    ON_PROBATION = 3
    """It had just begun, after another worker had died in the same state."""


class Blame(Enum):
    """Whether a request may have been what a worker died of."""

    NONE = auto()
    SUSPECT = auto()
    """One of several."""
    SOLE = auto()
    """Nothing else that this gateway knows of."""


class Inbox(Protocol):
    """Where a request gets what its workers send. `request_id`: of the whole request."""

    request_id: str

    def deliver(self, link: WorkerLink, output: worker_pb2.SequenceOutput) -> None: ...

    def exposure(self, link: WorkerLink) -> Exposure: ...

    def lose(self, link: WorkerLink, blame: Blame) -> None:
        """The worker is gone; nothing more will come from it."""


def model_key(info: worker_pb2.ModelInfo) -> str:
    """Equal for workers whose tokens mean the same."""
    return "/".join((info.id, info.revision, info.adapter, info.tokenizer_hash))


class WorkerLink:
    """Void once `lost`: the fleet then makes a new one. `model_key`, `kv_key`: as in `WorkerView`;
    they never change. `on_change` is called after every message and when the link is lost.
    `silence_s`: how long the worker may say nothing."""

    def __init__(
        self,
        description: worker_pb2.WorkerDescription,
        channel: Channel,
        gateway_id: str,
        silence_s: float,
        on_change: Callable[[], None],
    ) -> None:
        self.description = description
        self.model_key = model_key(description.model)
        layout = description.kv_layout.SerializeToString()
        self.kv_key = f"{description.protocol_version}/{layout.hex()}"
        self.load = description.load
        self.draining = description.draining
        self.num_sent_tokens = 0
        self.num_sent_sequences = 0
        self.missing_since: float | None = None
        self._channel = channel
        self._gateway_id = gateway_id
        self._silence_s = silence_s
        self._on_change = on_change
        self._inboxes: dict[str, Inbox] = {}
        self._stream: StepsStream | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._calls: dict[asyncio.Task[Any], None] = {}
        self._lost = asyncio.Event()
        self._num_silent_ticks = 0

    @property
    def worker_id(self) -> str:
        return self.description.worker_id

    @property
    def address(self) -> str:
        return self.description.endpoints[0].address

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    async def open(self, deadline: Deadline) -> None:
        """Returns when the worker knows this gateway. Raises Unavailable."""
        self._stream = self._channel.duplex(methods.STEPS)
        hello = worker_pb2.GatewayHello(gateway_id=self._gateway_id)
        try:
            async with asyncio.timeout(deadline.remaining_s()):
                await self._stream.send(worker_pb2.StepsRequest(hello=hello))
                answer = await self._stream.receive()
        except TimeoutError as error:
            raise Unavailable(f"{self.address} did not answer the hello in time") from error
        if answer is None:
            raise Unavailable(f"{self.address} ended the step stream at once")
        self._heard(answer)
        self._tasks = [
            asyncio.create_task(self._read(self._stream)),
            asyncio.create_task(self._renew(self._stream)),
            asyncio.create_task(self._watch()),
        ]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._stream is not None:
            self._stream.cancel()
        await self._channel.close()

    def subscribe(self, request_id: str, inbox: Inbox) -> None:
        """From now on the gateway wants what the worker has of `request_id`, and renews its
        lease. Raises WorkerLost."""
        if self.lost:
            raise WorkerLost(f"worker {self.worker_id} is gone")
        self._inboxes[request_id] = inbox

    def unsubscribe(self, request_id: str) -> None:
        self._inboxes.pop(request_id, None)

    def update_load(self, load: worker_pb2.WorkerLoad) -> None:
        """The worker's own figures replace what was sent since the last ones."""
        self.load = load
        self.forget_expected()

    def expect(self, num_sequences: int, num_prefill_tokens: int) -> None:
        """Counts work that is about to be sent, until the worker's own figures include it."""
        self.num_sent_sequences += num_sequences
        self.num_sent_tokens += num_prefill_tokens

    def forget_expected(self) -> None:
        """What was expected a while ago has been refused, or counted by the worker."""
        self.num_sent_tokens = self.num_sent_sequences = 0

    async def lost_within(self, seconds: float) -> bool:
        """Whether the link is lost by then: of a call that broke and a link that broke with it
        either may be noticed first."""
        try:
            async with asyncio.timeout(seconds):
                await self._lost.wait()
        except TimeoutError:
            return False
        return True

    async def check_identity(self) -> None:
        """Raises Unavailable when another worker, or another life of this one, has its address: a
        record outlives a worker that was killed, and addresses are used again."""
        response = await self._call(
            methods.DESCRIBE, worker_pb2.DescribeRequest(), Deadline.after(CALL_S)
        )
        there = (response.worker.worker_id, response.worker.epoch)
        if there != (self.worker_id, self.description.epoch):
            raise Unavailable(f"{self.address} is the address of {there[0]} now")

    async def get_tokenizer(self) -> bytes:
        response = await self._call(
            methods.GET_TOKENIZER, worker_pb2.GetTokenizerRequest(), Deadline.after(CALL_S)
        )
        return response.tokenizer_spec

    async def reserve(
        self, spec: worker_pb2.SequenceSpec, deadline: Deadline
    ) -> worker_pb2.ReserveResponse:
        """Raises Overloaded, Unavailable or InvalidRequest."""
        return await self._call(methods.RESERVE, worker_pb2.ReserveRequest(sequence=spec), deadline)

    async def prefill(
        self,
        spec: worker_pb2.SequenceSpec,
        target: worker_pb2.TransferTarget | None,
        deadline: Deadline,
        source: worker_pb2.PullSource | None = None,
    ) -> None:
        """`source`: where the worker fetches the KV of leading tokens that it does not hold.
        Raises Overloaded, Unavailable or InvalidRequest."""
        request = worker_pb2.PrefillRequest(sequence=spec, target=target, source=source)
        await self._call(methods.PREFILL, request, deadline)

    async def abort(self, spec: worker_pb2.SequenceSpec, choices: tuple[int, ...] = ()) -> None:
        """Does not raise for a worker that cannot be reached: without renewals it ends by itself
        what it holds."""
        if self.lost:
            return
        request = worker_pb2.AbortRequest(
            request_id=spec.request_id,
            gateway_id=self._gateway_id,
            choices=choices,
            attempt=spec.attempt,
        )
        try:
            await self._call(methods.ABORT, request, Deadline.after(CALL_S))
        except ForebayError as error:
            log.warning("abort of %s on %s: %s", spec.request_id, self.worker_id, error.message)

    async def _call(
        self, method: Method[Request, Response], request: Request, deadline: Deadline
    ) -> Response:
        """Ends with the link, too: who waits for a worker that is gone shall not wait."""
        if self.lost:
            raise WorkerLost(f"worker {self.worker_id} is gone")
        call = asyncio.create_task(self._channel.unary(method, request, deadline.within(CALL_S)))
        call.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        self._calls[call] = None
        try:
            await asyncio.wait((call,))
        finally:
            call.cancel()
            del self._calls[call]
        if call.cancelled():
            raise WorkerLost(f"worker {self.worker_id} is gone")
        try:
            return call.result()
        except (InvalidRequest, Overloaded, Unavailable):
            raise
        except DeadlineExceeded as error:
            if deadline.expired:
                raise
            raise Unavailable(f"{self.worker_id} did not answer in time") from error
        except ForebayError as error:
            raise Unavailable(f"{self.worker_id}: {error.message}") from error

    def _heard(self, message: worker_pb2.StepsResponse) -> None:
        self._num_silent_ticks = 0
        self.draining = message.draining
        self.update_load(message.load)

    async def _read(self, stream: StepsStream) -> None:
        reason = "the worker ended its step stream"
        try:
            while (message := await stream.receive()) is not None:
                self._heard(message)
                for output in message.outputs:
                    inbox = self._inboxes.get(output.request_id)
                    if inbox is not None:
                        inbox.deliver(self, output)
                self._on_change()
        except ForebayError as error:
            reason = error.message
        except Exception:
            log.exception("the step stream of %s cannot be read", self.worker_id)
            reason = "its step stream cannot be read"
        finally:
            self._lose(reason)

    async def _renew(self, stream: StepsStream) -> None:
        """Tells the worker what is still wanted from it; of a stream that cannot be written to the
        reader learns as well."""
        while True:
            await asyncio.sleep(RENEW_TICKS * TICK_S)
            if not self._inboxes:
                continue
            renewal = worker_pb2.Renewal(request_ids=list(self._inboxes))
            try:
                await stream.send(worker_pb2.StepsRequest(renewal=renewal))
            except ForebayError:
                return

    async def _watch(self) -> None:
        while self._num_silent_ticks * TICK_S < self._silence_s:
            await asyncio.sleep(TICK_S)
            self._num_silent_ticks += 1
        self._lose(f"no sign of life for {self._silence_s:g} s")

    def _lose(self, reason: str) -> None:
        if self.lost:
            return
        self._lost.set()
        log.info("link to %s is lost at %.3f: %s", self.worker_id, clock.now(), reason)
        inboxes = list(self._inboxes.values())
        self._inboxes.clear()
        for inbox, blame in zip(inboxes, self._blame(inboxes), strict=True):
            inbox.lose(self, blame)
        for call in self._calls:
            call.cancel()
        self._on_change()

    def _blame(self, inboxes: list[Inbox]) -> list[Blame]:
        """Of several requests that had been served well until then nobody is suspected; nor is
        anybody of the end of a worker that had said it would end."""
        if self.draining:
            return [Blame.NONE] * len(inboxes)
        exposures = [inbox.exposure(self) for inbox in inboxes]
        worst = max(exposures, default=Exposure.NONE)
        suspects = {i.request_id for i, e in zip(inboxes, exposures, strict=True) if e is worst}
        blame = Blame.SUSPECT if worst >= Exposure.UNPROVEN else Blame.NONE
        if len(suspects) == 1 and worst is not Exposure.NONE:
            blame = Blame.SOLE
        return [blame if exposure is worst else Blame.NONE for exposure in exposures]
