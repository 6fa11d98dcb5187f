"""The operations as the engine calls them. Each is `torch.ops.forebay.<name>` too."""

from forebay_kernels.ops.activation import silu_and_mul, silu_and_mul_quant
from forebay_kernels.ops.kv import KV_CODECS, KV_GROUP, kv_pack, kv_unpack, payload_bytes
from forebay_kernels.ops.moe import moe_align, moe_permute, moe_route, moe_unpermute
from forebay_kernels.ops.norm import add_rms_norm, add_rms_norm_quant, rms_norm
from forebay_kernels.plans import DecodePlan, PrefillPlan
from forebay_kernels.reference import (
    append_kv,
    paged_decode,
    paged_prefill,
    rotary_embedding,
)

__all__ = [
    "KV_CODECS",
    "KV_GROUP",
    "DecodePlan",
    "PrefillPlan",
    "add_rms_norm",
    "add_rms_norm_quant",
    "append_kv",
    "kv_pack",
    "kv_unpack",
    "moe_align",
    "moe_permute",
    "moe_route",
    "moe_unpermute",
    "paged_decode",
    "paged_prefill",
    "payload_bytes",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
    "silu_and_mul_quant",
]
