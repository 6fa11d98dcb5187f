"""What tests of kernels share, here and on a GPU: inputs, poison, comparison in float64."""

from forebay_kernels.testkit.chi_square import chi_square_p_value
from forebay_kernels.testkit.compare import Error, error_of, written
from forebay_kernels.testkit.inputs import Inputs

__all__ = ["Error", "Inputs", "chi_square_p_value", "error_of", "written"]
