"""A lean, token-protected Ray head on loopback: how it is started, found again and revived.

Its state lies in RocksDB under `folder`, so that applications outlive the loss of every Ray
process: `ray start` over the same folder brings them back.
"""

from __future__ import annotations

import secrets
import signal
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from forebay.deploy.ports import LOOPBACK, free_ports
from forebay.deploy.processes import ProcessRecord, command_of

OBJECT_STORE_BYTES = 80_000_000
"""Nothing goes through Ray's object store here; this is the smallest that it takes."""
LOGICAL_CPUS = 4
"""Bounds how many replicas start at once; a replica asks for a small fraction of one."""
RECONNECT_S = 600
"""How long Ray's processes wait for a lost control store before they give up."""
RAYLET_CHECK_MS = 10**12
"""Ray's workers look this often whether their raylet lives, and end when it does not: never, here.
They serve on without it, and `LeftWorkers` ends them once others have taken their place."""

TOKEN_NAME = "token"
GCS_NAME = "gcs_server"
RAYLET_NAME = "raylet"

_REPLICA_TITLE = "ray::ServeReplica:"
_UNNEEDED = ("ray.util.client.server", "dashboard/dashboard.py")


@dataclass(frozen=True, slots=True)
class RayHead:
    """`folder`: holds all that Ray writes. Its path must be short: Ray puts sockets below it."""

    folder: Path
    port: int
    spare_ports: tuple[int, int, int]

    @classmethod
    def prepare(cls, folder: Path) -> RayHead:
        port, *spare = free_ports(4)
        head = cls(folder, port, (spare[0], spare[1], spare[2]))
        token_path = folder / TOKEN_NAME
        token_path.touch(mode=0o600)
        token_path.write_text(secrets.token_hex(32))
        return head

    @property
    def session_logs(self) -> Path:
        return self.folder / "ray" / "session_latest" / "logs"

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    @property
    def variables(self) -> dict[str, str]:
        """For the head and for every client of it."""
        return {
            **client_variables(self.folder, self.address),
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(self.folder / "gcs"),
            "RAY_gcs_rpc_server_reconnect_timeout_s": str(RECONNECT_S),
            "RAY_raylet_death_check_interval_milliseconds": str(RAYLET_CHECK_MS),
            "RAY_enable_metrics_collection": "0",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_enable_worker_prestart": "0",
            "RAY_event_stats": "0",
            "RAY_DASHBOARD_DISABLE_METRICS": "1",
            "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
            # With MAX_START_FAILURES of the deployments: the smaller one counts.
            "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1000000",
            # A replica that fails its health checks cannot drain: it hangs, or cannot compute.
            "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        }

    @property
    def start_command(self) -> list[str]:
        dashboard, agent, client = self.spare_ports
        options: Mapping[str, object] = {
            "node-ip-address": LOOPBACK,
            "port": self.port,
            "temp-dir": self.folder / "ray",
            "num-cpus": LOGICAL_CPUS,
            "num-gpus": 0,
            "object-store-memory": OBJECT_STORE_BYTES,
            "include-dashboard": "false",
            "include-log-monitor": "false",
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": agent,
            "ray-client-server-port": client,
            "min-worker-port": 0,
            "max-worker-port": 0,
        }
        flags = [f"--{name}={value}" for name, value in options.items()]
        program = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
        return [*program, "start", "--head", "--no-monitor", "--disable-usage-stats", *flags]


def client_variables(folder: Path, address: str) -> dict[str, str]:
    """What a client of the head over `folder` needs in its environment."""
    return {
        # Without it Ray replaces a loopback address by the host's own.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_ADDRESS": address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / TOKEN_NAME),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def find(records: Iterable[ProcessRecord], name: str) -> ProcessRecord | None:
    return next((record for record in records if record.name == name), None)


def replicas(records: Iterable[ProcessRecord]) -> list[ProcessRecord]:
    """The processes among `records` that host a worker."""
    return [record for record in records if _first_argument(record).startswith(_REPLICA_TITLE)]


def _first_argument(record: ProcessRecord) -> str:
    try:
        arguments, _ = command_of(record)
    except OSError:
        return ""
    return arguments[0] if arguments else ""


def end_unneeded(records: Iterable[ProcessRecord]) -> None:
    """`ray start` has no option against the Ray client server and the dashboard's shell, 90 and
    120 MB; nothing here talks to them."""
    for record in records:
        try:
            arguments, _ = command_of(record)
        except OSError:
            continue
        if any(argument.endswith(_UNNEEDED) for argument in arguments[:4]):
            record.signal(signal.SIGTERM)
