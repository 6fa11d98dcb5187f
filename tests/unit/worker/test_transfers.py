"""A transfer from a prompt's arrival to its commit, with the engine's loop, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from kv_pairs import KEY, VERSION, kv_part, read_kv, sim_engine, start_of

from forebay.core.clock import Deadline
from forebay.core.errors import InternalError, KvTransferError, Unavailable
from forebay.core.executor import InlineExecutor
from forebay.core.kv_codec import KvCodec
from forebay.core.sampling import SamplingParams
from forebay.engine.engine import Engine, Prefilled, StepOutcome
from forebay.engine.interface import Batch, LayerHook, StepResult
from forebay.engine.sequence import RequestKey, Sequence
from forebay.kv.leases import Lease, LeaseTable
from forebay.rpc.v1 import kv_transfer_pb2, worker_pb2
from forebay.simulator import loop
from forebay.worker.engine_loop import EngineLoop
from forebay.worker.kv_push import layer_hook
from forebay.worker.prefill import TRANSFER_STALL_S, Transfers
from forebay.worker.requests import WorkerRequest
from forebay.worker.thread_executor import ThreadExecutor
from forebay.worker.transfer import KvReceiver, KvSender

STEP_S = 1.0
PROMPT = list(range(20))
NUM_STEPS = 3
FRAME_BYTES = 64


class Sending:
    """A prefill worker's engine with steps of a second, 8 tokens each, and a decode worker's
    receiver. `message_s`: what a message takes. `on_message` may raise, or wait."""

    def __init__(self, message_s: float = 0.01) -> None:
        self.source, self.target = sim_engine(max_batch_tokens=8), sim_engine(num_blocks=64)
        self.leases = LeaseTable(self.target.pool, "epoch")
        self.commits: list[Lease] = []
        self.ends: list[str | None] = []
        self.failed_steps: list[str] = []
        self.message_s = message_s
        self.messages_at: list[float] = []
        self.answer_s = 0.0
        self.prefilled_at: list[float] = []
        executor = InlineExecutor()
        self.sender = KvSender(
            self.source.runner, executor, self, KvCodec.RAW, FRAME_BYTES, VERSION
        )
        self.receiver = KvReceiver(
            self.target.runner, executor, self.leases, self._on_commit, no_prefix, VERSION
        )
        self.transfers = Transfers(self.source, self.sender, self._on_end)
        self.engine_loop = EngineLoop(
            self.source, executor, self._on_outcome, self._on_failure, self.layer_hook
        )
        self._run, runner = self.source.runner.run, self.source.runner
        runner.run = self._slow_run  # type: ignore[method-assign]

    async def push(
        self, address: str, messages: AsyncIterator[bytes], deadline: Deadline
    ) -> kv_transfer_pb2.PushResponse:
        """Implements `KvTransport`."""

        async def arriving() -> AsyncIterator[bytes]:
            async for message in messages:
                await asyncio.sleep(self.message_s)
                self.messages_at.append(asyncio.get_running_loop().time())
                yield message

        response = await self.receiver.push(arriving())
        await asyncio.sleep(self.answer_s)
        return response

    def layer_hook(self, batch: Batch, sequences: list[Sequence]) -> LayerHook | None:
        return layer_hook(self.transfers.pushes, batch, sequences)

    def open(self, key: RequestKey = KEY) -> Sequence:
        start = start_of(PROMPT, SamplingParams(n=2, seed=3, max_tokens=20), key)
        lease_id = f"lease of {key.request_id}"
        if all(commit.owner != key for commit in self.commits):
            self.leases.grant(lease_id, key, [], len(PROMPT))
        sequence = self.source.submit(start, prefill_only=True)
        request = WorkerRequest(
            start=start,
            deadline=Deadline.after(1000),
            since=0.0,
            lease=Deadline.after(1000),
            target=worker_pb2.TransferTarget(lease_id=lease_id, epoch="epoch"),
        )
        self.transfers.open(request, sequence)
        self.engine_loop.wake()
        return sequence

    def abort(self, key: RequestKey = KEY) -> None:
        """As Worker does when a request ends."""
        self.source.abort(key)
        self.transfers.abort(key)

    async def check_all_free(self) -> None:
        """Within one step."""
        await asyncio.sleep(STEP_S)
        assert len(self.transfers) == 0
        counts = self.source.pool.counts()
        assert counts.free + counts.cached == counts.total
        assert self.source.num_sequences == 0
        self.source.check_integrity()
        self.leases.check_integrity()

    def _slow_run(self, batch: Batch, on_layer: LayerHook | None = None) -> StepResult:
        result = self._run(batch, on_layer)
        return StepResult(result.tokens, STEP_S)

    def _on_outcome(self, outcome: StepOutcome) -> None:
        for prefilled in outcome.prefilled:
            self.prefilled_at.append(asyncio.get_running_loop().time())
            self.transfers.complete(prefilled)

    def _on_failure(self, sequences: list[Sequence], message: str) -> None:
        self.failed_steps.append(message)
        for sequence in sequences:
            self.transfers.abort(sequence.key)

    def _on_commit(self, lease: Lease, first_tokens: list[tuple[int, int]]) -> None:
        self.commits.append(lease)
        self.leases.take(lease)

    def _on_end(self, request: WorkerRequest, error: str | None) -> None:
        assert not any(s.status.name == "HOLDING" for s in self.source.sequences(request.key))
        self.ends.append(error)
        self.source.abort(request.key)


@asynccontextmanager
async def running(sending: Sending) -> AsyncIterator[None]:
    task = asyncio.create_task(sending.engine_loop.run())
    try:
        yield
    finally:
        await sending.transfers.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def in_virtual_time(test: Callable[[Sending], object], message_s: float = 0.01) -> None:
    async def main() -> None:
        sending = Sending(message_s)
        async with running(sending):
            await test(sending)  # type: ignore[misc]

    loop.run(main())


def no_prefix(lease: Lease, num_tokens: int) -> None:
    raise AssertionError("no prefix was leased")


def kv_of(engine: Engine, table: list[int]) -> bytes:
    return read_kv(engine.runner, table, kv_part(engine.runner, 0, len(PROMPT)))


def test_kv_arrives_while_the_next_steps_compute() -> None:
    async def test(sending: Sending) -> None:
        sequence = sending.open()
        assert len(sending.transfers) == 1
        await asyncio.sleep(NUM_STEPS * STEP_S - 0.5)
        assert len(sending.messages_at) == 10, "every frame: a sim step computes when it begins"
        assert sending.messages_at[3] < STEP_S and sending.prefilled_at == []
        table = list(sequence.block_table)
        expected = kv_of(sending.source, table)
        await asyncio.sleep(1)
        assert sending.ends == [None]
        (lease,) = sending.commits
        assert kv_of(sending.target, lease.block_table) == expected
        assert len(sending.messages_at) == 11, "only the commit came after the first token"
        assert sending.messages_at[-1] - sending.prefilled_at[0] == pytest.approx(0.01)
        assert sending.sender.num_bytes == 20 * 4 * 8
        assert sending.transfers.num_failures == 0
        await sending.check_all_free()

    in_virtual_time(test)


def test_no_hook_where_nothing_is_to_be_read() -> None:
    async def test(sending: Sending) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=3)
        sending.source.submit(start_of(PROMPT, params, RequestKey("g", "own")), prefill_only=False)
        batch = sending.source.begin_step()
        assert batch is not None
        assert sending.layer_hook(batch, sending.source.in_step) is None
        sequence = sending.open()
        assert sending.layer_hook(batch, sending.source.in_step) is None, "it waits"
        sending.abort()
        assert sequence.block_table == []
        sending.source.end_step(batch, sending.source.runner.run(batch))

    in_virtual_time(test)


def test_a_hook_reads_for_prompts_of_earlier_steps_too() -> None:
    """Their receivers were too slow for all of it to leave during their own steps."""

    async def test(sending: Sending) -> None:
        sending.open()
        while not sending.prefilled_at:
            await asyncio.sleep(0.1)
        sending.source.submit(
            start_of([9] * 4, SamplingParams(max_tokens=9), RequestKey("g", "own")),
            prefill_only=False,
        )
        batch = sending.source.begin_step()
        assert batch is not None
        assert sending.layer_hook(batch, sending.source.in_step) is not None
        sending.source.fail_step()

    in_virtual_time(test, message_s=60.0)


@pytest.mark.parametrize("error", [KvTransferError("torn"), Unavailable("gone"), OSError("bug")])
@pytest.mark.parametrize("at_message", [0, 3, 6, 10])
def test_a_failed_transfer_ends_once(error: Exception, at_message: int) -> None:
    """Before, while and after the prompt is computed."""

    async def test(sending: Sending) -> None:
        receive = sending.receiver.push

        async def fail(messages: AsyncIterator[bytes]) -> kv_transfer_pb2.PushResponse:
            async def some() -> AsyncIterator[bytes]:
                number = 0
                async for message in messages:
                    if number == at_message:
                        raise error
                    number += 1
                    yield message

            return await receive(some())

        sending.receiver.push = fail  # type: ignore[method-assign]
        sending.open()
        await asyncio.sleep(NUM_STEPS * STEP_S + 0.5)
        assert sending.ends == ["the KV transfer failed"]
        assert sending.transfers.num_failures == 1
        assert sending.commits == []
        await sending.check_all_free()

    in_virtual_time(test)


def test_nobody_at_the_target_fails_before_the_prompt_is_computed() -> None:
    async def test(sending: Sending) -> None:
        async def refuse(*_: object) -> kv_transfer_pb2.PushResponse:
            raise Unavailable("nobody listens")

        sending.push = refuse  # type: ignore[method-assign]
        sending.open()
        await asyncio.sleep(0.1)
        assert sending.ends == ["the KV transfer failed"]
        assert sending.prefilled_at == []
        await sending.check_all_free()

    in_virtual_time(test)


def test_a_receiver_that_answers_too_early_has_failed() -> None:
    async def test(sending: Sending) -> None:
        async def answer(*_: object) -> kv_transfer_pb2.PushResponse:
            return kv_transfer_pb2.PushResponse(num_bytes=640)

        sending.push = answer  # type: ignore[method-assign]
        sending.open()
        await asyncio.sleep(0.1)
        assert sending.ends == ["the KV transfer failed"]
        assert sending.sender.num_bytes == 0
        await sending.check_all_free()

    in_virtual_time(test)


def test_a_prompt_whose_transfer_has_failed_is_released() -> None:
    """Even if whoever heard of the failure leaves the prompt to the engine."""

    async def test(sending: Sending) -> None:
        sequence = sending.open()
        sending.transfers.abort(KEY)
        await asyncio.sleep(NUM_STEPS * STEP_S + 0.5)
        assert sending.prefilled_at and sending.ends == []
        sending.transfers.complete(Prefilled(sequence, ((0, 1),)))
        await sending.check_all_free()

    in_virtual_time(test)


@pytest.mark.parametrize("after_s", [0.0, *(0.03 + 0.2 * i for i in range(18))])
@pytest.mark.parametrize("message_s", [0.01, 0.15, 100.0])
def test_an_abort_in_any_phase_leaves_no_block_held(after_s: float, message_s: float) -> None:
    """Queued, computing, between layers' frames, with a slow receiver, while the commit waits."""

    async def test(sending: Sending) -> None:
        sending.answer_s = 100.0
        sending.open()
        if after_s:
            await asyncio.sleep(after_s)
        sending.abort()
        assert not sending.transfers.abort(KEY)
        await sending.check_all_free()
        assert sending.ends == []

    in_virtual_time(test, message_s)


