"""Replays a trace through the router in virtual time: the gateway's policy, index and view, and the
workers' block pools and KV events, around workers that compute one prompt after another in a time
linear in its uncached tokens. What is left out is what routing does not see: batches and decoding
(one decode worker, always idle, takes every request)."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from forebay.core.roles import WorkerRole
from forebay.kv.block_pool import BlockPool, Holder, OutOfBlocks
from forebay.kv.journal import KvJournal
from forebay.router.index import KvIndex, Tier
from forebay.router.policy import Policy
from forebay.router.view import Decision, FleetView, RouteRequest, WorkerFacts, WorkerLoad
from forebay.simulator.prefix_trace import BLOCK_TOKENS, TraceRequest

MODEL = "model"
KV = "kv"
DECODE = "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """num_blocks: KV blocks of one worker. tokens_per_s: what a worker computes. event_delay_s:
    from a change in a worker's cache to the router's index. pull_cost: time to fetch a token's KV
    from another worker over the time to compute it; pull_overhead: of one pull, in tokens
    computed. max_index_bytes: the index's bound. prediction_s: how long the router expects a
    prompt's blocks where it has sent it."""

    num_workers: int
    num_blocks: int
    tokens_per_s: float
    event_delay_s: float = 0.2
    pull_cost: float = 0.1
    pull_overhead: float = 512.0
    max_index_bytes: int = 1 << 30
    prediction_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Served:
    """One request's fate. queued_s: before its worker began with it."""

    queued_s: float
    ttft_s: float
    num_tokens: int
    num_cached_tokens: int
    num_pulled_tokens: int


@dataclass(slots=True)
class ReplayResult:
    """busy_s: by worker. Pulled tokens count as cached ones."""

    served: list[Served] = field(default_factory=list)
    busy_s: list[float] = field(default_factory=list)
    span_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        cached = sum(one.num_cached_tokens for one in self.served)
        return cached / sum(one.num_tokens for one in self.served)

    @property
    def pulled_share(self) -> float:
        pulled = sum(one.num_pulled_tokens for one in self.served)
        return pulled / sum(one.num_tokens for one in self.served)

    @property
    def utilisation(self) -> float:
        """Of the time in which requests arrived."""
        return sum(self.busy_s) / len(self.busy_s) / self.span_s

    @property
    def imbalance(self) -> float:
        """Busiest worker over the mean."""
        return max(self.busy_s) * len(self.busy_s) / sum(self.busy_s)


@dataclass(slots=True)
class _Job:
    request: TraceRequest
    decision: Decision
    work_tokens: float


class _Worker:
    """Computes its queue in order."""

    def __init__(self, worker_id: str, options: ReplayOptions) -> None:
        self.worker_id = worker_id
        self.pool = BlockPool(options.num_blocks, BLOCK_TOKENS)
        self.pool.journal = KvJournal()
        self.queue: deque[_Job] = deque()
        self.queued_tokens = 0.0
        self.busy_s = 0.0
        self.busy_until_s = 0.0
        self.busy = False

    def pending_tokens(self, now_s: float, tokens_per_s: float) -> float:
        running = max(0.0, self.busy_until_s - now_s) * tokens_per_s if self.busy else 0.0
        return self.queued_tokens + running


