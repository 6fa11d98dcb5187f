"""`python -m forebay_loadtest.routing.bare_worker`: a worker without Ray, set up by the variables
FOREBAY_WORKER_* and FOREBAY_ENGINE_*; it stops at SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import signal

from forebay.core.settings import WorkerSettings, load
from forebay.worker.process import WorkerProcess


async def run(settings: WorkerSettings) -> None:
    asked_to_stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked_to_stop.set)
    worker = WorkerProcess(settings)
    await worker.start()
    await asked_to_stop.wait()
    await worker.stop(0.0)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(run(load(WorkerSettings)))
