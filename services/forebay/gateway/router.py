"""The gateway's router: its view of the fleet, its index of KV blocks, and the policy over both."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence

from forebay.core import clock
from forebay.core.errors import Unavailable
from forebay.core.settings import GatewaySettings
from forebay.gateway.kv_follower import KvFollower
from forebay.gateway.waits import Wait, Waits
from forebay.kv.block_hash import HashChain
from forebay.router.index import KvIndex
from forebay.router.policies import policy_named
from forebay.router.policy import can_serve
from forebay.router.view import (
    NO_SLOT,
    Decision,
    FleetView,
    RouteRequest,
    WorkerFacts,
    WorkerLoad,
)
from forebay.store.kv_events import KvEventSource
from forebay.store.registry import Registry

log = logging.getLogger(__name__)

PREDICTION_S = 30.0
"""How long a prompt's blocks are expected on a worker that was given it, before events say so."""
RECONSIDER_S = 1.0
"""A request that waits for one worker looks at the others again after this long."""
LINES_S = 0.5
LINES_TTL_S = 2.0


class Router:
    """Rows of the view are workers by their id. `gateway_id`: under which this gateway's line is
    told to the others. num_decisions: tries to carry one out, by kind."""

    def __init__(
        self,
        settings: GatewaySettings,
        registry: Registry,
        events: KvEventSource,
        gateway_id: str,
    ) -> None:
        self._view = FleetView()
        self.index = KvIndex(settings.kv_index_mib * 1024 * 1024)
        self.follower = KvFollower(events, self.index, stale_s=settings.kv_stale_s)
        self.waits = Waits()
        self._registry = registry
        self._gateway_id = gateway_id
        self._policy = policy_named(settings.router_policy)
        self._other_lines: dict[str, float] = {}
        self._told_line = False
        self._changed: dict[str, Callable[[], WorkerLoad]] = {}
        self._num_joins_seen = 0
        self.num_decisions = dict.fromkeys(("pair", "alone", "pair_pull", "alone_pull"), 0)

    @property
    def view(self) -> FleetView:
        """As it is now."""
        self._catch_up()
        return self._view

    async def run(self) -> None:
        """Follows the workers' KV events and the other gateways' lines, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.follower.run())
            tasks.create_task(self._exchange_lines())

    async def close(self) -> None:
        """After `run` has ended."""
        await self.follower.close()

    def join(self, facts: WorkerFacts) -> None:
        """In place of what was there under the same id."""
        if facts.worker_id in self._view:
            self._view.leave(facts.worker_id)
        self._view.join(facts)

    def follow(self, lives: Collection[tuple[str, str]]) -> None:
        """To be called often: (worker id, epoch) of all workers there are. Others leave the view;
        those whose events lag are not looked up for a while."""
        ids = {worker_id for worker_id, _ in lives}
        for worker_id in self._view.worker_ids:
            if worker_id not in ids:
                self._view.leave(worker_id)
        self.follower.follow(lives)
        self._refresh_slots()

    def told(self, worker_id: str, epoch: str, seq: int) -> None:
        """The worker's own word on the last batch of its KV events."""
        self.follower.told(worker_id, epoch, seq)

    def changed(self, worker_id: str, load: Callable[[], WorkerLoad]) -> None:
        """The worker's load is to be asked for before it is next looked at: many more messages tell
        of loads than requests are routed."""
        self._changed[worker_id] = load

    def can_serve(self, model_key: str) -> bool:
        return can_serve(model_key, self.view)

    def _catch_up(self) -> None:
        changed, self._changed = self._changed, {}
        for worker_id, load in changed.items():
            if worker_id in self._view:
                self._view.update(worker_id, load())

    @property
    def degraded(self) -> bool:
        """Whether requests go by load, and by what this gateway itself has sent where."""
        return self.follower.degraded

    def hashes(self, model_key: str, root: bytes, tokens: Sequence[int]) -> list[bytes]:
        """Of the full blocks, as the model's workers cut them; none while there is no worker."""
        group = self._view.group(model_key)
        if group is None:
            return []
        return HashChain(root, group.kv_groups[0].block_size).upto(tokens)

    def choose(
        self, request: RouteRequest, order: tuple[int, int] | None = None
    ) -> Decision | None:
        """`order`: the request's place among those that wait, None behind all of them."""
        self._catch_up()
        self.index.expire(clock.now())
        if self._num_joins_seen != self.index.num_joins:
            self._refresh_slots()
        line = self.waits.tokens_before(order)
        for worker_id, num_tokens in self._other_lines.items():
            line[worker_id] = line.get(worker_id, 0.0) + num_tokens
        self._view.set_line_tokens(line)
        matches = self.index.match(request.hashes, events=not self.degraded)
        return self._policy.choose(request, self._view, matches)

    def expect(self, decision: Decision, hashes: Sequence[bytes]) -> None:
        """The prompt goes there: its blocks are looked for there from now on."""
        kind = "alone" if decision.prefill is None else "pair"
        self.num_decisions[kind if decision.pull_from is None else f"{kind}_pull"] += 1
        self._predict(decision, hashes)

    def wait(
        self, key: Hashable, order: tuple[int, int], decision: Decision, hashes: Sequence[bytes]
    ) -> None:
        """The request `key` is to be taken by that worker as soon as there is room."""
        self.waits.put(key, order, decision.computes, decision.num_compute_tokens)
        self._predict(decision, hashes)

    def _predict(self, decision: Decision, hashes: Sequence[bytes]) -> None:
        until = clock.now() + PREDICTION_S
        for worker_id in dict.fromkeys((decision.computes, decision.decode)):
            slot = self.index.slot_of(worker_id)
            if slot is not None:
                self.index.predict(slot, hashes, until)

    def stop_waiting(self, key: Hashable) -> None:
        self.waits.remove(key)

    def may_try(self, key: Hashable) -> bool:
        """Whether routing `key` again could place it now."""
        wait = self.waits.get(key)
        if wait is None or clock.now() - wait.since >= RECONSIDER_S:
            return True
        self._catch_up()
        return self._has_room(wait)

    def _has_room(self, wait: Wait) -> bool:
        row = self._view.row_of(wait.worker_id)
        if row is None or not self._view.accepting[row]:
            return True
        return bool(self._view.prefill_room_tokens[row] > 0)

    def _refresh_slots(self) -> None:
        degraded = self.degraded
        for worker_id in self._view.worker_ids:
            slot = self.index.slot_of(worker_id)
            known = slot is not None and (degraded or self.follower.is_fresh(worker_id))
            self._view.set_slot(worker_id, slot if slot is not None and known else NO_SLOT)
        self._num_joins_seen = self.index.num_joins

    async def _exchange_lines(self) -> None:
        """Tells the other gateways what waits here for which worker, and hears the same of them.
        Without Redis each goes by its own line."""
        while True:
            await asyncio.sleep(LINES_S)
            line = {name: round(count) for name, count in self.waits.tokens_before().items()}
            try:
                if line or self._told_line:
                    await self._registry.publish_line(self._gateway_id, line, LINES_TTL_S)
                    self._told_line = bool(line)
                lines = await self._registry.list_lines()
            except Unavailable:
                lines = {}
            except Exception:
                log.exception("the gateways' lines cannot be exchanged")
                lines = {}
            lines.pop(self._gateway_id, None)
            self._other_lines = _sum(lines.values())


def _sum(lines: Iterable[Mapping[str, int]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for line in lines:
        for worker_id, num_tokens in line.items():
            total[worker_id] = total.get(worker_id, 0.0) + num_tokens
    return total
