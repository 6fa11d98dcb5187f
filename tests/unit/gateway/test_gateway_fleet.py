"""The fleet follows a registry that may be stale, wrong or gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from forebay.core.errors import Unavailable
from forebay.core.executor import InlineExecutor
from forebay.core.randomness import Rng
from forebay.core.roles import WorkerRole
from forebay.core.settings import EngineSettings, GatewaySettings, WorkerSettings
from forebay.engine.loader import load_runner
from forebay.gateway.fleet import Fleet
from forebay.gateway.router import Router
from forebay.gateway.worker_link import Blame, Exposure, WorkerLink
from forebay.rpc.v1 import worker_pb2
from forebay.simulator import loop
from forebay.simulator.kv_events import SimKvEventSource, SimKvStreams
from forebay.simulator.network import SimNetwork
from forebay.simulator.redis_client import LocalRedisClient
from forebay.simulator.registry import MemoryRegistry
from forebay.worker.worker import Worker

ENGINE = EngineSettings(engine="sim", model_id="sim", num_blocks=16)


class World:
    def __init__(self) -> None:
        self.rng = Rng(1)
        self.network = SimNetwork(self.rng, 0.001)
        self.registry = MemoryRegistry()
        settings = GatewaySettings(registry_poll_s=0.5)
        events = SimKvEventSource(LocalRedisClient(SimKvStreams().routes()))
        self.router = Router(settings, self.registry, events, "g")
        self.fleet = Fleet(settings, self.registry, self.network, "g", self.router, lambda: None)
        self.tasks: list[asyncio.Task[None]] = []

    def worker(self, address: str, role: WorkerRole = WorkerRole.MIXED) -> Worker:
        settings = WorkerSettings(role=role, engine=ENGINE)
        worker = Worker(settings, load_runner(ENGINE), InlineExecutor(), self.network, self.rng)
        worker.endpoint = address
        self.network.listen(address, worker.routes())
        self.tasks.append(asyncio.create_task(worker.run()))
        return worker

    async def announce(self, worker: worker_pb2.WorkerDescription) -> None:
        await self.registry.publish(worker, 1000)

    def accepting(self) -> list[str]:
        view = self.router.view
        return sorted(id_ for id_, yes in zip(view.worker_ids, view.accepting, strict=True) if yes)

    def link(self, worker: Worker) -> WorkerLink:
        return self.fleet.link(worker.worker_id)


@asynccontextmanager
async def following() -> AsyncIterator[World]:
    world = World()
    world.tasks.append(asyncio.create_task(world.fleet.run()))
    try:
        yield world
        assert not world.tasks[0].done()
    finally:
        for task in world.tasks:
            task.cancel()
        await asyncio.gather(*world.tasks, return_exceptions=True)
        await world.fleet.close()


def in_virtual_time(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            await test()

        loop.run(main())

    return run


@in_virtual_time
async def test_workers_join_and_are_dropped_when_they_die() -> None:
    async with following() as world:
        one, two = world.worker("a:1"), world.worker("b:1")
        await world.announce(one.description())
        await world.announce(two.description())
        await asyncio.sleep(2)
        assert world.accepting() == sorted((one.worker_id, two.worker_id))
        assert set(world.fleet.models()) == {"sim"}
        await world.registry.remove(one.worker_id)
        world.network.unplug("a:1")
        await asyncio.sleep(2)
        assert world.accepting() == [two.worker_id]
        try:
            world.link(one)
            raise AssertionError("a dead worker has a link")
        except Unavailable:
            pass


@in_virtual_time
async def test_a_record_whose_address_another_worker_has_now_is_no_second_worker() -> None:
    """Two links to one worker would cut each other's step stream off for ever."""
    async with following() as world:
        killed = world.worker("a:1").description()
        world.network.unplug("a:1")
        alive = world.worker("a:1")
        await world.announce(killed)
        await world.announce(alive.description())
        await asyncio.sleep(2)
        link = world.link(alive)
        assert world.accepting() == [alive.worker_id]
        await asyncio.sleep(10)
        assert world.link(alive) is link
        assert not link.lost


@in_virtual_time
async def test_records_nobody_can_use_do_not_stop_the_others_from_joining() -> None:
    """A later version may have roles that this one does not know."""
    async with following() as world:
        good = world.worker("a:1")
        for number, change in enumerate(("endpoints", "role", "model")):
            worker = world.worker(f"b:{number}")
            bad = worker.description()
            bad.ClearField(change)  # type: ignore[arg-type]
            worker.description = lambda bad=bad: bad  # type: ignore[method-assign,misc]
            await world.announce(bad)
        await world.announce(good.description())
        await asyncio.sleep(5)
        assert world.accepting() == [good.worker_id]


