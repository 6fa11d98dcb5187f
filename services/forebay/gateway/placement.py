"""Finds a leg its workers: route, reserve, prefill, in one attempt that leaves nothing behind when
it fails."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from forebay.admission.queue import AdmissionQueue
from forebay.core.clock import Deadline
from forebay.core.errors import Overloaded, Unavailable
from forebay.gateway.fleet import Fleet
from forebay.gateway.worker_link import Inbox, WorkerLink
from forebay.router.policy import can_serve, choose
from forebay.router.view import Decision, RouteRequest
from forebay.rpc.v1 import worker_pb2

_LOSS_SHOWS_S = 0.5
"""A worker's death breaks its calls and its link at nearly the same time."""


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill` is None when `decode` computes the prompt itself."""

    decode: WorkerLink
    prefill: WorkerLink | None

    @property
    def links(self) -> tuple[WorkerLink, ...]:
        return (self.decode,) if self.prefill is None else (self.prefill, self.decode)


class Placeable(Inbox, Protocol):
    """What is to be placed; it gets the workers' outputs. `num_tokens`: to compute first."""

    model_key: str
    spec: worker_pb2.SequenceSpec
    choices: tuple[int, ...]

    @property
    def num_tokens(self) -> int: ...

    def computes_on(self, link: WorkerLink) -> None: ...


class _Refused(Exception):
    """A worker did not take the leg, for want of room or life."""

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
        leg: Placeable,
        deadline: Deadline,
        queue_deadline: Deadline,
        *,
        avoid: frozenset[str] = frozenset(),
        urgent: bool = False,
    ) -> Placement:
        """Waits in line for a place, `urgent` ones in front; every try raises `leg.spec.attempt`.
        The leg runs when this returns. `avoid`: workers to choose only when there is no other.
        Raises DeadlineExceeded, Overloaded when there was no place in time, Unavailable when there
        was no worker."""

        async def attempt() -> Placement | None:
            return await self._attempt(leg, avoid, deadline)

        try:
            return await self._queue.admit(attempt, queue_deadline, urgent=urgent)
        except Overloaded as error:
            deadline.check("it waited for a worker")
            if not can_serve(leg.model_key, self._fleet.view()):
                raise Unavailable("no worker is there for this model") from error
            raise

    async def _attempt(
        self, leg: Placeable, avoid: frozenset[str], deadline: Deadline
    ) -> Placement | None:
        """Tries workers until one takes the leg; None when all have refused."""
        refused: frozenset[str] = frozenset()
        while True:
            decision = self._choose(leg, refused | avoid) or self._choose(leg, refused)
            if decision is None:
                return None
            deadline.check("it waited for a worker")
            leg.spec.attempt += 1
            leg.spec.timeout_ms = deadline.remaining_ms()
            try:
                return await self._settle(decision, leg, deadline)
            except _Refused as refusal:
                refused |= {refusal.worker_id}

    def _choose(self, leg: Placeable, excluded: frozenset[str]) -> Decision | None:
        route = RouteRequest(leg.spec.request_id, leg.model_key, leg.num_tokens, excluded)
        return choose(route, self._fleet.view())

    async def _settle(self, decision: Decision, leg: Placeable, deadline: Deadline) -> Placement:
        """Raises _Refused, and then holds nothing anywhere."""
        decode = self._link(decision.decode)
        num_choices = len(leg.choices)
        if decision.prefill is None:
            decode.expect(num_choices, leg.num_tokens)
            await self._start(decode, leg, None, deadline)
            return Placement(decode, None)
        prefill = self._link(decision.prefill)
        prefill.expect(num_choices, leg.num_tokens)
        decode.expect(num_choices, 0)
        target = await self._reserve(decode, leg, deadline)
        try:
            await self._start(prefill, leg, target, deadline)
        except BaseException:
            self._discard(decode, leg.spec)
            raise
        return Placement(decode, prefill)

    def _link(self, worker_id: str) -> WorkerLink:
        try:
            return self._fleet.link(worker_id)
        except Unavailable as error:
            raise _Refused(worker_id) from error

    async def _reserve(
        self, decode: WorkerLink, leg: Placeable, deadline: Deadline
    ) -> worker_pb2.TransferTarget:
        async with self._subscribed(decode, leg):
            lease = await decode.reserve(leg.spec, deadline)
        return worker_pb2.TransferTarget(
            address=decode.address,
            lease_id=lease.lease_id,
            epoch=lease.epoch,
            start_token=lease.num_cached_tokens,
        )

    async def _start(
        self,
        link: WorkerLink,
        leg: Placeable,
        target: worker_pb2.TransferTarget | None,
        deadline: Deadline,
    ) -> None:
        """A worker that dies before its answer may have died of this prompt: that counts as a
        start, so that the leg learns of the loss as of any other."""
        async with self._subscribed(link, leg):
            leg.computes_on(link)
            try:
                await link.prefill(leg.spec, target, deadline)
            except Unavailable:
                if not await link.lost_within(_LOSS_SHOWS_S):
                    raise

    @asynccontextmanager
    async def _subscribed(self, link: WorkerLink, leg: Placeable) -> AsyncIterator[None]:
        """The subscription outlives success only. After a refusal nothing is held there; after
        any other failure something may be."""
        try:
            link.subscribe(leg.spec.request_id, leg)
            yield
        except Overloaded as error:
            link.unsubscribe(leg.spec.request_id)
            raise _Refused(link.worker_id) from error
        except Unavailable as error:
            self._discard(link, leg.spec)
            raise _Refused(link.worker_id) from error
        except BaseException:
            self._discard(link, leg.spec)
            raise
