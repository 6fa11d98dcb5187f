"""Workers in processes of their own, so that they can really be killed or stopped."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

MAIN = """
import asyncio, sys
from dataclasses import replace
from forebay.core.roles import WorkerRole
from forebay.core.settings import WorkerSettings, load
from forebay.worker.process import WorkerProcess

async def main():
    worker = WorkerProcess(replace(load(WorkerSettings), role=WorkerRole(sys.argv[1])))
    await worker.start()
    print(worker.address, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@dataclass
class RunningWorker:
    process: Process
    address: str

    @property
    def alive(self) -> bool:
        return self.process.returncode is None


@asynccontextmanager
async def workers(
    redis_url: str, *roles: str, **settings: str
) -> AsyncIterator[list[RunningWorker]]:
    """One sim-engine worker for each of `roles`; `settings` are environment variables."""
    environ = {
        **os.environ,
        "FOREBAY_REDIS_URL": redis_url,
        "FOREBAY_ENGINE_ENGINE": "sim",
        "FOREBAY_ENGINE_MODEL_ID": "sim",
        "FOREBAY_ENGINE_NUM_BLOCKS": "512",
        "FOREBAY_WORKER_REGISTRY_TTL_S": "2",
        **settings,
    }
    started = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", MAIN, role, env=environ, stdout=PIPE
        )
        for role in roles
    ]
    try:
        running = []
        for process in started:
            assert process.stdout is not None
            async with asyncio.timeout(60):
                line = await process.stdout.readline()
            running.append(RunningWorker(process, line.decode().strip()))
        yield running
    finally:
        for process in started:
            if process.returncode is None:
                process.kill()
            await process.wait()
