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


async def test_posts_reach_the_loop_in_order_before_the_result() -> None:
    executor = ThreadExecutor()
    seen: list[object] = []

    def function() -> str:
        for number in range(20):
            executor.post(seen.append, (number, threading.current_thread().name))
        executor.post(lambda: seen.append(threading.current_thread().name))
        return "result"

    seen.append(await executor.run(function))
    here = threading.current_thread().name
    engine = seen[0][1]  # type: ignore[index]
    assert engine != here
    assert seen == [*((number, engine) for number in range(20)), here, "result"]
    executor.close()


def test_a_post_to_a_closed_loop_is_dropped() -> None:
    executor = ThreadExecutor()
    seen: list[int] = []
    asyncio.run(executor.run(seen.append, 1))
    executor.post(seen.append, 2)
    asyncio.run(executor.run(seen.append, 3))
    executor.close()
    assert seen == [1, 3]
