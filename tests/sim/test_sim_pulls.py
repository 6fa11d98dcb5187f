"""Prefixes pulled between workers of a whole platform, with losses at any moment: answers are those
of an undisturbed run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from forebay.core import clock
from forebay.core.roles import WorkerRole
from forebay.core.sampling import SamplingParams
from forebay.core.settings import EngineSettings, GatewaySettings, WorkerSettings
from forebay.gateway.generation import ChatPrompt, Chunk, Completion, GenerationRequest
from forebay.simulator import loop
from forebay.simulator.platform import PlatformOptions, SimulatedPlatform
from forebay.simulator.processes import WorkerProcess

REQUEST = GenerationRequest(
    model="sim",
    prompt=ChatPrompt([{"role": "user", "content": "hello " * 60}]),
    params=SamplingParams(ignore_eos=True, n=2, temperature=0.8),
    max_tokens=20,
    seed=7,
)
OPTIONS = PlatformOptions(
    seed=5,
    num_prefill=3,
    num_decode=2,
    latency_s=0.002,
    step_s=0.004,
    pull_share=1.0,
    engine=EngineSettings(engine="sim", model_id="sim", num_blocks=512, sim_time_scale=0.2),
    worker=WorkerSettings(lease_s=3, gateway_grace_s=1, kv_frame_kib=1),
    gateway=GatewaySettings(worker_silence_s=1.0, router_policy="round-robin"),
)
NUM_REQUESTS = 4
Answer = list[tuple[int, ...]]


async def answer(platform: SimulatedPlatform) -> Answer:
    events = [event async for event in platform.gateway.prepare(REQUEST).events()]
    assert isinstance(events[-1], Completion)
    chunks = [event for event in events if isinstance(event, Chunk)]
    return [
        tuple(token.token_id for c in chunks if c.choice == choice for token in c.tokens)
        for choice in range(REQUEST.params.n)
    ]


def num_pulled(lives: list[WorkerProcess]) -> int:
    return sum(life.worker._traffic.pulls.num_tokens for life in lives)


def num_failed(lives: list[WorkerProcess]) -> int:
    return sum(life.worker._traffic.pulls.num_failures for life in lives)


def undisturbed() -> Answer:
    async def main() -> Answer:
        async with SimulatedPlatform(replace(OPTIONS, pull_share=0.0)) as platform:
            return await answer(platform)

    return loop.run(main())


EXPECTED = undisturbed()


async def warm(platform: SimulatedPlatform) -> None:
    """One prefill worker has the prompt; the next ones to be chosen have not."""
    assert await answer(platform) == EXPECTED
    await platform.settle()


def test_pulls_change_no_answer() -> None:
    async def main() -> None:
        async with SimulatedPlatform(OPTIONS) as platform:
            await warm(platform)
            answers = await asyncio.gather(*(answer(platform) for _ in range(NUM_REQUESTS)))
            await platform.settle()
            assert list(answers) == [EXPECTED] * NUM_REQUESTS
            assert num_pulled(platform.processes) > 0

    loop.run(main())


Disturb = Callable[[SimulatedPlatform, WorkerProcess, WorkerProcess], None]


def kill_puller(platform: SimulatedPlatform, puller: WorkerProcess, _: WorkerProcess) -> None:
    platform.kill(puller.node)


def kill_source(platform: SimulatedPlatform, _: WorkerProcess, source: WorkerProcess) -> None:
    platform.kill(source.node)


def freeze_source(platform: SimulatedPlatform, _: WorkerProcess, source: WorkerProcess) -> None:
    platform.loop.freeze(source.node)
    platform.loop.call_later(3, platform.loop.thaw, source.node)


def cut(platform: SimulatedPlatform, puller: WorkerProcess, source: WorkerProcess) -> None:
    link = platform.network.cut(puller.node, source.node)
    platform.loop.call_later(3, platform.network.heal, link)


def drain_source(platform: SimulatedPlatform, _: WorkerProcess, source: WorkerProcess) -> None:
    platform.loop.spawn(source.node, source.stop(5.0))


async def first_pull(platform: SimulatedPlatform) -> tuple[WorkerProcess, WorkerProcess]:
    """Who fetches, and who is asked."""
    limit = clock.now() + 2
    while clock.now() < limit:
        for puller in platform.processes:
            for address in puller.worker._traffic.pulls.sources:
                (source,) = [p for p in platform.processes if p.address == address]
                return puller, source
        await asyncio.sleep(0.0005)
    raise AssertionError("nothing is pulled")


@pytest.mark.parametrize("disturb", [kill_puller, kill_source, freeze_source, cut, drain_source])
@pytest.mark.parametrize("after_s", [0.004 * i for i in range(7)])
def test_answers_outlive_what_happens_to_a_pull(disturb: Disturb, after_s: float) -> None:
    """A pull takes about 25 ms here: asking, reading, frames, commit, answer."""

    async def main() -> None:
        async with SimulatedPlatform(OPTIONS) as platform:
            await warm(platform)
            lives = list(platform.processes)
            tasks = [asyncio.create_task(answer(platform)) for _ in range(NUM_REQUESTS)]
            puller, source = await first_pull(platform)
            await asyncio.sleep(after_s)
            disturb(platform, puller, source)
            platform.start_worker(WorkerRole.PREFILL, "prefill-9")
            answers = await asyncio.gather(*tasks)
            assert list(answers) == [EXPECTED] * NUM_REQUESTS
            while not all(p.node.running and (p.over or not p.stopping) for p in lives_left(lives)):
                await asyncio.sleep(0.1)
            await platform.settle()
            for process in platform.processes:
                assert process.watch.at_rest, process.watch.what_is_held()

    loop.run(main())


def lives_left(lives: list[WorkerProcess]) -> list[WorkerProcess]:
    return [life for life in lives if not life.node.dead]


def test_early_losses_of_a_source_fail_its_pulls() -> None:
    """The fault above does hit."""

    async def main() -> None:
        async with SimulatedPlatform(OPTIONS) as platform:
            await warm(platform)
            lives = list(platform.processes)
            tasks = [asyncio.create_task(answer(platform)) for _ in range(NUM_REQUESTS)]
            _, source = await first_pull(platform)
            platform.kill(source.node)
            assert list(await asyncio.gather(*tasks)) == [EXPECTED] * NUM_REQUESTS
            assert num_failed(lives) > 0
            await platform.settle()

    loop.run(main())
