"""Compiles csrc/ into shared libraries, one per variant, cached by a hash of the sources (objects
too).

    python -m forebay_kernels.build [--variant NAME ...] [--cache DIR]

Without --variant: what this machine runs. `--variant all`: every one that its compilers can build.

Variants: `cuda` (sm_80 and sm_90a, by nvcc), `cpu-avx512`, `cpu-avx2`, `cpu-scalar` (by g++; the
loader takes the best one for the processor), `host` (the CUDA sources by g++ over host/shim.h, for
tests) and `host-asan` (the same under the address sanitizer). All export the same entry points.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from forebay_kernels.isa import ISAS, best_isa, cpu_isas
from forebay_kernels.params import SOURCES

TIMEOUT_S = 900.0
"""For one source file of one variant."""
MAX_LINES = 40
"""Of what a compiler says in an error: the first ones matter."""
KEPT_S = 30 * 86400.0
"""Files of the cache that nothing has used for this long go at the next compilation."""
ALL = "all"
VERSION_MARK = "compiled by: "
"""Begins the line of a log that has the compiler's version."""


class BuildError(RuntimeError):
    """A library cannot be had: no compiler, or one that failed. Says which and what it printed."""


@dataclass(frozen=True, slots=True)
class Variant:
    """sources: patterns below csrc/. compilers: the first one found is taken. `options`: of the
    compilation; `language`: what the compiler must take the sources for."""

    name: str
    sources: tuple[str, ...]
    compilers: tuple[str, ...]
    options: tuple[str, ...]
    language: tuple[str, ...] = ()
    link_options: tuple[str, ...] = ()


_COMMON = ("-O3", "-std=c++17")
_ARCHITECTURES = (
    "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a",
)  # fmt: skip
_GXX = (
    *_COMMON, "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
_CXX_COMPILERS = ("g++", "c++", "clang++")
_HOST = (*_GXX, "-DFOREBAY_HOST", "-Wno-unused-parameter", "-Wno-unused-variable")


def _cpu(isa: str, *options: str) -> Variant:
    return Variant(
        f"cpu-{isa}",
        sources=("*/*_cpu.cpp",),
        compilers=_CXX_COMPILERS,
        options=(*_GXX, "-fopenmp", *options),
        link_options=("-fopenmp",),
    )


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(
            "cuda",
            sources=("*/*.cu",),
            compilers=("nvcc", "/usr/local/cuda/bin/nvcc"),
            options=(
                *_COMMON, "--compiler-options=-fPIC", "--cudart=static",
                *_ARCHITECTURES, "-Xptxas=-v", "--threads=2",
            ),
            link_options=("--cudart=static", *_ARCHITECTURES),
        ),
        _cpu("avx512", "-march=x86-64-v4", "-mprefer-vector-width=512", "-mpclmul"),
        _cpu("avx2", "-march=x86-64-v3", "-mpclmul"),
        _cpu("scalar"),
        Variant(
            "host",
            sources=("*/*.cu", "host/*.cpp"),
            compilers=_CXX_COMPILERS,
            options=_HOST,
            language=("-x", "c++"),
        ),
        Variant(
            "host-asan",
            sources=("*/*.cu", "host/*.cpp"),
            compilers=_CXX_COMPILERS,
            options=(*_HOST, "-O1", "-g1", "-fsanitize=address", "-fno-omit-frame-pointer"),
            language=("-x", "c++"),
            link_options=("-fsanitize=address",),
        ),
    )
}  # fmt: skip


def default_cache() -> Path:
    return Path.home() / ".cache" / "forebay" / "kernels"


def find_compiler(variant: Variant) -> str | None:
    return next((path for name in variant.compilers if (path := shutil.which(name))), None)


def library_path(variant: Variant, cache: Path) -> Path:
    digests = "".join(_digest(variant, source) for source in sources_of(variant))
    digest = hashlib.sha256(digests.encode()).hexdigest()[:16]
    return cache / f"forebay-{variant.name}-{digest}.so"


