"""The public gRPC service, with health and reflection, for the same Generator as the HTTP edge."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from typing import NoReturn, TypeAlias

import grpc

from forebay.core.clock import now
from forebay.core.errors import (
    DeadlineExceeded,
    ForebayError,
    InternalError,
    InvalidRequest,
    NotFound,
)
from forebay.core.finish import FinishReason
from forebay.gateway.explain_headers import (
    EXPLAIN,
    ROUTE,
    TIMELINE,
    TRACEPARENT,
    checked_traceparent,
    route_header,
    timeline_header,
    wants_explanation,
)
from forebay.gateway.failure_log import log_failure
from forebay.gateway.generation import ChoiceEnd, Chunk, Generator
from forebay.gateway.grpc_requests import (
    chunk_response,
    complete_response,
    generation_request,
    model_card,
)
from forebay.gateway.observed_events import Events, observed_events
from forebay.gateway.observer import Observer
from forebay.gateway.openai_responses import MAX_ERROR_CHARS
from forebay.gateway.timeline import RequestTimeline
from forebay.rpc.grpc_listener import (
    add_health_and_reflection,
    new_health_servicer,
    set_serving,
)
from forebay.rpc.status import mapped, trailing_metadata
from forebay.rpc.v1 import inference_pb2 as pb
from forebay.rpc.v1 import inference_pb2_grpc

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name

_DEADLINE_MARGIN_S = 5.0
"""As on the HTTP edge: for the generation's own deadline error to get out."""
_LAST_WORD_S = 1.0
"""How long a reader gets to take the error event before the status follows without it."""

GenerateContext: TypeAlias = "grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]"
ListContext: TypeAlias = "grpc.aio.ServicerContext[pb.ListModelsRequest, pb.ListModelsResponse]"


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, generator: Generator, observer: Observer, max_life_s: float) -> None:
        self._generator = generator
        self._observer = observer
        self._max_life_s = max_life_s

    # A coroutine that writes, where the generated class has a generator: cancelling it always
    # strikes inside it, so that the generation is closed at once and never left to the collector.
    async def Generate(  # type: ignore[override]
        self, request: pb.GenerateRequest, context: GenerateContext
    ) -> None:
        answer = _Answer(context, request.request_id)
        try:
            async with asyncio.timeout(self._max_life_s + _DEADLINE_MARGIN_S):
                await self._answer(request, answer)
            return
        except ForebayError as error:
            failure = error
        except TimeoutError:
            failure = DeadlineExceeded("the request's deadline passed")
        except Exception as error:
            log_failure(answer.request_id, error)
            failure = InternalError("the gateway failed")
        await answer.fail(failure)

    async def _answer(self, request: pb.GenerateRequest, answer: _Answer) -> None:
        arrived_at = now()
        try:
            wanted = generation_request(request, answer.remaining_s())
            generation = self._generator.prepare(wanted)
        except ForebayError as error:
            self._observer.metrics.count_error(error)
            raise
        answer.request_id = generation.request_id
        if wants_explanation(answer.header(EXPLAIN)):
            answer.explained = [generation.timeline]
        events = observed_events(
            generation,
            model=wanted.model,
            num_choices=wanted.params.n,
            observer=self._observer,
            arrived_at=arrived_at,
            traceparent=checked_traceparent(answer.header(TRACEPARENT)),
        )
        async with aclosing(events):
            await answer.stream(events, logprobs=wanted.params.top_logprobs is not None)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: ListContext
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[model_card(card) for card in self._generator.models()])


class _Answer:
    """One call's side towards its client."""

    def __init__(self, context: GenerateContext, request_id: str) -> None:
        self.request_id = request_id
        self.explained: list[RequestTimeline] = []
        self._context = context

    def header(self, name: str) -> str:
        """The first one of that name in the call's metadata; empty where it has none."""
        for key, value in self._context.invocation_metadata() or ():
            if key == name and isinstance(value, str):
                return value
        return ""

    def remaining_s(self) -> float | None:
        remaining: float | None = self._context.time_remaining()
        return remaining

    async def stream(self, events: Events, *, logprobs: bool) -> None:
        reasons: dict[int, FinishReason] = {}
        told = not self.explained
        async for event in events:
            if not told:
                told = True
                route = route_header(self.explained).decode("ascii")
                await self._context.send_initial_metadata(((ROUTE, route),))
            if isinstance(event, Chunk):
                response = chunk_response(self.request_id, event, logprobs=logprobs)
                await self._context.write(response)
            elif isinstance(event, ChoiceEnd):
                reasons[event.choice] = event.reason
            else:
                self._context.set_trailing_metadata(self._timeline())
                response = complete_response(self.request_id, reasons, event.usage)
                await self._context.write(response)

    async def fail(self, error: ForebayError) -> NoReturn:
        status = mapped(error).grpc
        message = error.message[:MAX_ERROR_CHARS]
        param = error.param if isinstance(error, InvalidRequest | NotFound) else None
        event = pb.GenerateError(code=status.value[0], message=message, param=param or "")
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORD_S):
                await self._context.write(
                    pb.GenerateResponse(request_id=self.request_id, error=event)
                )
        metadata = (*trailing_metadata(error), *self._timeline())
        await self._context.abort(status, message, metadata)

    def _timeline(self) -> tuple[tuple[str, str], ...]:
        if not self.explained:
            return ()
        return ((TIMELINE, timeline_header(self.explained).decode("ascii")),)


def add_to_server(
    server: grpc.aio.Server, generator: Generator, observer: Observer, *, max_life_s: float
) -> Health:
    """Adds InferenceService, grpc.health.v1 and reflection. `max_life_s`: a request's, at most."""
    servicer = InferenceServicer(generator, observer, max_life_s)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    health = Health(generator)
    add_health_and_reflection(server, health.servicer, [SERVICE_NAME])
    return health


class Health:
    """grpc.health.v1 from the generator's readiness, for the server and for its service."""

    def __init__(self, generator: Generator) -> None:
        self.servicer = new_health_servicer()
        self._generator = generator

    async def follow(self, poll_s: float) -> None:
        """Runs until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(poll_s)

    async def refresh(self) -> None:
        await set_serving(self.servicer, [SERVICE_NAME], self._generator.ready)

    async def drain(self) -> None:
        """NOT_SERVING from now on, whatever `refresh` finds."""
        await self.servicer.enter_graceful_shutdown()
