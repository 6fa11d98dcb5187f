"""Requests through production gateway and worker code, in virtual time."""

from __future__ import annotations

import asyncio
import socket
import threading
from dataclasses import replace
from typing import Any

import pytest

from forebay.core.finish import FinishReason
from forebay.core.sampling import SamplingParams
from forebay.core.settings import EngineSettings, WorkerSettings
from forebay.gateway.generation import (
    ChatPrompt,
    ChoiceEnd,
    Chunk,
    Completion,
    Event,
    GenerationRequest,
    Placed,
)
from forebay.rpc.v1 import worker_pb2
from forebay.simulator import loop
from forebay.simulator.platform import PlatformOptions, SimulatedPlatform

QUESTION = ChatPrompt([{"role": "user", "content": "Why does a forebay sit above a turbine?"}])
REQUEST = GenerationRequest(
    model="sim", prompt=QUESTION, params=SamplingParams(), max_tokens=40, seed=7
)


def text_of(events: list[Event], choice: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, Chunk) and e.choice == choice)


async def collect(platform: SimulatedPlatform, request: GenerationRequest) -> list[Event]:
    return [event async for event in platform.gateway.prepare(request).events()]


def run_request(options: PlatformOptions, request: GenerationRequest) -> list[Event]:
    async def main() -> list[Event]:
        async with SimulatedPlatform(options) as platform:
            events = await collect(platform, request)
            await platform.settle()
            return events

    return loop.run(main())


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a simulation opened a socket or started a thread")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "socketpair", refuse)
    monkeypatch.setattr(threading.Thread, "start", refuse)


@pytest.mark.usefixtures("no_sockets")
def test_one_request_goes_through_both_pools() -> None:
    async def main() -> None:
        async with SimulatedPlatform(PlatformOptions(seed=1)) as platform:
            events = await collect(platform, REQUEST)
            await platform.settle()
            assert isinstance(events[-1], Completion)
            prefill, decode = (worker.description().counters for worker in platform.workers)
            usage = events[-1].usage
            assert prefill.generation_tokens == 1
            assert decode.generation_tokens == usage.completion_tokens - 1
            assert prefill.kv_bytes_sent == decode.kv_bytes_received > 0
            assert prefill.kv_bytes_sent == usage.prompt_tokens * 4 * 8

    loop.run(main())


def test_same_seed_same_run() -> None:
    first = run_request(PlatformOptions(seed=1), REQUEST)
    assert first == run_request(PlatformOptions(seed=1), REQUEST)


def test_answer_depends_on_the_request_alone() -> None:
    pools = run_request(PlatformOptions(seed=1), REQUEST)
    mixed = run_request(PlatformOptions(seed=2, num_prefill=0, num_decode=0, num_mixed=1), REQUEST)
    chunked = PlatformOptions(
        seed=3,
        engine=EngineSettings(
            engine="sim", model_id="sim", num_blocks=64, block_size=4, max_batch_tokens=5
        ),
    )
    assert text_of(pools) == text_of(mixed) == text_of(run_request(chunked, REQUEST)) != ""
    other_seed = run_request(PlatformOptions(seed=1), replace(REQUEST, seed=8))
    assert text_of(other_seed) != text_of(pools)


def test_choices_share_a_prompt_and_differ() -> None:
    request = replace(REQUEST, params=SamplingParams(n=3, ignore_eos=True))
    events = run_request(PlatformOptions(seed=1), request)
    texts = {text_of(events, choice) for choice in range(3)}
    ends = {e.choice: e.reason for e in events if isinstance(e, ChoiceEnd)}
    assert len(texts) == 3
    assert ends == dict.fromkeys(range(3), FinishReason.LENGTH)
    assert isinstance(events[-1], Completion)
    assert events[-1].usage.completion_tokens == 120


def test_one_token_answer_releases_the_reservation() -> None:
    events = run_request(PlatformOptions(seed=1), replace(REQUEST, max_tokens=1))
    assert [type(event) for event in events] == [Placed, Chunk, ChoiceEnd, Completion]


