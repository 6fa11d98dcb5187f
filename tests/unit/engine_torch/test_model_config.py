from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ROPE_LLAMA3
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from forebay.core.errors import ModelFileError
from forebay.engine.config import FactorScaling, LinearScaling, Llama3Scaling, ModelConfig
from forebay.engine.models.rope import inverse_frequencies

HF: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 256,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.eos_token_id": 2,
}
SHAPES: dict[str, tuple[int, ...]] = {"token_embd.weight": (100, 64)}


def from_hf(folder: Path, generation: Any = None, **overrides: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(HF | overrides))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_hf(folder)


def from_gguf(
    shapes: dict[str, tuple[int, ...]] | None = None,
    rope_factors: tuple[float, ...] | None = None,
    **overrides: Any,
) -> ModelConfig:
    metadata = GGUF | {key.replace("__", "."): value for key, value in overrides.items()}
    return ModelConfig.from_gguf(Path("m.gguf"), metadata, SHAPES | (shapes or {}), rope_factors)


def test_defaults_of_an_old_config_json(tmp_path: Path) -> None:
    config = from_hf(tmp_path, num_key_value_heads=None, eos_token_id=None)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (4, 16, 10000.0)
    assert config.rope_scaling is None and config.eos_token_ids == ()
    assert not (config.tie_embeddings or config.attention_bias or config.mlp_bias)


def test_both_formats_give_the_same_config(tmp_path: Path) -> None:
    assert from_hf(tmp_path, tie_word_embeddings=True) == from_gguf()
    untied = from_gguf({"output.weight": (100, 64), "blk.0.attn_q.bias": (64,)})
    assert untied == from_hf(tmp_path, tie_word_embeddings=False, attention_bias=True)


def test_kv_values_per_token() -> None:
    assert from_gguf().kv_values_per_token == 2 * 2 * 2 * 16


def test_mistral_is_llama_without_a_window(tmp_path: Path) -> None:
    from_hf(tmp_path, architectures=["MistralForCausalLM"], sliding_window=None)
    with pytest.raises(ModelFileError, match="sliding-window"):
        from_hf(tmp_path, architectures=["MistralForCausalLM"], sliding_window=4096)


def test_end_tokens_of_config_and_generation_config(tmp_path: Path) -> None:
    config = from_hf(tmp_path, {"eos_token_id": [9, 2, 7]}, eos_token_id=2)
    assert config.eos_token_ids == (2, 9, 7)


def test_end_tokens_of_gguf() -> None:
    assert from_gguf(tokenizer__ggml__eot_token_id=7).eos_token_ids == (2, 7)


def test_rope_of_either_spelling(tmp_path: Path) -> None:
    expected = Llama3Scaling(8.0, 1.0, 4.0, 32)
    new = from_hf(tmp_path, rope_parameters=ROPE_LLAMA3)
    old = from_hf(tmp_path, rope_theta=10000.0, rope_scaling=ROPE_LLAMA3 | {"rope_theta": None})
    assert new == old and new.rope_scaling == expected
    linear = from_hf(tmp_path, rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=7.0)
    assert (linear.rope_scaling, linear.rope_theta) == (LinearScaling(2.0), 7.0)


def test_rope_of_gguf() -> None:
    linear = from_gguf(llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0)
    assert linear.rope_scaling == LinearScaling(4.0)
    factors = tuple(float(i + 1) for i in range(8))
    assert from_gguf(rope_factors=factors).rope_scaling == FactorScaling(factors)
    assert from_gguf(llama__rope__freq_base=1e5).rope_theta == 1e5


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        ROPE_LLAMA3,
        ROPE_LLAMA3 | {"original_max_position_embeddings": 8192, "rope_theta": 5e5},
    ],
)
def test_frequencies_equal_transformers(tmp_path: Path, rope: dict[str, Any]) -> None:
    config = from_hf(tmp_path, rope_parameters=rope, head_dim=64)
    reference = LlamaRotaryEmbedding(LlamaConfig(rope_parameters=rope, head_dim=64))
    torch.testing.assert_close(inverse_frequencies(config), reference.inv_freq, rtol=1e-6, atol=0)


def test_frequency_factors_divide() -> None:
    factors = tuple(float(i + 1) for i in range(8))
    plain, scaled = inverse_frequencies(from_gguf()), from_gguf(rope_factors=factors)
    assert torch.equal(inverse_frequencies(scaled), plain / torch.arange(1.0, 9.0))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
        ({"architectures": None}, "architecture missing"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, not None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": "100"}, "vocab_size"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"num_key_value_heads": 3}, "4 heads do not divide by 3"),
        ({"head_dim": 15}, "odd head dimension"),
        ({"eos_token_id": 100}, "end token 100"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": "linear"}, "object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial rotary"),
    ],
)
def test_a_config_json_that_cannot_be_computed(
    tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelFileError, match=message) as error:
        from_hf(tmp_path, **overrides)
    assert str(tmp_path / "config.json") in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.parametrize("content", [None, "{", "[]", "\xff"])
def test_a_config_json_that_is_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelFileError, match=r"config\.json"):
        ModelConfig.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"general__architecture": "qwen2"}, "architecture 'qwen2'"),
        ({"general__architecture": None}, "architecture None"),
        ({"llama__expert_count": 8}, "mixture-of-experts"),
        ({"llama__attention__sliding_window": 4096}, "sliding-window"),
        ({"llama__block_count": None}, r"llama\.block_count"),
        ({"llama__attention__head_count": [4, 4]}, "head_count"),
        ({"llama__attention__value_length": 8}, "value_length"),
        ({"llama__rope__dimension_count": 8}, "dimension_count"),
        ({"llama__rope__scaling__type": "yarn"}, "rope scaling 'yarn'"),
        ({"llama__rope__scale_linear": 2.0}, "scale_linear"),
        ({"rope_factors": (1.0,) * 7}, "7 rope factors"),
        (
            {
                "rope_factors": (1.0,) * 8,
                "llama__rope__scaling__type": "linear",
                "llama__rope__scaling__factor": 2.0,
            },
            "together",
        ),
    ],
)
def test_gguf_metadata_that_cannot_be_computed(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as error:
        from_gguf(**overrides)
    assert error.value.message.startswith("m.gguf: ")


def test_gguf_without_an_embedding() -> None:
    with pytest.raises(ModelFileError, match="token_embd"):
        ModelConfig.from_gguf(Path("m.gguf"), GGUF, {}, None)