class RoutingReplay:
    """Runs once. Raises what the policy raises."""

    def __init__(
        self, requests: Sequence[TraceRequest], policy: Policy, options: ReplayOptions
    ) -> None:
        self._requests = requests
        self._policy = policy
        self._options = options
        self._index = KvIndex(options.max_index_bytes)
        self._view = FleetView()
        self._workers = {
            name: _Worker(name, options)
            for name in (f"prefill-{number}" for number in range(options.num_workers))
        }
        for name in self._workers:
            self._join(name, WorkerRole.PREFILL)
        self._join(DECODE, WorkerRole.DECODE)
        self._now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._result = ReplayResult()

    def run(self) -> ReplayResult:
        for number, request in enumerate(self._requests):
            self._at(request.at_s, self._arrival(number, request))
        while self._events:
            self._now_s, _, act = heapq.heappop(self._events)
            act()
        result = self._result
        result.busy_s = [worker.busy_s for worker in self._workers.values()]
        result.span_s = self._requests[-1].at_s - self._requests[0].at_s
        assert len(result.served) == len(self._requests)
        return result

    def _join(self, name: str, role: WorkerRole) -> None:
        self._view.join(WorkerFacts(name, role, MODEL, KV, BLOCK_TOKENS))
        self._view.update(name, WorkerLoad())
        self._view.set_slot(name, self._index.join(name))

    def _at(self, time_s: float, act: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time_s, self._num_events, act))

    def _arrival(self, number: int, request: TraceRequest) -> Callable[[], None]:
        def act() -> None:
            self._index.expire(self._now_s)
            for worker in self._workers.values():
                tokens = worker.pending_tokens(self._now_s, self._options.tokens_per_s)
                load = WorkerLoad(
                    num_sequences=len(worker.queue) + worker.busy, num_queued_tokens=round(tokens)
                )
                self._view.update(worker.worker_id, load)
            route = RouteRequest(f"{number}", MODEL, request.num_tokens, request.hashes)
            matches = self._index.match(request.hashes)
            decision = self._policy.choose(route, self._view, matches)
            assert decision is not None and decision.prefill is not None
            self._take(request, decision)

        return act

    def _take(self, request: TraceRequest, decision: Decision) -> None:
        worker = self._workers[decision.computes]
        slot = self._index.slot_of(worker.worker_id)
        assert slot is not None
        self._index.predict(slot, request.hashes, self._now_s + self._options.prediction_s)
        work = float(decision.num_compute_tokens)
        if decision.pull_from is not None:
            work += self._pull_tokens(decision.num_pulled_tokens)
        worker.queue.append(_Job(request, decision, work))
        worker.queued_tokens += work
        self._begin(worker)

    def _pull_tokens(self, num_tokens: int) -> float:
        """What fetching takes, in tokens computed."""
        return self._options.pull_overhead + self._options.pull_cost * num_tokens

    def _begin(self, worker: _Worker) -> None:
        if worker.busy or not worker.queue:
            return
        job = worker.queue.popleft()
        worker.queued_tokens -= job.work_tokens
        request, pool = job.request, worker.pool
        held = pool.match(_usable(request))
        num_found = len(held) * BLOCK_TOKENS
        num_pulled = self._pullable(job, num_found)
        table = self._allocate(pool, held, request.num_tokens)
        num_cached = num_found + num_pulled
        work = request.num_tokens - num_cached
        seconds = (
            work + (self._pull_tokens(num_pulled) if num_pulled else 0)
        ) / self._options.tokens_per_s
        worker.busy, worker.busy_until_s = True, self._now_s + seconds
        worker.busy_s += seconds
        queued_s = self._now_s - request.at_s
        self._result.served.append(
            Served(queued_s, queued_s + seconds, request.num_tokens, num_cached, num_pulled)
        )
        self._publish(worker)
        self._at(worker.busy_until_s, lambda: self._end(worker, request, table))

    def _pullable(self, job: _Job, num_found: int) -> int:
        """Tokens that the source still holds and this worker does not."""
        if job.decision.pull_from is None:
            return 0
        source = self._workers[job.decision.pull_from].pool
        return max(0, len(source.match(_usable(job.request))) * BLOCK_TOKENS - num_found)

    def _allocate(self, pool: BlockPool, held: list[int], num_tokens: int) -> list[int]:
        """The prompt's blocks; empty where it is longer than the cache."""
        pool.retain(held, Holder.SEQUENCE)
        try:
            fresh = pool.allocate(pool.blocks_for(num_tokens) - len(held), Holder.SEQUENCE)
        except OutOfBlocks:
            pool.release(held, Holder.SEQUENCE)
            return []
        return held + fresh

    def _end(self, worker: _Worker, request: TraceRequest, table: list[int]) -> None:
        worker.busy = False
        for block, block_hash in zip(table, request.hashes, strict=False):
            worker.pool.register(block, block_hash)
        worker.pool.release(table, Holder.SEQUENCE)
        self._publish(worker)
        self._begin(worker)

    def _publish(self, worker: _Worker) -> None:
        assert worker.pool.journal is not None
        changes = worker.pool.journal.take()
        if not changes:
            return
        slot = self._index.slot_of(worker.worker_id)
        assert slot is not None
        stored, removed = b"".join(changes.stored), b"".join(changes.removed)
        self._at(
            self._now_s + self._options.event_delay_s,
            lambda: self._index.apply(slot, Tier.DEVICE, stored, removed),
        )


def _usable(request: TraceRequest) -> Sequence[bytes]:
    """Hashes that a cache can serve: the last token is always computed."""
    return request.hashes[: (request.num_tokens - 1) // BLOCK_TOKENS]


def cache_hit_rate(requests: Sequence[TraceRequest], num_blocks: int | None) -> float:
    """Of one cache that sees all requests in order, each computed before the next one comes:
    num_blocks large, or None: without a bound."""
    num_tokens = sum(request.num_tokens for request in requests)
    size = num_blocks or sum(len(request.hashes) + 1 for request in requests)
    pool = BlockPool(size, BLOCK_TOKENS)
    num_cached = 0
    for request in requests:
        held = pool.match(_usable(request))
        num_cached += len(held) * BLOCK_TOKENS
        pool.retain(held, Holder.SEQUENCE)
        table = held + pool.allocate(len(request.hashes) - len(held), Holder.SEQUENCE)
        for block, block_hash in zip(table, request.hashes, strict=True):
            pool.register(block, block_hash)
        pool.release(table, Holder.SEQUENCE)
    return num_cached / num_tokens
