"""The operations in plain torch, for every device and dtype: what kernels are compared with, and
what computes where there are none."""

from forebay_kernels.reference.activation import silu_and_mul, silu_and_mul_quant
from forebay_kernels.reference.attention import merge_lse, paged_decode, paged_prefill
from forebay_kernels.reference.checksum import crc32c
from forebay_kernels.reference.fp8 import dequantise_groups, quantise_groups
from forebay_kernels.reference.kv import pack_kv, unpack_kv
from forebay_kernels.reference.moe import (
    moe_align,
    moe_permute,
    moe_route,
    moe_unpermute,
    num_slots,
)
from forebay_kernels.reference.norm import add_rms_norm, add_rms_norm_quant, rms_norm
from forebay_kernels.reference.qkv import mla_post, qkv_post
from forebay_kernels.reference.sampling import sample

__all__ = [
    "add_rms_norm",
    "add_rms_norm_quant",
    "crc32c",
    "dequantise_groups",
    "merge_lse",
    "mla_post",
    "moe_align",
    "moe_permute",
    "moe_route",
    "moe_unpermute",
    "num_slots",
    "pack_kv",
    "paged_decode",
    "paged_prefill",
    "qkv_post",
    "quantise_groups",
    "rms_norm",
    "sample",
    "silu_and_mul",
    "silu_and_mul_quant",
    "unpack_kv",
]
