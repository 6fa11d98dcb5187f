"""What a worker does in the platform."""

from __future__ import annotations

from enum import StrEnum


class WorkerRole(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"
    """Computes prompts and decodes them itself; no KV moves."""
