"""How KV is written down on its way to another worker."""

from __future__ import annotations

from enum import StrEnum


class KvCodec(StrEnum):
    RAW = "raw"
    """The values as they are."""
    FP8 = "fp8"
    """e4m3 codes with a scale for each 128 values: half the bytes of bf16, and less precise."""
