"""One request from its placement to its last token: the state machine behind both edges.

It runs in legs. The first has all choices; when a leg's worker is lost, hangs or hands its streams
back, each choice goes on in a new leg from the prompt and its tokens so far. Everything that makes
up the answer (seed and position, detokenizer, stop strings, usage) is here or a function of the
tokens, so the client sees a pause and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator

from forebay.core.clock import Deadline
from forebay.core.errors import ForebayError, InternalError, Unavailable, WorkerLost
from forebay.core.finish import FinishReason
from forebay.core.sampling import SamplingParams
from forebay.gateway.choice import ChoiceText
from forebay.gateway.dispatch import Dispatcher
from forebay.gateway.fleet import ServedModel
from forebay.gateway.generation import Completion, Event, Migrated, Placed, Progress, Usage
from forebay.gateway.leg import Broken, Delivered, Leg, Signals, Stranded
from forebay.gateway.poison import poisoned
from forebay.gateway.setbacks import MAX_DEATHS, Deaths, Pace
from forebay.gateway.timeline import LegEnd, RequestTimeline
from forebay.gateway.worker_link import Blame, WorkerLink
from forebay.rpc.conversions import finish_from_proto
from forebay.rpc.v1 import worker_pb2

log = logging.getLogger(__name__)

PROBATION_S = 20.0
"""How long one suspect may keep the others waiting once it has its workers."""


class GatewayRequest:
    """Implements `Generation`. `spec`: what every leg's own spec begins as."""

    def __init__(
        self,
        *,
        spec: worker_pb2.SequenceSpec,
        params: SamplingParams,
        served: ServedModel,
        client_request_id: str,
        fingerprint: str,
        deadline: Deadline,
        queue_timeout_s: float,
        dispatcher: Dispatcher,
    ) -> None:
        self._spec = spec
        self._served = served
        self._client_request_id = client_request_id
        self._fingerprint = fingerprint
        self._deadline = deadline
        self._queue_timeout_s = queue_timeout_s
        self._dispatcher = dispatcher
        self._choices = [ChoiceText(i, served.tokenizer, params) for i in range(params.n)]
        self._num_migrations = [0] * params.n
        self._signals = Signals()
        self._legs: list[Leg] = []
        self._num_legs = 0
        self._placing: dict[asyncio.Task[None], None] = {}
        self.timeline = RequestTimeline(
            client_request_id,
            spec.request_id,
            served.info.id,
            num_prompt_tokens=len(spec.prompt_token_ids),
            num_choices=params.n,
        )
        self._pace = Pace()
        self._deaths = Deaths()

    @property
    def request_id(self) -> str:
        return self._client_request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._spec.prompt_token_ids)

    def token_text(self, token_id: int) -> str:
        return self._served.tokenizer.token_text(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return self._served.tokenizer.token_bytes(token_id)

    async def events(self) -> AsyncGenerator[Progress | Event, None]:
        leg = self._new_leg(tuple(range(len(self._choices))))
        try:
            queue_deadline = self._deadline.within(self._queue_timeout_s)
            await leg.place(self._dispatcher.placer, self._deadline, queue_deadline)
            yield Placed()
            while any(choice.finish is None for choice in self._choices):
                signal = await self._signals.next(self._deadline)
                if signal.leg not in self._legs:
                    continue
                if isinstance(signal, Stranded):
                    raise signal.error
                if isinstance(signal, Broken):
                    self._lose(signal)
                    yield Migrated()
                    continue
                for event in self._take(signal):
                    yield event
            yield Completion(self._usage())
        finally:
            for task in self._placing:
                task.cancel()
            for leg in list(self._legs):
                self._leave(leg)

    def _new_leg(
        self, choices: tuple[int, ...], *, after: Leg | None = None, on_probation: bool = False
    ) -> Leg:
        """`choices`: all that have no tokens yet, or a single one. `after`: the one that broke."""
        spec = worker_pb2.SequenceSpec()
        spec.CopyFrom(self._spec)
        if self._num_legs:
            spec.request_id = f"{self._spec.request_id}.{self._num_legs}"
        if len(choices) < len(self._choices):
            spec.choices.extend(choices)
        spec.generated_token_ids.extend(self._choices[choices[0]].token_ids)
        if spec.generated_token_ids and not spec.choices:
            spec.choices.extend(choices)
        leg = Leg(
            self._spec.request_id,
            self._num_legs,
            self._served.key,
            spec,
            choices,
            self._signals,
            self.timeline.new_leg(
                choices,
                continues=None if after is None else after.number,
                num_tokens=len(spec.generated_token_ids),
            ),
            on_probation=on_probation,
        )
        self._num_legs += 1
        self._legs.append(leg)
        return leg

    def _take(self, delivered: Delivered) -> Iterator[Progress | Event]:
        """Raises Unavailable when the request cannot go on."""
        leg, output = delivered.leg, delivered.output
        if self._choices[output.choice].finish is not None:
            return
        if finish_from_proto(output.finish_reason) is FinishReason.ERROR:
            error = Unavailable(output.error)
            if not output.resumable:
                raise error
            leg.timeline.broke(LegEnd.RETURNED)
            self._migrate(leg, error, avoid=leg.links)
            yield Migrated()
            return
        if output.offset == 0:
            timeline = self.timeline
            timeline.num_cached_tokens = max(timeline.num_cached_tokens, output.num_cached_tokens)
        choice = self._choices[output.choice]
        events = choice.accept(output)
        self.timeline.got_tokens(output.choice, len(choice.token_ids), choice.finish)
        yield from events
        if choice.finish is None:
            return
        if not self._unfinished(leg):
            self._leave(leg)
        elif choice.stopped_here:
            choice.stopped_here = False
            for link in leg.links:
                self._dispatcher.abort(link, leg.spec, (output.choice,))

    def _unfinished(self, leg: Leg) -> list[int]:
        return [i for i in leg.choices if self._choices[i].finish is None]

    def _lose(self, broken: Broken) -> None:
        if broken.blame is Blame.SOLE:
            self._deaths.note(broken.leg, broken.link, self._num_generated, self._num_legs)
        error = WorkerLost("a worker was lost with the request on it")
        broken.leg.timeline.broke(LegEnd.LOST, broken.link.worker_id)
        suspected = broken.blame is not Blame.NONE
        self._migrate(broken.leg, error, avoid=(broken.link,), suspected=suspected)

    async def _check_deaths(self) -> None:
        """Raises InvalidRequest for a request that workers die of. A link can be lost while its
        worker lives on; that is looked into when it matters."""
        deaths = self._deaths
        if len(deaths.links) < MAX_DEATHS:
            return
        deaths.links = [link for link in deaths.links if not await self._dispatcher.lives(link)]
        if len(deaths.links) >= MAX_DEATHS:
            self._dispatcher.poison.add(self._fingerprint)
            raise poisoned()

    def _migrate(
        self,
        leg: Leg,
        error: ForebayError,
        *,
        avoid: tuple[WorkerLink, ...],
        suspected: bool = False,
    ) -> None:
        """What fails again without progress is under suspicion as well. Raises `error` when the
        request has moved too often, or there is no time to."""
        unfinished = self._unfinished(leg)
        self._leave(leg)
        for i in unfinished:
            self._num_migrations[i] += 1
            if self._num_migrations[i] > self._dispatcher.max_migrations:
                raise error
        if self._dispatcher.closing:
            raise error
        log.info("%s goes on elsewhere: %s", leg.spec.request_id, error.message)
        delay_s = self._pace.broke(self._num_generated)
        on_probation = suspected or self._pace.num_fruitless > 1
        fresh = tuple(i for i in unfinished if not self._choices[i].token_ids)
        begun = [(i,) for i in unfinished if self._choices[i].token_ids]
        for choices in [fresh, *begun] if fresh else begun:
            for i in choices:
                self._choices[i].resume()
            successor = self._new_leg(choices, after=leg, on_probation=on_probation)
            workers = frozenset(link.worker_id for link in avoid)
            task = self._dispatcher.spawn(self._resume(successor, workers, delay_s))
            self._placing[task] = None
            task.add_done_callback(self._placing.pop)

    async def _resume(self, leg: Leg, avoid: frozenset[str], delay_s: float) -> None:
        try:
            await asyncio.sleep(delay_s)
            await self._check_deaths()
            if leg.on_probation:
                async with self._dispatcher.probation:
                    await self._place_again(leg, avoid)
                    await leg.first_sign(self._deadline.within(PROBATION_S))
            else:
                await self._place_again(leg, avoid)
        except ForebayError as error:
            self._signals.put(Stranded(leg, error))
        except Exception:
            log.exception("%s cannot be placed again", leg.spec.request_id)
            self._signals.put(Stranded(leg, InternalError("the request could not go on")))

    async def _place_again(self, leg: Leg, avoid: frozenset[str]) -> None:
        deadline = self._deadline
        await leg.place(self._dispatcher.placer, deadline, deadline, avoid=avoid, urgent=True)

    def _leave(self, leg: Leg) -> None:
        """Ends the leg wherever it may still hold something."""
        self._legs.remove(leg)
        ended = (self._choices[i] for i in leg.choices)
        finished = all(c.finish is not None and not c.stopped_here for c in ended)
        leg.timeline.left(finished=not self._unfinished(leg))
        for link in leg.links:
            link.unsubscribe(leg.spec.request_id)
            if not (finished and leg.is_settled):
                self._dispatcher.abort(link, leg.spec, ())

    @property
    def _num_generated(self) -> int:
        return sum(len(choice.token_ids) for choice in self._choices)

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self._num_generated,
            cached_tokens=self.timeline.num_cached_tokens,
        )