def test_the_prefill_worker_is_told_which_codecs_the_decode_worker_takes() -> None:
    async def main() -> list[worker_pb2.TransferTarget]:
        async with SimulatedPlatform(PlatformOptions(seed=1)) as platform:
            traffic, decode = platform.workers[0]._traffic, platform.workers[1]
            begin, targets = traffic.begin, []

            def note(*arguments: Any) -> None:
                targets.append(arguments[1].target)
                begin(*arguments)

            traffic.begin = note  # type: ignore[method-assign]
            async for _ in platform.gateway.prepare(REQUEST).events():
                pass
            assert list(decode.description().kv_codecs) == [worker_pb2.KV_CODEC_RAW]
            return targets

    assert [list(t.kv_codecs) for t in loop.run(main())] == [[worker_pb2.KV_CODEC_RAW]]


def test_first_token_comes_before_the_kv_has_moved() -> None:
    async def main() -> None:
        options = PlatformOptions(seed=5, worker=WorkerSettings(kv_frame_kib=1))
        async with SimulatedPlatform(options) as platform:
            long = ChatPrompt([{"role": "user", "content": "x" * 1000}])
            stream = platform.gateway.prepare(replace(REQUEST, prompt=long)).events()
            while not isinstance(await anext(stream), Chunk):
                pass
            decode = platform.workers[1]
            assert decode.load().kv_blocks.leased > 0
            assert decode.engine.num_sequences == 0
            rest = [event async for event in stream]
            assert isinstance(rest[-1], Completion)
            await platform.settle()

    loop.run(main())


def test_stop_string_ends_the_request_in_both_pools() -> None:
    whole = text_of(run_request(PlatformOptions(seed=1), REQUEST))
    stop = whole[5:8]
    request = replace(REQUEST, params=SamplingParams(stop=(stop,)))
    events = run_request(PlatformOptions(seed=1), request)
    assert text_of(events) == whole[: whole.index(stop)]
    assert ChoiceEnd(0, FinishReason.STOP) in events


@pytest.mark.parametrize("num_events", [0, 1, 2, 10])
def test_client_that_leaves_frees_every_block(num_events: int) -> None:
    async def main() -> None:
        async with SimulatedPlatform(PlatformOptions(seed=4)) as platform:
            request = replace(REQUEST, params=SamplingParams(ignore_eos=True), max_tokens=500)
            stream = platform.gateway.prepare(request).events()
            for _ in range(num_events):
                await anext(stream)
            await stream.aclose()
            await platform.settle()
            for worker in platform.workers:
                blocks = worker.load().kv_blocks
                assert blocks.free + blocks.cached == blocks.total

    loop.run(main())


@pytest.mark.parametrize("seed", range(8))
def test_many_requests_share_a_small_pool(seed: int) -> None:
    """Queueing, preemption and prefix sharing change when tokens come, and never which."""

    async def main(options: PlatformOptions) -> list[str]:
        async with SimulatedPlatform(options) as platform:
            requests = [
                replace(
                    REQUEST,
                    prompt=ChatPrompt([{"role": "user", "content": f"{i % 5} " * (3 + 5 * i)}]),
                    seed=i,
                    max_tokens=20 + i,
                )
                for i in range(16)
            ]
            runs = await asyncio.gather(*(collect(platform, request) for request in requests))
            await platform.settle()
            return [text_of(events) for events in runs]

    def options(num_blocks: int) -> PlatformOptions:
        engine = EngineSettings(
            engine="sim",
            model_id="sim",
            num_blocks=num_blocks,
            block_size=8,
            max_batch_tokens=64,
            max_num_seqs=8,
        )
        return PlatformOptions(seed=seed, num_prefill=2, num_decode=2, engine=engine)

    assert loop.run(main(options(36))) == loop.run(main(options(4000)))


def test_deadlock_is_reported() -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(loop.Deadlock):
        loop.run(forever())


def test_time_is_virtual() -> None:
    async def sleeper() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    assert loop.run(sleeper()) == 3600
