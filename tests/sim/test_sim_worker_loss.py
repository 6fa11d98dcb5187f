"""A worker that dies ends its requests with an error, at once: never a silence, never half an
answer that looks whole."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from forebay.core import clock
from forebay.core.errors import Unavailable
from forebay.core.sampling import SamplingParams
from forebay.core.settings import EngineSettings
from forebay.gateway.generation import ChatPrompt, ChoiceEnd, Completion, GenerationRequest
from forebay.simulator import loop
from forebay.simulator.platform import PlatformOptions, SimulatedPlatform

REQUEST = GenerationRequest(
    model="sim",
    prompt=ChatPrompt([{"role": "user", "content": "hello " * 50}]),
    params=SamplingParams(ignore_eos=True),
    max_tokens=200,
    seed=7,
)
OPTIONS = PlatformOptions(
    seed=3,
    engine=EngineSettings(engine="sim", model_id="sim", num_blocks=512, sim_time_scale=1.0),
)
PREFILL, DECODE = 0, 1


def kill(platform: SimulatedPlatform, index: int) -> None:
    platform.network.unplug(platform.workers[index].endpoint)
    for task in platform._tasks[2 * index : 2 * index + 2]:
        task.cancel()


@pytest.mark.parametrize("victim", [PREFILL, DECODE])
@pytest.mark.parametrize("after_s", [i * 0.006 for i in range(26)])
def test_a_request_ends_soon_after_its_worker(victim: int, after_s: float) -> None:
    """Whenever: in the queue, the prompt, the transfer, or the answer."""

    async def main() -> None:
        async with SimulatedPlatform(OPTIONS) as platform:
            began = clock.now()
            events = []

            async def read() -> None:
                async for event in platform.gateway.prepare(REQUEST).events():
                    events.append(event)

            task = asyncio.create_task(read())
            await asyncio.sleep(after_s)
            kill(platform, victim)
            try:
                await task
                failed = False
            except Unavailable:
                failed = True
            whole = any(isinstance(event, Completion) for event in events)
            assert failed is not whole
            assert whole is any(isinstance(event, ChoiceEnd) for event in events)
            limit = OPTIONS.gateway.queue_timeout_s + 10
            assert clock.now() - began < (limit if not whole else 60)
            survivor = platform.workers[1 - victim]
            await asyncio.sleep(OPTIONS.worker.lease_s + 5)
            assert survivor.idle
            survivor.check_integrity()

    loop.run(main())


def test_a_first_token_lost_with_its_worker_is_noticed() -> None:
    """The decode worker goes on, but the answer's first token will never come."""

    async def main() -> None:
        async with SimulatedPlatform(OPTIONS) as platform:
            prefill = platform.workers[PREFILL]
            dropped = 0

            def drop(gateway_id: str, message: object) -> None:
                nonlocal dropped
                dropped += 1

            prefill._streams.send = drop  # type: ignore[method-assign]
            stream = platform.gateway.prepare(replace(REQUEST, max_tokens=150)).events()

            async def read() -> None:
                async for _ in stream:
                    pass

            task = asyncio.create_task(read())
            await asyncio.sleep(1)
            assert dropped and not task.done()
            kill(platform, PREFILL)
            before = clock.now()
            with pytest.raises(Unavailable, match="lost"):
                await task
            assert clock.now() - before < 1
            await asyncio.sleep(1)
            assert platform.workers[DECODE].idle

    loop.run(main())
