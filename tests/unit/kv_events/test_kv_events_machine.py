"""Any interleaving of changes and faults ends with an index that says what the pools hold."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any
from unittest import mock

import pytest
from kv_event_benches import (
    EPOCH,
    FaultyRedis,
    FollowingGateway,
    PublishingWorker,
    held,
    in_virtual_time,
    running,
)

from forebay.gateway import kv_follower
from forebay.worker import kv_publisher

HEALED_S = 8.0
"""The longest wait between two looks at a snapshot, and the wish that is answered then."""
MAX_NUMBER = 40
NUM_STORIES = 80

HARMS = ("flush", "down", "up", "slow", "fast", "lose", "save", "set back")
UNREAD = ("drop", "drop", "flush", "set back")
PAUSES_S = (0.0, 0.01, 0.06, 0.11, 0.11, 0.6, 2.7)


def story_of(seed: int) -> list[tuple[Any, ...]]:
    chance = random.Random(seed)
    steps: list[tuple[Any, ...]] = []
    for _ in range(30):
        roll = chance.random()
        if roll < 0.5:
            first = chance.randrange(MAX_NUMBER - 9)
            steps.append(("store", chance.randrange(2), first, chance.randrange(1, 10)))
        elif roll < 0.6:
            steps.append(("evict", chance.randrange(2), chance.randrange(1, 10)))
        elif roll < 0.75:
            steps.append((chance.choice(UNREAD), chance.randrange(1, 3)))
        elif roll < 0.92:
            steps.append((chance.choice(HARMS),))
        else:
            more = [("restart", 0), ("restart", 1), ("leave", 1), ("return",), ("late",)]
            steps.append(chance.choice(more))
        steps.append(("pause", chance.choice(PAUSES_S)))
    return steps


class Story:
    def __init__(self) -> None:
        self.redis = FaultyRedis()
        self.workers = [PublishingWorker(self.redis, f"w{n}", 12) for n in range(2)]
        self.gateways = [FollowingGateway(self.redis)]
        self.listed = [0, 1]
        self.replica = self.redis.saved()
        self.unread: list[str] = []
        self.redis.after_append = self.harm_unread
        self.tasks: list[asyncio.Task[None]] = []
        self.publishing = [self.start(worker) for worker in self.workers]
        self.tasks.append(asyncio.create_task(self.gateways[0].follower.run()))
        self.follow()

    def start(self, worker: PublishingWorker) -> asyncio.Task[None]:
        task = asyncio.create_task(worker.publisher.run())
        self.tasks.append(task)
        return task

    def follow(self) -> None:
        for gateway in self.gateways:
            gateway.follow(*(self.workers[n] for n in self.listed))

    async def hear(self) -> None:
        while True:
            for gateway in self.gateways:
                gateway.hears(*self.workers)
            await asyncio.sleep(0.2)

    async def take(self, step: tuple[Any, ...]) -> None:
        match step:
            case ("store", worker, first, count):
                self.workers[worker].store(*range(first, first + count))
            case ("evict", worker, count):
                self.workers[worker].evict(count)
            case ("pause", seconds):
                await asyncio.sleep(seconds)
            case ("restart", worker):
                self.publishing[worker].cancel()
                epoch = f"{EPOCH}-{len(self.tasks)}"
                again = PublishingWorker(self.redis, f"w{worker}", 12, epoch)
                self.workers[worker] = again
                self.publishing[worker] = self.start(again)
                self.follow()
            case ("leave", worker):
                self.listed = [n for n in self.listed if n != worker]
                self.follow()
            case ("return",):
                self.listed = [0, 1]
                self.follow()
            case ("late",):
                if len(self.gateways) < 2:
                    self.gateways.append(FollowingGateway(self.redis))
                    task = asyncio.create_task(self.gateways[-1].follower.run())
                    self.tasks.append(task)
                    self.follow()
            case (name, int(count)):
                self.unread += [name] * count
            case (name,):
                self.harm(name)

    def harm_unread(self) -> None:
        """Something happens to what has just been appended before anybody has read it."""
        if self.unread:
            self.harm(self.unread.pop())

    def harm(self, name: str) -> None:
        redis = self.redis
        match name:
            case "drop":
                for worker in self.workers:
                    redis.drop(worker.worker_id, worker.publisher.seq, worker.epoch)
            case "flush":
                redis.streams.flush()
            case "down" | "up":
                redis.is_down = name == "down"
            case "slow" | "fast":
                redis.delay_s = 0.4 if name == "slow" else 0.0
            case "lose":
                redis.num_lost_answers += 2
            case "save":
                self.replica = redis.saved()
            case "set back":
                redis.streams, self.replica = self.replica, redis.saved()

    def heal(self) -> None:
        self.harm("up")
        self.harm("fast")
        self.redis.num_lost_answers = 0
        self.redis.after_append = None

    def check(self) -> None:
        for gateway in self.gateways:
            for number, worker in enumerate(self.workers):
                if number in self.listed:
                    assert gateway.knows(worker, MAX_NUMBER) == held(worker)
                    assert gateway.follower.is_fresh(worker.worker_id)
                else:
                    assert gateway.knows(worker, MAX_NUMBER) == set()
            assert not gateway.follower.degraded
            assert gateway.follower.staleness_s == 0


@pytest.mark.parametrize("seed", range(NUM_STORIES))
def test_any_story_ends_well(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        story = Story()
        async with running(story.hear()):
            for step in story_of(seed):
                await story.take(step)
            story.heal()
            await asyncio.sleep(HEALED_S)
            story.check()
        for task in story.tasks:
            task.cancel()
        await asyncio.gather(*story.tasks, return_exceptions=True)

    with (
        mock.patch.object(kv_publisher, "SNAPSHOT_BLOCKS", 60),
        mock.patch.object(kv_publisher, "MAX_PENDING_BATCHES", 4),
        mock.patch.object(kv_follower, "SLICE_BLOCKS", 40),
    ):
        in_virtual_time(main)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
