"""The operations as the engine calls them. Each is `torch.ops.forebay.<name>` too."""

from forebay_kernels.ops.kv import kv_pack, kv_unpack, payload_bytes
from forebay_kernels.ops.norm import add_rms_norm, add_rms_norm_quant, rms_norm
from forebay_kernels.plans import DecodePlan, PrefillPlan
from forebay_kernels.reference import (
    append_kv,
    paged_decode,
    paged_prefill,
    rotary_embedding,
    silu_and_mul,
)

__all__ = [
    "DecodePlan",
    "PrefillPlan",
    "add_rms_norm",
    "add_rms_norm_quant",
    "append_kv",
    "kv_pack",
    "kv_unpack",
    "paged_decode",
    "paged_prefill",
    "payload_bytes",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
]
