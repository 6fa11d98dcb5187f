"""Finds a request its workers: route, reserve, prefill, in one attempt that leaves nothing behind
when it fails."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from forebay.admission.queue import AdmissionQueue
from forebay.core.clock import Deadline
from forebay.core.errors import Overloaded, Unavailable
from forebay.gateway.fleet import Fleet
from forebay.gateway.worker_link import Inbox, WorkerLink
from forebay.router.policy import can_serve, choose
from forebay.router.view import Decision, RouteRequest
from forebay.rpc.v1 import worker_pb2


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill` is None when `decode` computes the prompt itself."""

    decode: WorkerLink
    prefill: WorkerLink | None

    @property
    def links(self) -> tuple[WorkerLink, ...]:
        return (self.decode,) if self.prefill is None else (self.prefill, self.decode)


class _Refused(Exception):
    """A worker did not take the request, for want of room or life."""

    def __init__(self, worker_id: str) -> None:
        super().__init__(worker_id)
        self.worker_id = worker_id


class Placer:
    """`discard(link, spec)` ends an attempt on a worker in the background."""

    def __init__(
        self,
        fleet: Fleet,
        queue: AdmissionQueue,
        discard: Callable[[WorkerLink, worker_pb2.SequenceSpec], None],
    ) -> None:
        self._fleet = fleet
        self._queue = queue
        self._discard = discard

    async def place(
        self,
        spec: worker_pb2.SequenceSpec,
        model_id: str,
        inbox: Inbox,
        deadline: Deadline,
        queue_deadline: Deadline,
    ) -> Placement:
        """Waits in line for a place; every try raises `spec.attempt`. The request runs when this
        returns, and its outputs go to `inbox`.
        Raises Overloaded when there was no place in time, Unavailable when there was no worker."""

        async def attempt() -> Placement | None:
            return await self._attempt(spec, model_id, inbox, deadline)

        try:
            return await self._queue.admit(attempt, queue_deadline)
        except Overloaded as error:
            if not can_serve(model_id, self._fleet.view()):
                raise Unavailable("no worker is there for this model") from error
            raise

    async def _attempt(
        self, spec: worker_pb2.SequenceSpec, model_id: str, inbox: Inbox, deadline: Deadline
    ) -> Placement | None:
        """Tries workers until one takes the request; None when all have refused."""
        refused: frozenset[str] = frozenset()
        num_tokens = len(spec.prompt_token_ids)
        while True:
            route = RouteRequest(spec.request_id, model_id, num_tokens, refused)
            decision = choose(route, self._fleet.view())
            if decision is None:
                return None
            deadline.check("it waited for a worker")
            spec.attempt += 1
            spec.timeout_ms = deadline.remaining_ms()
            try:
                return await self._settle(decision, spec, inbox, deadline)
            except _Refused as refusal:
                refused |= {refusal.worker_id}

    async def _settle(
        self,
        decision: Decision,
        spec: worker_pb2.SequenceSpec,
        inbox: Inbox,
        deadline: Deadline,
    ) -> Placement:
        """Raises _Refused, and then holds nothing anywhere."""
        num_tokens = len(spec.prompt_token_ids)
        decode = self._link(decision.decode)
        if decision.prefill is None:
            decode.expect(spec.sampling.n, num_tokens)
            await self._start(decode, spec, None, inbox, deadline)
            return Placement(decode, None)
        prefill = self._link(decision.prefill)
        prefill.expect(spec.sampling.n, num_tokens)
        decode.expect(spec.sampling.n, 0)
        target = await self._reserve(decode, spec, inbox, deadline)
        try:
            await self._start(prefill, spec, target, inbox, deadline)
        except BaseException:
            self._discard(decode, spec)
            raise
        return Placement(decode, prefill)

    def _link(self, worker_id: str) -> WorkerLink:
        try:
            return self._fleet.link(worker_id)
        except Unavailable as error:
            raise _Refused(worker_id) from error

    async def _reserve(
        self,
        decode: WorkerLink,
        spec: worker_pb2.SequenceSpec,
        inbox: Inbox,
        deadline: Deadline,
    ) -> worker_pb2.TransferTarget:
        async with self._subscribed(decode, spec, inbox):
            lease = await decode.reserve(spec, deadline)
        return worker_pb2.TransferTarget(
            address=decode.address,
            lease_id=lease.lease_id,
            epoch=lease.epoch,
            start_token=lease.num_cached_tokens,
        )

    async def _start(
        self,
        link: WorkerLink,
        spec: worker_pb2.SequenceSpec,
        target: worker_pb2.TransferTarget | None,
        inbox: Inbox,
        deadline: Deadline,
    ) -> None:
        async with self._subscribed(link, spec, inbox):
            await link.prefill(spec, target, deadline)

    @asynccontextmanager
    async def _subscribed(
        self, link: WorkerLink, spec: worker_pb2.SequenceSpec, inbox: Inbox
    ) -> AsyncIterator[None]:
        """The subscription outlives success only. After a refusal nothing is held there; after
        any other failure something may be."""
        try:
            link.subscribe(spec.request_id, inbox)
            yield
        except Overloaded as error:
            link.unsubscribe(spec.request_id)
            raise _Refused(link.worker_id) from error
        except Unavailable as error:
            self._discard(link, spec)
            raise _Refused(link.worker_id) from error
        except BaseException:
            self._discard(link, spec)
            raise
