"""`python -m forebay_loadtest.bookkeeping`: what leases and cancellations cost a decode step.

One worker in this process decodes a full batch while its gateway renews the leases once a second,
cancels requests and brings new ones in their place. The time spent in the worker's renewals,
sweeps and aborts is measured where it is spent and set against the time of all steps.
"""

from __future__ import annotations

import asyncio
import functools
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import click

from forebay.core.randomness import Rng
from forebay.core.settings import EngineSettings, WorkerSettings
from forebay.engine.loader import load_runner
from forebay.kv.block_hash import cache_root
from forebay.rpc.grpc_connector import GrpcConnector
from forebay.rpc.v1 import inference_pb2, worker_pb2
from forebay.worker.thread_executor import ThreadExecutor
from forebay.worker.worker import Worker
from forebay_loadtest.report import environment

LIMIT = 0.02
"""Share of a decode step that bookkeeping may take."""
RENEW_EVERY_S = 1.0
CANCELS_PER_S = 8
PROMPT_TOKENS = 32
WARM_UP_S = 5.0
_GATEWAY = "bench"


class Stopwatch:
    """Seconds spent in the functions it wraps, and how often."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.num_calls = 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds += time.perf_counter() - began
                self.num_calls += 1

        return timed

    async def awaiting(self, call: Awaitable[object]) -> None:
        """For a coroutine that never really waits."""
        began = time.perf_counter()
        await call
        self.seconds += time.perf_counter() - began
        self.num_calls += 1


class Crowd:
    """A gateway's requests on the worker."""

    def __init__(self, worker: Worker, num_sequences: int) -> None:
        self._worker = worker
        self._num_sequences = num_sequences
        self._num_sent = 0
        self.live: list[str] = []

    async def fill(self) -> None:
        while len(self.live) < self._num_sequences:
            request_id = f"r{self._num_sent}"
            prompt = [(self._num_sent * 7 + i) % 250 for i in range(PROMPT_TOKENS)]
            spec = worker_pb2.SequenceSpec(
                request_id=request_id,
                gateway_id=_GATEWAY,
                attempt=1,
                prompt_token_ids=prompt,
                sampling=inference_pb2.SamplingParams(
                    temperature=1.0, max_tokens=100_000, seed=self._num_sent, ignore_eos=True
                ),
                cache_root=cache_root(b"salt", "bench"),
                timeout_ms=3_600_000,
            )
            while self._worker.load().prefill_room_tokens == 0:
                await asyncio.sleep(0.01)
            await self._worker.prefill(worker_pb2.PrefillRequest(sequence=spec))
            self._num_sent += 1
            self.live.append(request_id)

    async def cancel_oldest(self, watch: Stopwatch) -> None:
        message = worker_pb2.AbortRequest(
            request_id=self.live.pop(0), gateway_id=_GATEWAY, attempt=1
        )
        await watch.awaiting(self._worker.abort(message))

    async def messages(self) -> AsyncIterator[worker_pb2.StepsRequest]:
        yield worker_pb2.StepsRequest(hello=worker_pb2.GatewayHello(gateway_id=_GATEWAY))
        while True:
            await asyncio.sleep(RENEW_EVERY_S)
            renewal = worker_pb2.Renewal(request_ids=self.live)
            # As it comes from the wire.
            data = worker_pb2.StepsRequest(renewal=renewal).SerializeToString()
            yield worker_pb2.StepsRequest.FromString(data)


async def measure(settings: WorkerSettings, num_sequences: int, seconds: float) -> dict[str, Any]:
    executor = ThreadExecutor()
    runner = await executor.run(load_runner, settings.engine)
    worker = Worker(settings, runner, executor, GrpcConnector(), Rng(1))
    watch = Stopwatch()
    worker._sweep = watch.around(worker._sweep)  # type: ignore[method-assign]
    worker._requests.renew = watch.around(worker._requests.renew)  # type: ignore[method-assign]
    crowd = Crowd(worker, num_sequences)

    async def read() -> None:
        async with aclosing(worker.steps(crowd.messages())) as stream:
            async for _ in stream:
                pass

    tasks = [asyncio.create_task(worker.run()), asyncio.create_task(read())]
    try:
        await asyncio.sleep(0.1)
        await crowd.fill()
        await asyncio.sleep(WARM_UP_S)
        watch.seconds, watch.num_calls = 0.0, 0
        steps, began = worker._loop.num_steps, time.perf_counter()
        num_cancelled = 0
        while time.perf_counter() - began < seconds:
            await crowd.cancel_oldest(watch)
            await crowd.fill()
            num_cancelled += 1
            await asyncio.sleep(1 / CANCELS_PER_S)
        elapsed = time.perf_counter() - began
        num_steps = worker._loop.num_steps - steps
        assert not any(task.done() for task in tasks), "the worker ended"
        expired = worker.description().counters.expired_leases
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await worker.close()
        executor.close()
    return {
        **environment(),
        "engine": settings.engine.engine,
        "num_sequences": num_sequences,
        "num_steps": num_steps,
        "step_ms": round(1000 * elapsed / num_steps, 3),
        "num_cancelled": num_cancelled,
        "expired_leases": expired,
        "bookkeeping_us_per_step": round(1e6 * watch.seconds / num_steps, 2),
        "share_of_step": round(watch.seconds / elapsed, 6),
    }


@click.command()
@click.option("--engine", type=click.Choice(["torch", "sim"]), default="torch", show_default=True)
@click.option("--model-path", type=click.Path(exists=True, path_type=Path), help="For torch.")
@click.option("--sequences", default=64, show_default=True, type=click.IntRange(1))
@click.option("--seconds", default=20.0, show_default=True)
def main(engine: str, model_path: Path | None, sequences: int, seconds: float) -> None:
    """Exits with 1 when bookkeeping takes more than 2 % of a step."""
    if engine == "torch" and model_path is None:
        raise click.UsageError("--model-path is needed for torch")
    settings = WorkerSettings(
        engine=EngineSettings(
            engine=engine,
            model_path=str(model_path or ""),
            max_num_seqs=sequences,
            num_blocks=sequences * 64,
        )
    )
    figures = asyncio.run(measure(settings, sequences, seconds))
    click.echo(json.dumps(figures))
    share = figures["share_of_step"]
    ok = share < LIMIT and figures["expired_leases"] == 0
    click.echo(
        f"{'OK' if ok else 'SHORT'}: leases and cancellations take {100 * share:.3f} % of a decode"
        f" step of {sequences} sequences ({figures['bookkeeping_us_per_step']} us of"
        f" {figures['step_ms']} ms)"
    )
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
