"""test_compiles.py for all targets. The suite compiles for sm_90 only, to save time; this is a separate command:

python -m pytest tests/every_target.py
"""

import pytest

from tests.ahead_of_time import TARGETS
from tests.test_compiles import KERNELS, check


@pytest.mark.parametrize("kernel_file", KERNELS)
def test_every_kernel_compiles_for_every_target(kernel_file):
    check(kernel_file, "all", TARGETS)
