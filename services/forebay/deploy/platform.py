"""The processes of a local platform: how each is started, tended and ended.

Order of life: Redis, gateway (it waits for workers by itself), Ray head, workers. Order of death:
gateway, workers through Ray Serve, Ray, everything that is left.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from forebay.core.errors import ConfigurationError, ForebayError, Unavailable
from forebay.core.settings import (
    CACHE_SALT_VARIABLE,
    REDIS_URL_VARIABLE,
    GatewaySettings,
    load,
)
from forebay.deploy import ray_cluster
from forebay.deploy.http_probe import http_status
from forebay.deploy.left_workers import LeftWorkers
from forebay.deploy.liveness import Liveness
from forebay.deploy.options import PlatformPlan, child_environment
from forebay.deploy.ports import LOOPBACK, free_ports
from forebay.deploy.processes import (
    INSTANCE_VARIABLE,
    KILL_LIMIT_S,
    ProcessRecord,
    command_of,
    descendants,
    end_processes,
    marked,
    reap_adopted,
    reap_all,
    wait_gone,
)
from forebay.deploy.ray_cluster import RayHead
from forebay.deploy.run_state import RAY_LOG_FOLDER
from forebay.deploy.serve_messages import helper_error
from forebay.deploy.services import AdoptedService, Service
from forebay.deploy.valkey import EmbeddedValkey
from forebay.rpc.v1 import worker_pb2
from forebay.store.redis_registry import RedisRegistry

REDIS_LIMIT_S = 15.0
RAY_LIMIT_S = 120.0
WORKERS_LIMIT_S = 300.0
GATEWAY_LIMIT_S = 60.0
HELPER_MARGIN_S = 30.0
"""What a helper gets on top of its work: importing Ray, connecting."""
QUICK_END_S = 5.0
REVIVE_PERIOD_S = 5.0
"""Between two tries to start a lost Ray head."""
PROBE_TIMEOUT_S = 3.0
_POLL_S = 0.1

logger = logging.getLogger("forebay.supervisor")


class Platform:
    """All methods run in the supervisor, which must be a child subreaper."""

    def __init__(self, plan: PlatformPlan, instance: str, folder: Path, log_dir: Path) -> None:
        self._plan = plan
        self._instance = instance
        self._salt = load(GatewaySettings).cache_salt or secrets.token_hex(16)
        self._folder = folder
        self._log_dir = log_dir
        self._valkey: EmbeddedValkey | None = None
        self._ray: RayHead | None = None
        self._raylet: ProcessRecord | None = None
        self._services: dict[str, Service] = {}
        self._liveness: dict[str, Liveness] = {"gateway": Liveness(self._gateway_answers)}
        self._left_workers: LeftWorkers | None = None
        self._revive_at = 0.0

    @property
    def redis_url(self) -> str:
        if self._valkey is not None:
            return self._valkey.url
        return self._plan.redis_url or ""

    @property
    def ray_address(self) -> str:
        return "" if self._ray is None else self._ray.address

    @property
    def end_limit_s(self) -> float:
        """An upper bound of what `end` takes."""
        drains = self._plan.gateway_drain_s + self._plan.worker_drain_s
        return drains + HELPER_MARGIN_S + 4 * (QUICK_END_S + KILL_LIMIT_S)

    @property
    def processes(self) -> list[ProcessRecord]:
        return descendants(os.getpid())

    # --- start -----------------------------------------------------------------------------

    async def start_redis(self) -> str:
        if self._plan.redis_url is not None:
            registry = RedisRegistry.connect(self._plan.redis_url)
            try:
                await registry.list_workers()
            finally:
                await registry.close()
            return "external"
        valkey = EmbeddedValkey.prepare(LOOPBACK, free_ports(1)[0])
        self._valkey = valkey
        self._liveness["valkey"] = Liveness(lambda: asyncio.to_thread(valkey.answers))
        environment = child_environment({INSTANCE_VARIABLE: self._instance})
        log = self.log("valkey")
        service = self._start_service(
            "valkey", lambda: valkey.spawn(self._folder, log, environment)
        )
        await self._until(valkey.answers, service, REDIS_LIMIT_S)
        return f"Valkey on {valkey.host}:{valkey.port}"

    def launch_gateway(self) -> None:
        """Returns at once; `await_gateway` waits for it."""
        command = [sys.executable, "-m", "forebay.gateway"]
        self._start_service("gateway", lambda: self._spawn(command, "gateway"))

    async def start_ray(self) -> str:
        self._ray = RayHead.prepare(self._folder)
        await self._start_ray_head()
        return self._ray.address

    async def start_workers(self) -> str:
        pools = [f"{role.value}={count}" for role, count in self._plan.pools.items()]
        await self._serve_helper(
            ["deploy", f"--limit-s={WORKERS_LIMIT_S:.0f}", *pools], WORKERS_LIMIT_S
        )
        return ", ".join(f"{count} {role.value}" for role, count in self._plan.pools.items())

    async def await_gateway(self) -> str:
        host, port = self._plan.host, self._plan.http_port
        end = asyncio.get_running_loop().time() + GATEWAY_LIMIT_S
        while await http_status(host, port, "/ready", timeout_s=2.0) != 200:
            if asyncio.get_running_loop().time() > end:
                raise Unavailable(
                    f"the gateway was not ready within {GATEWAY_LIMIT_S:.0f} s;"
                    f" see {self.log('gateway')}"
                )
            await asyncio.sleep(_POLL_S)
        return f"http://{host}:{port}"

    def check_services(self) -> None:
        """Raises ConfigurationError when a process has ended that should run. Only while the
        platform starts: later `tend` starts it again."""
        for service in self._services.values():
            code = service.exit_code()
            if code is not None:
                raise ConfigurationError(self._last_line(service.name, code))

    async def _start_ray_head(self) -> None:
        assert self._ray is not None
        await self._run(self._ray.start_command, "ray", RAY_LIMIT_S)
        processes = self.processes
        ray_cluster.end_unneeded(processes)
        self._raylet = ray_cluster.find(processes, ray_cluster.RAYLET_NAME)
        gcs = ray_cluster.find(processes, ray_cluster.GCS_NAME)
        if self._raylet is None or gcs is None:
            raise Unavailable(f"Ray ended right after its start; see {self.log('ray')}")
        command, environment = command_of(gcs)
        self._services["gcs"] = AdoptedService(
            "gcs",
            gcs,
            lambda: self._popen(command, "gcs", environment),
            asyncio.get_running_loop().time(),
        )

    # --- watch -----------------------------------------------------------------------------

    async def tend(self) -> None:
        """Starts again what has ended, and ends what hangs; for a platform that was ready once.
        Serve itself replaces workers. Raises ForebayError when Ray cannot be started: the next
        calls try again."""
        now = asyncio.get_running_loop().time()
        reap_adopted(pid for item in self._services.values() if (pid := item.pid) is not None)
        for service in list(self._services.values()):
            self._end_if_hung(service)
            service.tend(now)
        await self._tend_left_workers(now)
        if (self._raylet is None or not self._raylet.alive) and now >= self._revive_at:
            self._revive_at = now + REVIVE_PERIOD_S
            await self._revive_ray()

    def _end_if_hung(self, service: Service) -> None:
        liveness, record = self._liveness.get(service.name), service.record
        if liveness is not None and record is not None and liveness.hung(record):
            logger.warning("%s does not answer: ending it", service.name)
            record.signal(signal.SIGKILL)

    async def _gateway_answers(self) -> bool:
        port = self._plan.http_port
        return await http_status(self._plan.host, port, "/health", PROBE_TIMEOUT_S) == 200

    async def _revive_ray(self) -> None:
        """The control store's files bring the pools back; until their new workers are there, those
        that the raylet has left serve on."""
        logger.warning("the raylet ended: starting Ray again")
        self._raylet = None
        self._services.pop("gcs", None)
        known = {service.pid for service in self._services.values()}
        orphans = [item for item in self.processes if item.pid not in known]
        workers = ray_cluster.replicas(orphans)
        now = asyncio.get_running_loop().time()
        self._left_workers = LeftWorkers(workers, await self._registered(), now)
        others = [item for item in orphans if item not in workers]
        await asyncio.to_thread(end_processes, others, QUICK_END_S)
        await self._start_ray_head()
        logger.info("Ray runs again")

    async def _tend_left_workers(self, now: float) -> None:
        if self._left_workers is not None:
            registered = await self._registered()
            if self._left_workers.tend(registered, now, self._plan.worker_drain_s):
                self._left_workers = None

    async def _registered(self) -> list[worker_pb2.WorkerDescription] | None:
        """None when the registry cannot be read."""
        registry = RedisRegistry.connect(self.redis_url)
        try:
            return await registry.list_workers()
        except ForebayError:
            return None
        finally:
            await registry.close()

    # --- end -------------------------------------------------------------------------------

    async def end(self, *, drain: bool) -> None:
        """Leaves no process and no temporary file. `drain`: running streams may finish first."""
        for liveness in self._liveness.values():
            liveness.close()
        if (gateway := self._services.pop("gateway", None)) is not None:
            await self._end_gateway(gateway, self._plan.gateway_drain_s if drain else 0.0)
        if drain and self._raylet is not None and self._raylet.alive:
            try:
                await self._serve_helper(["shutdown"], self._plan.worker_drain_s)
            except (Unavailable, ConfigurationError) as error:
                logger.warning("Ray Serve did not shut down in order: %s", error.message)
        if self._raylet is not None:
            self._raylet.signal(signal.SIGTERM)
            await asyncio.to_thread(wait_gone, [self._raylet], QUICK_END_S)
        left = await asyncio.to_thread(end_processes, self._owned(), QUICK_END_S)
        left += await asyncio.to_thread(end_processes, self._owned(), QUICK_END_S)
        for record in left:
            logger.error("process %d (%s) outlived SIGKILL", record.pid, record.name)
        reap_all()
        self._keep_ray_logs()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _end_gateway(self, gateway: Service, drain_s: float) -> None:
        if (record := gateway.record) is not None:
            record.signal(signal.SIGTERM)
            await asyncio.to_thread(wait_gone, [record], drain_s + QUICK_END_S)
            record.signal(signal.SIGKILL)

    def _owned(self) -> list[ProcessRecord]:
        return list(dict.fromkeys([*self.processes, *marked(self._instance)]))

    def _keep_ray_logs(self) -> None:
        if self._ray is None or not self._ray.session_logs.is_dir():
            return
        try:
            shutil.copytree(
                self._ray.session_logs,
                self._log_dir / RAY_LOG_FOLDER,
                ignore_dangling_symlinks=True,
            )
        except (OSError, shutil.Error) as error:
            logger.warning("Ray's logs could not be kept: %s", error)

    # --- processes -------------------------------------------------------------------------

    def log(self, name: str) -> Path:
        return self._log_dir / f"{name}.log"

    def _environment(self) -> dict[str, str]:
        variables = dict(self._plan.environment)
        if self._ray is not None:
            variables.update(self._ray.variables)
        variables[REDIS_URL_VARIABLE] = self.redis_url
        variables[INSTANCE_VARIABLE] = self._instance
        # One for the platform's life: a gateway that starts again knows its caches and poison list.
        variables[CACHE_SALT_VARIABLE] = self._salt
        return child_environment(variables)

    def _start_service(self, name: str, spawn: Callable[[], subprocess.Popen[bytes]]) -> Service:
        service = Service(name, spawn)
        self._services[name] = service
        service.start(asyncio.get_running_loop().time())
        return service

    def _spawn(self, command: Sequence[str], name: str) -> subprocess.Popen[bytes]:
        return self._popen(command, name, self._environment())

    def _popen(
        self, command: Sequence[str], name: str, environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        with self.log(name).open("ab") as out:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                env=environment,
            )

    async def _until(self, ready: Callable[[], bool], service: Service, limit_s: float) -> None:
        end = asyncio.get_running_loop().time() + limit_s
        while not ready():
            if service.exit_code() is not None:
                self.check_services()
            if asyncio.get_running_loop().time() > end:
                raise Unavailable(f"{service.name} did not answer within {limit_s:.0f} s")
            await asyncio.sleep(_POLL_S)

    async def _serve_helper(self, arguments: Sequence[str], limit_s: float) -> None:
        assert self._ray is not None
        module = [sys.executable, "-m", "forebay.deploy.serve_apps"]
        command = [*module, f"--address={self._ray.address}", *arguments]
        await self._run(command, "serve", limit_s + HELPER_MARGIN_S)

    async def _run(self, command: Sequence[str], name: str, limit_s: float) -> None:
        """Raises ConfigurationError with the command's own `error`, and Unavailable when it gives
        none or takes too long."""
        with self.log(name).open("ab") as err:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=err,
                cwd=self._folder,
                env=self._environment(),
            )
        try:
            async with asyncio.timeout(limit_s):
                out, _ = await process.communicate()
        except TimeoutError:
            raise Unavailable(f"{name} took longer than {limit_s:.0f} s") from None
        finally:
            if process.returncode is None:
                process.kill()
        with self.log(name).open("ab") as log:
            log.write(out)
        if process.returncode != 0:
            if reason := helper_error(out):
                raise ConfigurationError(reason)
            raise Unavailable(self._last_line(name, process.returncode))

    def _last_line(self, name: str, code: int | None) -> str:
        lines = self.log(name).read_text(errors="replace").split("\n")
        reason = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{name} ended with code {code}: {reason}" if reason else f"{name} ended: {code}"