@in_virtual_time
async def test_a_tokenizer_that_is_not_what_was_announced_is_refused() -> None:
    async with following() as world:
        worker = world.worker("a:1")

        async def other(_: object) -> worker_pb2.GetTokenizerResponse:
            return worker_pb2.GetTokenizerResponse(tokenizer_spec=b"something else")

        routes = worker.routes()
        routes.unary = [
            (method, other if method.name == "GetTokenizer" else handler)
            for method, handler in routes.unary
        ]
        world.network.listen("a:1", routes)
        await world.announce(worker.description())
        await asyncio.sleep(5)
        assert world.accepting() == []
        assert world.fleet.models() == {}
        assert not worker._streams.is_attached("g")


@in_virtual_time
async def test_a_worker_that_could_not_join_is_tried_again() -> None:
    async with following() as world:
        worker = world.worker("a:1")
        description = worker.description()
        world.network.unplug("a:1")
        await world.announce(description)
        await asyncio.sleep(2)
        assert world.accepting() == []
        world.network.listen("a:1", worker.routes())
        await asyncio.sleep(2)
        assert world.accepting() == [worker.worker_id]


@in_virtual_time
async def test_a_failing_registry_changes_nothing() -> None:
    async with following() as world:
        worker = world.worker("a:1")
        await world.announce(worker.description())
        await asyncio.sleep(2)
        works = world.registry.list_workers
        for error in (Unavailable("away"), ValueError("a record that cannot be read")):

            async def fail(error: Exception = error) -> list[worker_pb2.WorkerDescription]:
                raise error

            world.registry.list_workers = fail  # type: ignore[method-assign]
            await asyncio.sleep(5)
            assert world.accepting() == [worker.worker_id]
        world.registry.list_workers = works  # type: ignore[method-assign]
        other = world.worker("b:1")
        await world.announce(other.description())
        await asyncio.sleep(2)
        assert len(world.accepting()) == 2


@in_virtual_time
async def test_a_worker_that_the_registry_forgot_gets_no_new_requests() -> None:
    async with following() as world:
        worker = world.worker("a:1")
        await world.announce(worker.description())
        await asyncio.sleep(2)
        await world.registry.remove(worker.worker_id)
        await asyncio.sleep(2)
        assert world.accepting() == [worker.worker_id]
        await asyncio.sleep(3)
        assert world.accepting() == []
        assert not world.link(worker).lost
        await world.announce(worker.description())
        await asyncio.sleep(1)
        assert world.accepting() == [worker.worker_id]


@in_virtual_time
async def test_an_old_record_does_not_replace_newer_figures() -> None:
    """Polling is faster than heartbeats: each record counts once."""
    async with following() as world:
        worker = world.worker("a:1")
        await world.announce(worker.description())
        await asyncio.sleep(2)
        link = world.link(worker)
        worker._streams.send_signs_of_life = lambda: None  # type: ignore[method-assign]
        link.update_load(worker_pb2.WorkerLoad(num_running=9))
        await asyncio.sleep(2)
        assert link.load.num_running == 9
        fresh = worker.description()
        fresh.load.num_running = 7
        await world.announce(fresh)
        await asyncio.sleep(1)
        assert link.load.num_running == 7


@in_virtual_time
async def test_a_step_stream_that_cannot_be_read_loses_the_link() -> None:
    async with following() as world:
        worker = world.worker("a:1")
        await world.announce(worker.description())
        await asyncio.sleep(2)
        link = world.link(worker)

        class Inbox:
            request_id = "r"
            num_lost = 0

            def deliver(self, link: WorkerLink, output: worker_pb2.SequenceOutput) -> None:
                raise ValueError("a bug")

            def exposure(self, link: WorkerLink) -> Exposure:
                return Exposure.NONE

            def lose(self, link: WorkerLink, blame: Blame) -> None:
                self.num_lost += 1

        inbox = Inbox()
        link.subscribe("r", inbox)
        worker._streams.send(
            "g",
            worker_pb2.StepsResponse(outputs=[worker_pb2.SequenceOutput(request_id="r")]),
        )
        await asyncio.sleep(0.1)
        assert link.lost and inbox.num_lost == 1
        await asyncio.sleep(2)
        assert world.link(worker) is not link


@in_virtual_time
async def test_work_that_is_about_to_be_sent_counts_at_once() -> None:
    async with following() as world:
        worker = world.worker("a:1")
        await world.announce(worker.description())
        await asyncio.sleep(2)
        room = world.router.view.prefill_room_tokens[0]
        world.fleet.expect(world.link(worker), 2, 300)
        view = world.router.view
        assert (view.num_sequences[0], view.num_queued_tokens[0]) == (2, 300)
        assert view.prefill_room_tokens[0] == room - 300
