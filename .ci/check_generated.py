"""Fails when the committed protobuf code is not what the .proto files generate."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

COMMITTED = Path("services")
OUTPUTS = ("python_out=", "grpc_python_out=", "mypy_out=quiet:", "mypy_grpc_out=quiet:")


def main(protos: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "grpc_tools.protoc", "--proto_path=protos"]
            + [f"--{output}{folder}" for output in OUTPUTS]
            + protos,
            check=True,
        )
        fresh = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        stale = [
            name
            for path in fresh
            if not (COMMITTED / (name := path.relative_to(folder))).is_file()
            or (COMMITTED / name).read_bytes() != path.read_bytes()
        ]
    for name in stale:
        print(f"{COMMITTED / name} is not up to date: run `make proto`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
