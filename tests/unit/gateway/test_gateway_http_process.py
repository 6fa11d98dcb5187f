"""`python -m forebay.gateway` as a process: how it starts, refuses to start, and stops."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import AsyncExitStack

import httpx
import pytest

WAIT_S = 60.0
NO_REDIS = "redis://127.0.0.1:1/0"


async def start(**variables: str) -> asyncio.subprocess.Process:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FOREBAY_")}
    ports = {"FOREBAY_GATEWAY_HTTP_PORT": "0", "FOREBAY_GATEWAY_GRPC_PORT": "0"}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "forebay.gateway",
        env={**kept, **ports, **variables},
        stderr=asyncio.subprocess.PIPE,
    )


async def outcome(process: asyncio.subprocess.Process) -> tuple[int | None, str]:
    async with asyncio.timeout(WAIT_S):
        _, error = await process.communicate()
    return process.returncode, error.decode()


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, "FOREBAY_REDIS_URL"),
        ({"FOREBAY_REDIS_URL": "nonsense"}, "Redis URL"),
        ({"FOREBAY_REDIS_URL": NO_REDIS, "FOREBAY_GATEWAY_HTTP_PORT": "x"}, "HTTP_PORT"),
        ({"FOREBAY_REDIS_URL": NO_REDIS, "FOREBAY_GATEWAY_HTTP_PORT": "70000"}, "70000"),
        ({"FOREBAY_REDIS_URL": NO_REDIS, "FOREBAY_GATEWAY_NO_SUCH": "1"}, "NO_SUCH"),
    ],
)
async def test_a_bad_setting_is_one_line_and_exit_code_1(
    variables: dict[str, str], named: str
) -> None:
    code, error = await outcome(await start(**variables))
    assert code == 1
    last = error.splitlines()[-1]
    assert last.startswith("forebay gateway: ")
    assert named in last
    assert "Traceback" not in error


@pytest.mark.parametrize("name", ["HTTP", "GRPC"])
async def test_a_taken_port_is_one_line_and_exit_code_1(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = await start(FOREBAY_REDIS_URL=NO_REDIS, **{f"FOREBAY_GATEWAY_{name}_PORT": port})
        code, error = await outcome(process)
    assert code == 1
    assert error.splitlines()[-1].startswith("forebay gateway: ")
    assert port in error.splitlines()[-1]
    assert "Traceback" not in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_serves_without_redis_and_stops_when_asked(number: signal.Signals) -> None:
    process = await start(FOREBAY_REDIS_URL=NO_REDIS)
    async with AsyncExitStack() as stack:
        stack.callback(lambda: process.returncode is None and process.kill())
        assert process.stderr is not None
        async with asyncio.timeout(WAIT_S):
            line = b""
            while b"listening: http=127.0.0.1:" not in line:
                line = await process.stderr.readline()
                assert line
        port = line.split(b"http=127.0.0.1:")[1].split()[0].decode()
        client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False)
        )
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 503
        body = {"model": "m", "prompt": "a"}
        refused = await client.post("/v1/completions", json=body)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        process.send_signal(number)
        code, error = await outcome(process)
        assert code == 0
        assert "Traceback" not in error
