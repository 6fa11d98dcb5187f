"""Drives the engine: one step after another while there is work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from forebay.core import clock
from forebay.core.errors import InternalError
from forebay.core.executor import Executor
from forebay.engine.engine import Engine, StepOutcome
from forebay.engine.interface import Batch, LayerHook
from forebay.engine.sequence import Sequence

log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""Failed steps in a row after which the worker counts as broken."""


class EngineLoop:
    """`on_outcome` gets the result of every step, `on_failure` the sequences that ended because
    their step could not be computed, with a message fit for the client. `layer_hook` is asked right
    before a step, on the loop, for what the runner shall call after each layer of it."""

    def __init__(
        self,
        engine: Engine,
        executor: Executor,
        on_outcome: Callable[[StepOutcome], None],
        on_failure: Callable[[list[Sequence], str], None],
        layer_hook: Callable[[Batch, list[Sequence]], LayerHook | None],
    ) -> None:
        self.num_steps = 0
        self._engine = engine
        self._executor = executor
        self._on_outcome = on_outcome
        self._on_failure = on_failure
        self._layer_hook = layer_hook
        self._wake = asyncio.Event()
        self._step_began: float | None = None
        self._num_failed = 0

    def wake(self) -> None:
        """Call after anything that may let a sequence run: a new one, or blocks set free."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._wake.clear()
            if not await self._step():
                await self._wake.wait()

    def check_health(self, step_timeout_s: float) -> None:
        """Raises InternalError when a step hangs or steps keep failing."""
        if self._num_failed >= MAX_FAILED_STEPS:
            raise InternalError(f"the last {self._num_failed} engine steps failed")
        if self._step_began is not None and clock.now() - self._step_began > step_timeout_s:
            raise InternalError(f"an engine step has taken longer than {step_timeout_s:.0f} s")

    async def _step(self) -> bool:
        batch = self._engine.begin_step()
        if batch is None:
            return False
        self._step_began = clock.now()
        try:
            hook = self._layer_hook(batch, self._engine.in_step)
            result = await self._executor.run(self._engine.runner.run, batch, hook)
            await asyncio.sleep(result.modelled_s)
        except Exception:
            log.exception("engine step of %d tokens failed", batch.num_tokens)
            self._num_failed += 1
            self._on_failure(self._engine.fail_step(), "the model could not compute this step")
            return True
        finally:
            self._step_began = None
        self._num_failed = 0
        self.num_steps += 1
        self._on_outcome(self._engine.end_step(batch, result))
        return True
