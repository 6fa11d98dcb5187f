"""One request from its placement to its last token: the state machine behind both edges."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator

from forebay.core.clock import Deadline
from forebay.core.errors import DeadlineExceeded, Unavailable, WorkerLost
from forebay.core.finish import FinishReason
from forebay.core.sampling import SamplingParams
from forebay.gateway.choice import ChoiceText
from forebay.gateway.fleet import ServedModel
from forebay.gateway.generation import Completion, Event, Placed, Usage
from forebay.gateway.placement import Placement, Placer
from forebay.gateway.worker_link import WorkerLink
from forebay.rpc.conversions import finish_from_proto
from forebay.rpc.v1 import worker_pb2


class RequestInbox:
    """What the workers of one request send, in the order of arrival. Implements `Inbox`."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[WorkerLink, worker_pb2.SequenceOutput | None]] = (
            asyncio.Queue()
        )

    def deliver(self, link: WorkerLink, output: worker_pb2.SequenceOutput) -> None:
        self._queue.put_nowait((link, output))

    def lose(self, link: WorkerLink) -> None:
        self._queue.put_nowait((link, None))

    async def next(self, deadline: Deadline) -> tuple[WorkerLink, worker_pb2.SequenceOutput | None]:
        """None for a link that is lost. Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout(deadline.remaining_s()):
                return await self._queue.get()
        except TimeoutError:
            raise DeadlineExceeded("the request's deadline passed while it was decoded") from None


class GatewayRequest:
    """Implements `Generation`. `abort(link, spec, choices)` ends choices (none named: all) on a
    worker in the background."""

    def __init__(
        self,
        *,
        spec: worker_pb2.SequenceSpec,
        params: SamplingParams,
        served: ServedModel,
        client_request_id: str,
        deadline: Deadline,
        queue_timeout_s: float,
        placer: Placer,
        abort: Callable[[WorkerLink, worker_pb2.SequenceSpec, tuple[int, ...]], None],
    ) -> None:
        self._spec = spec
        self._served = served
        self._client_request_id = client_request_id
        self._deadline = deadline
        self._queue_timeout_s = queue_timeout_s
        self._placer = placer
        self._abort = abort
        self._choices = [ChoiceText(i, served.tokenizer, params) for i in range(params.n)]
        self._num_cached_tokens = 0
        self._decode_began = False

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

    async def events(self) -> AsyncGenerator[Placed | Event, None]:
        inbox = RequestInbox()
        placement = await self._placer.place(
            self._spec,
            self._served.info.id,
            inbox,
            self._deadline,
            self._deadline.within(self._queue_timeout_s),
        )
        try:
            yield Placed()
            while any(choice.finish is None for choice in self._choices):
                link, output = await inbox.next(self._deadline)
                for event in self._take(placement, link, output):
                    yield event
            yield Completion(self._usage())
        finally:
            self._leave(placement)

    def _take(
        self,
        placement: Placement,
        link: WorkerLink,
        output: worker_pb2.SequenceOutput | None,
    ) -> Iterator[Event]:
        """Raises WorkerLost or Unavailable when the request cannot go on."""
        if output is None:
            if (
                link is placement.decode
                or not self._decode_began
                or any(choice.num_tokens == 0 for choice in self._choices)
            ):
                raise WorkerLost("a worker was lost with the request on it")
            return
        if output.attempt != self._spec.attempt or output.choice >= len(self._choices):
            return
        if finish_from_proto(output.finish_reason) is FinishReason.ERROR:
            raise Unavailable(output.error)
        if output.offset == 0:
            self._num_cached_tokens = max(self._num_cached_tokens, output.num_cached_tokens)
        if link is placement.decode:
            self._decode_began = True
        choice = self._choices[output.choice]
        yield from choice.accept(output)
        if choice.stopped_here and any(other.finish is None for other in self._choices):
            choice.stopped_here = False
            for worker in placement.links:
                self._abort(worker, self._spec, (output.choice,))

    def _leave(self, placement: Placement) -> None:
        """Ends the request wherever it may still hold something."""
        finished = all(c.finish is not None and not c.stopped_here for c in self._choices)
        for link in placement.links:
            link.unsubscribe(self._spec.request_id)
        if finished and (placement.prefill is None or self._decode_began):
            return
        for link in placement.links:
            self._abort(link, self._spec, ())

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=sum(choice.num_tokens for choice in self._choices),
            cached_tokens=self._num_cached_tokens,
        )
