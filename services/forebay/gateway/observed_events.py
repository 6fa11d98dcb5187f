"""The one way both edges read a generation: checked, measured and always closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from forebay.core.clock import now
from forebay.core.errors import ForebayError, InternalError, RequestCancelled
from forebay.core.finish import FinishReason
from forebay.gateway.generation import (
    ChoiceEnd,
    Chunk,
    Completion,
    Event,
    Generation,
    Migrated,
    Placed,
    Usage,
)
from forebay.gateway.observer import Observer
from forebay.gateway.timeline import COMPLETED
from forebay.rpc.status import mapped

_MERGE_BUFFER = 64
"""Events of several prompts that may wait for their reader."""

Events = AsyncGenerator[Event, None]


async def observed_events(
    generation: Generation,
    *,
    model: str,
    num_choices: int,
    observer: Observer,
    arrived_at: float,
    traceparent: str,
) -> Events:
    """The events of `generation`, each choice ended once and a Completion last. Raises
    InternalError where they are not so, or where a choice was aborted without an error: an
    answer that was cut must never look like one that is whole. `model` must be a served one."""
    record = observer.metrics.begin(model, arrived_at)
    timeline = generation.timeline
    timeline.arrived(arrived_at, traceparent)
    observer.begin(timeline)
    check = _Check(num_choices)
    completion: Completion | None = None
    completed = False
    failure: ForebayError | None = None
    try:
        async with aclosing(generation.events()) as events:
            async for event in events:
                if isinstance(event, Placed):
                    record.placed(now())
                    continue
                if isinstance(event, Migrated):
                    record.migrated()
                    continue
                check.next(event)
                if isinstance(event, Completion):
                    completion = event
                    continue
                if isinstance(event, Chunk) and event.tokens:
                    record.tokens(event.choice, len(event.tokens), now())
                yield event
        if completion is None:
            raise InternalError("the generation ended without a result")
        record.succeed(check.reasons[0], completion.usage, now())
        timeline.ended(COMPLETED)
        completed = True
        yield completion
    except ForebayError as error:
        failure = error
        raise
    except Exception:
        failure = InternalError("the gateway failed")
        raise
    except BaseException:
        failure = None if completed else RequestCancelled("the client left")
        raise
    finally:
        if failure is not None:
            record.fail(failure)
            timeline.ended(mapped(failure).grpc.name.lower())
        record.end()
        observer.end(timeline)


class _Check:
    """Raises InternalError at the first event that cannot follow those before it."""

    def __init__(self, num_choices: int) -> None:
        self.reasons: dict[int, FinishReason] = {}
        self._num_choices = num_choices
        self._completed = False

    def next(self, event: Event) -> None:
        if self._completed:
            raise InternalError("the generation went on after its result")
        if isinstance(event, Chunk):
            if event.choice in self.reasons:
                raise InternalError(f"choice {event.choice} went on after its end")
        elif isinstance(event, ChoiceEnd):
            if event.reason in (FinishReason.ABORT, FinishReason.ERROR):
                raise InternalError(f"choice {event.choice} was cut short")
            if event.choice in self.reasons:
                raise InternalError(f"choice {event.choice} ended twice")
            self.reasons[event.choice] = event.reason
        else:
            if len(self.reasons) != self._num_choices:
                raise InternalError("the generation has a result, but not for every choice")
            self._completed = True


async def merged_events(sources: Sequence[Events], num_choices: int) -> Events:
    """Several generations of one request as one, run at once: choice c of source s becomes
    s * num_choices + c, and the usages are added up. Closing it closes them all."""
    queue: asyncio.Queue[Event | Exception] = asyncio.Queue(_MERGE_BUFFER)
    pumps = [
        asyncio.create_task(_pump(source, index * num_choices, queue))
        for index, source in enumerate(sources)
    ]
    usages: list[Usage] = []
    try:
        while len(usages) < len(sources):
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Completion):
                usages.append(item.usage)
            else:
                yield item
        yield Completion(
            Usage(
                prompt_tokens=sum(usage.prompt_tokens for usage in usages),
                completion_tokens=sum(usage.completion_tokens for usage in usages),
                cached_tokens=sum(usage.cached_tokens for usage in usages),
            )
        )
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(source: Events, offset: int, queue: asyncio.Queue[Event | Exception]) -> None:
    async with aclosing(source):
        try:
            async for event in source:
                if isinstance(event, Chunk):
                    await queue.put(Chunk(event.choice + offset, event.text, event.tokens))
                elif isinstance(event, ChoiceEnd):
                    await queue.put(ChoiceEnd(event.choice + offset, event.reason))
                else:
                    await queue.put(event)
        except Exception as error:
            await queue.put(error)
