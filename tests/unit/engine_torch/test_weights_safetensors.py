from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Stream as Sequence
from tiny_models import load_tiny, random_tokens, save_tiny_llama, step_logits

from forebay.core.errors import ModelFileError
from forebay.engine.weights.checkpoint import open_checkpoint
from forebay.engine.weights.from_safetensors import SafetensorsSource, safetensors_revision

Tensors = dict[str, torch.Tensor]
WEIGHTS = "model.safetensors"


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def logits(folder: Path) -> torch.Tensor:
    return step_logits(load_tiny(folder), Sequence(random_tokens(9, seed=1), [0]).next())[0]


def test_shards_equal_one_file(tmp_path: Path) -> None:
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    save_tiny_llama(whole)
    save_tiny_llama(sharded, shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(logits(whole), logits(sharded))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_are_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    save_tiny_llama(tmp_path)
    expected = logits(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    assert (logits(tmp_path) - expected).abs().max() < 0.5


def test_a_tied_copy_and_computed_buffers_are_left_alone(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, tie_word_embeddings=True)
    expected = logits(tmp_path)

    def add(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = torch.zeros(97, 32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    rewrite(tmp_path, add)
    assert torch.equal(logits(tmp_path), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing tensors: model\.norm\.weight"),
        (lambda t: t.update(extra=torch.zeros(3)), "unexpected tensors: extra"),
        (
            lambda t: t.update({f"e{i}": torch.zeros(1) for i in range(9)}),
            "e0, e1, e2, e3, e4 and 4 more",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(31)}),
            r"model\.norm\.weight has shape \[31\], not \[32\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}),
            r"model\.norm\.weight: I8 is not supported",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    save_tiny_llama(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ModelFileError, match=message) as error:
        load_tiny(tmp_path)
    assert str(tmp_path) in error.value.message


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_cut_file(tmp_path: Path, keep: int) -> None:
    save_tiny_llama(tmp_path)
    weights = tmp_path / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelFileError, match=r"model\.safetensors: not a whole"):
        load_tiny(tmp_path)


def test_pickles_are_refused_by_name(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match=r"pytorch_model\.bin is a pickle"):
        load_tiny(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ModelFileError, match="has neither"):
        load_tiny(tmp_path)


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    with pytest.raises(ModelFileError, match="no such model"):
        load_tiny(tmp_path / "nothing")
    with pytest.raises(ModelFileError, match="name the folder"):
        load_tiny(tmp_path / WEIGHTS)


def test_a_missing_shard_and_a_lying_index(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(ModelFileError, match="ghost is in none of the shards"):
        load_tiny(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelFileError, match=f"{shard.name}: this shard is missing"):
        load_tiny(tmp_path)


def test_two_shards_with_one_tensor(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, shard_size="20KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(ModelFileError, match="in another shard too"):
        load_tiny(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "model.bin"])
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    save_tiny_llama(tmp_path, shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ModelFileError, match="is not a shard beside the index"):
        load_tiny(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    save_tiny_llama(tmp_path, shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelFileError, match=r"index\.json"):
        load_tiny(tmp_path)


def test_the_revision_follows_weights_and_config(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    first = safetensors_revision(tmp_path)
    assert first == safetensors_revision(tmp_path) == open_checkpoint(tmp_path).revision
    rewrite(tmp_path, lambda tensors: tensors["model.norm.weight"].add_(1))
    second = safetensors_revision(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert len({first, second, safetensors_revision(tmp_path)}) == 3


def test_a_source_reads_what_was_saved(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path)
    source = SafetensorsSource(tmp_path, tied=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(source.read(name), tensor)
        assert source.shapes[name] == tuple(tensor.shape)