def test_a_newer_attempt_has_a_transfer_of_its_own() -> None:
    async def test(sending: Sending) -> None:
        sending.open()
        await asyncio.sleep(1.5)
        sending.abort()
        sending.leases.release(sending.leases.get("lease of request", "epoch"))
        sending.open()
        await asyncio.sleep((NUM_STEPS + 2) * STEP_S)
        assert sending.ends == [None]
        assert len(sending.commits) == 1
        await sending.check_all_free()

    in_virtual_time(test)


@pytest.mark.parametrize("hang_at", [0, 1, 9, 10])
def test_a_receiver_that_takes_nothing_has_stalled(hang_at: int) -> None:
    async def test(sending: Sending) -> None:
        sending.message_s = 0.0
        plain = sending.receiver.push

        async def hang(messages: AsyncIterator[bytes]) -> kv_transfer_pb2.PushResponse:
            async def some() -> AsyncIterator[bytes]:
                number = 0
                async for message in messages:
                    if number == hang_at:
                        await asyncio.Event().wait()
                    number += 1
                    yield message

            return await plain(some())

        sending.receiver.push = hang  # type: ignore[method-assign]
        sending.open()
        while not sending.ends:
            sending.transfers.sweep()
            await asyncio.sleep(0.25)
        now = asyncio.get_running_loop().time()
        assert sending.ends == ["the KV transfer stalled"]
        assert TRANSFER_STALL_S <= now <= TRANSFER_STALL_S + NUM_STEPS * STEP_S + 0.5
        assert sending.transfers.num_failures == 1
        await sending.check_all_free()

    in_virtual_time(test)


