"""A number of clients, each with one stream running all the time."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence

from forebay_loadtest.chat_stream import Answer, ChatStream, Ending, http_client, run_chat
from forebay_loadtest.streams import make_prompts

RECONNECT_S = 0.5
Body = Mapping[str, object]


class IncompleteReference(Exception):
    """An undisturbed platform did not complete a stream."""


def make_bodies(model: str, count: int, max_tokens: int, seed: int) -> list[Body]:
    """Requests of three kinds in turn: greedy; sampled; sampled with penalties."""
    sampled: Body = {"temperature": 0.8, "top_p": 0.95}
    penalised: Body = {**sampled, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    kinds: tuple[Body, ...] = ({"temperature": 0}, sampled, penalised)
    return [
        {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "seed": seed + index,
            "stream": True,
            "stream_options": {"include_usage": True},
            **kinds[index % len(kinds)],
        }
        for index, prompt in enumerate(make_prompts(count, seed))
    ]


class Crowd:
    """`streams` holds every stream so far, in the order of their beginnings."""

    def __init__(self, url: str, bodies: Sequence[Body], num_clients: int, seed: int) -> None:
        self.streams: list[ChatStream] = []
        self._url = url
        self._bodies = bodies
        self._num_clients = num_clients
        self._rng = random.Random(seed)
        self._http = http_client(num_clients)
        self._tasks: list[asyncio.Task[None]] = []
        self._leaving = False

    async def reference(self) -> list[Answer]:
        """Every body's answer, once each. Raises IncompleteReference."""
        places = asyncio.Semaphore(self._num_clients)

        async def one(spec: int) -> Answer:
            async with places:
                stream = await self._run(client=-1, spec=spec)
            if stream.answer is None:
                raise IncompleteReference(f"{stream.ending}: {stream.error}")
            return stream.answer

        return list(await asyncio.gather(*(one(spec) for spec in range(len(self._bodies)))))

    def start(self) -> None:
        for client in range(self._num_clients):
            self._tasks.append(asyncio.create_task(self._keep_running(client)))

    async def finish(self, limit_s: float) -> None:
        """No new streams; those that run get `limit_s` to end by themselves."""
        self._leaving = True
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=limit_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.aclose()

    @property
    def num_running(self) -> int:
        return sum(stream.ending is Ending.RUNNING for stream in self.streams[-4096:])

    async def _keep_running(self, client: int) -> None:
        while not self._leaving:
            stream = await self._run(client, self._rng.randrange(len(self._bodies)))
            if stream.ending is not Ending.COMPLETE:
                await asyncio.sleep(RECONNECT_S)

    async def _run(self, client: int, spec: int) -> ChatStream:
        stream = ChatStream(client, spec, time.monotonic())
        if client >= 0:
            self.streams.append(stream)
        await run_chat(self._http, self._url, self._bodies[spec], stream)
        return stream
