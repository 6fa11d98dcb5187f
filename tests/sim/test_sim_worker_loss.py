"""A request outlives its worker: whenever that dies or falls silent, the answer is the one of an
undisturbed run, and only later."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from forebay.core import clock
from forebay.core.roles import WorkerRole
from forebay.core.sampling import SamplingParams
from forebay.core.settings import EngineSettings, GatewaySettings, WorkerSettings
from forebay.gateway.generation import (
    ChatPrompt,
    Chunk,
    Completion,
    Event,
    GenerationRequest,
    Migrated,
    Progress,
)
from forebay.simulator import loop
from forebay.simulator.platform import PlatformOptions, SimulatedPlatform
from forebay.simulator.processes import WorkerProcess

REQUEST = GenerationRequest(
    model="sim",
    prompt=ChatPrompt([{"role": "user", "content": "hello " * 50}]),
    params=SamplingParams(ignore_eos=True, n=2, temperature=0.8),
    max_tokens=30,
    seed=7,
)
OPTIONS = PlatformOptions(
    seed=3,
    num_prefill=2,
    num_decode=2,
    engine=EngineSettings(engine="sim", model_id="sim", num_blocks=512),
    worker=WorkerSettings(lease_s=3, gateway_grace_s=1),
    gateway=GatewaySettings(worker_silence_s=1.0),
)
ROLES = [WorkerRole.PREFILL, WorkerRole.DECODE]
Events = list[Progress | Event]


async def read(platform: SimulatedPlatform, request: GenerationRequest, events: Events) -> None:
    async for event in platform.gateway.prepare(request).events():
        events.append(event)


def answer(events: Events) -> list[tuple[int, ...]]:
    chunks = [event for event in events if isinstance(event, Chunk)]
    return [
        tuple(
            token.token_id for chunk in chunks if chunk.choice == choice for token in chunk.tokens
        )
        for choice in range(REQUEST.params.n)
    ]


def undisturbed() -> Events:
    async def main() -> Events:
        async with SimulatedPlatform(OPTIONS) as platform:
            events: Events = []
            await read(platform, REQUEST, events)
            return events

    return loop.run(main())


def busy(platform: SimulatedPlatform, role: WorkerRole) -> WorkerProcess:
    """The worker with the request, or any."""
    processes = [process for process in platform.processes if process.role is role]
    return next((p for p in processes if not p.worker.idle), processes[0])


def check_whole(events: Events) -> None:
    expected = undisturbed()
    assert answer(events) == answer(expected)
    assert isinstance(events[-1], Completion) and isinstance(expected[-1], Completion)
    assert sum(isinstance(event, Completion) for event in events) == 1
    assert events[-1].usage.completion_tokens == expected[-1].usage.completion_tokens
    assert events[-1].usage.prompt_tokens == expected[-1].usage.prompt_tokens


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("after_s", [i * 0.05 for i in range(26)])
def test_a_request_outlives_its_worker(role: WorkerRole, after_s: float) -> None:
    """Whenever: in the queue, the prompt, the transfer, or the answer."""

    async def main() -> Events:
        async with SimulatedPlatform(OPTIONS) as platform:
            events: Events = []
            task = asyncio.create_task(read(platform, REQUEST, events))
            await asyncio.sleep(after_s)
            platform.kill(busy(platform, role).node)
            await task
            await platform.settle()
            return events

    check_whole(loop.run(main()))


@pytest.mark.parametrize("role", ROLES)
def test_silence_is_failure(role: WorkerRole) -> None:
    """A worker that is stopped, not dead: its connection stays."""

    async def main() -> tuple[Events, float]:
        async with SimulatedPlatform(OPTIONS) as platform:
            events: Events = []
            task = asyncio.create_task(read(platform, REQUEST, events))
            while (victim := busy(platform, role)).worker.idle:
                await asyncio.sleep(0.001)
            platform.loop.freeze(victim.node)
            began = clock.now()
            await task
            took_s = clock.now() - began
            platform.loop.thaw(victim.node)
            await platform.settle()
            return events, took_s

    events, took_s = loop.run(main())
    check_whole(events)
    assert any(isinstance(event, Migrated) for event in events)
    assert took_s < 5


def test_a_first_token_lost_with_its_worker_is_computed_again() -> None:
    """The decode worker goes on, but the first token of the answer died on its way."""

    async def main() -> Events:
        async with SimulatedPlatform(OPTIONS) as platform:
            for process in platform.processes:
                if process.role is WorkerRole.PREFILL:
                    link = platform.network.link(platform.gateways[0].node, process.node)
                    link.extra_s = 0.4
            events: Events = []
            task = asyncio.create_task(read(platform, REQUEST, events))
            decodes = [p.worker for p in platform.processes if p.role is WorkerRole.DECODE]
            while not any(worker.engine.num_running for worker in decodes):
                await asyncio.sleep(0.001)
            assert not any(isinstance(event, Chunk) for event in events)
            for link in platform.network.links.values():
                link.extra_s = 0.0
            for process in list(platform.processes):
                if process.role is WorkerRole.PREFILL:
                    platform.kill(process.node)
            platform.start_worker(WorkerRole.PREFILL, "prefill-9")
            await task
            await platform.settle()
            return events

    events = loop.run(main())
    check_whole(events)
    assert any(isinstance(event, Migrated) for event in events)


def test_without_migration_the_error_comes_at_once() -> None:
    async def main() -> None:
        gateway = replace(OPTIONS.gateway, max_migrations=0)
        async with SimulatedPlatform(replace(OPTIONS, gateway=gateway)) as platform:
            events: Events = []
            task = asyncio.create_task(read(platform, REQUEST, events))
            await asyncio.sleep(0.4)
            platform.kill(busy(platform, WorkerRole.DECODE).node)
            began = clock.now()
            with pytest.raises(Exception, match="lost"):
                await task
            assert clock.now() - began < 1
            assert not any(isinstance(event, Completion) for event in events)

    loop.run(main())
