"""Prefixes whose KV lies here and goes to another worker, which asked for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from forebay.core.clock import Deadline
from forebay.core.errors import KvTransferError, Overloaded, Unavailable
from forebay.core.randomness import Rng
from forebay.core.sampling import SamplingParams
from forebay.engine.engine import Engine
from forebay.engine.sequence import RequestKey, SequenceStart
from forebay.rpc.v1 import worker_pb2
from forebay.worker.kv_push import KvPush
from forebay.worker.transfer import KvSender

MAX_SENDS = 8
"""How many at once; whoever asks for more computes sooner than it would be served."""


class PrefixSends:
    """Each lasts as long as the call that asked for it, and holds the blocks it reads as a sequence
    does; `on_release` is called when it has given them back. `epoch`: of this life."""

    def __init__(
        self,
        engine: Engine,
        sender: KvSender,
        rng: Rng,
        on_release: Callable[[], None],
        epoch: str,
        protocol_version: int,
    ) -> None:
        self._engine = engine
        self._sender = sender
        self._rng = rng
        self._on_release = on_release
        self._epoch = epoch
        self._protocol_version = protocol_version
        self._pushes: dict[KvPush, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._pushes)

    @property
    def pushes(self) -> list[KvPush]:
        return list(self._pushes)

    async def send(self, message: worker_pb2.SendPrefixRequest) -> worker_pb2.SendPrefixResponse:
        """Returns when the target has committed. Raises Unavailable for another life's KV,
        Overloaded, KvTransferError when there is nothing to send or the target does not take it,
        DeadlineExceeded."""
        if message.epoch != self._epoch:
            raise Unavailable("the worker that held the prefix is gone")
        if message.protocol_version != self._protocol_version:
            raise KvTransferError("KV moves between workers of one protocol version")
        if len(self._pushes) >= MAX_SENDS:
            raise Overloaded("enough prefixes are being sent already")
        sequence = self._engine.hold(self._start(message))
        try:
            num_tokens = len(sequence.tokens)
            if num_tokens <= message.target.start_token:
                raise KvTransferError("the prefix is not held here any more")
            push = self._sender.open(sequence, message.target)
            await self._push(push, Deadline.after_ms(message.timeout_ms))
            return worker_pb2.SendPrefixResponse(num_tokens=num_tokens)
        finally:
            self._engine.release(sequence)
            self._on_release()

    def close(self) -> None:
        """Cuts what is under way: its callers get an error."""
        for task in self._pushes.values():
            task.cancel()

    async def _push(self, push: KvPush, deadline: Deadline) -> None:
        push.complete(())
        task = self._pushes[push] = asyncio.create_task(self._sender.send(push, deadline))
        try:
            await asyncio.wait((task,))
        finally:
            push.close()
            del self._pushes[push]
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if task.cancelled():
            raise Unavailable("the worker stops")
        task.result()

    def _start(self, message: worker_pb2.SendPrefixRequest) -> SequenceStart:
        """No gateway has an empty id, so the key is nobody else's."""
        return SequenceStart(
            key=RequestKey("", self._rng.token("prefix")),
            attempt=0,
            tokens=tuple(message.token_ids),
            num_prompt_tokens=len(message.token_ids),
            params=SamplingParams(),
            choices=(0,),
            cache_root=message.cache_root,
        )
