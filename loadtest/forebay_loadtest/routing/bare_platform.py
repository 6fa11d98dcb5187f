"""Valkey, mixed sim-engine workers and gateways as bare processes, without Ray: up in seconds."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from forebay.deploy.http_probe import http_status
from forebay.deploy.ports import LOOPBACK, free_ports
from forebay.deploy.processes import ProcessRecord, end_processes
from forebay.deploy.valkey import EmbeddedValkey
from forebay_loadtest import proc
from forebay_loadtest.local_platform import PlatformError

MODEL = "sim"
START_LIMIT_S = 60.0
_STOP_S = 5.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a peer has to be given as well. `num_blocks` is each worker's."""

    num_workers: int = 4
    num_blocks: int = 1024
    block_size: int = 16
    max_batch_tokens: int = 2048
    max_num_seqs: int = 64


@dataclass(slots=True)
class Child:
    """A process and how to start it again."""

    name: str
    port: int
    metrics_port: int
    command: Sequence[str]
    environ: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command,
                env=dict(self.environ),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    @property
    def record(self) -> ProcessRecord:
        """Raises PlatformError when the process has ended."""
        found = None if self.process is None else ProcessRecord.of(self.process.pid)
        if found is None:
            raise PlatformError(f"{self.name} has ended: {self.last_words()}")
        return found

    def last_words(self) -> str:
        return " | ".join(self.log.read_text(errors="replace").splitlines()[-5:])

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    async def until(self, there: Callable[[], bool]) -> None:
        """Raises PlatformError when it ends instead, or takes too long."""
        end = time.monotonic() + START_LIMIT_S
        while not there():
            if self.process is None or self.process.poll() is not None or time.monotonic() > end:
                raise PlatformError(f"{self.name} did not start: {self.last_words()}")
            await asyncio.sleep(_POLL_S)


@dataclass(slots=True)
class BarePlatform:
    folder: Path
    capacity: Capacity
    redis_url: str
    valkey: subprocess.Popen[bytes]
    workers: list[Child] = field(default_factory=list)
    gateways: list[Child] = field(default_factory=list)

    @property
    def urls(self) -> list[str]:
        return [f"http://{LOOPBACK}:{gateway.port}" for gateway in self.gateways]


async def scrape(children: Iterable[Child]) -> list[dict[str, float]]:
    """Of each process the names and values of its metrics, summed over labels. Raises
    httpx.TransportError."""
    async with httpx.AsyncClient(trust_env=False, timeout=10.0) as http:
        urls = [f"http://{LOOPBACK}:{child.metrics_port}/metrics" for child in children]
        return [_totals((await http.get(url)).text) for url in urls]


@asynccontextmanager
async def bare_platform(
    capacity: Capacity,
    *,
    num_gateways: int = 1,
    engine: Mapping[str, str] | None = None,
    gateway: Mapping[str, str] | None = None,
) -> AsyncIterator[BarePlatform]:
    """`engine`, `gateway`: settings by the last part of their variables' names. Every gateway
    knows every worker when it is up. Raises PlatformError."""
    with tempfile.TemporaryDirectory(prefix="forebay-routing-") as name:
        folder = Path(name)
        (redis_port,) = free_ports(1)
        server = EmbeddedValkey.prepare(LOOPBACK, redis_port)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("FOREBAY_")}
        environ = {**inherited, "FOREBAY_REDIS_URL": server.url}
        valkey = server.spawn(folder, folder / "valkey.log", environ)
        platform = BarePlatform(folder, capacity, server.url, valkey)
        try:
            await _until(server.answers)
            platform.workers = await _start_workers(platform, environ, engine or {})
            platform.gateways = await _start_gateways(
                platform, environ, num_gateways, gateway or {}
            )
            yield platform
        finally:
            _end(platform)


