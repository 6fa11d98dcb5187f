"""A run's results as one JSON object."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence

from forebay_loadtest.streams import StreamResult


def summarise(results: Sequence[StreamResult], wall_s: float) -> dict[str, object]:
    """Figures of a run that took `wall_s` seconds; times in seconds."""
    complete = [result for result in results if not result.error]
    return {
        "num_streams": len(results),
        "num_complete": len(complete),
        "errors": sorted({result.error for result in results if result.error}),
        "usage_adds_up": all(
            result.prompt_tokens + result.completion_tokens == result.total_tokens
            for result in complete
        ),
        "prompt_tokens": sum(result.prompt_tokens for result in complete),
        "completion_tokens": sum(result.completion_tokens for result in complete),
        "ttft_s": _quantiles([result.ttft_s for result in complete if result.num_chunks]),
        "total_s": _quantiles([result.total_s for result in complete]),
        "wall_s": round(wall_s, 3),
        "completion_tokens_per_s": round(
            sum(result.completion_tokens for result in complete) / wall_s, 1
        ),
    }


def environment() -> dict[str, object]:
    """Commit, versions and machine. The generator shares the machine's cores with the platform."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "openai": importlib.metadata.version("openai"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {"p50": round(values[0], 3), "max": round(values[0], 3)} if values else {}
    return {"p50": round(statistics.median(values), 3), "max": round(max(values), 3)}
