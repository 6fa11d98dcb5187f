"""Every implementation that a CPU can run, one after another, behind the same operations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from forebay_kernels import native
from forebay_kernels.build import cpu_isas
from forebay_kernels.native import best_isa, libraries

_ISAS = cpu_isas()[cpu_isas().index(best_isa()) :]
IMPLEMENTATIONS = ["torch", "host", *(f"cpu-{isa}" for isa in _ISAS)]
"""`torch`: the references; `host`: the CUDA sources over the shim; the CPU twins."""


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The one that torch.ops.forebay uses for tensors on the CPU during a test."""
    name: str = request.param
    kept = libraries.of("cpu")
    libraries.use("cpu", None if name == "torch" else native.load(name))
    yield name
    libraries.use("cpu", kept)


@pytest.fixture
def host_library() -> Iterator[native.Library]:
    """The CUDA sources over the shim, for a test that is of no other implementation."""
    kept, library = libraries.of("cpu"), native.load("host")
    libraries.use("cpu", library)
    yield library
    library.order_threads(0)
    libraries.use("cpu", kept)
