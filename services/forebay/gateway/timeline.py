"""What happened to one request, and when: marks in seconds on the loop's clock, ids and numbers.
Nothing of its text ever comes in here, so whatever is made of it can be shown, kept and exported.

    prepare | queue | route | prefill | transfer | decode
    arrived   prepared                                        body read, prompt tokenized
              ^ leg begins                                    waits for a place on workers
                      ^ routed (the try that succeeded)       chosen, reserved, sent
                              ^ placed                        a worker computes the prompt
                                        ^ first token         pools only: KV still on its way
                                                   ^ decode worker's first token ... ended
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np

from forebay.core.clock import now
from forebay.router.view import Candidates, Decision

RUNNING = "running"
COMPLETED = "completed"

_KEPT_ENDS = 4
"""Of a leg's tries the first and the last this many are kept."""
_KEPT_LEG_ENDS = 16
"""Of a request's legs likewise."""
_NOBODY = Candidates((), np.empty(0, np.intp), np.empty(0), np.empty(0))


class Phase(Enum):
    PREPARE = "prepare"
    QUEUE = "queue"
    ROUTE = "route"
    PREFILL = "prefill"
    TRANSFER = "transfer"
    DECODE = "decode"


class LegEnd(Enum):
    """finished: all its choices are complete. lost: a worker that it needed was. returned: a worker
    handed it back (it drains, or KV did not arrive). left: the request ended before it."""

    FINISHED = "finished"
    LOST = "lost"
    RETURNED = "returned"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Span:
    """`leg` is None before the first one; `worker_id`: where it happened, if at one place."""

    phase: Phase
    leg: int | None
    began_at: float
    ended_at: float
    worker_id: str | None = None


@dataclass(slots=True)
class Attempt:
    """One choice of workers and how these took it. `decision_s`: how long choosing took. One that
    came out the same again and again while there was no room is counted in `num_looks`, the last
    one kept, `first_at` the first one's time."""

    decision: Decision
    decision_s: float
    degraded: bool
    routed_at: float
    first_at: float
    num_looks: int = 1
    reserved_at: float | None = None
    accepted_at: float | None = None
    refused_at: float | None = None
    refused_by: str | None = None

    @property
    def is_open(self) -> bool:
        """The workers chosen were asked, and none has refused."""
        return self.decision.has_room and self.refused_at is None

    def waits_as(self, decision: Decision) -> bool:
        """Whether it waited for the place that `decision` names, too."""
        own = self.decision
        return not own.has_room and (own.decode, own.prefill) == (decision.decode, decision.prefill)

    def drop_scores(self) -> None:
        self.decision = replace(self.decision, candidates=_NOBODY)


@dataclass(slots=True)
class ChoiceTimeline:
    """`first_token_at`: when the client could have its first token."""

    first_token_at: float | None = None
    ended_at: float | None = None
    num_tokens: int = 0
    finish_reason: str | None = None


