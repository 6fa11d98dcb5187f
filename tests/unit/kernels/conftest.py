"""Every implementation that this machine can run, one after another, behind the same operations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from forebay_kernels import native
from forebay_kernels.isa import best_isa, cpu_isas
from forebay_kernels.native import libraries
from forebay_kernels.testkit import Error, OnDevice, listen, poisoned_allocations

_ISAS = cpu_isas()[cpu_isas().index(best_isa()) :]
IMPLEMENTATIONS = [
    "torch",
    "host",
    *(f"cpu-{isa}" for isa in _ISAS),
    *(["cuda"] if torch.cuda.is_available() else []),
]
"""`torch`: the references; `host`: the CUDA sources over the shim; the CPU twins; `cuda`: the
kernels on a GPU, to which each call's tensors are copied."""

_current: tuple[str, str] | None = None
_largest: dict[str, dict[str, float]] = {}
"""By test and implementation."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--implementation",
        help="only tests of this one: --implementation=cuda, or host-asan, which is none of the"
        " usual ones (docs/kernels.md)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("implementation", None)
        chosen = IMPLEMENTATIONS if wanted is None else [wanted]
        metafunc.parametrize("implementation", chosen, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("implementation", None) is None:
        return
    kept = [item for item in items if _implementation_of(item) is not None]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _implementation_of(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("implementation")


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The one that torch.ops.forebay uses for tensors on the CPU during a test. What ops allocate
    for their outputs is poisoned."""
    name: str = request.param
    kept = libraries.of("cpu")
    with contextlib.ExitStack() as stack:
        stack.enter_context(poisoned_allocations())
        stack.callback(libraries.use, "cpu", kept)
        if name == "cuda":
            stack.enter_context(OnDevice("cuda"))
            libraries.use("cpu", _Nowhere())
        else:
            libraries.use("cpu", None if name == "torch" else native.load(name))
        yield name


class _Nowhere(native.Library):
    """In place of a CPU's library where all is to be computed on a GPU."""

    def __init__(self) -> None:
        self.variant = "none"

    def start(self, op: str, *_: object) -> bool:
        raise AssertionError(f"{op} was to be computed on the GPU")


@pytest.fixture
def host_library() -> Iterator[native.Library]:
    """The CUDA sources over the shim, for a test that is of no other implementation."""
    kept, library = libraries.of("cpu"), native.load("host")
    libraries.use("cpu", library)
    yield library
    library.order_threads(0)
    libraries.use("cpu", kept)


@pytest.fixture(autouse=True)
def _current_test(request: pytest.FixtureRequest) -> Iterator[None]:
    global _current
    implementation = _implementation_of(request.node)
    if implementation is not None:
        name = getattr(request.node, "originalname", None) or request.node.name
        _current = (f"{request.node.path.stem}::{name}", implementation)
    yield
    _current = None


@listen
def _remember(error: Error) -> None:
    if _current is not None:
        of_test = _largest.setdefault(_current[0], {})
        of_test[_current[1]] = max(of_test.get(_current[1], 0.0), error.relative)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _largest:
        return
    terminalreporter.section("kernels against float64: largest relative errors")
    for name, errors in sorted(_largest.items()):
        cells = "  ".join(f"{key} {value:.1e}" for key, value in errors.items())
        terminalreporter.write_line(f"{name:60} {cells}")
