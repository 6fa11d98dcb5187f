"""Nothing is read or written outside tensors: the CUDA sources over the host shim, compiled with
the address sanitizer, through every test of the operations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from forebay_kernels.build import VARIANTS, build, find_compiler

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 240

PLANTED = """
import torch
from forebay_kernels import native
library = native.load("host-asan")
x, weight, out = torch.ones(2, 64), torch.ones(64), torch.ones({rows}, 64)
library.call("add_rms_norm", 0, x=x.data_ptr(), weight=weight.data_ptr(), out=out.data_ptr(),
             rows=3, width=64, x_stride=64, eps=1e-5)
print("survived")
"""


@pytest.fixture(scope="module")
def sanitized() -> dict[str, str]:
    """The environment of a process that loads the sanitizer's runtime before anything else."""
    compiler = find_compiler(VARIANTS["host-asan"])
    if compiler is None:
        pytest.skip("no C++ compiler")
    # C++'s own beside it: an exception thrown by torch is to find both.
    runtimes = [_library_of(compiler, name) for name in ("libasan.so", "libstdc++.so")]
    if not Path(runtimes[0]).is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    build(VARIANTS["host-asan"])
    return {**os.environ, "LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}


def _library_of(compiler: str, name: str) -> str:
    command = [compiler, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.parametrize(("rows", "access"), [(3, "READ"), (1, "WRITE")])
def test_a_planted_access_outside_is_caught(
    rows: int, access: str, sanitized: dict[str, str]
) -> None:
    """The third row of an input that has two, or an output that has one."""
    result = _python(sanitized, "-c", PLANTED.format(rows=rows))
    assert result.returncode != 0 and "survived" not in result.stdout
    assert "heap-buffer-overflow" in result.stdout and f"{access} of size 16" in result.stdout


@pytest.mark.timeout(TIMEOUT_S + 30)
def test_no_operation_leaves_its_tensors(sanitized: dict[str, str]) -> None:
    result = _python(
        sanitized,
        *("-m", "pytest", "tests/unit/kernels", "--implementation=host-asan", "-q", "-x"),
        *("-p", "no:cacheprovider", "--tb=short"),
        *("-k", "not every_implementation"),  # thousands of rows: minutes under the sanitizer
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
