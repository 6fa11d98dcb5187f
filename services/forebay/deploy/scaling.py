"""Another number of workers for a pool of the running platform."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from forebay.core.errors import ConfigurationError, Unavailable
from forebay.core.roles import WorkerRole
from forebay.deploy.options import MAX_REPLICAS, child_environment
from forebay.deploy.ray_cluster import client_variables
from forebay.deploy.run_state import RunState
from forebay.deploy.serve_messages import helper_error

SCALE_LIMIT_S = 60.0


def scale(run: RunState, role: WorkerRole, num_replicas: int) -> None:
    """Returns when Ray Serve has taken the number in; it starts or drains workers from then on.
    Raises ConfigurationError and Unavailable."""
    if role.value not in run.pools:
        raise ConfigurationError(f"this platform has no {role.value} pool")
    if num_replicas > MAX_REPLICAS:
        raise ConfigurationError(f"at most {MAX_REPLICAS} workers on one machine")
    module = [sys.executable, "-m", "forebay.deploy.serve_apps"]
    command = [*module, f"--address={run.ray_address}", "scale", role.value, str(num_replicas)]
    try:
        done = subprocess.run(
            command,
            env=child_environment(client_variables(Path(run.temp_dir), run.ray_address)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SCALE_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"Ray did not answer within {SCALE_LIMIT_S:.0f} s") from None
    if done.returncode != 0:
        raise Unavailable(helper_error(done.stdout) or f"Ray refused; see {run.log_dir}")