def test_a_slow_receiver_and_a_long_queue_are_no_stall() -> None:
    async def test(sending: Sending) -> None:
        sending.engine_loop.wake = lambda: None  # type: ignore[method-assign]
        sending.open()
        for _ in range(4 * 30):
            sending.transfers.sweep()
            await asyncio.sleep(0.25)
        EngineLoop.wake(sending.engine_loop)
        while not sending.ends:
            sending.transfers.sweep()
            await asyncio.sleep(0.25)
        assert sending.ends == [None]
        await sending.check_all_free()

    in_virtual_time(test, message_s=TRANSFER_STALL_S - 0.5)


@pytest.mark.parametrize("at_call", [0, 3, 5])
def test_kv_that_cannot_be_read_fails_the_transfer_and_not_the_step(at_call: int) -> None:
    async def test(sending: Sending) -> None:
        calls = 0
        read = sending.source.runner.export_kv

        def fail(*args: object) -> int:
            nonlocal calls
            calls += 1
            if calls > at_call:
                raise InternalError("broken")
            return read(*args)  # type: ignore[arg-type]

        sending.source.runner.export_kv = fail  # type: ignore[method-assign,assignment]
        bystander = RequestKey("gateway", "bystander")
        sending.source.submit(
            start_of([1, 2], SamplingParams(max_tokens=3), bystander), prefill_only=False
        )
        sending.open()
        await asyncio.sleep((NUM_STEPS + 2) * STEP_S)
        assert sending.ends == ["the KV transfer failed"]
        assert sending.failed_steps == []
        assert not sending.source.sequences(bystander)
        await sending.check_all_free()

    in_virtual_time(test)


