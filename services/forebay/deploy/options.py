"""What `forebay up` was asked for, checked before anything is started."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from forebay.core.errors import ConfigurationError
from forebay.core.kv_codec import KvCodec
from forebay.core.roles import WorkerRole
from forebay.core.settings import (
    DEFAULT_MODEL,
    GatewaySettings,
    WorkerSettings,
    external_redis_url,
    load,
)

MAX_REPLICAS = 64
MAX_THREADS_PER_CPU = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """The command line's values; None where the user left the choice to settings."""

    model: str | None = None
    prefill: int | None = None
    decode: int | None = None
    mixed: int = 0
    engine: str | None = None
    dtype: str | None = None
    http_port: int | None = None
    grpc_port: int | None = None
    max_model_len: int | None = None
    kv_memory_mib: int | None = None
    threads: int | None = None
    kv_codec: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformPlan:
    """All that the supervisor needs to know; travels to it as JSON.

    pools: replicas of each role, roles without replicas left out.
    environment: variables that every process of the platform gets on top of the user's own.
    """

    pools: Mapping[WorkerRole, int]
    host: str
    http_port: int
    grpc_port: int
    model: str
    model_id: str
    engine: str
    redis_url: str | None
    environment: Mapping[str, str]
    worker_drain_s: float
    gateway_drain_s: float

    @classmethod
    def parse(cls, line: str) -> PlatformPlan:
        data = json.loads(line)
        pools = {WorkerRole(role): count for role, count in data["pools"].items()}
        return cls(**{**data, "pools": pools})

    def serialise(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


def make_plan(options: UpOptions) -> PlatformPlan:
    """Raises ConfigurationError. `model` is still the name or path that the user gave: its file
    is found, or fetched, by `with_model`."""
    pools = _pools(options)
    chosen = {
        "FOREBAY_ENGINE_ENGINE": options.engine,
        "FOREBAY_ENGINE_DTYPE": options.dtype,
        "FOREBAY_ENGINE_MAX_MODEL_LEN": options.max_model_len,
        "FOREBAY_ENGINE_KV_MEMORY_MIB": options.kv_memory_mib,
        "FOREBAY_ENGINE_NUM_THREADS": options.threads,
        "FOREBAY_WORKER_KV_CODEC": options.kv_codec,
        "FOREBAY_GATEWAY_HTTP_PORT": options.http_port,
        "FOREBAY_GATEWAY_GRPC_PORT": options.grpc_port,
    }
    environment = {name: str(value) for name, value in chosen.items() if value is not None}
    merged = {**inherited_environment(), **environment}
    worker, gateway = load(WorkerSettings, merged), load(GatewaySettings, merged)
    num_cpus = len(os.sched_getaffinity(0))
    if worker.engine.num_threads is None:
        threads = max(1, num_cpus // sum(pools.values()))
        environment["FOREBAY_ENGINE_NUM_THREADS"] = str(threads)
    elif worker.engine.num_threads > MAX_THREADS_PER_CPU * num_cpus:
        raise ConfigurationError(
            f"{worker.engine.num_threads} threads are too many for {num_cpus} CPUs"
        )
    if options.model == "":
        raise ConfigurationError("the model's name is empty")
    if gateway.http_port == gateway.grpc_port:
        raise ConfigurationError(f"port {gateway.http_port} cannot serve both HTTP and gRPC")
    _check_engine(worker)
    return PlatformPlan(
        pools=pools,
        host=gateway.host,
        http_port=gateway.http_port,
        grpc_port=gateway.grpc_port,
        model=options.model or worker.engine.model_path or DEFAULT_MODEL,
        model_id=worker.engine.model_id,
        engine=worker.engine.engine,
        redis_url=external_redis_url(),
        environment=environment,
        worker_drain_s=worker.drain_s,
        gateway_drain_s=gateway.drain_s,
    )


def with_model(plan: PlatformPlan, path: str, model_id: str) -> PlatformPlan:
    """The plan with the model's file known. The user's own FOREBAY_ENGINE_MODEL_ID goes first."""
    variables = {"FOREBAY_ENGINE_MODEL_PATH": path}
    if "FOREBAY_ENGINE_MODEL_ID" in inherited_environment():
        model_id = plan.model_id
    variables["FOREBAY_ENGINE_MODEL_ID"] = model_id
    return replace(
        plan, model=path, model_id=model_id, environment={**plan.environment, **variables}
    )


def inherited_environment() -> dict[str, str]:
    """What this process hands on to those that it starts; settings are read by core.settings."""
    return dict(os.environ)


def child_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The user's environment with `variables` on top, fit for a process in another folder.

    They come last, where a process that rewrites its own title does not overwrite them.
    """
    inherited = inherited_environment()
    for name in variables:
        inherited.pop(name, None)
    if "PYTHONPATH" in inherited:
        folders = inherited["PYTHONPATH"].split(os.pathsep)
        inherited["PYTHONPATH"] = os.pathsep.join(os.path.abspath(item) for item in folders)
    return {**inherited, **variables}


def _pools(options: UpOptions) -> dict[WorkerRole, int]:
    if options.mixed and (options.prefill is not None or options.decode is not None):
        raise ConfigurationError("--mixed takes the place of --prefill and --decode")
    default = 0 if options.mixed else 1
    asked = {
        WorkerRole.PREFILL: default if options.prefill is None else options.prefill,
        WorkerRole.DECODE: default if options.decode is None else options.decode,
        WorkerRole.MIXED: options.mixed,
    }
    pools = {role: count for role, count in asked.items() if count > 0}
    if not options.mixed and len(pools) != 2:
        raise ConfigurationError(
            "a platform needs at least one prefill and one decode worker, or mixed workers"
        )
    if sum(pools.values()) > MAX_REPLICAS:
        raise ConfigurationError(f"at most {MAX_REPLICAS} workers on one machine")
    return pools


def _check_engine(worker: WorkerSettings) -> None:
    engine = worker.engine
    if engine.engine not in ("torch", "sim"):
        raise ConfigurationError(f"engine {engine.engine!r}: torch or sim")
    if engine.dtype not in ("auto", "fp32", "bf16", "fp16"):
        raise ConfigurationError(f"dtype {engine.dtype!r}: auto, fp32, bf16 or fp16")
    if engine.engine == "sim" and worker.kv_codec is not KvCodec.RAW:
        raise ConfigurationError(f"kv_codec {worker.kv_codec.value!r}: the sim engine's KV is raw")
