"""One worker as this gateway knows it: a step stream that stays open, and calls beside it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from forebay.core import clock
from forebay.core.clock import Deadline
from forebay.core.errors import DeadlineExceeded, ForebayError, Unavailable, WorkerLost
from forebay.rpc import methods
from forebay.rpc.connector import Channel, Duplex, Method, Request, Response
from forebay.rpc.v1 import worker_pb2

log = logging.getLogger(__name__)

CALL_S = 5.0
"""Limit of one call to a worker; the request's own deadline bounds it further."""


class Inbox(Protocol):
    """Where a request gets what its workers send."""

    def deliver(self, link: WorkerLink, output: worker_pb2.SequenceOutput) -> None: ...

    def lose(self, link: WorkerLink) -> None:
        """The worker is gone; nothing more will come from it."""


class WorkerLink:
    """Void once `lost`: the fleet then makes a new one. `on_change` is called after every step and
    when the link is lost."""

    def __init__(
        self,
        description: worker_pb2.WorkerDescription,
        channel: Channel,
        gateway_id: str,
        on_change: Callable[[], None],
    ) -> None:
        self.description = description
        self.load = description.load
        self.num_sent_tokens = 0
        self.num_sent_sequences = 0
        self.lost = False
        self.missing_since: float | None = None
        self._channel = channel
        self._gateway_id = gateway_id
        self._on_change = on_change
        self._inboxes: dict[str, Inbox] = {}
        self._stream: Duplex[worker_pb2.StepsRequest, worker_pb2.StepsResponse] | None = None
        self._reader: asyncio.Task[None] | None = None

    @property
    def worker_id(self) -> str:
        return self.description.worker_id

    @property
    def address(self) -> str:
        return self.description.endpoints[0].address

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
        self.update_load(answer.load)
        self._reader = asyncio.create_task(self._read(self._stream))

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        if self._stream is not None:
            self._stream.cancel()
        await self._channel.close()

    def subscribe(self, request_id: str, inbox: Inbox) -> None:
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
    ) -> None:
        """Raises Overloaded, Unavailable or InvalidRequest."""
        request = worker_pb2.PrefillRequest(sequence=spec, target=target)
        await self._call(methods.PREFILL, request, deadline)

    async def abort(self, spec: worker_pb2.SequenceSpec, choices: tuple[int, ...] = ()) -> None:
        """Does not raise for a worker that is gone: it frees by itself what it held."""
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
        try:
            return await self._channel.unary(method, request, deadline.within(CALL_S))
        except DeadlineExceeded as error:
            if deadline.expired:
                raise
            raise Unavailable(f"{self.worker_id} did not answer in time") from error

    async def _read(
        self, stream: Duplex[worker_pb2.StepsRequest, worker_pb2.StepsResponse]
    ) -> None:
        reason = "the worker ended its step stream"
        try:
            while (message := await stream.receive()) is not None:
                self.update_load(message.load)
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

    def _lose(self, reason: str) -> None:
        self.lost = True
        log.info("link to %s is lost at %.3f: %s", self.worker_id, clock.now(), reason)
        for inbox in list(self._inboxes.values()):
            inbox.lose(self)
        self._inboxes.clear()
        self._on_change()
