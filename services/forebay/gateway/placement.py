"""Finds a leg its workers: route, reserve, prefill, in one attempt that leaves nothing behind when
it fails."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from forebay.admission.queue import AdmissionQueue, NoPlace
from forebay.core import clock
from forebay.core.clock import Deadline
from forebay.core.errors import Overloaded, Unavailable
from forebay.gateway.fleet import Fleet
from forebay.gateway.router import Router
from forebay.gateway.timeline import LegTimeline
from forebay.gateway.worker_link import Inbox, WorkerLink
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
    """What is to be placed; it gets the workers' outputs."""

    model_key: str
    spec: worker_pb2.SequenceSpec
    choices: tuple[int, ...]
    timeline: LegTimeline

    def computes_on(self, link: WorkerLink) -> None: ...


class _Refused(Exception):
    """A worker did not take the leg, for want of room or life."""

    def __init__(self, worker_id: str) -> None:
        super().__init__(worker_id)
        self.worker_id = worker_id


@dataclass(slots=True, eq=False)
class _Search:
    """One leg's way to its place. order: its place in the line, the lower the sooner."""

    leg: Placeable
    deadline: Deadline
    avoid: frozenset[str]
    order: tuple[int, int]
    tokens: list[int] = field(init=False)
    hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        spec = self.leg.spec
        self.tokens = [*spec.prompt_token_ids, *spec.generated_token_ids]


class Placer:
    """`discard(link, spec)` ends an attempt on a worker in the background."""

    def __init__(
        self,
        fleet: Fleet,
        router: Router,
        queue: AdmissionQueue,
        discard: Callable[[WorkerLink, worker_pb2.SequenceSpec], None],
    ) -> None:
        self._fleet = fleet
        self._router = router
        self._queue = queue
        self._discard = discard
        self._num_placed = 0

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
        self._num_placed += 1
        search = _Search(leg, deadline, avoid, (0 if urgent else 1, self._num_placed))

        async def attempt() -> Placement | NoPlace:
            return await self._attempt(search)

        def may_try() -> bool:
            return self._router.may_try(search)

        try:
            return await self._queue.admit(attempt, queue_deadline, urgent=urgent, may_try=may_try)
        except Overloaded as error:
            deadline.check("it waited for a worker")
            if not self._router.can_serve(leg.model_key):
                raise Unavailable("no worker is there for this model") from error
            raise
        finally:
            self._router.stop_waiting(search)

    async def _attempt(self, search: _Search) -> Placement | NoPlace:
        """Tries workers until one takes the leg, or the one that should has no room yet."""
        refused: frozenset[str] = frozenset()
        leg = search.leg
        while True:
            decision = self._choose(search, refused)
            if decision is None:
                return NoPlace.NOBODY_PASSES
            if not decision.has_room:
                self._router.wait(search, search.order, decision, search.hashes)
                return NoPlace.ASIDE
            search.deadline.check("it waited for a worker")
            leg.spec.attempt += 1
            leg.spec.timeout_ms = search.deadline.remaining_ms()
            self._router.stop_waiting(search)
            self._router.expect(decision, search.hashes)
            try:
                return await self._settle(decision, leg, search.deadline)
            except _Refused as refusal:
                leg.timeline.refused(refusal.worker_id)
                refused |= {refusal.worker_id}

    def _choose(self, search: _Search, refused: frozenset[str]) -> Decision | None:
        """The worker that the request waits for must not count it as work before it."""
        began_at = clock.now()
        router, leg = self._router, search.leg
        if not search.hashes:
            search.hashes = router.hashes(leg.model_key, leg.spec.cache_root, search.tokens)
        for excluded in dict.fromkeys((refused | search.avoid, refused)):
            route = RouteRequest(
                leg.spec.request_id, leg.model_key, len(search.tokens), search.hashes, excluded
            )
            decision = router.choose(route, search.order)
            if decision is not None:
                seconds = clock.now() - began_at
                leg.timeline.routed(decision, seconds, degraded=router.degraded)
                return decision
        return None

    async def _settle(self, decision: Decision, leg: Placeable, deadline: Deadline) -> Placement:
        """Raises _Refused, and then holds nothing anywhere."""
        decode = self._link(decision.decode)
        num_choices = len(leg.choices)
        if decision.prefill is None:
            self._fleet.expect(decode, num_choices, decision.num_compute_tokens)
            await self._start(decode, leg, None, decision, deadline)
            return Placement(decode, None)
        prefill = self._link(decision.prefill)
        self._fleet.expect(prefill, num_choices, decision.num_compute_tokens)
        self._fleet.expect(decode, num_choices, 0)
        target = await self._reserve(decode, leg, deadline)
        leg.timeline.reserved(decode.worker_id)
        try:
            await self._start(prefill, leg, target, decision, deadline)
        except BaseException:
            self._discard(decode, leg.spec)
            raise
        return Placement(decode, prefill)

    def _source(self, decision: Decision) -> worker_pb2.PullSource | None:
        """None as well when that worker has gone since: the prompt is computed."""
        if decision.pull_from is None:
            return None
        try:
            link = self._fleet.link(decision.pull_from)
        except Unavailable:
            return None
        held = decision.matched[decision.pull_from]
        return worker_pb2.PullSource(
            address=link.address, epoch=link.description.epoch, num_tokens=held
        )

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
            kv_codecs=decode.description.kv_codecs,
        )

    async def _start(
        self,
        link: WorkerLink,
        leg: Placeable,
        target: worker_pb2.TransferTarget | None,
        decision: Decision,
        deadline: Deadline,
    ) -> None:
        """A worker that dies before its answer may have died of this prompt: that counts as a
        start, so that the leg learns of the loss as of any other."""
        async with self._subscribed(link, leg):
            leg.computes_on(link)
            try:
                await link.prefill(leg.spec, target, deadline, self._source(decision))
                leg.timeline.accepted(link.worker_id)
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