def build(variant: Variant, cache: Path | None = None) -> Path:
    """The variant's library, compiled unless the cache has it. Processes that want the same one
    wait for the first. Raises BuildError. Beside the library lies what the compiler printed, with
    the ending .log: its version, and nvcc's report of registers, spills and stack."""
    cache = default_cache() if cache is None else cache
    path = library_path(variant, cache)
    if path.exists():
        _touch(path)
        return path
    compiler = find_compiler(variant)
    if compiler is None:
        raise BuildError(f"{variant.name} kernels need one of {', '.join(variant.compilers)}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / f"{path.stem}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                with tempfile.TemporaryDirectory(dir=cache) as folder:
                    _compile(variant, compiler, Path(folder), path)
                _sweep(cache)
    except OSError as error:
        raise BuildError(f"{variant.name} kernels cannot be built in {cache}: {error}") from error
    return path


def sources_of(variant: Variant) -> list[Path]:
    return sorted(path for pattern in variant.sources for path in SOURCES.glob(pattern))


def _digest(variant: Variant, source: Path) -> str:
    """Of everything that goes into the source's object: a source includes nothing but headers of
    its own folder, of common/ and host/, and params.h."""
    digest = hashlib.sha256(repr((variant, platform.machine())).encode())
    headers = {
        path for pattern in ("*.h", "common/*", "host/*.h") for path in SOURCES.glob(pattern)
    }
    headers |= {path for pattern in ("*.h", "*.cuh") for path in source.parent.glob(pattern)}
    for path in sorted(headers | {source}):
        digest.update(f"{path.relative_to(SOURCES)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(variant: Variant, compiler: str, folder: Path, path: Path) -> None:
    version = compiler_version(compiler)

    def compile_one(source: Path) -> Path:
        name = "-".join(source.relative_to(SOURCES).parts)
        target = path.parent / f"{variant.name}-{name}-{_digest(variant, source)}.o"
        if not target.exists():
            fresh = folder / target.name
            command = [compiler, *variant.options, f"-I{SOURCES}", *variant.language]
            output = _run([*command, "-c", str(source), "-o", str(fresh)])
            target.with_suffix(".log").write_text(f"{VERSION_MARK}{version}\n{output}")
            os.replace(fresh, target)
        _touch(target)
        return target

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, sources_of(variant)))
    linked = folder / path.name
    targets = [str(target) for target in objects]
    _run([compiler, "-shared", *variant.link_options, *targets, "-o", str(linked)])
    logs = [target.with_suffix(".log").read_text() for target in objects]
    path.with_suffix(".log").write_text("".join(logs))
    os.replace(linked, path)


def compiler_version(compiler: str) -> str:
    """The line of `--version` that has a number: `Cuda compilation tools, release 13.0, V13.0.88`,
    `g++ (Debian 12.2.0-14) 12.2.0`. Raises BuildError."""
    lines = _run([compiler, "--version"]).splitlines()
    return next((line for line in lines if re.search(r"\d+\.\d+", line)), "unknown")


def _touch(path: Path) -> None:
    """Marks it as used. A cache that is only read stays as it is."""
    with contextlib.suppress(OSError):
        for each in (path, path.with_suffix(".log")):
            os.utime(each)


def _sweep(cache: Path) -> None:
    oldest = time.time() - KEPT_S
    for path in cache.iterdir():
        if path.suffix in (".so", ".o", ".log", ".lock") and path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)


def _run(command: Sequence[str]) -> str:
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S
        )
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"no end after {TIMEOUT_S:.0f} s: {' '.join(command)}") from error
    if result.returncode != 0:
        lines = result.stdout.splitlines()
        more = [f"... {len(lines) - MAX_LINES} more lines"] if len(lines) > MAX_LINES else []
        raise BuildError("\n".join([" ".join(command), *lines[:MAX_LINES], *more]))
    return result.stdout


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m forebay_kernels.build", description=__doc__)
    parser.add_argument("--variant", action="append", choices=[*VARIANTS, ALL], default=None)
    parser.add_argument("--cache", type=Path, default=None, help="where the libraries are kept")
    options = parser.parse_args(None if arguments is None else list(arguments))
    failed = False
    for name in _chosen(options.variant):
        began = time.monotonic()
        try:
            path = build(VARIANTS[name], options.cache)
        except BuildError as error:
            print(f"{name:12} not built: {error}", file=sys.stderr, flush=True)
            failed = True
        else:
            print(f"{name:12} {time.monotonic() - began:6.1f} s  {path}", flush=True)
    return 1 if failed else 0


def _chosen(wanted: Sequence[str] | None) -> list[str]:
    if wanted and ALL not in wanted:
        return list(wanted)
    if wanted:
        foreign = {f"cpu-{isa}" for isa in ISAS} - {f"cpu-{isa}" for isa in cpu_isas()}
        names = [name for name in VARIANTS if name not in foreign]
    else:
        names = [f"cpu-{best_isa()}", *(["cuda"] if torch.cuda.is_available() else [])]
    found = [name for name in names if find_compiler(VARIANTS[name]) is not None]
    for name in set(names) - set(found):
        compilers = ", ".join(VARIANTS[name].compilers)
        print(f"{name:12} no compiler ({compilers}): plain torch instead", file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main())
