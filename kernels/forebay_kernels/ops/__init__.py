"""The operations as the engine calls them. Each is `torch.ops.forebay.<name>` too."""

from forebay_kernels.ops.activation import silu_and_mul, silu_and_mul_quant
from forebay_kernels.ops.attention import merge_lse
from forebay_kernels.ops.kv import KV_CODECS, KV_GROUP, kv_pack, kv_unpack, payload_bytes
from forebay_kernels.ops.mla import mla_post
from forebay_kernels.ops.moe import moe_align, moe_permute, moe_route, moe_unpermute
from forebay_kernels.ops.norm import add_rms_norm, add_rms_norm_quant, rms_norm
from forebay_kernels.ops.qkv import qkv_post
from forebay_kernels.ops.sampling import sample
from forebay_kernels.plans import DecodePlan, PrefillPlan
from forebay_kernels.reference import paged_decode, paged_prefill

__all__ = [
    "KV_CODECS",
    "KV_GROUP",
    "DecodePlan",
    "PrefillPlan",
    "add_rms_norm",
    "add_rms_norm_quant",
    "kv_pack",
    "kv_unpack",
    "merge_lse",
    "mla_post",
    "moe_align",
    "moe_permute",
    "moe_route",
    "moe_unpermute",
    "paged_decode",
    "paged_prefill",
    "payload_bytes",
    "qkv_post",
    "rms_norm",
    "sample",
    "silu_and_mul",
    "silu_and_mul_quant",
]