def test_a_step_that_fails_takes_its_transfers_along() -> None:
    async def test(sending: Sending) -> None:
        sending.open()
        await asyncio.sleep(1.5)

        def fail(*_: object) -> StepResult:
            raise InternalError("broken")

        sending.source.runner.run = fail  # type: ignore[method-assign]
        await asyncio.sleep(1)
        assert len(sending.failed_steps) == 1
        assert sending.ends == []
        await sending.check_all_free()

    in_virtual_time(test)


def test_closing_ends_every_transfer() -> None:
    async def test(sending: Sending) -> None:
        for i in range(3):
            sending.open(RequestKey("gateway", str(i)))
        await asyncio.sleep(1.5)
        assert len(sending.transfers) == 3
        await sending.transfers.close()
        assert len(sending.transfers) == 0
        assert sending.ends == []

    in_virtual_time(test, message_s=50.0)


def test_steps_and_reads_on_a_thread_of_their_own() -> None:
    """The production executor, no virtual time: blocks change hands while they are read."""

    async def main() -> None:
        executor = ThreadExecutor()
        source, target = sim_engine(24, max_batch_tokens=8), sim_engine(num_blocks=400)
        leases = LeaseTable(target.pool, "epoch")
        receiver = KvReceiver(
            target.runner,
            executor,
            leases,
            lambda lease, _: committed.append(lease),
            no_prefix,
            VERSION,
        )
        committed: list[Lease] = []
        errors: list[str | None] = []

        class Direct:
            async def push(
                self, address: str, messages: AsyncIterator[bytes], deadline: Deadline
            ) -> kv_transfer_pb2.PushResponse:
                return await receiver.push(messages)

        sender = KvSender(source.runner, executor, Direct(), KvCodec.RAW, FRAME_BYTES, VERSION)

        def ended(request: WorkerRequest, error: str | None) -> None:
            errors.append(error)
            engine_loop.wake()

        transfers = Transfers(source, sender, ended)

        def outcome(step: StepOutcome) -> None:
            for prefilled in step.prefilled:
                transfers.complete(prefilled)

        def hook(batch: Batch, sequences: list[Sequence]) -> LayerHook | None:
            return layer_hook(transfers.pushes, batch, sequences)

        engine_loop = EngineLoop(source, executor, outcome, lambda *_: errors.append("step"), hook)
        running = asyncio.create_task(engine_loop.run())
        prompts = {f"r{i}": [(i * 31 + j) % 250 for j in range(5 + i % 37)] for i in range(40)}
        for name, prompt in prompts.items():
            key = RequestKey("gateway", name)
            leases.grant(name, key, [], len(prompt))
            start = start_of(prompt, SamplingParams(seed=1, max_tokens=9), key)
            where = worker_pb2.TransferTarget(lease_id=name, epoch="epoch")
            request = WorkerRequest(
                start, Deadline.after(60), 0.0, Deadline.after(60), target=where
            )
            transfers.open(request, source.submit(start, prefill_only=True))
            engine_loop.wake()
        async with asyncio.timeout(60):
            while len(errors) < len(prompts):
                await asyncio.sleep(0.001)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert errors == [None] * len(prompts)
        for lease in committed:
            prompt = prompts[lease.lease_id]
            alone = sim_engine(max_batch_tokens=64)
            sequence = alone.submit(start_of(prompt, SamplingParams()), prefill_only=True)
            batch = alone.begin_step()
            assert batch is not None
            alone.end_step(batch, alone.runner.run(batch))
            part = kv_part(alone.runner, 0, len(prompt))
            expected = read_kv(alone.runner, sequence.block_table, part)
            assert read_kv(target.runner, lease.block_table, part) == expected, lease.lease_id
        executor.close()

    asyncio.run(main())
