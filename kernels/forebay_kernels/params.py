"""The parameter structs of csrc/params.h as ctypes: the header is the one place that says them."""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"

_TYPES: dict[str, type[ctypes._SimpleCData[int] | ctypes._SimpleCData[float]]] = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}
_STRUCT = re.compile(r"^struct (\w+)Params \{\n(.*?)^\};$", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(r"^  (const void\*|void\*|\w+) (\w+);(?:\s*//.*)?$")
_ENUM = re.compile(r"^enum (\w+) \{(.*?)\};$", re.MULTILINE | re.DOTALL)


@cache
def structs() -> dict[str, type[ctypes.Structure]]:
    """By op, as in `add_rms_norm` for AddRmsNormParams. Raises ValueError on a field whose type
    Python does not know."""
    return {
        _snake(name): type(f"{name}Params", (ctypes.Structure,), {"_fields_": _fields(name, body)})
        for name, body in _STRUCT.findall(_header())
    }


@cache
def constants(enum: str) -> dict[str, int]:
    """The names and numbers of an enum of the header."""
    body = dict(_ENUM.findall(_header()))[enum]
    return {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", body)}


def _header() -> str:
    return (SOURCES / "params.h").read_text()


def _fields(struct: str, body: str) -> list[tuple[str, type]]:
    fields: list[tuple[str, type]] = []
    for line in body.splitlines():
        if not line.strip() or line.lstrip().startswith("//"):
            continue
        match = _FIELD.match(line)
        if match is None or not (match[1].endswith("*") or match[1] in _TYPES):
            raise ValueError(
                f"params.h: {struct}Params has a line that is no field: {line.strip()}"
            )
        fields.append((match[2], _TYPES.get(match[1], ctypes.c_void_p)))
    return fields


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
