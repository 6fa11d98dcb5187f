"""A request over workers that come and go: scripted ones, so that each loss falls where it is
meant to."""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from forebay.core import clock
from forebay.core.clock import Deadline
from forebay.core.errors import ForebayError, InvalidRequest, Overloaded, Unavailable, WorkerLost
from forebay.core.finish import FinishReason
from forebay.core.sampling import SamplingParams
from forebay.gateway.fleet import ServedModel
from forebay.gateway.generation import ChoiceEnd, Chunk, Completion, Migrated
from forebay.gateway.leg import Leg
from forebay.gateway.placement import Placement
from forebay.gateway.request import GatewayRequest
from forebay.gateway.setbacks import DEATH_SLACK_TOKENS
from forebay.gateway.worker_link import Blame
from forebay.rpc.conversions import finish_to_proto, sampling_to_proto
from forebay.rpc.v1 import worker_pb2
from forebay.simulator import loop
from forebay.text.sim import sim_tokenizer_spec
from forebay.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(sim_tokenizer_spec())
ANSWER = b"a forebay holds the first seconds of a surge"


class Link:
    """A worker as the request sees it."""

    def __init__(self, worker_id: str) -> None:
        self.worker_id = worker_id
        self.lives = False
        self.subscribed: set[str] = set()

    def unsubscribe(self, request_id: str) -> None:
        self.subscribed.discard(request_id)


