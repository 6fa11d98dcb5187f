"""`up` and `down`: starting and ending the supervisor of a local platform, from another process."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from forebay.core.errors import ConfigurationError, Unavailable
from forebay.core.settings import state_dir
from forebay.deploy.models import resolve_model
from forebay.deploy.options import PlatformPlan, child_environment, with_model
from forebay.deploy.ports import check_port
from forebay.deploy.processes import end_processes, marked, wait_gone
from forebay.deploy.progress import Event, Stage
from forebay.deploy.run_state import (
    LOG_FOLDER,
    LOG_NAME,
    RunState,
    read_run_state,
    remove_run_state,
)

START_FAILED_LIMIT_S = 90.0
"""How long the supervisor may take to end all that it has started, without drains."""
ORPHANS_GRACE_S = 5.0
NEEDED_PACKAGES = ("ray", "redis", "starlette", "tokenizers", "torch")
"""One or more of each extra that `forebay[local]` consists of."""

Notify = Callable[[Event], None]


def start(plan: PlatformPlan, notify: Notify) -> RunState:
    """Returns when the platform is ready. Raises ForebayError when it cannot be; then, as after
    a KeyboardInterrupt, nothing is left running."""
    _check_installed()
    folder = _prepared_state_dir()
    _check_nothing_runs(folder)
    check_port(plan.host, plan.http_port)
    check_port(plan.host, plan.grpc_port)
    plan = _with_model_file(plan, notify)
    logs = folder / LOG_FOLDER
    logs.mkdir(mode=0o700, exist_ok=True)
    with (logs / LOG_NAME).open("ab") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "forebay.deploy.supervisor", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=child_environment({}),
            start_new_session=True,
        )
    try:
        return _follow(supervisor, plan, folder, notify)
    except BaseException:
        supervisor.terminate()
        _await_end(supervisor)
        raise
    finally:
        for pipe in (supervisor.stdin, supervisor.stdout):
            if pipe is not None:
                pipe.close()


def _check_installed() -> None:
    for name in NEEDED_PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ConfigurationError(f"`forebay up` needs forebay[local]: there is no {name}")


def _prepared_state_dir() -> Path:
    if sys.platform != "linux":
        raise ConfigurationError("the local platform runs on Linux only")
    folder = state_dir()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{folder}: {error.strerror}") from error
    return folder


def _check_nothing_runs(folder: Path) -> None:
    state = read_run_state(folder)
    if state is None:
        return
    if not state.alive:
        _clean_up(folder, state)
        return
    doing = "runs" if state.ready else "is starting"
    raise ConfigurationError(f"a platform {doing} already ({state.http_url}); see `forebay down`")


def _with_model_file(plan: PlatformPlan, notify: Notify) -> PlatformPlan:
    if plan.engine == "sim":
        return plan
    began = time.monotonic()
    notify(Event(stage=Stage.MODEL))
    model = resolve_model(plan.model, lambda text: notify(Event(stage=Stage.MODEL, detail=text)))
    seconds = time.monotonic() - began
    notify(Event(stage=Stage.MODEL, done=True, seconds=seconds, detail=str(model.path)))
    return with_model(plan, str(model.path), model.model_id)


def _follow(
    supervisor: subprocess.Popen[str], plan: PlatformPlan, folder: Path, notify: Notify
) -> RunState:
    """Passes events on until the platform is ready or has failed."""
    assert supervisor.stdin is not None and supervisor.stdout is not None
    supervisor.stdin.write(plan.serialise() + "\n")
    supervisor.stdin.flush()
    failure: Event | None = None
    stopping = False
    for line in supervisor.stdout:
        event = Event.parse(line)
        if event.error:
            failure = event
            continue
        notify(event)
        stopping = event.stage is Stage.STOPPING
        if event.stage is Stage.READY:
            state = read_run_state(folder)
            assert state is not None
            return state
    _await_end(supervisor)
    if failure is None and stopping:
        raise Unavailable("the start was ended from elsewhere")
    if failure is None:
        raise Unavailable(f"the supervisor ended unexpectedly; see {folder / LOG_FOLDER}")
    hint = f" (logs: {failure.log})" if failure.log else ""
    raise Unavailable(f"{failure.error}{hint}")


def _await_end(supervisor: subprocess.Popen[str]) -> None:
    try:
        supervisor.wait(START_FAILED_LIMIT_S)
    except subprocess.TimeoutExpired:
        supervisor.kill()
        supervisor.wait()


def stop() -> bool:
    """Ends the platform and waits until it is gone. False when none was there."""
    folder = state_dir()
    state = read_run_state(folder)
    if state is None:
        return False
    if state.alive:
        state.supervisor.signal(signal.SIGTERM)
        if wait_gone([state.supervisor], state.end_limit_s):
            state.supervisor.signal(signal.SIGKILL)
    state = read_run_state(folder)
    if state is not None:
        _clean_up(folder, state)
    return True


def _clean_up(folder: Path, state: RunState) -> None:
    """Ends what a supervisor that is gone has left behind."""
    left = end_processes([*state.processes, *marked(state.instance)], ORPHANS_GRACE_S)
    left += end_processes(marked(state.instance), ORPHANS_GRACE_S)
    if left:
        ids = ", ".join(str(record.pid) for record in left)
        raise Unavailable(f"these processes do not end: {ids}")
    if Path(state.temp_dir).name.startswith("forebay-"):
        shutil.rmtree(state.temp_dir, ignore_errors=True)
    remove_run_state(folder)
