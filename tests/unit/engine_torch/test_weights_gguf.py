from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_models import (
    GREEDY,
    Stream,
    load_tiny,
    random_tokens,
    reference_logits,
    save_tiny_llama,
    step_logits,
)
from transformers import LlamaForCausalLM

from forebay.core.errors import ModelFileError
from forebay.engine.weights.from_gguf import (
    GgufSource,
    canonical_name,
    gguf_config,
    gguf_name,
    gguf_revision,
    open_gguf,
    undo_permutation,
)

VOCAB_SIZE = 97
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
Arrays = dict[str, np.ndarray[Any, np.dtype[np.float32]]]
Quant = gguf.GGMLQuantizationType


def permuted(array: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to q and k."""
    halves = array.reshape(num_heads, 2, len(array) // num_heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def to_gguf_arrays(model: LlamaForCausalLM) -> Arrays:
    arrays: Arrays = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        for part, heads in (
            ("q_proj", model.config.num_attention_heads),
            ("k_proj", model.config.num_key_value_heads),
        ):
            if part in name:
                array = permuted(array, heads)
        arrays[gguf_name(name)] = array
    return arrays


def write_gguf(
    path: Path,
    arrays: Arrays,
    *,
    quant: Quant = Quant.F32,
    architecture: str = "llama",
    num_kv_heads: int = 2,
    vocab_size: int = VOCAB_SIZE,
) -> None:
    """Matrices in `quant`, vectors in fp32, as converters do it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(3)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    alphabet = sorted(chr(c) for c in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144)])
    writer.add_token_list([*alphabet[: vocab_size - 1], '!"'])
    writer.add_token_types([1] * vocab_size)
    writer.add_token_merges(['! "'])
    writer.add_eos_token_id(2)
    for name, array in arrays.items():
        if array.ndim == 1 or quant == Quant.F32:
            writer.add_tensor(name, np.ascontiguousarray(array))
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return save_tiny_llama(tmp_path_factory.mktemp("gguf-reference"), **SIZES)


@pytest.fixture
def arrays(model: LlamaForCausalLM) -> Arrays:
    return to_gguf_arrays(model)


def source(path: Path) -> GgufSource:
    reader = open_gguf(path)
    return GgufSource(path, reader, gguf_config(path, reader))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4},
    ],
)
def test_logits_equal_transformers_from_gguf(tmp_path: Path, overrides: dict[str, Any]) -> None:
    model = save_tiny_llama(tmp_path, **SIZES | overrides)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, to_gguf_arrays(model), num_kv_heads=model.config.num_key_value_heads)
    tokens = random_tokens(40, seed=3)
    (logits,) = step_logits(load_tiny(path), Stream(tokens, [4, 0, 2], GREEDY).next())
    torch.testing.assert_close(logits, reference_logits(model, tokens)[-1], rtol=1e-4, atol=1e-4)


def test_a_source_undoes_the_permutation_exactly(
    tmp_path: Path, model: LlamaForCausalLM, arrays: Arrays
) -> None:
    write_gguf(tmp_path / "m.gguf", arrays)
    tensors = source(tmp_path / "m.gguf")
    for name, expected in model.state_dict().items():
        assert torch.equal(tensors.read(name), expected)
        assert tensors.shapes[name] == tuple(expected.shape)


@pytest.mark.parametrize(
    ("quant", "tolerance"),
    [
        (Quant.F16, 1e-3),
        (Quant.BF16, 1e-2),
        (Quant.Q8_0, 1e-2),
        (Quant.Q5_1, 0.1),
        (Quant.Q4_0, 0.2),
        (Quant.Q4_1, 0.2),
    ],
)
def test_quantised_tensors_come_back_close(
    tmp_path: Path, model: LlamaForCausalLM, arrays: Arrays, quant: Quant, tolerance: float
) -> None:
    write_gguf(tmp_path / "m.gguf", arrays, quant=quant)
    tensors = source(tmp_path / "m.gguf")
    for name, expected in model.state_dict().items():
        assert (tensors.read(name) - expected).abs().max() < tolerance


