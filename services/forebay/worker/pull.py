"""Prefixes whose KV another worker seems to hold: fetched for prompts that wait for them here.

A pull is a lease like a reservation's, which the other worker is asked to fill. When its KV is
here, the blocks go into the prefix cache and the prompt into the engine, which finds them there.
Whatever goes wrong before, the prompt goes into the engine all the same and is computed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from forebay.core.clock import Deadline
from forebay.core.errors import DeadlineExceeded, ForebayError, InvalidRequest, KvTransferError
from forebay.core.randomness import Rng
from forebay.engine.engine import Engine
from forebay.engine.sequence import RequestKey
from forebay.kv.block_hash import HashChain
from forebay.kv.block_pool import OutOfBlocks
from forebay.kv.leases import Lease, LeaseTable
from forebay.rpc.conversions import codec_to_proto
from forebay.rpc.v1 import worker_pb2
from forebay.worker.requests import WorkerRequest

log = logging.getLogger(__name__)

PULL_S = 5.0
"""How long a prompt waits for KV from elsewhere when its gateway names no time."""
MAX_PULLS = 8
"""How many prompts wait at once; further ones find no room on this worker."""


class PrefixSource(Protocol):
    """Asks the worker at an address to push a prefix; raises a ForebayError."""

    async def send_prefix(
        self, address: str, message: worker_pb2.SendPrefixRequest, deadline: Deadline
    ) -> worker_pb2.SendPrefixResponse: ...


@dataclass(slots=True, eq=False)
class _Pull:
    """hashes: of the blocks that are wanted. lease: once the source is asked. over: set when the
    prompt waits no longer."""

    request: WorkerRequest
    message: worker_pb2.SendPrefixRequest
    address: str
    hashes: list[bytes]
    deadline: Deadline
    lease: Lease | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] = field(init=False)


class Pulls:
    """At most one per request. `on_end(request)` is called once when a prompt need not wait any
    longer, unless it was aborted; `request.num_pulled_tokens` says what has come.

    num_tokens: fetched since the start. num_failures: prompts that waited in vain.
    """

    def __init__(
        self,
        engine: Engine,
        leases: LeaseTable,
        source: PrefixSource,
        rng: Rng,
        on_end: Callable[[WorkerRequest], None],
        protocol_version: int,
    ) -> None:
        self.num_tokens = 0
        self.num_failures = 0
        self._engine = engine
        self._leases = leases
        self._source = source
        self._rng = rng
        self._on_end = on_end
        self._protocol_version = protocol_version
        self._by_key: dict[RequestKey, _Pull] = {}
        self._asking: dict[bytes, _Pull] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Those that have ended count until their call has."""
        return len(self._tasks)

    def __contains__(self, key: RequestKey) -> bool:
        return key in self._by_key

    @property
    def num_waiting(self) -> int:
        return len(self._by_key)

    @property
    def sources(self) -> list[str]:
        """Addresses of the workers that are being asked."""
        return [pull.address for pull in self._by_key.values() if pull.lease is not None]

    @property
    def num_leases(self) -> int:
        return len(self.sources)

    @property
    def num_pending_tokens(self) -> int:
        """Prompt tokens that are to be computed once the pulls have succeeded."""
        size = self._engine.pool.block_size
        return sum(
            len(pull.request.start.tokens) - len(pull.hashes) * size
            for pull in self._by_key.values()
        )

    @property
    def num_waiting_blocks(self) -> int:
        """Blocks that the waiting prompts will take beyond those under a lease already."""
        blocks_for = self._engine.pool.blocks_for
        return sum(
            blocks_for(len(pull.request.start.tokens))
            - (len(pull.lease.block_table) if pull.lease else 0)
            for pull in self._by_key.values()
        )

    def begin(self, request: WorkerRequest, source: worker_pb2.PullSource, address: str) -> bool:
        """Whether the prompt waits: not so when all that `source` seems to hold is here already.
        `address`: this worker's own. Raises InvalidRequest."""
        assert request.key not in self._by_key
        if not source.address or not source.epoch:
            raise InvalidRequest("a source has an address and an epoch", param="source")
        start, pool = request.start, self._engine.pool
        num_tokens = min(source.num_tokens, len(start.tokens) - 1)
        hashes = HashChain(start.cache_root, pool.block_size).upto(start.tokens, num_tokens)
        if self._are_here(hashes):
            return False
        target = worker_pb2.TransferTarget(
            address=address,
            epoch=self._leases.epoch,
            kv_codecs=[codec_to_proto(codec) for codec in self._engine.runner.kv_codecs],
        )
        message = worker_pb2.SendPrefixRequest(
            cache_root=start.cache_root,
            token_ids=start.tokens[: len(hashes) * pool.block_size],
            target=target,
            epoch=source.epoch,
            protocol_version=self._protocol_version,
        )
        limit_s = source.timeout_ms / 1000 if source.timeout_ms else PULL_S
        pull = _Pull(request, message, source.address, hashes, request.deadline.within(limit_s))
        pull.task = asyncio.create_task(self._run(pull))
        self._by_key[request.key] = pull
        self._tasks.add(pull.task)
        pull.task.add_done_callback(self._tasks.discard)
        return True

    def commit(self, lease: Lease, num_tokens: int) -> None:
        """The KV of so many leading tokens of `lease` is here: the prompt goes on. The call that
        brought it ends by itself."""
        assert isinstance(lease.owner, RequestKey)
        pull = self._by_key[lease.owner]
        assert pull.lease is lease
        num_blocks = num_tokens // self._engine.pool.block_size
        if num_tokens % self._engine.pool.block_size:
            raise KvTransferError("a prefix ends with a full block")
        self._leases.keep(lease, pull.hashes[:num_blocks])
        pull.lease = None
        pull.request.num_pulled_tokens = num_tokens - lease.num_cached_tokens
        self.num_tokens += pull.request.num_pulled_tokens
        self._end(pull)

    def abort(self, key: RequestKey) -> bool:
        """Ends the pull of a request without a call of `on_end`; False without one."""
        pull = self._by_key.get(key)
        if pull is None:
            return False
        self._forget(pull)
        pull.task.cancel()
        return True

    async def close(self) -> None:
        for key in list(self._by_key):
            self.abort(key)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def check_integrity(self) -> None:
        for key, pull in self._by_key.items():
            assert pull.request.key == key and not pull.over.is_set()
            assert pull.lease is None or not pull.lease.ended
        assert all(pull is self._by_key[pull.request.key] for pull in self._asking.values())

    async def _run(self, pull: _Pull) -> None:
        """A call that fails after the commit has done its work."""
        error: Exception | None = None
        try:
            await self._fetch(pull)
        except (ForebayError, OutOfBlocks) as failure:
            error = failure
        except Exception as failure:
            log.exception("the pull for %s broke", pull.request.key.request_id)
            error = failure
        if pull.over.is_set():
            return
        if error is not None or not self._are_here(pull.hashes):
            log.info("%s gets no KV from %s: %s", pull.request.key.request_id, pull.address, error)
            self.num_failures += 1
        self._end(pull)

    async def _fetch(self, pull: _Pull) -> None:
        """Asks the source, unless another prompt's pull brings the same blocks."""
        while (other := self._asking.get(pull.hashes[-1])) is not None:
            try:
                async with asyncio.timeout(pull.deadline.remaining_s()):
                    await other.over.wait()
            except TimeoutError as error:
                raise DeadlineExceeded("another pull of the same prefix took too long") from error
        if self._are_here(pull.hashes):
            return
        self._asking[pull.hashes[-1]] = pull
        pull.lease = self._leases.grant(
            self._rng.token("pull"),
            pull.request.key,
            pull.hashes,
            len(pull.hashes) * self._engine.pool.block_size,
            is_prefix=True,
        )
        pull.message.target.lease_id = pull.lease.lease_id
        pull.message.target.start_token = pull.lease.num_cached_tokens
        pull.message.timeout_ms = pull.deadline.remaining_ms()
        await self._source.send_prefix(pull.address, pull.message, pull.deadline)

    def _are_here(self, hashes: list[bytes]) -> bool:
        return len(self._engine.pool.match(hashes)) == len(hashes)

    def _end(self, pull: _Pull) -> None:
        self._forget(pull)
        self._on_end(pull.request)

    def _forget(self, pull: _Pull) -> None:
        del self._by_key[pull.request.key]
        if self._asking.get(pull.hashes[-1]) is pull:
            del self._asking[pull.hashes[-1]]
        if pull.lease is not None:
            self._leases.release(pull.lease)
            pull.lease = None
        pull.over.set()
