"""The one process that owns a local platform: starts it, watches it, ends it.

`python -m forebay.deploy.supervisor STATE_DIR` reads a `PlatformPlan` as one JSON line from stdin,
reports on stdout (`progress.py`) and logs on stderr. Until the platform is ready the end of stdin
means that `forebay up` is gone, and everything is ended; afterwards only SIGTERM ends it.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path

from forebay.core.errors import ConfigurationError, ForebayError
from forebay.deploy.options import PlatformPlan
from forebay.deploy.platform import Platform
from forebay.deploy.processes import ProcessRecord, become_subreaper
from forebay.deploy.progress import Event, ProgressWriter, Stage
from forebay.deploy.run_state import (
    LOG_FOLDER,
    LOG_NAME,
    RAY_LOG_FOLDER,
    RunState,
    remove_run_state,
    write_run_state,
)

WATCH_PERIOD_S = 0.5
LOCK_NAME = "lock"
MAX_TEMP_DIR_CHARS = 40
"""Ray puts Unix sockets about 60 characters deeper, and their paths end at 107."""

logger = logging.getLogger("forebay.supervisor")


class Supervisor:
    def __init__(self, plan: PlatformPlan, state_dir: Path, progress: ProgressWriter) -> None:
        self._plan = plan
        self._state_dir = state_dir
        self._progress = progress
        self._instance = secrets.token_hex(16)
        self._temp_dir = _make_temp_dir()
        self._log_dir = state_dir / LOG_FOLDER
        self._platform = Platform(plan, self._instance, self._temp_dir, self._log_dir)
        self._ready = False
        self._stage = Stage.REDIS
        self._written: RunState | None = None

    @property
    def ready(self) -> bool:
        return self._ready

    async def run(self) -> int:
        """The exit code: 0 after SIGTERM, 1 when the start failed. Nothing is left behind."""
        try:
            await self._start()
            while True:
                await asyncio.sleep(WATCH_PERIOD_S)
                await self._watch()
        except asyncio.CancelledError:
            logger.info("asked to stop")
            return 0
        except ForebayError as error:
            self._fail(error.message)
            return 1
        except Exception as error:
            logger.exception("broken")
            self._fail(f"{type(error).__name__}: {error}")
            return 1
        finally:
            self._progress.emit(Event(stage=Stage.STOPPING))
            await self._platform.end(drain=self._ready)
            remove_run_state(self._state_dir)
            logger.info("ended")

    async def _start(self) -> None:
        self._write_state()
        await self._run_stage(Stage.REDIS, self._platform.start_redis())
        self._platform.launch_gateway()
        await self._run_stage(Stage.RAY, self._platform.start_ray())
        await self._run_stage(Stage.WORKERS, self._platform.start_workers())
        await self._run_stage(Stage.GATEWAY, self._platform.await_gateway())
        self._ready = True
        self._write_state()
        self._progress.emit(Event(stage=Stage.READY, done=True))
        self._progress.close()
        logger.info("ready")

    async def _run_stage(self, stage: Stage, work: Awaitable[str]) -> None:
        self._stage = stage
        self._progress.emit(Event(stage=stage))
        loop = asyncio.get_running_loop()
        began = loop.time()
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=WATCH_PERIOD_S)
                self._platform.check_services()
                self._write_state()
        finally:
            task.cancel()
        seconds = loop.time() - began
        self._progress.emit(Event(stage=stage, done=True, seconds=seconds, detail=task.result()))

    async def _watch(self) -> None:
        """What goes wrong here is tried again the next time: the platform itself goes on."""
        try:
            await self._platform.tend()
            self._write_state()
        except (ForebayError, OSError) as error:
            logger.error("%s", error)

    def _fail(self, reason: str) -> None:
        logger.error("%s", reason)
        self._progress.emit(Event(stage=self._stage, error=reason, log=str(self._log_dir)))

    def _write_state(self) -> None:
        supervisor = ProcessRecord.of(os.getpid())
        assert supervisor is not None
        state = RunState(
            instance=self._instance,
            ready=self._ready,
            supervisor=supervisor,
            processes=tuple(self._platform.processes),
            host=self._plan.host,
            http_port=self._plan.http_port,
            grpc_port=self._plan.grpc_port,
            redis_url=self._platform.redis_url,
            ray_address=self._platform.ray_address,
            temp_dir=str(self._temp_dir),
            log_dir=str(self._log_dir),
            end_limit_s=self._platform.end_limit_s,
            model_id=self._plan.model_id,
            engine=self._plan.engine,
            pools={role.value: count for role, count in self._plan.pools.items()},
        )
        if state != self._written:
            write_run_state(self._state_dir, state)
            self._written = state


def _make_temp_dir() -> Path:
    base = tempfile.gettempdir()
    if len(base) > MAX_TEMP_DIR_CHARS:
        raise ConfigurationError(
            f"{base}: too long a path for sockets; set TMPDIR to a shorter one"
        )
    return Path(tempfile.mkdtemp(prefix="forebay-", dir=base))


@contextmanager
def _state_lock(state_dir: Path) -> Iterator[None]:
    """Held as long as this process lives: one platform a state folder."""
    with (state_dir / LOCK_NAME).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError("another platform runs, starts or ends here") from None
        yield


def clear_logs(folder: Path) -> None:
    """Of the platform before; this process's own stderr stays where it is."""
    shutil.rmtree(folder / RAY_LOG_FOLDER, ignore_errors=True)
    for path in folder.glob("*.log"):
        if path.name == LOG_NAME:
            os.truncate(path, 0)
        else:
            path.unlink()


async def _supervise(plan: PlatformPlan, state_dir: Path, progress: ProgressWriter) -> int:
    loop = asyncio.get_running_loop()
    supervisor = Supervisor(plan, state_dir, progress)
    task = asyncio.ensure_future(supervisor.run())
    stopping = False

    def stop() -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            task.cancel()

    def read_stdin() -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            loop.remove_reader(sys.stdin)
            if not supervisor.ready:
                logger.info("`forebay up` is gone")
                stop()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    loop.add_reader(sys.stdin, read_stdin)
    return await task


def main() -> int:
    state_dir = Path(sys.argv[1])
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    progress = ProgressWriter(sys.stdout)
    plan = PlatformPlan.parse(sys.stdin.readline())
    try:
        with _state_lock(state_dir):
            clear_logs(state_dir / LOG_FOLDER)
            become_subreaper()
            return asyncio.run(_supervise(plan, state_dir, progress))
    except ForebayError as error:
        progress.emit(Event(stage=Stage.REDIS, error=error.message))
        return 1


if __name__ == "__main__":
    sys.exit(main())
