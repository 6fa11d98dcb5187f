"""The shape of a model: everything that a forward pass needs to know besides the weights.

Read from GGUF metadata or from a Hugging Face config.json; whatever this engine cannot compute
exactly is a ModelFileError of one line that names the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebay.core.errors import ModelFileError

_HF_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
_GGUF_ARCHITECTURE = "llama"


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions are divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Low frequencies are divided by `factor`, high ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class FactorScaling:
    """One divisor per frequency (head_dim / 2): GGUF's `rope_freqs.weight`."""

    factors: tuple[float, ...]


RopeScaling = LinearScaling | Llama3Scaling | FactorScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """attention_bias: biases on q, k, v and the output projection; mlp_bias: on gate, up and down.
    eos_token_ids: the model's own end tokens, in the order the files name them."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position: int
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, folder: Path) -> ModelConfig:
        """Reads config.json and, where it exists, generation_config.json (end tokens only).
        Raises ModelFileError."""
        path = folder / "config.json"
        fields = _Fields(path, _read_json(path))
        architectures = fields.values.get("architectures") or []
        if not any(name in _HF_ARCHITECTURES for name in architectures):
            raise fields.error(
                f"architecture {', '.join(map(str, architectures)) or 'missing'} is not supported "
                f"(supported: {', '.join(_HF_ARCHITECTURES)})"
            )
        fields.require_absent("quantization_config", "quantised checkpoints are not supported")
        fields.require_absent("sliding_window", "sliding-window attention is not supported")
        if fields.values.get("hidden_act", "silu") != "silu":
            raise fields.error(f"hidden_act {fields.values['hidden_act']!r} is not supported")
        hidden_size = fields.integer("hidden_size")
        num_heads = fields.integer("num_attention_heads")
        max_position = fields.integer("max_position_embeddings")
        rope = _hf_rope(fields)
        return cls(
            num_layers=fields.integer("num_hidden_layers"),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=fields.integer("num_key_value_heads", num_heads),
            head_dim=fields.integer("head_dim", hidden_size // num_heads),
            vocab_size=fields.integer("vocab_size"),
            rms_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=rope.number("rope_theta", fields.number("rope_theta", 10000.0)),
            rope_scaling=_hf_rope_scaling(rope, max_position),
            max_position=max_position,
            tie_embeddings=fields.flag("tie_word_embeddings"),
            attention_bias=fields.flag("attention_bias"),
            mlp_bias=fields.flag("mlp_bias"),
            eos_token_ids=_hf_eos_token_ids(folder, fields),
        ).checked(path)

    @classmethod
    def from_gguf(
        cls,
        path: Path,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        rope_factors: tuple[float, ...] | None,
    ) -> ModelConfig:
        """metadata: the file's scalar fields; shapes: its tensors' shapes, outermost dimension
        first; rope_factors: values of `rope_freqs.weight` where the file has it.
        Raises ModelFileError."""
        fields = _Fields(path, metadata)
        architecture = metadata.get("general.architecture")
        if architecture != _GGUF_ARCHITECTURE:
            raise fields.error(
                f"architecture {architecture!r} is not supported (supported: {_GGUF_ARCHITECTURE})"
            )
        fields.require_absent("llama.expert_count", "mixture-of-experts models are not supported")
        fields.require_absent(
            "llama.attention.sliding_window", "sliding-window attention is not supported"
        )
        if "token_embd.weight" not in shapes:
            raise fields.error("tensor token_embd.weight is missing")
        hidden_size = fields.integer("llama.embedding_length")
        num_heads = fields.integer("llama.attention.head_count")
        head_dim = fields.integer("llama.attention.key_length", hidden_size // num_heads)
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if fields.integer(key, head_dim) != head_dim:
                raise fields.error(f"{key} other than the head dimension {head_dim}")
        return cls(
            num_layers=fields.integer("llama.block_count"),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("llama.feed_forward_length"),
            num_heads=num_heads,
            num_kv_heads=fields.integer("llama.attention.head_count_kv", num_heads),
            head_dim=head_dim,
            vocab_size=shapes["token_embd.weight"][0],
            rms_eps=fields.number("llama.attention.layer_norm_rms_epsilon"),
            rope_theta=fields.number("llama.rope.freq_base", 10000.0),
            rope_scaling=_gguf_rope_scaling(fields, rope_factors),
            max_position=fields.integer("llama.context_length"),
            tie_embeddings="output.weight" not in shapes,
            attention_bias="blk.0.attn_q.bias" in shapes,
            mlp_bias="blk.0.ffn_gate.bias" in shapes,
            eos_token_ids=_gguf_eos_token_ids(fields),
        ).checked(path)

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token leaves in the KV memory of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def checked(self, path: Path) -> ModelConfig:
        """Itself, or ModelFileError where its numbers cannot belong together."""
        if self.num_heads % self.num_kv_heads:
            raise ModelFileError(
                f"{path}: {self.num_heads} heads do not divide by {self.num_kv_heads} KV heads"
            )
        if self.head_dim % 2:
            raise ModelFileError(f"{path}: odd head dimension {self.head_dim}")
        scaling = self.rope_scaling
        if isinstance(scaling, FactorScaling) and len(scaling.factors) != self.head_dim // 2:
            raise ModelFileError(
                f"{path}: {len(scaling.factors)} rope factors for head dimension {self.head_dim}"
            )
        for token_id in self.eos_token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise ModelFileError(f"{path}: end token {token_id} is not in the vocabulary")
        return self


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed reading of a file's key-value fields; an absent one is None or missing."""

    path: Path
    values: Mapping[str, Any]

    def error(self, message: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {message}")

    def require_absent(self, key: str, message: str) -> None:
        if self.values.get(key):
            raise self.error(message)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(f"{key} must be a positive integer, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.error(f"{key} must be a positive number, not {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, not {value!r}")
        return bool(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
            raise self.error(f"{key} must be a token id or a list of them, not {value!r}")
        return tuple(ids)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: is not a JSON object")
    return value


def _hf_rope(fields: _Fields) -> _Fields:
    """transformers 5 writes `rope_parameters`, earlier ones `rope_scaling` beside `rope_theta`."""
    values = fields.values.get("rope_parameters") or fields.values.get("rope_scaling") or {}
    if not isinstance(values, dict):
        raise fields.error("rope parameters must be an object")
    return _Fields(fields.path, values)


def _hf_rope_scaling(rope: _Fields, max_position: int) -> RopeScaling | None:
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise rope.error("partial rotary embeddings are not supported")
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(rope.number("factor"))
    if kind == "llama3":
        return Llama3Scaling(
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position=rope.integer("original_max_position_embeddings", max_position),
        )
    raise rope.error(f"rope type {kind!r} is not supported (supported: default, linear, llama3)")


def _hf_eos_token_ids(folder: Path, fields: _Fields) -> tuple[int, ...]:
    ids = fields.token_ids("eos_token_id")
    generation_path = folder / "generation_config.json"
    if generation_path.exists():
        generation = _Fields(generation_path, _read_json(generation_path))
        ids += generation.token_ids("eos_token_id")
    return tuple(dict.fromkeys(ids))


def _gguf_rope_scaling(
    fields: _Fields, rope_factors: tuple[float, ...] | None
) -> RopeScaling | None:
    kind = fields.values.get("llama.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise fields.error(f"rope scaling {kind!r} is not supported (supported: none, linear)")
    fields.require_absent("llama.rope.scale_linear", "llama.rope.scale_linear is not supported")
    if kind == "linear":
        if rope_factors is not None:
            raise fields.error("linear rope scaling together with rope_freqs.weight")
        return LinearScaling(fields.number("llama.rope.scaling.factor"))
    return None if rope_factors is None else FactorScaling(rope_factors)


def _gguf_eos_token_ids(fields: _Fields) -> tuple[int, ...]:
    ids: tuple[int, ...] = ()
    for name in ("eos", "eot", "eom"):
        ids += fields.token_ids(f"tokenizer.ggml.{name}_token_id")
    return tuple(dict.fromkeys(ids))
