from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from forebay_kernels import build as builder
from forebay_kernels import native
from forebay_kernels.build import VARIANTS, BuildError, Variant, build, find_compiler
from forebay_kernels.isa import best_isa, cpu_isas
from forebay_kernels.native import Library

NVCC = find_compiler(VARIANTS["cuda"])
NO_NVCC = "nvcc is not on this machine"
TINY = Variant("tiny", ("host/fiber.cpp",), ("g++", "c++", "clang++"), ("-O0", "-fPIC"))
"""A variant that compiles in a moment."""
needs_cxx = pytest.mark.skipif(find_compiler(TINY) is None, reason="no C++ compiler")


@pytest.mark.skipif(NVCC is None, reason=NO_NVCC)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_without_a_driver_is_left_to_torch() -> None:
    """Compiles every kernel for both architectures, if the cache has not got them."""
    library = Library("cuda", build(VARIANTS["cuda"]))
    x = torch.ones(2, 64)
    fields = dict.fromkeys(("x", "residual", "weight", "total", "out"), x.data_ptr())
    assert not library.call(
        "add_rms_norm", 0, **fields, rows=2, width=64, x_stride=64, residual_stride=64, eps=1e-5
    )


@needs_cxx
def test_a_second_build_takes_what_the_first_left(tmp_path: Path) -> None:
    first = build(TINY, tmp_path)
    stamp = first.stat().st_ino
    assert build(TINY, tmp_path) == first and first.stat().st_ino == stamp
    assert first.with_suffix(".log").read_text().startswith(builder.VERSION_MARK)


@needs_cxx
def test_other_options_are_another_library(tmp_path: Path) -> None:
    other = dataclasses.replace(TINY, options=(*TINY.options, "-g1"))
    assert build(TINY, tmp_path) != build(other, tmp_path)


@needs_cxx
def test_builds_of_one_library_at_once_are_one_build(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        libraries = list(pool.map(lambda _: build(TINY, tmp_path), range(2)))
    assert libraries[0] == libraries[1]
    assert len(list(tmp_path.glob("*.so"))) == 1


@needs_cxx
def test_what_nobody_has_used_for_long_goes(tmp_path: Path) -> None:
    old, young, foreign = (tmp_path / name for name in ("a.so", "b.o", "notes.txt"))
    for path in (old, young, foreign):
        path.write_text("")
    past = time.time() - builder.KEPT_S - 60
    for path in (old, foreign):
        os.utime(path, (past, past))
    build(TINY, tmp_path)
    assert not old.exists() and young.exists() and foreign.exists()


@needs_cxx
def test_what_the_compiler_says_is_in_the_error(tmp_path: Path) -> None:
    wrong = dataclasses.replace(TINY, options=("-DFOREBAY_WRONG", "--no-such-option"))
    with pytest.raises(BuildError, match="no-such-option"):
        build(wrong, tmp_path)
    assert not list(tmp_path.glob("*.so"))


def test_no_compiler_is_said_by_name(tmp_path: Path) -> None:
    absent = dataclasses.replace(TINY, compilers=("no-such-compiler", "nor-this"))
    with pytest.raises(BuildError, match="tiny kernels need one of no-such-compiler, nor-this"):
        build(absent, tmp_path)


@needs_cxx
def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")
    with pytest.raises(BuildError, match=f"cannot be built in {occupied}"):
        build(TINY, occupied)


def test_a_compiler_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "slow"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && echo slow 1.0 && exit\nexec sleep 60\n')
    script.chmod(0o755)
    monkeypatch.setattr(builder, "TIMEOUT_S", 0.2)
    with pytest.raises(BuildError, match="no end after"):
        build(dataclasses.replace(TINY, compilers=(str(script),)), tmp_path / "cache")


PLAIN_TORCH = """
import logging, sys, torch
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
from forebay_kernels import ops
x = torch.ones(2, 64)
for _ in range(3):
    out, total = ops.add_rms_norm(x, x, torch.ones(64), 0.0)
print(float(out[0, 0]), float(total[0, 0]))
"""


def _without_compilers(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": "", "HOME": str(tmp_path)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_without_any_compiler_torch_computes_and_it_is_said_once(tmp_path: Path) -> None:
    result = _without_compilers(tmp_path, sys.executable, "-c", PLAIN_TORCH)
    warnings = [line for line in result.stdout.splitlines() if line.startswith("WARNING")]
    assert warnings == [
        f"WARNING operations on cpu run on plain torch: cpu-{best_isa()} kernels need one of"
        " g++, c++, clang++"
    ]
    assert result.stdout.splitlines()[-1] == "1.0 2.0", result.stderr


def test_setting_up_without_a_compiler_is_no_failure(tmp_path: Path) -> None:
    result = _without_compilers(tmp_path, sys.executable, "-m", "forebay_kernels.build")
    assert result.returncode == 0
    assert f"cpu-{best_isa()}" in result.stderr and "plain torch instead" in result.stderr


def test_a_library_of_another_machine_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = builder.library_path(TINY, tmp_path)
    path.write_bytes(b"not a library")
    monkeypatch.setitem(VARIANTS, "tiny", TINY)
    with pytest.raises(BuildError, match="tiny kernels do not load"):
        native.load("tiny", tmp_path)


def test_the_best_instruction_set_comes_first() -> None:
    assert cpu_isas()[-1] == "scalar" and best_isa() in cpu_isas()
    assert {f"cpu-{isa}" for isa in cpu_isas()} <= set(VARIANTS)
