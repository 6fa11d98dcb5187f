"""Folders of safetensors with a config.json, as Hugging Face lays them out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from forebay.core.errors import ModelFileError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_TIED_COPY = "lm_head.weight"
_COMPUTED_SUFFIX = ".rotary_emb.inv_freq"
_SAMPLED_BYTES = 4096


class SafetensorsSource:
    """TensorSource over one file or over the shards that the index names. Raises ModelFileError.

    tied: the output projection is the embedding, so that a stored copy of it is left alone.
    """

    def __init__(self, folder: Path, *, tied: bool) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in checkpoint_files(folder):
            self._open(path, tied)
        self._check_index()

    @property
    def path(self) -> Path:
        return self._folder

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def file_name(self, name: str) -> str:
        return name

    def read(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._files[name].get_tensor(name)
        except SafetensorError as error:
            raise ModelFileError(f"{self._folder}: tensor {name}: {error}") from error
        return tensor

    def _open(self, path: Path, tied: bool) -> None:
        try:
            file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelFileError(f"{path}: not a whole safetensors file: {error}") from error
        for name in file.keys():  # noqa: SIM118 - not a mapping
            if name.endswith(_COMPUTED_SUFFIX) or (tied and name == _TIED_COPY):
                continue
            if name in self._files:
                raise ModelFileError(f"{path}: tensor {name} is in another shard too")
            view = file.get_slice(name)
            if view.get_dtype() not in _DTYPES:
                raise ModelFileError(f"{path}: tensor {name}: {view.get_dtype()} is not supported")
            self._files[name] = file
            self._shapes[name] = tuple(view.get_shape())

    def _check_index(self) -> None:
        """A shard that was swapped for another one of the same name shows here."""
        index = self._folder / _INDEX
        if (self._folder / _SINGLE).exists() or not index.exists():
            return
        for name in _weight_map(index):
            ignored = name.endswith(_COMPUTED_SUFFIX) or name == _TIED_COPY
            if name not in self._files and not ignored:
                raise ModelFileError(f"{index}: tensor {name} is in none of the shards")


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, sorted. Raises ModelFileError."""
    single = folder / _SINGLE
    if single.exists():
        return [single]
    index = folder / _INDEX
    if index.exists():
        names = sorted(set(_weight_map(index).values()))
        paths = [folder / name for name in names]
        for path in paths:
            if path.parent != folder or path.suffix != ".safetensors":
                raise ModelFileError(f"{index}: {path.name} is not a shard beside the index")
            if not path.exists():
                raise ModelFileError(f"{path}: this shard is missing")
        return paths
    pickled = sorted(
        path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)
    )
    if pickled:
        raise ModelFileError(
            f"{folder}: {pickled[0]} is a pickle, which is never loaded; convert to safetensors"
        )
    raise ModelFileError(f"{folder}: has neither {_SINGLE} nor {_INDEX}")


def safetensors_revision(folder: Path) -> str:
    """sha256 over config.json and, of each file, its size, its header (names, shapes, dtypes) and
    the first 4 KiB of every tensor: tells fine-tuned weights of one shape apart without reading
    all of them. Hexadecimal. Raises ModelFileError."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in checkpoint_files(folder):
        try:
            _digest_file(digest, path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelFileError(f"{path}: not a whole safetensors file: {error}") from error
    return digest.hexdigest()


def _digest_file(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        if header_length > size:
            raise ValueError("the header is longer than the file")
        header = file.read(header_length)
        digest.update(size.to_bytes(8, "little") + header)
        entries = {
            name: entry for name, entry in json.loads(header).items() if name != "__metadata__"
        }
        for name in sorted(entries):
            begin, end = entries[name]["data_offsets"]
            file.seek(8 + header_length + begin)
            digest.update(file.read(min(end - begin, _SAMPLED_BYTES)))


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, of an index file."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{index}: cannot be read as an index: {error}") from error
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise ModelFileError(f"{index}: weight_map is not an object of file names")
    return weight_map
