"""From settings to a runner; the only place that decides whether torch is needed."""

from __future__ import annotations

from pathlib import Path

from forebay.core.errors import ConfigurationError
from forebay.core.settings import MIB, EngineSettings, cache_dir
from forebay.engine.interface import Runner
from forebay.engine.profile import LLAMA2_70B_H100_TP8
from forebay.engine.sim import DIGEST_BYTES, NUM_LAYERS, SimRunner

SIM_MAX_MODEL_LEN = 32_768


def load_runner(settings: EngineSettings) -> Runner:
    """Takes seconds for a real model. Raises ConfigurationError, ModelFileError."""
    if settings.engine == "sim":
        return _sim_runner(settings)
    if settings.engine != "torch":
        raise ConfigurationError(f"engine: {settings.engine!r} is neither torch nor sim")
    # Here, to keep torch out of sim processes.
    from forebay.engine.torch_runner import load_torch_runner
    from forebay_kernels.native import libraries

    libraries.keep_in(cache_dir() / "kernels")
    runner = load_torch_runner(
        Path(settings.model_path),
        model_id=settings.model_id,
        dtype=settings.dtype,
        num_blocks=settings.num_blocks,
        kv_memory_bytes=settings.kv_memory_mib * MIB,
        block_size=settings.block_size,
        max_model_len=settings.max_model_len,
        device=settings.device,
        num_threads=settings.num_threads,
    )
    libraries.of(settings.device.partition(":")[0])  # compiled now, not while a request waits
    return runner


def _sim_runner(settings: EngineSettings) -> SimRunner:
    block_bytes = NUM_LAYERS * DIGEST_BYTES * settings.block_size
    return SimRunner(
        model_id=settings.model_id,
        block_size=settings.block_size,
        num_blocks=settings.num_blocks or max(1, 16 * MIB // block_bytes),
        max_model_len=settings.max_model_len or SIM_MAX_MODEL_LEN,
        profile=LLAMA2_70B_H100_TP8,
        time_scale=settings.sim_time_scale,
        mean_output_tokens=settings.sim_mean_output_tokens,
        crash_text=settings.sim_crash_text.encode(),
    )
