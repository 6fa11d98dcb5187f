"""The machine code of the cuda library, as cuobjdump shows it: which instructions each kernel
has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from forebay_kernels.resources import readable

_FUNCTION = re.compile(r"^\s*Function : (\w+)")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)")
TIMEOUT_S = 300.0


def disassembler() -> str | None:
    """cuobjdump of the Python packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, or of a
    CUDA toolkit."""
    folders = [str(Path(folder) / "nvidia" / "cu13" / "bin") for folder in sys.path]
    return shutil.which("cuobjdump", path=os.pathsep.join(folders)) or shutil.which("cuobjdump")


def architectures(cuobjdump: str, library: Path) -> set[str]:
    """Of which the library has machine code."""
    return set(re.findall(r"\.(sm_\w+)\.cubin", _run([cuobjdump, "--list-elf", str(library)])))


def instructions(cuobjdump: str, library: Path, architecture: str) -> Mapping[str, Counter[str]]:
    """By kernel, as in resources: how often each instruction stands in it, its modifiers included,
    as in LDG.E.128.CONSTANT."""
    found: dict[str, Counter[str]] = {}
    current = Counter[str]()
    command = [cuobjdump, "--dump-sass", "--gpu-architecture", architecture, str(library)]
    for line in _run(command).splitlines():
        if match := _INSTRUCTION.match(line):
            current[match[1]] += 1
        elif match := _FUNCTION.match(line):
            current = found.setdefault(readable(match[1]), Counter())
    return found


def _run(command: Sequence[str]) -> str:
    """cuobjdump wants nvdisasm, which lies beside it."""
    path = os.pathsep.join([str(Path(command[0]).parent), os.environ.get("PATH", os.defpath)])
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "PATH": path},
        check=True,
    ).stdout


def count(instructions: Mapping[str, int], pattern: str) -> int:
    """How many match the whole of a regular expression."""
    return sum(number for name, number in instructions.items() if re.fullmatch(pattern, name))
