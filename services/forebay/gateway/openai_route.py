"""One OpenAI-compatible route as a bare ASGI application: request in, JSON or event stream out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from forebay.core.errors import ForebayError, InternalError, Overloaded, Unavailable
from forebay.core.randomness import Rng
from forebay.core.settings import GatewaySettings
from forebay.gateway.exchange import Exchange
from forebay.gateway.exchanges import Exchanges
from forebay.gateway.explain_headers import (
    EXPLAIN,
    ROUTE,
    TIMELINE,
    TRACEPARENT,
    checked_traceparent,
    route_header,
    timeline_comment,
    timeline_header,
    wants_explanation,
)
from forebay.gateway.failure_log import log_failure
from forebay.gateway.generation import Completion, Generation, GenerationRequest, Generator
from forebay.gateway.observed_events import Events, merged_events, observed_events
from forebay.gateway.observer import Observer
from forebay.gateway.openai_requests import chat_request, completion_requests
from forebay.gateway.openai_responses import (
    Logprobs,
    chat_json,
    collect,
    completion_json,
    error_fields,
    error_json,
    to_json,
)
from forebay.gateway.openai_schema import ChatBody, CompletionBody, parse_body
from forebay.gateway.openai_stream import KEEP_ALIVE, StreamFormat, error_frame
from forebay.rpc.status import mapped

BODY_TIMEOUT_S = 30.0
_DEADLINE_MARGIN_S = 5.0
"""The generation's own deadline error has this long to reach the client before the edge cuts."""
_RETRY_AFTER_UNAVAILABLE_S = 1.0


@dataclass(frozen=True, slots=True)
class Edge:
    """What every route works with. `unix_time` gives whole seconds for `created`."""

    generator: Generator
    settings: GatewaySettings
    observer: Observer
    rng: Rng
    unix_time: Callable[[], int]
    exchanges: Exchanges


class GenerationRoute:
    """`chat` or plain completions."""

    def __init__(self, edge: Edge, *, chat: bool) -> None:
        self._edge = edge
        self._chat = chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        edge = self._edge
        exchange = Exchange(scope, receive, send, edge.rng.token("req"))
        try:
            edge.exchanges.add(exchange)
            raw = await exchange.read_body(edge.settings.max_body_kib * 1024, BODY_TIMEOUT_S)
            await exchange.run(
                self._answer(exchange, raw),
                timeout_s=edge.settings.request_timeout_s + _DEADLINE_MARGIN_S,
                keep_alive_s=edge.settings.keep_alive_s,
                keep_alive=KEEP_ALIVE,
            )
        except HTTPException as refusal:
            body = to_json(error_fields(refusal.detail, type_="invalid_request_error"))
            await exchange.respond(refusal.status_code, body, ((b"connection", b"close"),))
        except ForebayError as error:
            await _fail(exchange, error)
        except Exception as error:
            log_failure(exchange.request_id, error)
            await _fail(exchange, InternalError("the gateway failed"))
        finally:
            edge.exchanges.remove(exchange)

    async def _answer(self, exchange: Exchange, raw: bytes) -> None:
        try:
            body, requests = self._parse(raw, exchange.request_id)
            generations = [self._edge.generator.prepare(request) for request in requests]
        except ForebayError as error:
            self._edge.observer.metrics.count_error(error)
            raise
        if wants_explanation(exchange.header(EXPLAIN)):
            exchange.explained = [generation.timeline for generation in generations]
        params = requests[0].params
        answer = _Answer(
            chat=self._chat,
            response_id=("chatcmpl-" if self._chat else "cmpl-") + exchange.request_id,
            created=self._edge.unix_time(),
            model=body.model,
            num_choices=params.n * len(requests),
            logs=Logprobs(generations[0], wanted=params.top_logprobs is not None),
        )
        async with aclosing(self._events(exchange, generations, requests)) as events:
            if body.stream:
                await answer.stream(exchange, events, include_usage=body.include_usage)
            else:
                await answer.whole(exchange, events)

    def _parse(
        self, raw: bytes, request_id: str
    ) -> tuple[ChatBody | CompletionBody, list[GenerationRequest]]:
        if self._chat:
            chat = parse_body(ChatBody, raw)
            return chat, [chat_request(chat, request_id)]
        completion = parse_body(CompletionBody, raw)
        return completion, completion_requests(completion, request_id)

    def _events(
        self,
        exchange: Exchange,
        generations: list[Generation],
        requests: list[GenerationRequest],
    ) -> Events:
        num_choices = requests[0].params.n
        traceparent = checked_traceparent(exchange.header(TRACEPARENT))
        sources = [
            observed_events(
                generation,
                model=request.model,
                num_choices=num_choices,
                observer=self._edge.observer,
                arrived_at=exchange.arrived_at,
                traceparent=traceparent,
            )
            for generation, request in zip(generations, requests, strict=True)
        ]
        return sources[0] if len(sources) == 1 else merged_events(sources, num_choices)


@dataclass(frozen=True, slots=True)
class _Answer:
    chat: bool
    response_id: str
    created: int
    model: str
    num_choices: int
    logs: Logprobs

    async def whole(self, exchange: Exchange, events: Events) -> None:
        choices, usage = await collect(events, self.num_choices)
        render = chat_json if self.chat else completion_json
        value = render(self.response_id, self.created, self.model, choices, usage, self.logs)
        await exchange.respond(200, to_json(value), _explanation(exchange))

    async def stream(self, exchange: Exchange, events: Events, *, include_usage: bool) -> None:
        """The response starts with the first event, so that earlier errors have their status."""
        form = StreamFormat(
            chat=self.chat,
            response_id=self.response_id,
            created=self.created,
            model=self.model,
            num_choices=self.num_choices,
            include_usage=include_usage,
            logs=self.logs,
        )
        first = await anext(events)
        await exchange.start_stream(_explanation(exchange, began=True))
        opening = form.opening() + form.frame(first)
        if opening:
            await exchange.write(opening)
        async for event in events:
            if isinstance(event, Completion):
                await exchange.write(form.frame(event, _comment(exchange)), last=True)
                return
            frame = form.frame(event)
            if frame:
                await exchange.write(frame)


async def _fail(exchange: Exchange, error: ForebayError) -> None:
    if exchange.client_left:
        return
    if exchange.response_started:
        await exchange.fail_stream(_comment(exchange) + error_frame(error))
        return
    headers = _explanation(exchange)
    if isinstance(error, Overloaded):
        headers.append((b"retry-after", retry_after(error.retry_after_s)))
    elif isinstance(error, Unavailable):
        headers.append((b"retry-after", retry_after(_RETRY_AFTER_UNAVAILABLE_S)))
    await exchange.respond(mapped(error).http, to_json(error_json(error)), headers)


def _explanation(exchange: Exchange, *, began: bool = False) -> list[tuple[bytes, bytes]]:
    """Headers of an answer that is whole, or of one that `began`."""
    timelines = exchange.explained
    if not timelines:
        return []
    headers = [(ROUTE.encode("ascii"), route_header(timelines))]
    if not began:
        headers.append((TIMELINE.encode("ascii"), timeline_header(timelines)))
    return headers


def _comment(exchange: Exchange) -> bytes:
    return timeline_comment(exchange.explained) if exchange.explained else b""


def retry_after(seconds: float) -> bytes:
    """Whole seconds, rounded up: sooner would be a lie."""
    return str(max(1, int(-(-seconds // 1)))).encode("ascii")
