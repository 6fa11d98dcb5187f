"""What `forebay status` shows: every registered worker, asked itself, and the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from forebay.core.clock import Deadline
from forebay.core.errors import ForebayError
from forebay.deploy.http_probe import http_status
from forebay.deploy.run_state import RunState
from forebay.rpc.grpc_connector import GrpcConnector
from forebay.rpc.methods import DESCRIBE
from forebay.rpc.v1 import worker_pb2
from forebay.store.redis_registry import RedisRegistry

DESCRIBE_LIMIT_S = 2.0


class WorkerState(StrEnum):
    READY = "ready"
    DRAINING = "draining"
    UNREACHABLE = "unreachable"
    """Registered, but it does not answer: the figures are those of its last registration."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    state: WorkerState
    worker: worker_pb2.WorkerDescription

    @property
    def address(self) -> str:
        return self.worker.endpoints[0].address if self.worker.endpoints else ""

    @property
    def role(self) -> str:
        return worker_pb2.WorkerRole.Name(self.worker.role).removeprefix("WORKER_ROLE_").lower()


@dataclass(frozen=True, slots=True)
class PlatformStatus:
    """`registry_error`: why the list of workers could not be read, if so."""

    run: RunState
    gateway_ready: bool
    workers: tuple[WorkerStatus, ...]
    registry_error: str = ""

    def as_json(self) -> dict[str, object]:
        rows = [_worker_json(item) for item in self.workers]
        return {
            "ready": self.run.ready and self.gateway_ready,
            "model": self.run.model_id,
            "engine": self.run.engine,
            "gateway": {
                "http_url": self.run.http_url,
                "grpc_address": self.run.grpc_address,
                "ready": self.gateway_ready,
            },
            "pools": {role: self._pool_json(role, num) for role, num in self.run.pools.items()},
            "workers": rows,
            "totals": self.totals(),
            "registry_error": self.registry_error or None,
            "supervisor_pid": self.run.supervisor.pid,
            "log_dir": self.run.log_dir,
        }

    def totals(self) -> dict[str, int]:
        workers = [item.worker for item in self.workers]
        return {
            "running": sum(worker.load.num_running for worker in workers),
            "waiting": sum(worker.load.num_waiting for worker in workers),
            "kv_blocks": sum(worker.load.kv_blocks.total for worker in workers),
            "kv_blocks_free": sum(worker.load.kv_blocks.free for worker in workers),
            "kv_bytes_sent": sum(worker.counters.kv_bytes_sent for worker in workers),
            "kv_bytes_received": sum(worker.counters.kv_bytes_received for worker in workers),
            "prompt_tokens": sum(worker.counters.prompt_tokens for worker in workers),
            "generation_tokens": sum(worker.counters.generation_tokens for worker in workers),
        }

    def _pool_json(self, role: str, started_with: int) -> Mapping[str, int]:
        ready = [item for item in self.workers if item.state is WorkerState.READY]
        return {"started_with": started_with, "ready": sum(item.role == role for item in ready)}


def _worker_json(item: WorkerStatus) -> dict[str, object]:
    worker, blocks = item.worker, item.worker.load.kv_blocks
    return {
        "id": worker.worker_id,
        "role": item.role,
        "address": item.address,
        "state": item.state.value,
        "model": worker.model.id,
        "engine": worker.model.engine,
        "epoch": worker.epoch,
        "running": worker.load.num_running,
        "waiting": worker.load.num_waiting,
        "kv_blocks": {
            "total": blocks.total,
            "free": blocks.free,
            "cached": blocks.cached,
            "used": blocks.used,
            "leased": blocks.leased,
            "quarantined": blocks.quarantined,
        },
        "kv_bytes_sent": worker.counters.kv_bytes_sent,
        "kv_bytes_received": worker.counters.kv_bytes_received,
        "prompt_tokens": worker.counters.prompt_tokens,
        "generation_tokens": worker.counters.generation_tokens,
        "metrics_url": worker.metrics_url,
    }


async def platform_status(run: RunState) -> PlatformStatus:
    """Takes a few seconds at most, whatever is down."""
    gateway = asyncio.ensure_future(
        http_status(run.host, run.http_port, "/ready", DESCRIBE_LIMIT_S)
    )
    registry = RedisRegistry.connect(run.redis_url)
    try:
        registered = await registry.list_workers()
        problem = ""
    except ForebayError as error:
        registered, problem = [], error.message
    finally:
        await registry.close()
    workers = await asyncio.gather(*(_ask(worker) for worker in registered))
    ordered = sorted(workers, key=lambda item: (item.worker.role, item.worker.worker_id))
    return PlatformStatus(run, await gateway == 200, tuple(ordered), problem)


async def _ask(registered: worker_pb2.WorkerDescription) -> WorkerStatus:
    if not registered.endpoints:
        return WorkerStatus(WorkerState.UNREACHABLE, registered)
    channel = GrpcConnector().connect(registered.endpoints[0].address)
    try:
        answer = await channel.unary(
            DESCRIBE, worker_pb2.DescribeRequest(), Deadline.after(DESCRIBE_LIMIT_S)
        )
    except ForebayError:
        return WorkerStatus(WorkerState.UNREACHABLE, registered)
    finally:
        await channel.close()
    there = (answer.worker.worker_id, answer.worker.epoch)
    if there != (registered.worker_id, registered.epoch):
        return WorkerStatus(WorkerState.UNREACHABLE, registered)
    state = WorkerState.DRAINING if answer.worker.draining else WorkerState.READY
    return WorkerStatus(state, answer.worker)
