"""The operations as the engine calls them; each is the implementation in use."""

from __future__ import annotations

from forebay_kernels.plans import DecodePlan, PrefillPlan
from forebay_kernels.reference import (
    add_rms_norm,
    append_kv,
    paged_decode,
    paged_prefill,
    rms_norm,
    rotary_embedding,
    silu_and_mul,
)

__all__ = [
    "DecodePlan",
    "PrefillPlan",
    "add_rms_norm",
    "append_kv",
    "paged_decode",
    "paged_prefill",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
]
