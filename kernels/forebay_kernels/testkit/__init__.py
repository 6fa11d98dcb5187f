"""What tests of kernels share, here and on a GPU: inputs, poison, comparison in float64."""

from forebay_kernels.testkit.bridge import OnDevice
from forebay_kernels.testkit.chi_square import chi_square_p_value
from forebay_kernels.testkit.compare import Error, error_of, listen, written
from forebay_kernels.testkit.inputs import Inputs
from forebay_kernels.testkit.poison import poisoned_allocations

__all__ = [
    "Error",
    "Inputs",
    "OnDevice",
    "chi_square_p_value",
    "error_of",
    "listen",
    "poisoned_allocations",
    "written",
]
