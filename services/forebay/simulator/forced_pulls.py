"""Prompts for which a gateway names a worker to pull KV from, whatever its router would say: often
the right one, sometimes one that holds nothing, or is gone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from forebay.kv.block_hash import HashChain
from forebay.rpc.v1 import worker_pb2
from forebay.simulator.dice import Dice
from forebay.simulator.processes import WorkerProcess

TIMEOUTS_MS = (0, 100, 1000)


class ForcedPulls:
    """`share`: of the prompts. `processes`: the workers that are there."""

    def __init__(
        self, dice: Dice, share: float, processes: Callable[[], Sequence[WorkerProcess]]
    ) -> None:
        self._dice = dice
        self._share = share
        self._processes = processes
        self._named: list[tuple[str, str]] = []

    def name_source(
        self, address: str, request: worker_pb2.PrefillRequest
    ) -> worker_pb2.PrefillRequest:
        """What becomes of a prompt on its way to the worker at `address`."""
        others = [process for process in self._processes() if process.address != address]
        if request.HasField("source") or not others or not self._dice.chance(self._share):
            return request
        held = {process: _num_held(process, request.sequence) for process in others}
        most = max(held.values())
        best = [process for process in others if held[process] == most]
        source = self._dice.pick(others if self._dice.chance(0.1) else best)
        where, num_tokens = (source.address, source.worker.epoch), held[source]
        if self._named and self._dice.chance(0.1):
            where = self._dice.pick(self._named)
        if self._dice.chance(0.2):
            num_tokens = len(request.sequence.prompt_token_ids)
        self._named.append(where)
        request.source.CopyFrom(
            worker_pb2.PullSource(
                address=where[0],
                epoch=where[1],
                num_tokens=num_tokens,
                timeout_ms=self._dice.pick(TIMEOUTS_MS),
            )
        )
        return request


def _num_held(process: WorkerProcess, spec: worker_pb2.SequenceSpec) -> int:
    pool = process.worker.engine.pool
    tokens = (*spec.prompt_token_ids, *spec.generated_token_ids)
    chain = HashChain(spec.cache_root, pool.block_size)
    return len(pool.match(chain.upto(tokens))) * pool.block_size
