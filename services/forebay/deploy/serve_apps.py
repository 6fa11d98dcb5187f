"""Ray Serve applications of the pools, and a short-lived helper that deploys or ends them.

`python -m forebay.deploy.serve_apps deploy|scale|shutdown ...` prints one JSON object: `error` or
`detail`. It is a process of its own so that its caller can put a limit around it: Ray's clients
retry for minutes when the head is away.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import click
import ray
from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve.schema import ApplicationStatus, ServeStatus

from forebay.core.errors import ConfigurationError, ForebayError, Unavailable
from forebay.core.roles import WorkerRole
from forebay.core.settings import WorkerSettings, load
from forebay.deploy.replica import WorkerReplica
from forebay.deploy.serve_messages import root_cause

REPLICA_CPUS = 0.05
"""Logical: placement on one machine is not Ray's to limit."""
HEALTH_PERIOD_S = 1.0
HEALTH_TIMEOUT_S = 3.0
"""Serve replaces a worker after three failures in a row: one that hangs after about 12 s."""
MAX_START_FAILURES = 1_000_000
"""Serve would give a pool up after a few workers that failed to start, and never try again."""
SHUTDOWN_MARGIN_S = 10.0
"""What a draining worker gets on top of its own limit before Serve kills it."""
CONTROLLER_LIMIT_S = 30.0
_POLL_S = 0.2


def deployment_name(role: WorkerRole) -> str:
    return role.value.capitalize()


def application(role: WorkerRole, num_replicas: int) -> serve.Application:
    drain_s = load(WorkerSettings).drain_s
    decorate = serve.deployment(
        name=deployment_name(role),
        num_replicas=num_replicas,
        ray_actor_options={"num_cpus": REPLICA_CPUS},
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=drain_s + SHUTDOWN_MARGIN_S,
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=MAX_START_FAILURES,
    )
    bound: serve.Application = decorate(WorkerReplica).bind(role.value)
    return bound


def deploy(pools: Mapping[WorkerRole, int], limit_s: float) -> None:
    """Returns when every replica runs. Raises ForebayError at the first replica that fails to
    start (Serve itself would go on trying), and Unavailable when the time is up."""
    serve.start(proxy_location="Disabled")
    targets = [
        serve.RunTarget(
            application(role, count),
            name=role.value,
            route_prefix=None,
            external_scaler_enabled=True,
        )
        for role, count in pools.items()
    ]
    serve.run_many(targets, wait_for_applications_running=False)
    end = time.monotonic() + limit_s
    while not _all_running(serve.status(), pools):
        if time.monotonic() > end:
            raise Unavailable(f"the workers were not ready within {limit_s:.0f} s")
        time.sleep(_POLL_S)


def _all_running(status: ServeStatus, pools: Mapping[WorkerRole, int]) -> bool:
    running = 0
    for role in pools:
        app = status.applications.get(role.value)
        if app is None:
            continue
        for deployment in app.deployments.values():
            if "failed to start" in deployment.message:
                print(deployment.message, file=sys.stderr)
                raise ConfigurationError(
                    f"a {role.value} worker did not start: {root_cause(deployment.message)}"
                )
        if app.status == ApplicationStatus.DEPLOY_FAILED:
            raise ConfigurationError(f"the {role.value} pool did not start: {app.message}")
        running += app.status == ApplicationStatus.RUNNING
    return running == len(pools)


def scale(role: WorkerRole, num_replicas: int) -> None:
    """Asks for `num_replicas`; Serve starts or drains replicas on its own time."""
    controller: Any = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    deployment = DeploymentID(name=deployment_name(role), app_name=role.value)
    call = controller.update_deployment_replicas.remote(deployment, num_replicas)
    ray.get(call, timeout=CONTROLLER_LIMIT_S)


def shutdown() -> None:
    """Drains and ends every replica and Serve itself."""
    serve.shutdown()  # type: ignore[no-untyped-call]


@click.group()
@click.option("--address", required=True, help="host:port of the Ray head.")
def main(address: str) -> None:
    ray.init(address=address, namespace="serve", log_to_driver=False)


@main.command("deploy")
@click.option("--limit-s", type=float, required=True)
@click.argument("pools", nargs=-1, required=True)
def deploy_command(limit_s: float, pools: tuple[str, ...]) -> None:
    """Each of POOLS is ROLE=REPLICAS."""
    counts = {}
    for pool in pools:
        role, _, count = pool.partition("=")
        counts[WorkerRole(role)] = int(count)
    with _report():
        deploy(counts, limit_s)


@main.command("scale")
@click.argument("role", type=WorkerRole)
@click.argument("replicas", type=int)
def scale_command(role: WorkerRole, replicas: int) -> None:
    with _report():
        scale(role, replicas)


@main.command("shutdown")
def shutdown_command() -> None:
    with _report():
        shutdown()


@contextlib.contextmanager
def _report() -> Iterator[None]:
    try:
        yield
    except ForebayError as error:
        print(json.dumps({"error": error.message}), flush=True)
        sys.exit(1)
    print(json.dumps({"detail": "done"}), flush=True)


if __name__ == "__main__":
    main()
