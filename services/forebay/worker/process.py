"""A worker as a process: the edge that gives `Worker` a thread, a listener and the registry."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from prometheus_client import start_http_server

from forebay.core.clock import Deadline
from forebay.core.errors import InternalError, Unavailable
from forebay.core.randomness import Rng
from forebay.core.settings import WorkerSettings
from forebay.engine.loader import load_runner
from forebay.rpc.grpc_connector import GrpcConnector
from forebay.rpc.grpc_listener import GrpcListener
from forebay.store.redis_kv_events import RedisKvEventSink
from forebay.store.redis_registry import RedisRegistry
from forebay.store.registry import Registry
from forebay.worker.kv_publisher import KvPublisher
from forebay.worker.malloc import keep_freed_memory
from forebay.worker.thread_executor import ThreadExecutor
from forebay.worker.worker import Worker

log = logging.getLogger(__name__)

_CLOSE_S = 1.0


class WorkerProcess:
    """Start it once, stop it once, on one running loop."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._registry: Registry = RedisRegistry.connect(settings.redis_url)
        self._executor = ThreadExecutor()
        self._worker: Worker | None = None
        self._publisher: KvPublisher | None = None
        self._listener: GrpcListener | None = None
        self._metrics_server: Any = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stopping: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """host:port that others reach the worker under; empty before `start`."""
        return self._worker.endpoint if self._worker else ""

    async def start(self) -> None:
        """Loads the model, listens, registers. Raises ConfigurationError, ModelFileError, or
        Unavailable without Redis."""
        settings = self._settings
        keep_freed_memory()
        runner = await self._executor.run(load_runner, settings.engine)
        worker = Worker(settings, runner, self._executor, GrpcConnector(), Rng())
        publisher = self._publisher = KvPublisher(
            worker.engine.pool,
            RedisKvEventSink.connect(settings.redis_url, worker.worker_id, worker.epoch),
            interval_s=settings.kv_event_interval_s,
            heartbeat_s=settings.heartbeat_s,
        )
        host = settings.advertise_host or settings.host
        self._metrics_server, _ = start_http_server(
            settings.metrics_port, settings.host, registry=worker.metrics.registry
        )
        worker.metrics_url = f"http://{host}:{self._metrics_server.server_port}/metrics"
        self._listener = GrpcListener(worker.routes(), settings.host, settings.port)
        self._worker = worker
        self._tasks["worker"] = asyncio.create_task(worker.run())
        await self._listener.start()
        worker.endpoint = f"{host}:{self._listener.port}"
        await self._registry.publish(worker.description(), settings.registry_ttl_s)
        self._tasks["publisher"] = asyncio.create_task(publisher.run())
        self._tasks["heartbeat"] = asyncio.create_task(self._heartbeat(worker))
        log.info("%s listens on %s", worker.worker_id, worker.endpoint)

    def check_health(self) -> None:
        """Raises InternalError when the worker should be replaced."""
        if self._worker is None:
            raise InternalError("the worker has not started")
        for name, task in self._tasks.items():
            if task.done():
                cause = None if task.cancelled() else task.exception()
                raise InternalError(f"the worker's {name} task has ended: {cause!r}")
        self._worker.check_health()

    async def stop(self, grace_s: float) -> None:
        """Leaves the registry, lets what is here finish for up to `grace_s`, hands over the rest
        and ends. A second call waits for the first."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(grace_s))
        await asyncio.shield(self._stopping)

    async def _stop(self, grace_s: float) -> None:
        worker = self._worker
        if worker is not None:
            await self._end("heartbeat")
            log.info("%s drains for up to %.0f s", worker.worker_id, grace_s)
            num_left, _ = await asyncio.gather(
                worker.drain(Deadline.after(grace_s)), self._deregister(worker)
            )
            log.info("%s has drained, %d sequences handed over", worker.worker_id, num_left)
        await self._end("worker")
        await self._end("publisher")
        if self._publisher is not None:
            await self._publisher.close()
        if worker is not None:
            await worker.close()
        if self._listener is not None:
            await self._listener.stop(_CLOSE_S)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.shutdown)
            self._metrics_server.server_close()
        await asyncio.to_thread(self._executor.close)
        await self._registry.close()

    async def _heartbeat(self, worker: Worker) -> None:
        """Without Redis the worker goes on: gateways keep the list they know. A worker that is
        not healthy falls silent, so that no gateway chooses it."""
        complaint = ""
        while True:
            await asyncio.sleep(self._settings.heartbeat_s)
            try:
                self.check_health()
                await self._registry.publish(worker.description(), self._settings.registry_ttl_s)
                complaint = ""
            except (InternalError, Unavailable) as error:
                if error.message != complaint:
                    log.warning("no heartbeat: %s", error.message)
                complaint = error.message

    async def _end(self, name: str) -> None:
        task = self._tasks.get(name)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _deregister(self, worker: Worker) -> None:
        try:
            await self._registry.remove(worker.worker_id)
        except Unavailable as error:
            log.warning("deregistering failed, the record expires: %s", error.message)
