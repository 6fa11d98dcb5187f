"""A model on disk, opened: its shape, its tensors, its tokenizer and what identifies it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from forebay.core.errors import ModelFileError
from forebay.engine.config import ModelConfig
from forebay.engine.weights.from_gguf import GgufSource, gguf_config, gguf_revision, open_gguf
from forebay.engine.weights.from_safetensors import SafetensorsSource, safetensors_revision
from forebay.engine.weights.source import TensorSource
from forebay.text.gguf_tokenizer import spec_from_gguf_reader
from forebay.text.hf_tokenizer import spec_from_folder
from forebay.text.spec import TokenizerSpec


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`revision`: hexadecimal hash that tells this checkpoint's weights from any other's."""

    config: ModelConfig
    source: TensorSource
    tokenizer: TokenizerSpec
    revision: str


def open_checkpoint(path: Path) -> Checkpoint:
    """A GGUF file or a folder with safetensors; weights are not read yet. Raises ModelFileError."""
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise ModelFileError(f"{path}: no such model file or folder")
    if path.suffix == ".safetensors":
        raise ModelFileError(f"{path}: name the folder, not the file: config.json is needed too")
    reader = open_gguf(path)
    try:
        config = gguf_config(path, reader)
        tokenizer = spec_from_gguf_reader(reader)
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path}: metadata that is not UTF-8: {error}") from error
    return Checkpoint(config, GgufSource(path, reader, config), tokenizer, gguf_revision(path))


def _open_folder(folder: Path) -> Checkpoint:
    config = ModelConfig.from_hf(folder)
    return Checkpoint(
        config,
        SafetensorsSource(folder, tied=config.tie_embeddings),
        spec_from_folder(folder),
        safetensors_revision(folder),
    )
