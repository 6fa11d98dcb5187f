"""Faults in a running platform: each strikes, is proved to have struck, and heals."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import urlsplit

from forebay.deploy.processes import ProcessRecord
from forebay.deploy.ray_cluster import RAYLET_NAME
from forebay.deploy.status import PlatformStatus
from forebay_loadtest import proc
from forebay_loadtest.fault_plan import Act, FaultKind, Target
from forebay_loadtest.fault_records import FaultRecord
from forebay_loadtest.local_platform import LocalPlatform
from forebay_loadtest.watch import NotInTime, Watch, ready

PAUSE_S = 3.0
"""Shorter than a lease and than the registry's memory; longer than a gateway's patience."""
AWAY_S = 65.0
STRIKE_LIMIT_S = 60.0
"""For a drain to end, too."""
HEAL_LIMIT_S = 180.0
_POLL_S = 0.02


class Injector:
    """`pools`: how many workers each pool has when it is whole. `probe` returns once a request has
    been answered in full."""

    def __init__(
        self,
        platform: LocalPlatform,
        watch: Watch,
        pools: Mapping[str, int],
        probe: Callable[[], Awaitable[None]],
        seed: int,
    ) -> None:
        self._platform = platform
        self._watch = watch
        self._pools = pools
        self._probe = probe
        self._rng = random.Random(seed)

    async def carry_out(self, kind: FaultKind, fault: FaultRecord) -> None:
        """Returns when capacity is back. Raises NotInTime."""
        if kind.worker:
            await self._strike_worker(kind, fault)
        elif kind.target in (Target.GATEWAY, Target.VALKEY):
            await self._strike_service(kind, fault)
        else:
            await self._strike_ray(kind, fault)

    # --- workers ---------------------------------------------------------------------------

    async def _strike_worker(self, kind: FaultKind, fault: FaultRecord) -> None:
        role = str(kind.target)
        status = self._watch.latest
        if status is None or not self._whole(status, role):
            status = await self._watch.until(lambda s: self._whole(s, role), HEAL_LIMIT_S)
        if kind.act is Act.SCALE:
            await self._scale(role, fault)
        else:
            epoch, address = self._rng.choice(sorted(ready(status, role).items()))
            victim = proc.listener(int(address.rpartition(":")[2]))
            if victim is None:
                raise NotInTime(f"nobody listens on {address}")
            fault.victim = f"{address}, process {victim.pid}"
            await self._strike(kind, fault, victim)
            if kind.act is Act.DRAIN:
                await self._await_drain(role, epoch, victim, fault)
            gone = set() if kind.act is Act.PAUSE else {epoch}
            await self._heal(fault, lambda s: self._whole(s, role, gone))

    async def _await_drain(
        self, role: str, epoch: str, victim: ProcessRecord, fault: FaultRecord
    ) -> None:
        status = await self._watch.until(lambda s: epoch not in ready(s, role), STRIKE_LIMIT_S)
        listed = any(item.worker.epoch == epoch for item in status.workers)
        await _until(lambda: not victim.alive, STRIKE_LIMIT_S)
        took = time.monotonic() - fault.at
        fault.evidence = f"left the {'list of ready workers' if listed else 'registry'}, then ended"
        fault.evidence += f" after {took:.1f} s"

    async def _scale(self, role: str, fault: FaultRecord) -> None:
        num = self._pools[role]
        fault.at = time.monotonic()
        await self._command("scale", role, str(num - 1))
        status = await self._watch.until(lambda s: len(ready(s, role)) == num - 1, STRIKE_LIMIT_S)
        fault.evidence = f"{len(ready(status, role))} of {num} left in the registry"
        await self._command("scale", role, str(num))
        await self._heal(fault, lambda s: self._whole(s, role))

    def _whole(
        self, status: PlatformStatus, role: str, gone: set[str] | frozenset[str] = frozenset()
    ) -> bool:
        there = ready(status, role)
        return not (gone & there.keys()) and len(there) == self._pools[role]

    # --- gateway and Valkey ----------------------------------------------------------------

    async def _strike_service(self, kind: FaultKind, fault: FaultRecord) -> None:
        port = self._port(kind.target)
        victim = proc.listener(port)
        if victim is None:
            raise NotInTime(f"nobody listens on port {port}")
        fault.victim = f"port {port}, process {victim.pid}"
        await self._strike(kind, fault, victim)
        if kind.act is Act.KILL:
            await _until(lambda: not proc.port_open(port), STRIKE_LIMIT_S)
            fault.evidence += f", port {port} closed"
        if kind.act is Act.DRAIN:
            await _until(lambda: not victim.alive, STRIKE_LIMIT_S)
            fault.evidence = f"ended after {time.monotonic() - fault.at:.1f} s"
        replaced = kind.act is not Act.PAUSE

        def back(status: PlatformStatus) -> bool:
            if replaced and victim.alive:
                return False
            there = all(ready(status, role) for role in self._pools)
            return status.gateway_ready and not status.registry_error and there

        await self._heal(fault, back)

    def _port(self, target: Target) -> int:
        if target is Target.GATEWAY:
            return self._platform.http_port
        port = urlsplit(self._platform.run_state.redis_url).port
        assert port is not None
        return port

    # --- Ray -------------------------------------------------------------------------------

    async def _strike_ray(self, kind: FaultKind, fault: FaultRecord) -> None:
        run = self._platform.run_state
        gcs_port = int(run.ray_address.rpartition(":")[2])
        gcs = proc.listener(gcs_port)
        raylet = next((item for item in run.processes if item.name == RAYLET_NAME), None)
        if gcs is None or raylet is None:
            raise NotInTime("Ray does not run")
        status = self._watch.latest
        assert status is not None
        old = {item.worker.epoch for item in status.workers}
        victims = {Target.GCS: [gcs], Target.RAYLET: [raylet], Target.HEAD: [gcs, raylet]}
        struck = victims[kind.target]
        fault.victim = ", ".join(f"{item.name} {item.pid}" for item in struck)
        if kind.act is Act.AWAY:
            run.supervisor.signal(signal.SIGSTOP)
        fault.at = time.monotonic()
        for victim in struck:
            victim.signal(signal.SIGKILL)
        await _until(lambda: not any(item.alive for item in struck), STRIKE_LIMIT_S)
        fault.evidence = f"{fault.victim} gone"
        if kind.act is Act.AWAY:
            await asyncio.sleep(AWAY_S)
            if not proc.port_open(gcs_port):
                away = time.monotonic() - fault.at
                fault.evidence += f", still away after {away:.0f} s"
            run.supervisor.signal(signal.SIGCONT)
        restarted = kind.target is Target.GCS

        def back(status: PlatformStatus) -> bool:
            renewed = restarted or all(self._whole(status, role, old) for role in self._pools)
            return renewed and status.gateway_ready and proc.listener(gcs_port) is not None

        await self._heal(fault, back)

    # --- parts of all ----------------------------------------------------------------------

    async def _strike(self, kind: FaultKind, fault: FaultRecord, victim: ProcessRecord) -> None:
        fault.at = time.monotonic()
        if kind.act is Act.DRAIN:
            victim.signal(signal.SIGTERM)
            return
        if kind.act is Act.KILL:
            victim.signal(signal.SIGKILL)
            await _until(lambda: not victim.alive, STRIKE_LIMIT_S)
            fault.evidence = f"process {victim.pid} gone"
            return
        victim.signal(signal.SIGSTOP)
        await _until(lambda: proc.state(victim.pid) == "T", STRIKE_LIMIT_S)
        fault.evidence = f"process {victim.pid} in state T"
        if kind.act is Act.PAUSE:
            await asyncio.sleep(PAUSE_S)
            victim.signal(signal.SIGCONT)
            await _until(lambda: proc.state(victim.pid) != "T", STRIKE_LIMIT_S)
            fault.evidence += f", on after {time.monotonic() - fault.at:.1f} s"

    async def _heal(self, fault: FaultRecord, back: Callable[[PlatformStatus], bool]) -> None:
        """Capacity is back when `back` holds, if a request is answered then."""
        await self._watch.until(back, HEAL_LIMIT_S)
        back_s = time.monotonic() - fault.at
        await self._probe()
        fault.back_s = back_s

    async def _command(self, *arguments: str) -> None:
        await asyncio.to_thread(self._platform.command, *arguments)


async def _until(condition: Callable[[], bool], limit_s: float) -> None:
    """Raises NotInTime."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise NotInTime("the fault did not strike")
        await asyncio.sleep(_POLL_S)
