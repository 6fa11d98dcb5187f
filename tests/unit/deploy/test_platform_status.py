"""Status from a real Valkey and real gRPC listeners."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from forebay.deploy.ports import LOOPBACK, free_ports
from forebay.deploy.processes import ProcessRecord
from forebay.deploy.run_state import RunState
from forebay.deploy.status import WorkerState, platform_status
from forebay.rpc.v1 import worker_pb2, worker_pb2_grpc
from forebay.store.redis_registry import RedisRegistry


class Describing(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self, worker: worker_pb2.WorkerDescription) -> None:
        self.worker = worker

    async def Describe(self, request: Any, context: Any) -> worker_pb2.DescribeResponse:  # type: ignore[override]
        return worker_pb2.DescribeResponse(worker=self.worker)


@pytest.fixture
async def gateway_port() -> AsyncIterator[int]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, LOOPBACK, 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()


def run_state(http_port: int, redis_url: str) -> RunState:
    return RunState(
        instance="x",
        ready=True,
        supervisor=ProcessRecord(1, 1, "x"),
        processes=(),
        host=LOOPBACK,
        http_port=http_port,
        grpc_port=1,
        redis_url=redis_url,
        ray_address="",
        temp_dir="",
        log_dir=str(Path("/logs")),
        end_limit_s=1.0,
        model_id="m",
        engine="sim",
        pools={"prefill": 1, "decode": 2},
    )


def description(worker_id: str, role: worker_pb2.WorkerRole) -> worker_pb2.WorkerDescription:
    return worker_pb2.WorkerDescription(
        worker_id=worker_id,
        role=role,
        load=worker_pb2.WorkerLoad(
            num_running=2, kv_blocks=worker_pb2.KvBlocks(total=10, free=7, used=3)
        ),
        counters=worker_pb2.WorkerCounters(kv_bytes_sent=100, generation_tokens=5),
    )


async def test_asks_every_worker(gateway_port: int, valkey_url: str) -> None:
    live = description("p-1", worker_pb2.WORKER_ROLE_PREFILL)
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(Describing(live), server)
    port = server.add_insecure_port(f"{LOOPBACK}:0")
    await server.start()
    live.endpoints.add(rank=0, address=f"{LOOPBACK}:{port}")
    registered = worker_pb2.WorkerDescription()
    registered.CopyFrom(live)
    registered.load.num_running = 0
    dead = description("d-1", worker_pb2.WORKER_ROLE_DECODE)
    dead.endpoints.add(rank=0, address=f"{LOOPBACK}:{free_ports(1)[0]}")
    registry = RedisRegistry.connect(valkey_url)
    try:
        await registry.publish(registered, 60.0)
        await registry.publish(dead, 60.0)
        status = await platform_status(run_state(gateway_port, valkey_url))
        live.draining = True
        draining = await platform_status(run_state(gateway_port, valkey_url))
    finally:
        await registry.remove("p-1")
        await registry.remove("d-1")
        await registry.close()
        await server.stop(None)
    assert [(item.role, item.state) for item in status.workers] == [
        ("prefill", WorkerState.READY),
        ("decode", WorkerState.UNREACHABLE),
    ]
    assert status.workers[0].worker.load.num_running == 2
    assert draining.workers[0].state is WorkerState.DRAINING
    report: Any = status.as_json()
    assert report["ready"] is True
    assert report["pools"] == {
        "prefill": {"started_with": 1, "ready": 1},
        "decode": {"started_with": 2, "ready": 0},
    }
    assert report["workers"][0]["kv_blocks"]["used"] == 3
    assert report["totals"]["kv_bytes_sent"] == 200


async def test_everything_down() -> None:
    http_port, redis_port = free_ports(2)
    run = run_state(http_port, f"redis://{LOOPBACK}:{redis_port}/0")
    status = await platform_status(run)
    assert status.workers == ()
    assert not status.gateway_ready
    assert "Redis" in status.registry_error
    assert status.as_json()["ready"] is False


async def test_not_ready_until_the_platform_says_so(gateway_port: int, valkey_url: str) -> None:
    status = await platform_status(replace(run_state(gateway_port, valkey_url), ready=False))
    assert status.gateway_ready
    assert status.as_json()["ready"] is False
