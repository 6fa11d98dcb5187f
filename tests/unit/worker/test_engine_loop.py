from __future__ import annotations

import asyncio

import pytest
from kv_pairs import KEY, sim_engine, start_of

from forebay.core.errors import InternalError
from forebay.core.executor import InlineExecutor
from forebay.core.sampling import SamplingParams
from forebay.engine.engine import StepOutcome
from forebay.engine.interface import Batch, LayerHook, StepResult
from forebay.engine.sequence import Sequence
from forebay.simulator import loop
from forebay.worker.engine_loop import MAX_FAILED_STEPS, EngineLoop


class Stepping:
    def __init__(self) -> None:
        self.engine = sim_engine(max_batch_tokens=8)
        self.num_outcomes = 0
        self.failed: list[Sequence] = []
        self.layers: list[int] = []
        self.loop = EngineLoop(
            self.engine, InlineExecutor(), self._on_outcome, self._on_failure, self._hook
        )

    def submit(self, num_tokens: int = 20) -> None:
        params = SamplingParams(max_tokens=2)
        self.engine.submit(start_of(list(range(num_tokens)), params), prefill_only=False)
        self.loop.wake()

    def _on_outcome(self, outcome: StepOutcome) -> None:
        self.num_outcomes += 1

    def _on_failure(self, sequences: list[Sequence], message: str) -> None:
        self.failed += sequences

    def _hook(self, batch: Batch, sequences: list[Sequence]) -> LayerHook | None:
        assert [item.tokens for item in batch.sequences] == [s.tokens for s in sequences]
        return self.layers.append


def test_every_step_has_its_hook() -> None:
    async def main() -> None:
        stepping = Stepping()
        task = asyncio.create_task(stepping.loop.run())
        stepping.submit()
        await asyncio.sleep(1)
        assert stepping.num_outcomes == stepping.loop.num_steps == 4
        assert stepping.layers == [0, 1, 2, 3] * 4
        assert stepping.failed == []
        stepping.engine.check_integrity()
        task.cancel()

    loop.run(main())


def test_failed_steps_end_their_sequences_and_in_a_row_the_workers_health() -> None:
    async def main() -> None:
        stepping = Stepping()
        run = stepping.engine.runner.run

        def fail(batch: Batch, on_layer: LayerHook | None = None) -> StepResult:
            raise InternalError("broken")

        stepping.engine.runner.run = fail  # type: ignore[method-assign]
        task = asyncio.create_task(stepping.loop.run())
        for number in range(MAX_FAILED_STEPS):
            stepping.loop.check_health(10)
            stepping.submit()
            await asyncio.sleep(1)
            assert len(stepping.failed) == number + 1
            assert not stepping.engine.sequences(KEY)
        with pytest.raises(InternalError, match="steps failed"):
            stepping.loop.check_health(10)
        stepping.engine.runner.run = run  # type: ignore[method-assign]
        stepping.submit()
        await asyncio.sleep(1)
        stepping.loop.check_health(10)
        stepping.engine.check_integrity()
        task.cancel()

    loop.run(main())


def test_a_step_that_outlives_its_limit() -> None:
    async def main() -> None:
        stepping = Stepping()
        run = stepping.engine.runner.run

        def slow(batch: Batch, on_layer: LayerHook | None = None) -> StepResult:
            return StepResult(run(batch, on_layer).tokens, 100.0)

        stepping.engine.runner.run = slow  # type: ignore[method-assign]
        task = asyncio.create_task(stepping.loop.run())
        await asyncio.sleep(1000)
        stepping.loop.check_health(10)
        stepping.submit(4)
        await asyncio.sleep(9)
        stepping.loop.check_health(10)
        await asyncio.sleep(2)
        with pytest.raises(InternalError, match="longer than 10 s"):
            stepping.loop.check_health(10)
        await asyncio.sleep(1000)
        stepping.loop.check_health(10)
        task.cancel()

    loop.run(main())
