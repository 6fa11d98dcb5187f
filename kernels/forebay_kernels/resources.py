"""What each kernel takes of a multiprocessor, as nvcc reported it when it compiled the library.

    python -m forebay_kernels.resources            compares with csrc/resources.json
    python -m forebay_kernels.resources --write    writes it: after a change of a kernel

The table shows in a diff what a change of a source costs in registers and shared memory. Its
numbers are those of one version of nvcc, which it names.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from forebay_kernels.build import VARIANTS, VERSION_MARK, BuildError, build
from forebay_kernels.params import SOURCES

TABLE = SOURCES / "resources.json"

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_ANONYMOUS = re.compile(r"\b_GLOBAL__N__\w+::|\(anonymous namespace\)::")


@dataclass(frozen=True, slots=True)
class Usage:
    """registers: of a thread; shared: static bytes of a block; stack, spills: bytes of a thread."""

    registers: int
    shared: int
    stack: int
    spills: int


@dataclass(frozen=True, slots=True)
class Report:
    """compilers: the versions that compiled the library's objects. usage: by `architecture
    kernel`."""

    compilers: tuple[str, ...]
    usage: Mapping[str, Usage]

    def as_json(self) -> str:
        rows = {name: asdict(usage) for name, usage in sorted(self.usage.items())}
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        return f'{{\n "compilers": {json.dumps(self.compilers)},\n "usage": {{\n{lines}\n }}\n}}\n'


def compiled() -> Report:
    """Of the cuda library, which is built first where that is needed. Raises BuildError."""
    return parse(build(VARIANTS["cuda"]).with_suffix(".log").read_text())


def recorded(path: Path = TABLE) -> Report:
    table = json.loads(path.read_text())
    usage = {name: Usage(**row) for name, row in table["usage"].items()}
    return Report(tuple(table["compilers"]), usage)


def parse(log: str) -> Report:
    compilers: set[str] = set()
    usage: dict[str, Usage] = {}
    name, memory = "", (0, 0, 0)
    for line in log.splitlines():
        if line.startswith(VERSION_MARK):
            compilers.add(line.removeprefix(VERSION_MARK))
        elif entry := _ENTRY.search(line):
            name, memory = f"{entry[2]} {readable(entry[1])}", (0, 0, 0)
        elif found := _MEMORY.search(line):
            memory = (int(found[1]), int(found[2]), int(found[3]))
        elif name and (used := _USED.search(line)):
            shared = _SHARED.search(line)
            stack, stores, loads = memory
            shared_bytes = int(shared[1]) if shared else 0
            usage[name] = Usage(int(used[1]), shared_bytes, stack, stores + loads)
            name = ""
    return Report(tuple(sorted(compilers)), usage)


def readable(symbol: str) -> str:
    """`add_rms_norm_kernel<float, 128, 1, false>` of the compiler's symbol: without the namespaces
    and parameters, and without the hash by which nvcc tells files' unnamed namespaces apart."""
    name = _ANONYMOUS.sub("", demangled(symbol)).removeprefix("void ").replace("forebay::", "")
    return _without_parameters(name)


def _without_parameters(name: str) -> str:
    """Up to the parenthesis that no template argument holds."""
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:i]
    return name


def demangled(symbol: str) -> str:
    """By the C++ runtime that torch brings into the process."""
    runtime = ctypes.CDLL("libstdc++.so.6")
    demangle = getattr(runtime, "__cxa_demangle")
    demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    address = demangle(symbol.encode(), None, None, ctypes.byref(status))
    if status.value != 0 or not address:
        return symbol
    try:
        return ctypes.string_at(address).decode()
    finally:
        ctypes.CDLL(None).free(ctypes.c_void_p(address))


def differences(found: Report, wanted: Report) -> list[str]:
    """Kernels that are new, gone or use something else than the table says."""
    names = sorted({*found.usage, *wanted.usage})
    return [
        f"{name}: {wanted.usage.get(name)} in the table, {found.usage.get(name)} compiled"
        for name in names
        if found.usage.get(name) != wanted.usage.get(name)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m forebay_kernels.resources")
    parser.add_argument("--write", action="store_true", help="the table becomes what was compiled")
    options = parser.parse_args(arguments)
    try:
        found = compiled()
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    if options.write:
        TABLE.write_text(found.as_json())
        print(f"{TABLE}: {len(found.usage)} kernels")
        return 0
    different = differences(found, recorded())
    print("\n".join(different) or "as in the table")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
