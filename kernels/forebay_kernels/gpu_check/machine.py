"""What the figures were measured on, and with what."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from forebay_kernels.build import VARIANTS, compiler_version, find_compiler

PACKAGE = Path(__file__).resolve().parents[1]
REPOSITORY = PACKAGE.parents[1]
_CHECKED = ("tests/gpu", "tests/unit/kernels")
_PEERS = ("flashinfer-python", "liger-kernel", "sgl-deep-gemm", "triton")


def source_hash() -> str:
    """Of the package and of the tests that a GPU runs."""
    files = [
        path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h")
    ]
    for folder in _CHECKED:
        files += (REPOSITORY / folder).glob("*.py")
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(REPOSITORY)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def driver_version(device: torch.device) -> str:
    if device.type != "cuda":
        return "none"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    lines = answer.stdout.split()
    return lines[0] if lines else "unknown"


def versions() -> dict[str, str]:
    """Of what takes part, peers included."""
    nvcc = find_compiler(VARIANTS["cuda"])
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nvcc": "absent" if nvcc is None else compiler_version(nvcc).rpartition(" ")[2],
    }
    for name in _PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, on the path or where the toolkit lies."""
    folders = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/bin")
    return shutil.which(name) or next(
        (path for folder in folders if (path := shutil.which(name, path=folder))), None
    )
