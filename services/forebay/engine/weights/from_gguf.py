"""GGUF files of the llama architecture, dequantised tensor by tensor."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from forebay.core.errors import ModelFileError
from forebay.engine.config import ModelConfig

_TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"
_PERMUTED = re.compile(r"\.self_attn\.([qk])_proj\.")


def open_gguf(path: Path) -> gguf.GGUFReader:
    """Maps the file. Raises ModelFileError when it is no GGUF, cut short or big endian."""
    try:
        reader = gguf.GGUFReader(path)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ModelFileError(f"{path}: not a whole GGUF file") from error
    if reader.byte_order != "I":
        raise ModelFileError(f"{path}: big-endian GGUF is not supported")
    return reader


def gguf_revision(path: Path) -> str:
    """sha256 of the file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def gguf_config(path: Path, reader: gguf.GGUFReader) -> ModelConfig:
    """Raises ModelFileError for what ModelConfig.from_gguf refuses."""
    metadata: dict[str, Any] = {
        name: field.contents()
        for name, field in reader.fields.items()
        if name.startswith(("general.architecture", "llama.")) or name.endswith("_token_id")
    }
    shapes = {tensor.name: _shape(tensor) for tensor in reader.tensors}
    factors = [tensor for tensor in reader.tensors if tensor.name == _ROPE_FACTORS]
    rope_factors = tuple(_dequantised(path, factors[0]).tolist()) if factors else None
    return ModelConfig.from_gguf(path, metadata, shapes, rope_factors)


class GgufSource:
    """TensorSource over a mapped file. llama.cpp stores the rows of q and k of each head with
    rotary pairs side by side; here they come back in the half-and-half order."""

    def __init__(self, path: Path, reader: gguf.GGUFReader, config: ModelConfig) -> None:
        self._path = path
        self._num_heads = {"q": config.num_heads, "k": config.num_kv_heads}
        self._tensors = {
            canonical_name(tensor.name): tensor
            for tensor in reader.tensors
            if tensor.name != _ROPE_FACTORS
        }
        self._shapes = {name: _shape(tensor) for name, tensor in self._tensors.items()}

    @property
    def path(self) -> Path:
        return self._path

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def file_name(self, name: str) -> str:
        return gguf_name(name)

    def read(self, name: str) -> Tensor:
        values = _dequantised(self._path, self._tensors[name])
        permuted = _PERMUTED.search(name)
        return undo_permutation(values, self._num_heads[permuted[1]]) if permuted else values


def undo_permutation(values: Tensor, num_heads: int) -> Tensor:
    """[heads * D, ...] rows of a head from (0, D/2, 1, D/2 + 1, ...) to (0, 1, 2, ...)."""
    rows, *rest = values.shape
    pairs = values.reshape(num_heads, rows // num_heads // 2, 2, *rest)
    return pairs.transpose(1, 2).reshape(rows, *rest)


def canonical_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; a name unknown to us stays as it is."""
    match = _LAYER_TENSOR.fullmatch(name)
    if match and match[2] in _IN_LAYER:
        return f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"
    return _TOP_LEVEL.get(name, name)


def gguf_name(name: str) -> str:
    """The inverse of canonical_name."""
    for ours, theirs in _TOP_LEVEL.items():
        if name == theirs:
            return ours
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match:
        for ours, theirs in _IN_LAYER.items():
            if match[2] == theirs:
                return f"blk.{match[1]}.{ours}.{match[3]}"
    return name


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    """GGUF writes the innermost dimension first."""
    return tuple(int(size) for size in reversed(tensor.shape.tolist()))


def _dequantised(path: Path, tensor: gguf.ReaderTensor) -> Tensor:
    try:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ModelFileError(
            f"{path}: tensor {tensor.name}: {tensor.tensor_type.name} is not supported"
        ) from error
    return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(_shape(tensor))
