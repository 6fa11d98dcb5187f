"""Decisions, and a request whose workers take it, refuse it or let it wait as a script says."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from test_gateway_request import Link, World

from forebay.core.clock import now
from forebay.core.errors import ForebayError
from forebay.gateway.explanations import Explanations
from forebay.gateway.leg import Leg
from forebay.gateway.metrics import GatewayMetrics
from forebay.gateway.observed_events import observed_events
from forebay.gateway.observer import Observer, SpanSink
from forebay.gateway.placement import Placement
from forebay.gateway.request import GatewayRequest
from forebay.gateway.timeline import RequestTimeline
from forebay.router.view import Candidates, Decision


def decision(
    decode: str = "decode",
    prefill: str | None = "prefill",
    scores: Mapping[str, float] | None = None,
    matched: Mapping[str, int] | None = None,
    **fields: Any,
) -> Decision:
    """`scores` names all candidates, infinite ones could not be chosen."""
    scores = {"prefill": 30.0, "decode": 64.0} if scores is None else scores
    matched = matched or {}
    candidates = Candidates(
        tuple(scores),
        np.arange(len(scores)),
        np.array(list(scores.values()), np.float64),
        np.array([matched.get(worker, 0) for worker in scores], np.float64),
    )
    return Decision(
        decode=decode,
        prefill=prefill,
        candidates=candidates,
        **{"has_room": True, "num_compute_tokens": 3, **fields},
    )


@dataclass(frozen=True, slots=True)
class Step:
    """What a try meets: `wait_s` passes, then the workers chosen refuse it, or have no room, or
    take it. They answer after 10 and 20 ms."""

    wait_s: float = 0.0
    refused_by: str | None = None
    has_room: bool = True
    local: bool = False
    error: ForebayError | None = None
    degraded: bool = False


class PlacedWorld(World):
    """A World that marks timelines as a Placer does: each placement goes through `steps` until one
    succeeds, and after the last of them succeeds at once."""

    def __init__(self, *steps: Step, **how: Any) -> None:
        super().__init__(**how)
        self.steps = deque(steps)

    async def place(self, leg: Leg, *deadlines: Any, **how: Any) -> Placement:
        while True:
            step = self.steps.popleft() if self.steps else Step()
            await asyncio.sleep(step.wait_s)
            if step.error is not None:
                raise step.error
            prefill = None if step.local else "prefill"
            chosen = decision(prefill=prefill, has_room=step.has_room)
            leg.timeline.routed(chosen, 0.001, degraded=step.degraded)
            if not step.has_room:
                continue
            await asyncio.sleep(0.01)
            if step.refused_by is not None:
                leg.timeline.refused(step.refused_by)
                continue
            if prefill is not None:
                leg.timeline.reserved("decode")
                await asyncio.sleep(0.01)
            leg.timeline.accepted(prefill or "decode")
            placement = await super().place(leg, *deadlines, **how)
            return Placement(placement.decode, None if step.local else placement.prefill)

    async def send_after(self, seconds: float, leg: Leg, count: int, *, choice: int = 0) -> None:
        await asyncio.sleep(seconds)
        self.send(leg, count, choice=choice)


class Reader:
    """Reads a request as an edge does."""

    def __init__(self, request: GatewayRequest, spans: SpanSink | None = None) -> None:
        self.timeline: RequestTimeline = request.timeline
        self.explanations = Explanations(10)
        self.error: ForebayError | None = None
        observer = Observer(GatewayMetrics(), self.explanations, spans)
        self._events = observed_events(
            request,
            model="sim",
            num_choices=len(request.timeline.choices),
            observer=observer,
            arrived_at=now() - 0.5,
            traceparent="",
        )
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for _ in self._events:
                pass
        except ForebayError as error:
            self.error = error
        finally:
            await self._events.aclose()

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def done(self) -> None:
        await asyncio.wait_for(self.task, 100)

    def phases(self) -> list[tuple[str, int | None, float, float]]:
        """Name, leg, begin and duration in milliseconds since the request's arrival."""
        arrived_at = self.timeline.arrived_at
        return [
            (
                span.phase.value,
                span.leg,
                round((span.began_at - arrived_at) * 1000, 3),
                round((span.ended_at - span.began_at) * 1000, 3),
            )
            for span in self.timeline.spans()
        ]


__all__ = ["Link", "PlacedWorld", "Reader", "Step", "decision"]
