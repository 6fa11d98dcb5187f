from __future__ import annotations

import asyncio
import threading

import pytest

from forebay.worker.thread_executor import ThreadExecutor


async def test_calls_run_one_at_a_time_in_order() -> None:
    executor = ThreadExecutor()
    seen: list[int] = []
    await asyncio.gather(*(executor.run(seen.append, i) for i in range(50)))
    assert seen == list(range(50))
    with pytest.raises(ZeroDivisionError):
        await executor.run(lambda: 1 // 0)
    executor.close()


@pytest.mark.parametrize("num_cancels", [1, 2, 5])
async def test_a_cancelled_call_ends_after_its_function(num_cancels: int) -> None:
    executor = ThreadExecutor()
    begun, go_on = threading.Event(), threading.Event()

    def function() -> None:
        begun.set()
        go_on.wait(10)
        raise OSError("nobody is there to see it")

    task = asyncio.create_task(executor.run(function))
    while not begun.is_set():
        await asyncio.sleep(0)
    for _ in range(num_cancels):
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    executor.close()


async def test_a_call_cancelled_before_its_turn_never_runs() -> None:
    executor = ThreadExecutor()
    begun, go_on = threading.Event(), threading.Event()
    seen: list[str] = []

    def first() -> None:
        begun.set()
        go_on.wait(10)

    running = asyncio.create_task(executor.run(first))
    queued = asyncio.create_task(executor.run(seen.append, "ran"))
    while not begun.is_set():
        await asyncio.sleep(0)
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued
    go_on.set()
    await running
    executor.close()
    assert seen == []
