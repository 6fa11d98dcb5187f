"""One try at running some choices of a request on workers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from forebay.core.clock import Deadline
from forebay.core.errors import DeadlineExceeded, ForebayError
from forebay.gateway.placement import Placement, Placer
from forebay.gateway.timeline import LegTimeline
from forebay.gateway.worker_link import Blame, Exposure, WorkerLink
from forebay.rpc.v1 import worker_pb2


@dataclass(frozen=True, slots=True)
class Delivered:
    """Tokens, or a choice's end."""

    leg: Leg
    output: worker_pb2.SequenceOutput


@dataclass(frozen=True, slots=True)
class Broken:
    """A worker that the leg needs is lost."""

    leg: Leg
    link: WorkerLink
    blame: Blame


@dataclass(frozen=True, slots=True)
class Stranded:
    """The leg found no workers."""

    leg: Leg
    error: ForebayError


Signal = Delivered | Broken | Stranded


class Signals:
    """What the legs of one request report, in the order of arrival."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Signal] = asyncio.Queue()

    def put(self, signal: Signal) -> None:
        self._queue.put_nowait(signal)

    async def next(self, deadline: Deadline) -> Signal:
        """Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout(deadline.remaining_s()):
                return await self._queue.get()
        except TimeoutError:
            raise DeadlineExceeded("the request's deadline passed while it was decoded") from None


class Leg:
    """Implements `Inbox`. `number` counts the request's legs from 0; `spec` is this leg's own:
    every leg has another wire id. Until the decode worker goes on and no first token is missing, a
    leg needs both its workers."""

    def __init__(
        self,
        request_id: str,
        number: int,
        model_key: str,
        spec: worker_pb2.SequenceSpec,
        choices: Iterable[int],
        signals: Signals,
        timeline: LegTimeline,
        *,
        on_probation: bool = False,
    ) -> None:
        self.request_id = request_id
        self.number = number
        self.model_key = model_key
        self.spec = spec
        self.choices = tuple(choices)
        self.timeline = timeline
        self.on_probation = on_probation
        self.placement: Placement | None = None
        self._signals = signals
        self._held: list[tuple[WorkerLink, worker_pb2.SequenceOutput | Blame]] = []
        self._computing: WorkerLink | None = None
        self._awaiting_first = set(self.choices)
        self._decode_began = False
        self._noticed = asyncio.Event()

    @property
    def num_tokens(self) -> int:
        """To compute before the next one can be sampled."""
        return len(self.spec.prompt_token_ids) + len(self.spec.generated_token_ids)

    @property
    def links(self) -> tuple[WorkerLink, ...]:
        return () if self.placement is None else self.placement.links

    @property
    def is_settled(self) -> bool:
        """Whether nobody but the decode worker can still hold anything of it."""
        return self.placement is None or self.placement.prefill is None or self._decode_began

    async def place(
        self,
        placer: Placer,
        deadline: Deadline,
        queue_deadline: Deadline,
        *,
        avoid: frozenset[str] = frozenset(),
        urgent: bool = False,
    ) -> None:
        """Returns when the workers have it. Raises what `Placer.place` raises."""
        self.placement = await placer.place(
            self, deadline, queue_deadline, avoid=avoid, urgent=urgent
        )
        decode, prefill = self.placement.decode, self.placement.prefill
        self.timeline.placed(decode.worker_id, None if prefill is None else prefill.worker_id)
        held, self._held = self._held, []
        for link, item in held:
            if isinstance(item, Blame):
                self.lose(link, item)
            else:
                self.deliver(link, item)

    async def first_sign(self, deadline: Deadline) -> None:
        """Returns when the placed leg has had a token, or has broken."""
        try:
            async with asyncio.timeout(deadline.remaining_s()):
                await self._noticed.wait()
        except TimeoutError:
            return

    def computes_on(self, link: WorkerLink) -> None:
        """`link` is about to get the prompt."""
        self._computing = link

    def deliver(self, link: WorkerLink, output: worker_pb2.SequenceOutput) -> None:
        if self.placement is None:
            self._held.append((link, output))
            return
        if output.attempt != self.spec.attempt or output.choice not in self.choices:
            return
        if not output.token_ids and not self._needs(link):
            return  # a failure that no longer matters
        if output.offset == len(self.spec.generated_token_ids):
            self._awaiting_first.discard(output.choice)
        self._mark(link, output)
        if not self._awaiting_first:
            self._computing = self.placement.decode
        self._noticed.set()
        self._signals.put(Delivered(self, output))

    def _mark(self, link: WorkerLink, output: worker_pb2.SequenceOutput) -> None:
        assert self.placement is not None
        if output.token_ids and self.timeline.first_token_at is None:
            self.timeline.first_token()
        if link is self.placement.decode and not self._decode_began:
            self._decode_began = True
            self.timeline.decode_began()

    def exposure(self, link: WorkerLink) -> Exposure:
        if link is not self._computing:
            return Exposure.NONE
        if self._decode_began:
            return Exposure.PROVEN
        return Exposure.ON_PROBATION if self.on_probation else Exposure.UNPROVEN

    def lose(self, link: WorkerLink, blame: Blame) -> None:
        if self.placement is None:
            self._held.append((link, blame))
            return
        if self._needs(link):
            self._noticed.set()
            self._signals.put(Broken(self, link, blame))

    def _needs(self, link: WorkerLink) -> bool:
        assert self.placement is not None
        if link is self.placement.decode:
            return True
        done_with_prefill = self._decode_began and not self._awaiting_first
        return link is self.placement.prefill and not done_with_prefill
