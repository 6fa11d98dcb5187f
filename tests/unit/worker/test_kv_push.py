"""KV leaves while it is computed, in order, within bounds, and arrives bit-identical."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Seq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_pairs import (
    KEY,
    VERSION,
    as_iterator,
    kv_part,
    read_kv,
    sim_engine,
    start_of,
    write_kv,
)

from forebay.core.errors import KvTransferError
from forebay.core.executor import InlineExecutor
from forebay.core.kv_codec import KvCodec
from forebay.core.sampling import SamplingParams
from forebay.engine.engine import Engine
from forebay.engine.sequence import RequestKey
from forebay.kv.leases import Lease, LeaseTable
from forebay.rpc.v1 import kv_transfer_pb2, worker_pb2
from forebay.simulator import loop
from forebay.worker.frames import Frame, decode_message
from forebay.worker.kv_push import MAX_FRAMES_AHEAD, FrameReader, KvPush
from forebay.worker.transfer import KvReceiver

NUM_LAYERS = 4
TOKEN_BYTES = 8
PARAMS = SamplingParams(seed=3, max_tokens=20)
TARGET = worker_pb2.TransferTarget(lease_id="lease", epoch="epoch")


class Pushing:
    """A prompt that is computed step by step, its push, and what has been taken from it so far."""

    def __init__(
        self,
        engine: Engine,
        prompt: list[int],
        max_frame_bytes: int,
        start_token: int = 0,
    ) -> None:
        self.engine = engine
        self.prompt = prompt
        self.taken: list[bytes] = []
        self.made_after_layer: list[int] = []
        self.sequence = engine.submit(start_of(prompt, PARAMS), prefill_only=True)
        target = worker_pb2.TransferTarget(start_token=start_token)
        target.MergeFrom(TARGET)
        reader = FrameReader(engine.runner, target, KvCodec.RAW, max_frame_bytes, VERSION)
        self.reader = reader
        self.push = KvPush(reader, InlineExecutor(), target, self.sequence)
        self._between = asyncio.create_task(self.push.read_between_steps())

    def step(self) -> bool:
        """Computes the next step, as EngineLoop and Transfers do; False when nothing can run."""
        batch = self.engine.begin_step()
        if batch is None:
            return False
        ends = {
            sequence: item.start + item.num_tokens
            for sequence, item in zip(self.engine.in_step, batch.sequences, strict=True)
        }
        extent = self.push.extent(ends.get(self.sequence, 0))
        self.made_after_layer = []

        def on_layer(layer: int) -> None:
            if extent is not None:
                self.push.read_in_step(extent, layer + 1)
            self.made_after_layer.append(self.reader.num_frames)

        outcome = self.engine.end_step(batch, self.engine.runner.run(batch, on_layer))
        for prefilled in outcome.prefilled:
            self.push.complete(prefilled.first_tokens)
        self.engine.check_integrity()
        return True

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def take(self, at_most: int = 10**6) -> None:
        """What can be taken without waiting."""
        for _ in range(at_most):
            asking = asyncio.ensure_future(anext(self.push))
            await self.settle()
            if not asking.done():
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                return
            if isinstance(asking.exception(), StopAsyncIteration):
                return
            self.taken.append(asking.result())

    def frames(self) -> list[kv_transfer_pb2.KvFrameHeader]:
        messages = [decode_message(message) for message in self.taken]
        return [message.header for message in messages if isinstance(message, Frame)]

    async def end(self) -> None:
        self.push.close()
        self._between.cancel()
        await asyncio.gather(self._between, return_exceptions=True)


async def received_kv(messages: Seq[bytes], num_tokens: int, held: bytes = b"") -> bytes:
    """The KV of all layers as a receiver has it after these messages. `held`: KV of the leading
    tokens that it had before, all layers of it."""
    engine = sim_engine(num_blocks=128)
    leases = LeaseTable(engine.pool, "epoch")
    lease = leases.grant("lease", KEY, [], num_tokens)
    num_held = len(held) // (NUM_LAYERS * TOKEN_BYTES)
    lease.num_cached_tokens = num_held
    if held:
        write_kv(engine.runner, lease.block_table, kv_part(engine.runner, 0, num_held), held)
    commits: list[Lease] = []
    receiver = KvReceiver(
        engine.runner,
        InlineExecutor(),
        leases,
        lambda lease, _: commits.append(lease),
        lambda *_: None,
        VERSION,
    )
    await receiver.push(as_iterator(list(messages)))
    assert commits == [lease]
    return read_kv(engine.runner, lease.block_table, kv_part(engine.runner, 0, num_tokens))


def expected_kv(prompt: list[int], num_tokens: int | None = None) -> bytes:
    """Computed at once, in a big pool."""
    engine = sim_engine(num_blocks=128, max_batch_tokens=1000)
    sequence = engine.submit(start_of(prompt, PARAMS), prefill_only=True)
    batch = engine.begin_step()
    assert batch is not None
    engine.end_step(batch, engine.runner.run(batch))
    end = len(prompt) if num_tokens is None else num_tokens
    return read_kv(engine.runner, sequence.block_table, kv_part(engine.runner, 0, end))


@pytest.mark.parametrize(
    ("layers_a_frame", "made"),
    [(1, [1, 2, 3, 4]), (2, [0, 1, 1, 2]), (3, [0, 0, 1, 2]), (4, [0, 0, 0, 1])],
)
def test_a_layer_group_leaves_when_its_last_layer_is_computed(
    layers_a_frame: int, made: list[int]
) -> None:
    async def main() -> None:
        pushing = Pushing(sim_engine(), list(range(10)), layers_a_frame * 10 * TOKEN_BYTES)
        pushing.step()
        assert pushing.made_after_layer == made
        await pushing.take()
        assert pushing.push.committed
        assert await received_kv(pushing.taken, 10) == expected_kv(pushing.prompt)
        await pushing.end()

    loop.run(main())


def test_frames_leave_before_the_prompt_is_computed() -> None:
    async def main() -> None:
        pushing = Pushing(sim_engine(max_batch_tokens=8), list(range(20)), 8 * TOKEN_BYTES)
        sent: list[list[tuple[int, int, int]]] = []
        for _ in range(3):
            before = len(pushing.frames())
            pushing.step()
            await pushing.take()
            new = pushing.frames()[before:]
            sent.append([(f.layer_start, f.token_start, f.num_tokens) for f in new])
        assert sent[:2] == [[(layer, start, 8) for layer in range(NUM_LAYERS)] for start in (0, 8)]
        assert sent[2] == [(layer, 16, 4) for layer in (0, 2)]
        assert pushing.push.committed
        assert [f.frame for f in pushing.frames()] == list(range(10))
        assert await received_kv(pushing.taken, 20) == expected_kv(pushing.prompt)
        await pushing.end()

    loop.run(main())


def test_the_cached_prefix_leaves_with_the_first_layer() -> None:
    async def main() -> None:
        engine = sim_engine()
        first = Pushing(engine, list(range(12)), 10_000)
        first.step()
        await first.end()
        engine.release(first.sequence)
        prompt = [*range(12), 50, 51, 52]
        pushing = Pushing(engine, prompt, 12 * TOKEN_BYTES * NUM_LAYERS, start_token=4)
        pushing.step()
        assert pushing.made_after_layer == [1, 1, 1, 2]
        await pushing.take()
        parts = [
            (f.layer_start, f.num_layers, f.token_start, f.num_tokens) for f in pushing.frames()
        ]
        assert parts == [(0, 4, 4, 8), (0, 4, 12, 3)]
        held = expected_kv(prompt, 4)
        assert await received_kv(pushing.taken, 15, held) == expected_kv(prompt)
        await pushing.end()

    loop.run(main())


def test_what_the_receiver_holds_is_a_commit_alone() -> None:
    async def main() -> None:
        pushing = Pushing(sim_engine(), list(range(8)), 64, start_token=8)
        await pushing.take()
        assert pushing.taken == []
        pushing.step()
        await pushing.take()
        assert (len(pushing.taken), pushing.frames()) == (1, [])
        held = expected_kv(pushing.prompt)
        assert await received_kv(pushing.taken, 8, held) == held
        await pushing.end()

    loop.run(main())


def test_a_slow_receiver_does_not_make_frames_pile_up() -> None:
    async def main() -> None:
        prompt = [i % 200 for i in range(400)]
        pushing = Pushing(sim_engine(num_blocks=128, max_batch_tokens=32), prompt, 64)
        while pushing.step():
            await pushing.settle()
            assert pushing.reader.num_frames - len(pushing.taken) <= MAX_FRAMES_AHEAD
            await pushing.take(1)
        assert pushing.reader.num_frames < 13 + MAX_FRAMES_AHEAD + 1
        while not pushing.push.committed:
            await pushing.take(1)
            assert pushing.reader.num_frames - len(pushing.taken) <= MAX_FRAMES_AHEAD
        assert len(pushing.frames()) == pushing.reader.num_frames > 100
        assert await received_kv(pushing.taken, 400) == expected_kv(prompt)
        await pushing.end()

    loop.run(main())


def test_nothing_is_read_after_the_end() -> None:
    async def main() -> None:
        pushing = Pushing(sim_engine(max_batch_tokens=8), list(range(20)), 8 * TOKEN_BYTES)
        pushing.step()
        num_frames = pushing.reader.num_frames
        await pushing.end()
        while pushing.step():
            pass
        await pushing.take()
        assert (pushing.taken, pushing.reader.num_frames) == ([], num_frames)
        assert not pushing.push.committed

    loop.run(main())


def test_an_error_in_the_hook_ends_the_push_and_not_the_step() -> None:
    async def main() -> None:
        pushing = Pushing(sim_engine(max_batch_tokens=8), list(range(20)), 8 * TOKEN_BYTES)
        calls: list[int] = []

        def fail(*_: object) -> bytes:
            calls.append(1)
            raise KvTransferError("broken")

        pushing.reader._encode = fail  # type: ignore[method-assign,assignment]
        reading = asyncio.create_task(pushing.push.read_between_steps())
        assert pushing.step() and pushing.step()
        assert calls == [1]
        with pytest.raises(KvTransferError, match="broken"):
            await reading
        await pushing.end()

    loop.run(main())


def test_how_long_something_waits() -> None:
    async def main() -> None:
        pushing = Pushing(sim_engine(max_batch_tokens=8), list(range(20)), 8 * TOKEN_BYTES)
        await asyncio.sleep(50)
        assert pushing.push.waits_for_s() == 0
        pushing.step()
        await asyncio.sleep(3)
        assert pushing.push.waits_for_s() == pytest.approx(3)
        await pushing.take(1)
        await asyncio.sleep(2)
        assert pushing.push.waits_for_s() == pytest.approx(2)
        await pushing.take()
        await asyncio.sleep(50)
        assert pushing.push.waits_for_s() == 0
        while pushing.step():
            pass
        while not pushing.push.committed:
            await anext(pushing.push)
        await asyncio.sleep(7)
        assert pushing.push.waits_for_s() == pytest.approx(7), "the commit waits for its answer"
        await pushing.end()

    loop.run(main())


def other(name: str, num_tokens: int, max_tokens: int) -> object:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, stop_token_ids=frozenset())
    return start_of([7] * num_tokens, params, RequestKey("gateway", name))


def test_a_preempted_prompt_is_sent_whole() -> None:
    """Its blocks go to another sequence, which writes to them, and it is computed again in others
    and in other chunks."""

    async def main() -> None:
        engine = sim_engine(num_blocks=12, max_batch_tokens=4)
        engine.submit(other("older", 4, 25), prefill_only=False)  # type: ignore[arg-type]
        batch = engine.begin_step()
        assert batch is not None
        engine.end_step(batch, engine.runner.run(batch))
        prompt = list(range(100, 140))
        pushing = Pushing(engine, prompt, 4 * TOKEN_BYTES)
        num_taken_before = 0
        while pushing.step():
            if not engine.num_preemptions:
                await pushing.take(3)
                num_taken_before = len(pushing.taken)
            else:
                await pushing.take(1)
        assert engine.num_preemptions
        assert num_taken_before
        await pushing.take()
        assert pushing.push.committed
        assert await received_kv(pushing.taken, 40) == expected_kv(prompt)
        await pushing.end()

    loop.run(main())


@settings(max_examples=150)
@given(
    num_tokens=st.integers(1, 60),
    max_batch_tokens=st.integers(2, 30),
    max_frame_bytes=st.integers(1, 700),
    start_blocks=st.integers(0, 15),
    cached_blocks=st.integers(0, 15),
    older_tokens=st.integers(0, 40),
    takes=st.lists(st.integers(0, 12), max_size=40),
)
def test_what_arrives_is_bit_identical(
    num_tokens: int,
    max_batch_tokens: int,
    max_frame_bytes: int,
    start_blocks: int,
    cached_blocks: int,
    older_tokens: int,
    takes: list[int],
) -> None:
    """Whatever the chunks, frames, prefixes held on either side, neighbours, preemptions and the
    receiver's pace."""
    prompt = list(range(100, 100 + num_tokens))
    start_token = min(start_blocks * 4, num_tokens)

    async def main() -> None:
        engine = sim_engine(num_blocks=18, max_batch_tokens=max_batch_tokens)
        if cached := prompt[: cached_blocks * 4]:
            engine.submit(
                start_of(cached, SamplingParams(max_tokens=1), RequestKey("g", "before")),
                prefill_only=False,
            )
        if older_tokens:
            engine.submit(other("older", 8, older_tokens), prefill_only=False)  # type: ignore[arg-type]
        for _ in range(3):
            batch = engine.begin_step()
            if batch is not None:
                engine.end_step(batch, engine.runner.run(batch))
        pushing = Pushing(engine, prompt, max_frame_bytes, start_token)
        turns = iter(takes)
        while pushing.step():
            await pushing.settle()
            await pushing.take(next(turns, 1))
            assert pushing.reader.num_frames - len(pushing.frames()) <= MAX_FRAMES_AHEAD
        await pushing.take()
        assert pushing.push.committed
        held = expected_kv(prompt, start_token) if start_token else b""
        assert await received_kv(pushing.taken, num_tokens, held) == expected_kv(prompt)
        await pushing.end()

    loop.run(main())
