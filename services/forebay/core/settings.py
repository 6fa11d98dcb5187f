"""Settings of every process, grouped; the only reader of environment variables.

A field `http_port` of GatewaySettings is read from FOREBAY_GATEWAY_HTTP_PORT. FOREBAY_REDIS_URL
serves every group that has a `redis_url`. An unknown name or a bad value is an error.
"""

from __future__ import annotations

import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from forebay.core.errors import ConfigurationError
from forebay.core.kv_codec import KvCodec
from forebay.core.roles import WorkerRole

DEFAULT_MODEL = "smollm2-135m-instruct"
REDIS_URL_VARIABLE = "FOREBAY_REDIS_URL"
CACHE_SALT_VARIABLE = "FOREBAY_GATEWAY_CACHE_SALT"

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    engine: str = "torch"
    """`torch` computes; `sim` has no weights and answers with seeded nonsense."""
    model_path: str = ""
    """A GGUF file or a folder with safetensors; unused by the sim engine."""
    model_id: str = DEFAULT_MODEL
    """The name clients ask for."""
    dtype: str = "auto"
    """auto, fp32, bf16 or fp16; auto takes bf16 where the processor multiplies it natively."""
    device: str = "cpu"
    block_size: int = 16
    """Tokens per KV block."""
    num_blocks: int | None = None
    """KV blocks; None takes as many as kv_memory_mib holds."""
    kv_memory_mib: int = 1024
    """KV memory of one worker; the sim engine has none and takes num_blocks."""
    max_model_len: int | None = None
    """Prompt plus answer, in tokens; None takes the model's own limit."""
    max_batch_tokens: int = 512
    """Tokens computed in one step: bounds how long a prompt's chunk delays running streams."""
    max_num_seqs: int = 64
    """Sequences that decode at once."""
    num_threads: int | None = None
    """CPU threads of one worker's model; None leaves torch's own choice."""
    sim_time_scale: float = 1.0
    """Multiplies the sim engine's modelled times; 0 makes every step instant."""
    sim_mean_output_tokens: int = 128
    """Mean answer length of the sim engine (geometric)."""
    sim_crash_text: str = ""
    """A prompt with this text kills the sim engine's process, for drills; empty: none does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    role: WorkerRole = WorkerRole.MIXED
    host: str = "127.0.0.1"
    port: int = 0
    """gRPC; 0 lets the system choose."""
    advertise_host: str = ""
    """Host that others reach this worker under; empty takes `host`."""
    metrics_port: int = 0
    redis_url: str = ""
    heartbeat_s: float = 1.0
    registry_ttl_s: float = 5.0
    """A worker that is silent this long is gone for the routers."""
    lease_s: float = 10.0
    """How long a worker keeps what it holds for a request, in whatever phase, unless the gateway
    renews it, which it does once a second. The request's own deadline bounds it further."""
    gateway_grace_s: float = 5.0
    """How long a gateway's sequences outlive its step stream."""
    kv_frame_kib: int = 1024
    """Upper bound of a KV frame's payload (at least one token of one layer goes into a frame)."""
    kv_codec: KvCodec = KvCodec.RAW
    """How this worker writes down the KV that it sends: `raw`, or `fp8`, which takes about half the
    bytes of bf16 and loses precision. A receiver that does not know it gets raw."""
    kv_event_interval_s: float = 0.05
    """How long changes of the prefix cache are gathered before gateways are told of them."""
    drain_s: float = 30.0
    """How long a worker that has to go lets its requests finish before it hands them over."""
    step_timeout_s: float = 120.0
    """A step that takes longer makes the worker unhealthy."""
    engine: EngineSettings = field(default_factory=EngineSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    redis_url: str = ""
    request_timeout_s: float = 600.0
    """The default, and the longest, life of a request."""
    queue_timeout_s: float = 30.0
    """How long a request may wait for a place on a worker before it gets a 429."""
    max_queued_requests: int = 256
    max_body_kib: int = 8192
    keep_alive_s: float = 15.0
    """A silent SSE stream carries a comment this often."""
    registry_poll_s: float = 0.5
    worker_silence_s: float = 4.0
    """A worker that says nothing for this long is lost: its streams go on elsewhere."""
    max_migrations: int = 16
    """How often one request may move to other workers before it fails; 0: never."""
    kv_stale_s: float = 2.0
    """How far behind the index of KV blocks may be: a worker of which it is further behind is
    chosen by load alone."""
    kv_index_mib: int = 256
    """Most memory of the index of KV blocks: about a million blocks per 64 MiB."""
    router_policy: str = "kv"
    """`kv` sends requests where their prefix is cached; baselines: round-robin, least-loaded,
    consistent-hash, prefix-tree."""
    poison_s: float = 600.0
    """How long a request that ended two workers is refused."""
    drain_s: float = 30.0
    explain_requests: int = 1000
    """Of this many requests that ended the timeline is kept, memory permitting; 0: of none."""
    otlp_endpoint: str = ""
    """An OpenTelemetry collector's OTLP/HTTP base URL (needs forebay[otel]); empty: no traces."""
    cache_salt: str = ""
    """Secret that keys block hashes and the poison list, the same for all gateways of a platform;
    empty draws one at start."""


Group = TypeVar("Group", EngineSettings, WorkerSettings, GatewaySettings)

_PREFIXES: dict[type[Any], str] = {
    EngineSettings: "FOREBAY_ENGINE_",
    WorkerSettings: "FOREBAY_WORKER_",
    GatewaySettings: "FOREBAY_GATEWAY_",
}

_AT_LEAST_ONE = frozenset(
    {
        "block_size",
        "num_blocks",
        "kv_memory_mib",
        "max_model_len",
        "max_batch_tokens",
        "max_num_seqs",
        "num_threads",
        "kv_frame_kib",
        "kv_index_mib",
        "max_body_kib",
    }
)


_MORE_THAN_ZERO = frozenset(
    {
        "heartbeat_s",
        "registry_ttl_s",
        "lease_s",
        "step_timeout_s",
        "keep_alive_s",
        "registry_poll_s",
        "worker_silence_s",
        "kv_event_interval_s",
        "kv_stale_s",
    }
)
_MOST = {"kv_frame_kib": 32 * 1024}
"""A frame has to fit into a message."""


def load(group: type[Group], environ: Mapping[str, str] | None = None) -> Group:
    """Defaults overridden by the environment. Raises ConfigurationError naming the variable."""
    env = os.environ if environ is None else environ
    prefix = _PREFIXES[group]
    hints = typing.get_type_hints(group)
    values: dict[str, Any] = {}
    for f in fields(group):
        if f.name == "engine" and group is WorkerSettings:
            values["engine"] = load(EngineSettings, env)
            continue
        variable = prefix + f.name.upper()
        if variable in env:
            values[f.name] = _parse(variable, env[variable], hints[f.name])
            _check_range(variable, f.name, values[f.name])
        elif f.name == "redis_url" and REDIS_URL_VARIABLE in env:
            values[f.name] = env[REDIS_URL_VARIABLE]
    nested: set[str] = {"engine"} if group is WorkerSettings else set()
    known = {prefix + f.name.upper() for f in fields(group) if f.name not in nested}
    for variable in env:
        if variable.startswith(prefix) and variable not in known:
            raise ConfigurationError(f"{variable}: no such setting")
    return group(**values)


def _check_range(variable: str, name: str, value: Any) -> None:
    if value is None:
        return
    if name in _AT_LEAST_ONE and value < 1:
        raise ConfigurationError(f"{variable}: must be at least 1")
    if name in _MORE_THAN_ZERO and value <= 0:
        raise ConfigurationError(f"{variable}: must be more than 0")
    if name in _MOST and value > _MOST[name]:
        raise ConfigurationError(f"{variable}: must be at most {_MOST[name]}")


def _parse(variable: str, text: str, hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        if text == "":
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    try:
        value = hint(text)
    except ValueError:
        raise ConfigurationError(f"{variable}: {text!r} is not a valid {hint.__name__}") from None
    if isinstance(value, (int, float)) and (not math.isfinite(value) or value < 0):
        raise ConfigurationError(f"{variable}: {text!r} must be a finite number, 0 or more")
    return value


def external_redis_url() -> str | None:
    """The operator's own Redis, if FOREBAY_REDIS_URL names one."""
    return os.environ.get(REDIS_URL_VARIABLE) or None


def cache_dir() -> Path:
    """Where fetched models lie: FOREBAY_CACHE_DIR, else the user's cache folder."""
    return _folder("FOREBAY_CACHE_DIR", "XDG_CACHE_HOME", ".cache")


def state_dir() -> Path:
    """Where a local platform keeps logs and process ids: FOREBAY_STATE_DIR, else the user's."""
    return _folder("FOREBAY_STATE_DIR", "XDG_STATE_HOME", ".local/state")


def _folder(own: str, xdg: str, under_home: str) -> Path:
    """As everywhere in a shell, an empty variable is one that is not set."""
    try:
        if chosen := os.environ.get(own):
            return Path(chosen).expanduser().resolve()
        base = os.environ.get(xdg)
        return (Path(base) if base else Path.home() / under_home) / "forebay"
    except RuntimeError as error:
        raise ConfigurationError(f"{own}: {error}") from error