async def _start_workers(
    platform: BarePlatform, environ: Mapping[str, str], engine: Mapping[str, str]
) -> list[Child]:
    capacity = platform.capacity
    settings = {
        "engine": "sim",
        "model_id": MODEL,
        "num_blocks": str(capacity.num_blocks),
        "block_size": str(capacity.block_size),
        "max_batch_tokens": str(capacity.max_batch_tokens),
        "max_num_seqs": str(capacity.max_num_seqs),
        # Answers of full length: as many tokens as any peer's.
        "sim_mean_output_tokens": "1000000",
        **engine,
    }
    own = {f"FOREBAY_ENGINE_{name.upper()}": value for name, value in settings.items()}
    own["FOREBAY_WORKER_ROLE"] = "mixed"
    workers = []
    ports = free_ports(2 * capacity.num_workers)
    for number in range(capacity.num_workers):
        name = f"worker-{number}"
        port, metrics_port = ports[2 * number : 2 * number + 2]
        listen = {
            "FOREBAY_WORKER_PORT": str(port),
            "FOREBAY_WORKER_METRICS_PORT": str(metrics_port),
        }
        workers.append(
            Child(
                name,
                port,
                metrics_port,
                (sys.executable, "-m", "forebay_loadtest.routing.bare_worker"),
                {**environ, **own, **listen},
                platform.folder / f"{name}.log",
            )
        )
        workers[-1].start()
    platform.workers = workers
    for worker in workers:
        await worker.until(partial(proc.port_open, worker.port))
    return workers


async def _start_gateways(
    platform: BarePlatform, environ: Mapping[str, str], count: int, settings: Mapping[str, str]
) -> list[Child]:
    """The salt is one for all: gateways that draw their own do not share any prefix."""
    own = {f"FOREBAY_GATEWAY_{name.upper()}": value for name, value in settings.items()}
    own.setdefault("FOREBAY_GATEWAY_CACHE_SALT", "live routing")
    ports = free_ports(2 * count)
    for number in range(count):
        name = f"gateway-{number}"
        http_port, grpc_port = ports[2 * number : 2 * number + 2]
        listen = {
            "FOREBAY_GATEWAY_HTTP_PORT": str(http_port),
            "FOREBAY_GATEWAY_GRPC_PORT": str(grpc_port),
        }
        gateway = Child(
            name,
            http_port,
            http_port,
            (sys.executable, "-m", "forebay.gateway"),
            {**environ, **own, **listen},
            platform.folder / f"{name}.log",
        )
        gateway.start()
        platform.gateways.append(gateway)
    for gateway in platform.gateways:
        await gateway.until(partial(_knows, gateway.log, len(platform.workers)))
        await _ready(gateway)
    return platform.gateways


def _knows(log: Path, num_workers: int) -> bool:
    lines = log.read_text(errors="replace").splitlines()
    return sum(" joined" in line for line in lines) >= num_workers


async def _ready(gateway: Child) -> None:
    end = time.monotonic() + START_LIMIT_S
    while await http_status(LOOPBACK, gateway.port, "/ready", 1.0) != 200:
        if time.monotonic() > end:
            raise PlatformError(f"{gateway.name} is not ready: {gateway.last_words()}")
        await asyncio.sleep(_POLL_S)


async def _until(there: Callable[[], bool]) -> None:
    end = time.monotonic() + START_LIMIT_S
    while not there():
        if time.monotonic() > end:
            raise PlatformError("Valkey did not start")
        await asyncio.sleep(_POLL_S)


def _end(platform: BarePlatform) -> None:
    """A stopped process goes on first, so that it can be told to end."""
    processes = [child.process for child in (*platform.gateways, *platform.workers)]
    started = [process for process in (*processes, platform.valkey) if process is not None]
    records = [found for each in started if (found := ProcessRecord.of(each.pid)) is not None]
    for record in records:
        record.signal(signal.SIGCONT)
    end_processes(records, _STOP_S)
    for process in started:
        process.wait()


def _totals(page: str) -> dict[str, float]:
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals
