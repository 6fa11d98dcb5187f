"""The operations in plain torch, for every device and dtype: what kernels are compared with, and
what computes where there are none."""

from forebay_kernels.reference.attention import (
    append_kv,
    paged_decode,
    paged_prefill,
    rotary_embedding,
    silu_and_mul,
)
from forebay_kernels.reference.checksum import crc32c
from forebay_kernels.reference.fp8 import dequantise_groups, quantise_groups
from forebay_kernels.reference.kv import pack_kv, unpack_kv
from forebay_kernels.reference.norm import add_rms_norm, add_rms_norm_quant, rms_norm

__all__ = [
    "add_rms_norm",
    "add_rms_norm_quant",
    "append_kv",
    "crc32c",
    "dequantise_groups",
    "pack_kv",
    "paged_decode",
    "paged_prefill",
    "quantise_groups",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
    "unpack_kv",
]