@pytest.mark.parametrize("shape", [(8, 5), (8,), (24, 3)])
def test_undo_permutation(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    stored = torch.from_numpy(np.ascontiguousarray(permuted(array, 2)))
    assert torch.equal(undo_permutation(stored, 2), torch.from_numpy(array))


def test_names_go_both_ways() -> None:
    for name in ("blk.12.attn_output.bias", "token_embd.weight", "blk.0.ffn_norm.weight"):
        assert gguf_name(canonical_name(name)) == name != canonical_name(name)
    assert canonical_name("blk.0.ssm_a.weight") == "blk.0.ssm_a.weight"


def test_rope_factors_are_read_and_are_no_weight(tmp_path: Path, arrays: Arrays) -> None:
    factors = np.arange(1, 9, dtype=np.float32)
    write_gguf(tmp_path / "m.gguf", arrays | {"rope_freqs.weight": factors})
    runner = load_tiny(tmp_path / "m.gguf")
    frequencies = runner._network._inverse_frequencies
    assert frequencies[0] == 1.0
    assert float(frequencies[1]) == pytest.approx(10000.0 ** (-2 / 16) / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("blk.1.ffn_up.weight"), r"missing tensors: blk\.1\.ffn_up\.weight"),
        (lambda a: a.update(odd=np.zeros(4, np.float32)), "unexpected tensors: odd"),
        (
            lambda a: a.update({"blk.3.attn_norm.weight": np.zeros(64, np.float32)}),
            r"unexpected tensors: blk\.3\.attn_norm\.weight",
        ),
        (
            lambda a: a.update({"output_norm.weight": np.zeros(32, np.float32)}),
            r"output_norm\.weight has shape \[32\], not \[64\]",
        ),
        (
            lambda a: a.update({"output_norm.weight": np.zeros(64, np.int32)}),
            r"output_norm\.weight: I32 is not supported",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, arrays: Arrays, change: Callable[[Arrays], Any], message: str
) -> None:
    change(arrays)
    write_gguf(tmp_path / "m.gguf", arrays)
    with pytest.raises(ModelFileError, match=message) as error:
        load_tiny(tmp_path / "m.gguf")
    assert str(tmp_path / "m.gguf") in error.value.message


def test_another_architecture(tmp_path: Path, arrays: Arrays) -> None:
    write_gguf(tmp_path / "m.gguf", arrays, architecture="mamba")
    with pytest.raises(ModelFileError, match=r"m\.gguf: architecture 'mamba'"):
        load_tiny(tmp_path / "m.gguf")


def test_a_file_cut_anywhere(tmp_path: Path, arrays: Arrays) -> None:
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, arrays)
    content = whole.read_bytes()
    cut = tmp_path / "cut.gguf"
    for keep in [0, 3, 4, 20, 30, 200, 700, 1500, *range(2000, len(content), 20_011)]:
        cut.write_bytes(content[:keep])
        with pytest.raises(ModelFileError, match=r"cut\.gguf: not a whole GGUF file"):
            open_gguf(cut)
    cut.write_bytes(content[:-1])
    with pytest.raises(ModelFileError, match=r"cut\.gguf: not a whole GGUF file"):
        open_gguf(cut)


def test_metadata_that_is_not_utf8(tmp_path: Path, arrays: Arrays) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, arrays)
    path.write_bytes(path.read_bytes().replace(b"llama", b"ll\xffma", 1))
    with pytest.raises(ModelFileError, match=r"m\.gguf: metadata that is not UTF-8"):
        load_tiny(path)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "notes.gguf"
    path.write_text("these are notes, and not a model at all")
    with pytest.raises(ModelFileError, match="not a whole GGUF file"):
        load_tiny(path)


def test_a_path_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=re.escape(str(tmp_path))):
        open_gguf(tmp_path)


def test_the_revision_is_the_files_sha256(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert gguf_revision(path).startswith("ba7816bf8f01cfea414140de5dae2223")