class World:
    """Implements what a request wants of a Dispatcher and its Placer. Each placement takes the
    next of `errors` (None: it succeeds) and is kept in `legs`."""

    def __init__(self, *, max_migrations: int = 16) -> None:
        self.max_migrations = max_migrations
        self.closing = False
        self.prefill, self.decode = Link("prefill"), Link("decode")
        self.placer = self.poison = self
        self.probation = asyncio.Lock()
        self.errors: deque[ForebayError | None] = deque()
        self.legs: list[Leg] = []
        self.placed: asyncio.Queue[Leg] = asyncio.Queue()
        self.avoided: list[frozenset[str]] = []
        self.urgent: list[bool] = []
        self.aborts: list[tuple[str, str, tuple[int, ...]]] = []
        self.poisoned: list[str] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.sent: dict[tuple[str, int], int] = {}

    async def place(
        self, leg: Leg, deadline: Deadline, queue_deadline: Deadline, **how: Any
    ) -> Placement:
        error = self.errors.popleft() if self.errors else None
        if error is not None:
            raise error
        leg.spec.attempt += 1
        self.avoided.append(how["avoid"])
        self.urgent.append(how["urgent"])
        leg.computes_on(self.prefill)  # type: ignore[arg-type]
        for link in (self.prefill, self.decode):
            link.subscribed.add(leg.spec.request_id)
        self.legs.append(leg)
        self.placed.put_nowait(leg)
        return Placement(self.decode, self.prefill)  # type: ignore[arg-type]

    def abort(self, link: Link, spec: worker_pb2.SequenceSpec, choices: tuple[int, ...]) -> None:
        self.aborts.append((link.worker_id, spec.request_id, choices))

    def spawn(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        return task

    async def lives(self, link: Link) -> bool:
        return link.lives

    def add(self, fingerprint: str) -> None:
        self.poisoned.append(fingerprint)

    def request(self, request_id: str = "r", **params: Any) -> GatewayRequest:
        sampling = SamplingParams(**{"max_tokens": len(ANSWER), **params})
        spec = worker_pb2.SequenceSpec(
            request_id=request_id,
            gateway_id="g",
            prompt_token_ids=[1, 2, 3],
            sampling=sampling_to_proto(sampling),
        )
        return GatewayRequest(
            spec=spec,
            params=sampling,
            served=ServedModel(
                worker_pb2.ModelInfo(id="sim"), worker_pb2.KvLayout(), 100, TOKENIZER
            ),
            client_request_id="client",
            fingerprint="print",
            deadline=Deadline.after(60),
            queue_timeout_s=5,
            dispatcher=self,  # type: ignore[arg-type]
        )

    async def next_leg(self) -> Leg:
        async with asyncio.timeout(30):
            return await self.placed.get()

    def send(self, leg: Leg, count: int, *, choice: int = 0) -> None:
        """The next `count` tokens of the answer at most, a leg's first from the prefill worker."""
        begin = len(leg.spec.generated_token_ids)
        key = (leg.spec.request_id, choice)
        offset = self.sent.get(key, begin)
        end = self.sent[key] = min(offset + count, len(ANSWER))
        for i in range(offset, end):
            output = worker_pb2.SequenceOutput(
                attempt=leg.spec.attempt,
                choice=choice,
                offset=i,
                token_ids=[ANSWER[i]],
                finish_reason=finish_to_proto(
                    FinishReason.LENGTH if i == len(ANSWER) - 1 else None
                ),
            )
            leg.deliver(self.prefill if i == begin else self.decode, output)  # type: ignore[arg-type]

    def fail(self, leg: Leg, *, resumable: bool, link: Link | None = None) -> None:
        output = worker_pb2.SequenceOutput(
            attempt=leg.spec.attempt,
            finish_reason=finish_to_proto(FinishReason.ERROR),
            error="it broke",
            resumable=resumable,
        )
        leg.deliver(link or self.decode, output)  # type: ignore[arg-type]


class Client:
    def __init__(self, request: GatewayRequest) -> None:
        self.events: list[object] = []
        self.task = asyncio.create_task(self._read(request))

    async def _read(self, request: GatewayRequest) -> None:
        async for event in request.events():
            self.events.append(event)

    async def done(self) -> list[object]:
        await asyncio.wait_for(self.task, 100)
        return self.events

    def text(self, choice: int = 0) -> str:
        chunks = [e for e in self.events if isinstance(e, Chunk) and e.choice == choice]
        return "".join(chunk.text for chunk in chunks)

    @property
    def num_migrations(self) -> int:
        return sum(isinstance(event, Migrated) for event in self.events)


def in_virtual_time(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        async def main() -> None:
            await test(**arguments)

        loop.run(main())

    del run.__wrapped__  # type: ignore[attr-defined]  # pytest would see a coroutine function
    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return run


def lose(leg: Leg, link: Link, blame: Blame = Blame.NONE) -> None:
    leg.lose(link, blame)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_before", [0, 1, 2, 17, len(ANSWER) - 1])
@in_virtual_time
async def test_a_stream_outlives_its_decode_worker(num_before: int) -> None:
    world = World()
    client = Client(world.request())
    first = await world.next_leg()
    world.send(first, num_before)
    lose(first, world.decode)
    second = await world.next_leg()
    assert second.spec.request_id == "r.1"
    assert bytes(second.spec.generated_token_ids) == ANSWER[:num_before]
    assert list(second.spec.choices) == ([0] if num_before else [])
    assert world.urgent == [False, True]
    assert world.avoided[1] == {"decode"}
    world.send(second, len(ANSWER) - num_before)
    events = await client.done()
    assert client.text() == ANSWER.decode()
    usage = events[-1].usage  # type: ignore[attr-defined]
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, len(ANSWER))
    assert client.num_migrations == 1
    assert {link for link, leg, _ in world.aborts if leg == "r"} == {"prefill", "decode"}


@in_virtual_time
async def test_the_prefill_worker_may_go_once_the_answer_comes_from_the_other() -> None:
    world = World()
    client = Client(world.request())
    leg = await world.next_leg()
    world.send(leg, 2)
    lose(leg, world.prefill)
    world.send(leg, len(ANSWER) - 2)
    await client.done()
    assert client.num_migrations == 0
    assert world.aborts == []


@in_virtual_time
async def test_before_that_it_is_needed() -> None:
    world = World()
    client = Client(world.request())
    first = await world.next_leg()
    world.send(first, 1)
    lose(first, world.prefill)
    second = await world.next_leg()
    assert bytes(second.spec.generated_token_ids) == ANSWER[:1]
    world.send(second, len(ANSWER) - 1)
    await client.done()
    assert client.text() == ANSWER.decode()


@in_virtual_time
async def test_an_answer_whose_first_token_was_lost_is_computed_again() -> None:
    world = World()
    client = Client(world.request())
    first = await world.next_leg()
    late = worker_pb2.SequenceOutput(attempt=1, offset=1, token_ids=[ANSWER[1]])
    first.deliver(world.decode, late)  # type: ignore[arg-type]
    first.deliver(world.decode, late)  # type: ignore[arg-type]
    world.fail(first, resumable=True)
    second = await world.next_leg()
    assert not second.spec.generated_token_ids
    world.send(second, len(ANSWER))
    await client.done()
    assert client.text() == ANSWER.decode()


@in_virtual_time
async def test_every_choice_goes_on_from_its_own_tokens() -> None:
    world = World()
    client = Client(world.request(n=3))
    first = await world.next_leg()
    world.send(first, 5, choice=0)
    world.send(first, len(ANSWER), choice=1)
    lose(first, world.decode)
    fresh, begun = await world.next_leg(), await world.next_leg()
    assert (fresh.choices, begun.choices) == ((2,), (0,))
    assert list(fresh.spec.choices) == [2] and not fresh.spec.generated_token_ids
    assert bytes(begun.spec.generated_token_ids) == ANSWER[:5]
    world.send(begun, len(ANSWER) - 5, choice=0)
    world.send(fresh, len(ANSWER), choice=2)
    events = await client.done()
    assert [client.text(i) for i in range(3)] == [ANSWER.decode()] * 3
    assert sum(isinstance(event, ChoiceEnd) for event in events) == 3
    assert events[-1].usage.completion_tokens == 3 * len(ANSWER)  # type: ignore[attr-defined]


@in_virtual_time
async def test_what_an_old_leg_still_says_is_not_heard() -> None:
    world = World()
    client = Client(world.request())
    first = await world.next_leg()
    world.send(first, 3)
    world.fail(first, resumable=True)
    second = await world.next_leg()
    world.send(first, 5)
    world.fail(first, resumable=False)
    lose(first, world.decode, Blame.SOLE)
    world.send(second, len(ANSWER) - 3)
    await client.done()
    assert client.text() == ANSWER.decode()
    assert client.num_migrations == 1


@in_virtual_time
async def test_stop_strings_reach_over_a_migration() -> None:
    world = World()
    client = Client(world.request(stop=("holds",)))
    first = await world.next_leg()
    world.send(first, len(b"a forebay hol"))
    lose(first, world.decode)
    second = await world.next_leg()
    world.send(second, 4)
    events = await client.done()
    assert client.text() == "a forebay "
    assert events[-2] == ChoiceEnd(0, FinishReason.STOP)
    assert ("decode", "r.1", ()) in world.aborts


@in_virtual_time
async def test_an_error_that_no_other_worker_could_mend_ends_it() -> None:
    world = World()
    client = Client(world.request())
    leg = await world.next_leg()
    world.send(leg, 3)
    world.fail(leg, resumable=False)
    with pytest.raises(Unavailable, match="it broke"):
        await client.done()
    assert {link for link, _, _ in world.aborts} == {"prefill", "decode"}


@pytest.mark.parametrize("limit", [0, 1, 3])
@in_virtual_time
async def test_the_number_of_migrations_is_bounded(limit: int) -> None:
    world = World(max_migrations=limit)
    client = Client(world.request())
    for _ in range(limit + 1):
        lose(await world.next_leg(), world.decode)
    with pytest.raises(WorkerLost):
        await client.done()
    assert len(world.legs) == limit + 1


@in_virtual_time
async def test_a_gateway_that_ends_begins_no_leg() -> None:
    world = World()
    client = Client(world.request())
    leg = await world.next_leg()
    world.closing = True
    lose(leg, world.decode)
    with pytest.raises(WorkerLost):
        await client.done()


@in_virtual_time
async def test_fruitless_migrations_slow_down() -> None:
    world = World()
    client = Client(world.request())
    times = []
    for _ in range(6):
        leg = await world.next_leg()
        times.append(clock.now())
        world.fail(leg, resumable=True)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps[0] == 0 and gaps[1:] == sorted(gaps[1:]) and gaps[-1] > 4 * gaps[1] > 0
    leg = await world.next_leg()
    world.send(leg, 4)
    before = clock.now()
    world.fail(leg, resumable=True)
    leg = await world.next_leg()
    assert clock.now() == before
    world.send(leg, len(ANSWER))
    await client.done()


@in_virtual_time
async def test_no_place_for_a_migrating_stream_is_told() -> None:
    world = World()
    client = Client(world.request())
    leg = await world.next_leg()
    world.errors.append(Overloaded("full"))
    lose(leg, world.decode)
    with pytest.raises(Overloaded, match="full"):
        await client.done()


@in_virtual_time
async def test_a_first_placement_that_fails_leaves_nothing() -> None:
    world = World()
    world.errors.append(Overloaded("full"))
    with pytest.raises(Overloaded):
        await Client(world.request()).done()
    assert not world.aborts


@in_virtual_time
async def test_two_deaths_at_one_spot_make_it_poison() -> None:
    world = World()
    client = Client(world.request())
    first = await world.next_leg()
    world.send(first, 20)
    lose(first, world.decode, Blame.SOLE)
    world.decode = Link("another")
    second = await world.next_leg()
    world.send(second, DEATH_SLACK_TOKENS)
    lose(second, world.decode, Blame.SOLE)
    with pytest.raises(InvalidRequest) as caught:
        await client.done()
    assert caught.value.code == "poisoned_request"
    assert world.poisoned == ["print"]


@in_virtual_time
async def test_a_worker_that_lives_on_has_not_died_of_it() -> None:
    world = World()
    client = Client(world.request())
    for i in range(5):
        leg = await world.next_leg()
        world.decode.lives = i != 2
        lose(leg, world.decode, Blame.SOLE)
        world.decode = Link(f"another {i}")
    leg = await world.next_leg()
    world.send(leg, len(ANSWER))
    await client.done()
    assert not world.poisoned and client.text() == ANSWER.decode()


@in_virtual_time
async def test_progress_between_two_deaths_clears_it() -> None:
    world = World()
    client = Client(world.request())
    first = await world.next_leg()
    world.send(first, 3)
    lose(first, world.decode, Blame.SOLE)
    world.decode = Link("another")
    second = await world.next_leg()
    world.send(second, DEATH_SLACK_TOKENS + 1)
    lose(second, world.decode, Blame.SOLE)
    third = await world.next_leg()
    world.send(third, len(ANSWER))
    await client.done()
    assert not world.poisoned and client.text() == ANSWER.decode()


@in_virtual_time
async def test_one_of_several_suspects_is_not_guilty_yet() -> None:
    world = World()
    client = Client(world.request())
    for _ in range(3):
        leg = await world.next_leg()
        lose(leg, world.prefill, Blame.SUSPECT)
        world.prefill = Link("next")
    leg = await world.next_leg()
    world.send(leg, len(ANSWER))
    await client.done()
    assert not world.poisoned


@in_virtual_time
async def test_a_first_token_lost_with_its_worker_is_missed() -> None:
    """The decode worker goes on, but the answer's first token will never come."""
    world = World()
    client = Client(world.request())
    first = await world.next_leg()
    second_token = worker_pb2.SequenceOutput(attempt=1, offset=1, token_ids=[ANSWER[1]])
    first.deliver(world.decode, second_token)  # type: ignore[arg-type]
    lose(first, world.prefill)
    second = await world.next_leg()
    world.send(second, len(ANSWER))
    await client.done()
    assert client.text() == ANSWER.decode()


@in_virtual_time
async def test_a_late_failure_of_the_prefill_worker_moves_nothing() -> None:
    world = World()
    client = Client(world.request())
    leg = await world.next_leg()
    world.send(leg, 2)
    world.fail(leg, resumable=True, link=world.prefill)
    world.send(leg, len(ANSWER))
    await client.done()
    assert client.num_migrations == 0


@in_virtual_time
async def test_a_failure_of_a_choice_that_has_ended_ends_no_other() -> None:
    world = World()
    client = Client(world.request(n=2, stop=("holds",)))
    leg = await world.next_leg()
    world.send(leg, 20, choice=0)
    world.fail(leg, resumable=False)
    world.send(leg, len(ANSWER), choice=1)
    await client.done()
    assert client.text(0) == "a forebay " == client.text(1)


@in_virtual_time
async def test_what_breaks_several_legs_at_once_is_one_death() -> None:
    world = World()
    client = Client(world.request(n=2))
    first = await world.next_leg()
    world.send(first, 3, choice=0)
    world.send(first, 3, choice=1)
    lose(first, world.decode)
    legs = []
    for name in ("one", "other"):
        legs.append(await world.next_leg())
        world.decode = Link(name)
    for leg in legs:
        lose(leg, leg.placement.decode, Blame.SOLE)  # type: ignore[union-attr,arg-type]
    for _ in legs:
        leg = await world.next_leg()
        world.send(leg, len(ANSWER), choice=leg.choices[0])
    await client.done()
    assert not world.poisoned


@in_virtual_time
async def test_a_second_hand_over_after_progress_needs_no_probation() -> None:
    world = World()
    client = Client(world.request())
    for _ in range(3):
        leg = await world.next_leg()
        assert not leg.on_probation
        world.send(leg, 5)
        world.fail(leg, resumable=True)
    leg = await world.next_leg()
    assert not leg.on_probation
    world.send(leg, len(ANSWER))
    await client.done()


@in_virtual_time
async def test_suspects_are_placed_one_at_a_time() -> None:
    world = World()
    one, other = Client(world.request("one")), Client(world.request("other"))
    legs = [await world.next_leg(), await world.next_leg()]
    for leg in legs:
        lose(leg, world.prefill, Blame.SUSPECT)
    first = await world.next_leg()
    await asyncio.sleep(1)
    assert world.placed.empty()
    world.send(first, 1)
    second = await world.next_leg()
    world.send(first, len(ANSWER))
    world.send(second, len(ANSWER))
    await one.done()
    await other.done()


@pytest.mark.parametrize("migrating", [False, True])
@in_virtual_time
async def test_a_client_that_leaves_takes_everything_along(migrating: bool) -> None:
    world = World()
    client = Client(world.request())
    leg = await world.next_leg()
    world.send(leg, 3)
    if migrating:
        await world.probation.acquire()
        lose(leg, world.decode, Blame.SUSPECT)
    await asyncio.sleep(1)
    client.task.cancel()
    await asyncio.gather(client.task, *world.tasks, return_exceptions=True)
    assert all(task.done() for task in world.tasks)
    assert not world.prefill.subscribed and not world.decode.subscribed
    assert {link for link, _, _ in world.aborts} == {"prefill", "decode"}
    assert not any(isinstance(event, Completion) for event in client.events)