class LegTimeline:
    """`continues`: the number of the leg that it goes on from, `num_tokens` in."""

    def __init__(
        self, number: int, choices: tuple[int, ...], continues: int | None, num_tokens: int
    ) -> None:
        self.number = number
        self.choices = choices
        self.continues = continues
        self.num_tokens = num_tokens
        self.began_at = now()
        self.attempts: list[Attempt] = []
        self.num_attempts = 0
        self.decode: str | None = None
        self.prefill: str | None = None
        self.placed_at: float | None = None
        self.first_token_at: float | None = None
        self.decode_began_at: float | None = None
        self.ended_at: float | None = None
        self.end: LegEnd | None = None
        self.lost_worker: str | None = None

    def routed(self, decision: Decision, seconds: float, *, degraded: bool = False) -> None:
        """`decision` was just made, which took `seconds`. Only the latest keeps its scores."""
        self.num_attempts += 1
        attempt = Attempt(decision, seconds, degraded, now(), now())
        if self.attempts:
            last = self.attempts[-1]
            if last.waits_as(decision) and not decision.has_room:
                attempt.first_at = last.first_at
                attempt.num_looks += last.num_looks
                self.attempts.pop()
            last.drop_scores()
        if len(self.attempts) == 2 * _KEPT_ENDS:
            del self.attempts[_KEPT_ENDS]
        self.attempts.append(attempt)

    def reserved(self, worker_id: str) -> None:
        """The decode worker holds blocks for it."""
        self._open_attempt(worker_id).reserved_at = now()

    def accepted(self, worker_id: str) -> None:
        """The worker that computes the prompt has it."""
        self._open_attempt(worker_id).accepted_at = now()

    def refused(self, worker_id: str) -> None:
        """The try is over: this worker had no room after all, or is gone."""
        attempt = self.attempts[-1]
        attempt.refused_at, attempt.refused_by = now(), worker_id

    def placed(self, decode: str, prefill: str | None) -> None:
        """Its workers have it; `prefill` is None where `decode` computes the prompt itself."""
        self.decode, self.prefill, self.placed_at = decode, prefill, now()

    def first_token(self) -> None:
        self.first_token_at = now()

    def decode_began(self) -> None:
        """The decode worker has sent a token."""
        self.decode_began_at = now()

    def broke(self, end: LegEnd, worker_id: str | None = None) -> None:
        """It goes on in other legs. `worker_id`: the one that is lost, if one is."""
        self._close(end)
        self.lost_worker = worker_id

    def left(self, *, finished: bool) -> None:
        """Nobody works on it any more; without effect on one that broke."""
        self._close(LegEnd.FINISHED if finished else LegEnd.LEFT)

    def spans(self, until: float) -> Iterator[Span]:
        """One after the other, without gaps, from its beginning to its end or to `until`."""
        end = until if self.ended_at is None else min(self.ended_at, until)
        starts = list(self._starts())
        for i, (phase, began_at, worker_id) in enumerate(starts):
            ended_at = starts[i + 1][1] if i + 1 < len(starts) else end
            if phase is Phase.PREFILL and self._has_nothing_to_decode:
                assert self.first_token_at is not None
                ended_at = self.first_token_at
            yield Span(phase, self.number, began_at, max(began_at, ended_at), worker_id)

    @property
    def _has_nothing_to_decode(self) -> bool:
        """Between pools: its first token was its last."""
        return (
            self.prefill is not None
            and self.first_token_at is not None
            and self.decode_began_at is None
            and self.end is LegEnd.FINISHED
        )

    def _starts(self) -> Iterator[tuple[Phase, float, str | None]]:
        yield Phase.QUEUE, self.began_at, None
        last = self.attempts[-1] if self.attempts else None
        if last is not None and last.is_open:
            yield Phase.ROUTE, max(self.began_at, last.routed_at - last.decision_s), None
        if self.placed_at is None:
            return
        yield Phase.PREFILL, self.placed_at, self.prefill or self.decode
        first_at = self.first_token_at
        if first_at is None or self._has_nothing_to_decode:
            return
        if self.prefill is None:
            yield Phase.DECODE, first_at, self.decode
            return
        yield Phase.TRANSFER, first_at, self.decode
        if self.decode_began_at is not None:
            yield Phase.DECODE, max(first_at, self.decode_began_at), self.decode

    def _open_attempt(self, worker_id: str) -> Attempt:
        attempt = self.attempts[-1]
        assert worker_id in (attempt.decision.decode, attempt.decision.prefill)
        return attempt

    def _close(self, end: LegEnd) -> None:
        if self.end is None:
            self.end, self.ended_at = end, now()


@dataclass(slots=True, eq=False)
class RequestTimeline:
    """`request_id` is the client's name for it, `internal_id` the workers'; `traceparent`: the
    client's W3C trace context as it came, or empty. Made when the request has been tokenized."""

    request_id: str
    internal_id: str
    model: str
    num_prompt_tokens: int
    num_choices: int
    traceparent: str = ""
    prepared_at: float = field(default_factory=now)
    arrived_at: float = field(default_factory=now)
    ended_at: float | None = None
    outcome: str = RUNNING
    num_cached_tokens: int = 0
    legs: list[LegTimeline] = field(default_factory=list)
    num_legs: int = 0
    choices: list[ChoiceTimeline] = field(init=False)

    def __post_init__(self) -> None:
        self.choices = [ChoiceTimeline() for _ in range(self.num_choices)]

    def arrived(self, at: float, traceparent: str) -> None:
        self.arrived_at, self.traceparent = min(at, self.prepared_at), traceparent

    def new_leg(
        self, choices: Iterable[int], *, continues: int | None = None, num_tokens: int = 0
    ) -> LegTimeline:
        """The first one has waited since the request was prepared."""
        leg = LegTimeline(self.num_legs, tuple(choices), continues, num_tokens)
        if continues is None:
            leg.began_at = self.prepared_at
        self.num_legs += 1
        if len(self.legs) == 2 * _KEPT_LEG_ENDS:
            del self.legs[_KEPT_LEG_ENDS]
        self.legs.append(leg)
        return leg

    def got_tokens(self, choice: int, num_tokens: int, finish_reason: str | None) -> None:
        """`num_tokens`: of that choice so far."""
        mark = self.choices[choice]
        mark.num_tokens = num_tokens
        if mark.first_token_at is None and num_tokens:
            mark.first_token_at = now()
        if finish_reason is not None:
            mark.ended_at, mark.finish_reason = now(), finish_reason

    def ended(self, outcome: str) -> None:
        """`outcome`: COMPLETED, or the code of the error. The first one counts."""
        if self.ended_at is None:
            self.ended_at, self.outcome = now(), outcome

    @property
    def first_token_at(self) -> float | None:
        return min(
            (c.first_token_at for c in self.choices if c.first_token_at is not None), default=None
        )

    @property
    def until(self) -> float:
        return now() if self.ended_at is None else self.ended_at

    def spans(self) -> list[Span]:
        """In the order of the legs. A request under way has its last ones end now."""
        until = self.until
        spans = [Span(Phase.PREPARE, None, self.arrived_at, self.prepared_at)]
        for leg in self.legs:
            spans.extend(leg.spans(until))
        return spans
