"""Two workers of which one holds what the other is to compute."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from worker_benches import ENGINE, Bench, Hall, running, spec

from forebay.core.finish import FinishReason
from forebay.core.roles import WorkerRole
from forebay.rpc.v1 import worker_pb2
from forebay.simulator import loop

BIG = replace(ENGINE, num_blocks=64, max_num_seqs=16)
PROMPT = 40
PULLED = 36
"""Full blocks of all tokens but the last."""


class Scene:
    """`source` holds the prompt's KV; `puller` is asked to answer."""

    def __init__(self, hall: Hall, source: Bench, puller: Bench) -> None:
        self.hall = hall
        self.source = source
        self.puller = puller

    def pull_source(self, num_tokens: int = PROMPT, **values: Any) -> worker_pb2.PullSource:
        worker = self.source.worker
        where = {"address": worker.endpoint, "epoch": worker.epoch, **values}
        return worker_pb2.PullSource(num_tokens=num_tokens, **where)

    async def pull(self, request: worker_pb2.SequenceSpec, **values: Any) -> None:
        await self.puller.prefill(request, source=self.pull_source(**values))

    def figures(self, request_id: str = "r") -> tuple[int, int]:
        """Cached and pulled tokens, as the gateway hears of them."""
        outputs = [o for o in self.puller.outputs if o.request_id == request_id]
        return outputs[0].num_cached_tokens, outputs[0].num_pulled_tokens

    @property
    def num_failures(self) -> int:
        return self.puller.worker.description().counters.kv_pull_failures

    def check_empty(self) -> None:
        for bench in (self.source, self.puller):
            bench.check_empty()
            traffic = bench.worker._traffic
            assert (len(traffic.pulls), len(traffic.prefix_sends)) == (0, 0)
            assert len(bench.worker.leases) == 0


@asynccontextmanager
async def scene(engine: Any = BIG, **puller: Any) -> AsyncIterator[Scene]:
    hall = Hall()
    async with (
        running(WorkerRole.MIXED, engine, hall, "source") as source,
        running(WorkerRole.MIXED, engine, hall, "puller", **puller) as bench,
    ):
        await source.prefill(spec("w", prompt=PROMPT, max_tokens=1))
        await asyncio.sleep(1)
        yield Scene(hall, source, bench)


def in_scene(test: Callable[[Scene], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            async with scene() as there:
                await test(there)

        loop.run(main())

    return run


def computed(request: worker_pb2.SequenceSpec, engine: Any = BIG) -> list[list[int]]:
    """The answer of a worker that knows nothing, choice by choice."""

    async def main() -> list[list[int]]:
        async with running(engine=engine) as bench:
            await bench.prefill(request)
            await asyncio.sleep(10)
            return [bench.tokens("r", choice) for choice in range(request.sampling.n)]

    return loop.run(main())


REQUEST = spec(prompt=PROMPT, max_tokens=8, n=2)
EXPECTED = computed(REQUEST)


def check_answer(bench: Bench, request_id: str = "r") -> None:
    assert [bench.tokens(request_id, choice) for choice in range(2)] == EXPECTED
    assert bench.ends(request_id) == [FinishReason.LENGTH] * 2


def stalled(there: Scene) -> dict[str, Any]:
    """After the first message."""

    def alter(message: bytes) -> list[bytes]:
        there.hall.open.clear()
        return [message]

    there.hall.alter = alter
    return {"timeout_ms": 300}
