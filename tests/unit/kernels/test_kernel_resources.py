"""What nvcc made of the kernels: compiled here for sm_80 and sm_90a, looked at without a GPU."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import pytest

from forebay_kernels import resources
from forebay_kernels.build import VARIANTS, build, find_compiler
from forebay_kernels.resources import Report, Usage
from forebay_kernels.testkit import sass

ARCHITECTURES = {"sm_80", "sm_90a"}
MOVERS = [
    # Every instance reads and writes at least so many bits in one access.
    ("add_rms_norm_kernel<.*>", 128, 128),
    ("qkv_post_kernel<.*>", 128, 128),
    ("mla_post_kernel<.*>", 128, 128),
    ("merge_lse_kernel<.*>", 128, 128),
    ("moe_permute_kernel<16>", 128, 128),
    ("moe_unpermute_kernel<.*>", 128, 128),
    ("silu_and_mul_kernel<.*, false>", 128, 128),
    ("silu_and_mul_kernel<.*, true>", 128, 64),
]

needs_nvcc = pytest.mark.skipif(
    find_compiler(VARIANTS["cuda"]) is None, reason="nvcc is not on this machine"
)


@pytest.fixture(scope="module")
def compiled() -> Report:
    return resources.compiled()


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    found = sass.disassembler()
    if found is None:
        pytest.skip("cuobjdump is not on this machine")
    return found


@pytest.fixture(scope="module")
def code(cuobjdump: str) -> Mapping[str, Counter[str]]:
    """Of sm_90a: what the other has differs in little, and takes as long to print."""
    return sass.instructions(cuobjdump, build(VARIANTS["cuda"]), "sm_90a")


@needs_nvcc
def test_no_kernel_spills_or_has_a_stack(compiled: Report) -> None:
    assert compiled.usage
    assert {
        name: usage for name, usage in compiled.usage.items() if usage.stack or usage.spills
    } == {}


@needs_nvcc
def test_every_kernel_is_there_for_both_architectures(compiled: Report) -> None:
    kernels = {name.partition(" ")[2] for name in compiled.usage}
    assert set(compiled.usage) == {f"{a} {kernel}" for a in ARCHITECTURES for kernel in kernels}


@needs_nvcc
def test_the_table_is_what_was_compiled(compiled: Report) -> None:
    table = resources.recorded()
    assert set(compiled.usage) == set(table.usage), "python -m forebay_kernels.resources --write"
    if compiled.compilers == table.compilers:
        assert resources.differences(compiled, table) == []


def test_the_table_has_no_stack_no_spills_and_no_names_of_a_compilation() -> None:
    table = resources.recorded()
    assert {usage.stack + usage.spills for usage in table.usage.values()} == {0}
    assert not [name for name in table.usage if re.search("GLOBAL__N|anonymous", name)]


@needs_nvcc
def test_the_library_has_machine_code_for_both_architectures(cuobjdump: str) -> None:
    assert sass.architectures(cuobjdump, build(VARIANTS["cuda"])) == ARCHITECTURES


@needs_nvcc
def test_the_machine_code_is_that_of_the_table(
    compiled: Report, code: Mapping[str, Counter[str]]
) -> None:
    assert {f"sm_90a {name}" for name in code} == {
        name for name in compiled.usage if name.startswith("sm_90a ")
    }


@needs_nvcc
def test_no_kernel_goes_to_local_memory(code: Mapping[str, Counter[str]]) -> None:
    assert [name for name, found in code.items() if sass.count(found, r"(LDL|STL)(\..*)?")] == []


@needs_nvcc
@pytest.mark.parametrize(("pattern", "read", "written"), MOVERS)
def test_movers_read_and_write_wide(
    pattern: str, read: int, written: int, code: Mapping[str, Counter[str]]
) -> None:
    found = {name: each for name, each in code.items() if re.fullmatch(pattern, name)}
    assert found
    for name, each in found.items():
        assert _widest(each, "LDG") >= read and _widest(each, "STG") >= written, name


def _widest(found: Counter[str], access: str) -> int:
    """Bits; a modifier says how many where they are not 32."""
    return max(
        (
            next((int(part) for part in name.split(".") if part in ("64", "128")), 32)
            for name in found
            if name.startswith(f"{access}.")
        ),
        default=0,
    )


def test_a_report_is_read() -> None:
    log = (
        "compiled by: nvcc 13.0\n"
        "ptxas info    : Compiling entry function '_ZN7forebay48_GLOBAL__N__ed0a8a5d_15_add_rms_"
        "norm_cu_4b755f2119add_rms_norm_kernelINS_3f16ELi1024ELi2ELb1EEEv16AddRmsNormParams' for"
        " 'sm_90a'\n"
        "ptxas info    : Function properties for _ZN7forebay\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 37 registers, used 1 barriers, 128 bytes smem\n"
    )
    name = "sm_90a add_rms_norm_kernel<f16, 1024, 2, true>"
    report = resources.parse(log)
    assert report == Report(("nvcc 13.0",), {name: Usage(37, 128, 8, 16)})
    assert resources.differences(report, Report((), {})) == [
        f"{name}: None in the table, {report.usage[name]} compiled"
    ]


def test_a_table_is_read_as_it_was_written() -> None:
    table = resources.recorded()
    assert resources.TABLE.read_text() == table.as_json()
