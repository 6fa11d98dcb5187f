"""Five bugs of the kind that leaks or corrupts KV memory, as patches of production code. The
simulator has to find each of them: `python tests/sim/planted_bugs.py` prints with which seed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from forebay.engine.engine import Engine
from forebay.engine.sequence import RequestKey, Sequence, SequenceStart
from forebay.kv.block_pool import Holder
from forebay.kv.leases import Lease, LeaseTable
from forebay.rpc.v1 import worker_pb2
from forebay.simulator.report import simulate_guarded
from forebay.simulator.scenario import SeedResult
from forebay.worker.decode import Reservations
from forebay.worker.pull import Pulls, _Pull
from forebay.worker.requests import WorkerRequest
from forebay.worker.worker import Worker

MAX_SEEDS = 500

Patch = Callable[[], Any]


@contextmanager
def free_before_the_last_write() -> Iterator[None]:
    """A lease that ends gives its blocks back at once, although a write to them is under way."""

    def release(table: LeaseTable, lease: Lease) -> None:
        table._end(lease)
        table._pool.release(lease.block_table, Holder.LEASE)

    def end_write(table: LeaseTable, lease: Lease) -> None:
        lease.num_writes -= 1

    with (
        mock.patch.object(LeaseTable, "release", release),
        mock.patch.object(LeaseTable, "end_write", end_write),
    ):
        yield


@contextmanager
def lost_abort() -> Iterator[None]:
    """An abort that comes while a step computes the request is forgotten."""
    abort = Worker.abort

    async def forgetful(
        worker: Worker, message: worker_pb2.AbortRequest
    ) -> worker_pb2.AbortResponse:
        key = RequestKey(message.gateway_id, message.request_id)
        if any(sequence.key == key for sequence in worker.engine.in_step):
            return worker_pb2.AbortResponse(found=False)
        return await abort(worker, message)

    with mock.patch.object(Worker, "abort", forgetful):
        yield


@contextmanager
def double_commit() -> Iterator[None]:
    """A commit that comes again, with the push it ends, is taken again."""
    get, take, commit = LeaseTable.get, LeaseTable.take, Reservations.commit
    end_write = LeaseTable.end_write

    def get_any(table: LeaseTable, lease_id: str, epoch: str) -> Lease:
        taken: dict[str, Lease] = table.__dict__.setdefault("taken", {})
        return taken[lease_id] if lease_id in taken else get(table, lease_id, epoch)

    def take_and_remember(table: LeaseTable, lease: Lease) -> list[int]:
        table.__dict__.setdefault("taken", {})[lease.lease_id] = lease
        return list(take(table, lease))

    def end_write_unless_taken(table: LeaseTable, lease: Lease) -> None:
        if lease.lease_id in table.__dict__.setdefault("taken", {}):
            lease.num_writes -= 1
        else:
            end_write(table, lease)

    def commit_again(
        reservations: Reservations, lease: Lease, first_tokens: list[tuple[int, int]]
    ) -> WorkerRequest:
        known: dict[str, WorkerRequest] = reservations.__dict__.setdefault("committed", {})
        request = known.get(lease.lease_id)
        if request is None:
            request = known[lease.lease_id] = commit(reservations, lease, first_tokens)
            return request
        engine = reservations._engine
        engine.pool.retain(lease.block_table, Holder.SEQUENCE)
        engine.adopt(request.start, list(lease.block_table), first_tokens)
        return request

    with (
        mock.patch.object(LeaseTable, "get", get_any),
        mock.patch.object(LeaseTable, "take", take_and_remember),
        mock.patch.object(LeaseTable, "end_write", end_write_unless_taken),
        mock.patch.object(Reservations, "commit", commit_again),
    ):
        yield


@contextmanager
def unfinished_pull_kept() -> Iterator[None]:
    """A pull that ends without a commit leaves its blocks in the prefix cache."""
    forget = Pulls._forget

    def keep(pulls: Pulls, pull: _Pull) -> None:
        if pull.lease is not None:
            for block, block_hash in zip(pull.lease.block_table, pull.hashes, strict=True):
                pulls._engine.pool.register(block, block_hash)
        forget(pulls, pull)

    with mock.patch.object(Pulls, "_forget", keep):
        yield


@contextmanager
def source_not_held() -> Iterator[None]:
    """Blocks whose KV is sent to another worker's prefix cache may be evicted meanwhile."""
    hold = Engine.hold

    def hold_nothing(engine: Engine, start: SequenceStart) -> Sequence:
        sequence = hold(engine, start)
        engine.pool.release(sequence.block_table, Holder.SEQUENCE)
        engine._by_key.pop(sequence.key)
        return sequence

    def release(engine: Engine, sequence: Sequence) -> None:
        if sequence.key.gateway_id:
            engine_release(engine, sequence)

    engine_release = Engine.release
    with (
        mock.patch.object(Engine, "hold", hold_nothing),
        mock.patch.object(Engine, "release", release),
    ):
        yield


BUGS: dict[str, Patch] = {
    "free before the last write landed": free_before_the_last_write,
    "lost abort": lost_abort,
    "double commit": double_commit,
    "unfinished pull kept": unfinished_pull_kept,
    "source of a pull not held": source_not_held,
}


def find(patch: Patch, first_seed: int = 0) -> SeedResult | None:
    """The first of MAX_SEEDS seeds that fails, if one does."""
    with patch():
        for seed in range(first_seed, first_seed + MAX_SEEDS):
            result = simulate_guarded(seed)
            if result.error:
                return result
    return None


def main() -> int:
    missed = []
    for name, patch in BUGS.items():
        result = find(patch)
        if result is None:
            missed.append(name)
        else:
            print(f"{name}: found by seed {result.seed}: {result.error}")
    if missed:
        print(f"SHORT: not found within {MAX_SEEDS} seeds: {', '.join(missed)}")
    else:
        print(f"OK: {len(BUGS)} planted bugs, each found within {MAX_SEEDS} seeds")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
