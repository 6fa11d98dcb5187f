"""Clients that send a request set in its order, so many at a time, and note what was cached."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable, Sequence
from functools import partial

import httpx

from forebay_loadtest.chat_stream import http_client
from forebay_loadtest.routing.shares import Outcome
from forebay_loadtest.routing.workload import InfiniteCache, RoutedRequest


class RequestFlow:
    """Closed loop: `num_clients` requests run at any time, each on a gateway that the seed draws.
    `outcomes` holds those that have ended, in that order. `ideal` is asked about each as it is
    sent."""

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        requests: Iterable[RoutedRequest],
        *,
        num_clients: int,
        max_tokens: int,
        seed: int,
        ideal: InfiniteCache | None = None,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self._urls = urls
        self._model = model
        self._requests = requests
        self._num_clients = num_clients
        self._max_tokens = max_tokens
        self._rng = random.Random(seed)
        self._ideal = ideal
        self._running: dict[int, asyncio.Task[None]] = {}
        self._leaving = False

    async def run(self) -> None:
        """Until the requests have run out, or those that run at `leave` have ended."""
        places = asyncio.Semaphore(self._num_clients)
        async with http_client(self._num_clients) as http, asyncio.TaskGroup() as tasks:
            for request in self._requests:
                await places.acquire()
                if self._leaving:
                    break
                before = None if request.after is None else self._running.get(request.after)
                sent = tasks.create_task(self._send(http, request, before))
                self._running[request.number] = sent
                sent.add_done_callback(partial(self._ended, request.number, places))

    @property
    def num_failed(self) -> int:
        return sum(bool(each.error) for each in self.outcomes)

    def leave(self) -> None:
        self._leaving = True

    def _ended(self, number: int, places: asyncio.Semaphore, sent: asyncio.Task[None]) -> None:
        del self._running[number]
        places.release()

    async def _send(
        self, http: httpx.AsyncClient, request: RoutedRequest, before: asyncio.Task[None] | None
    ) -> None:
        if before is not None:
            await asyncio.wait([before])
        gateway = self._rng.randrange(len(self._urls))
        ideal = self._ideal
        ideal_tokens = ideal.num_cached_tokens(request.rendered()) if ideal else 0
        outcome = Outcome(request.number, gateway, time.monotonic(), ideal_tokens)
        body = request.body(self._model, self._max_tokens)
        url = f"{self._urls[gateway]}/v1/chat/completions"
        try:
            response = await http.post(url, json=body)
            if response.status_code == 200:
                usage = response.json()["usage"]
                outcome.prompt_tokens = usage["prompt_tokens"]
                outcome.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
            else:
                outcome.error = f"{response.status_code}: {response.text[:300]}"
        except httpx.TransportError as error:
            outcome.error = f"{type(error).__name__}: {error}"
        outcome.ended = time.monotonic()
        self.outcomes.append(outcome)
