"""The checks of test_compiles.py for every launch and target, which take too long for the test suite:

python -m pytest tests/every_target.py
"""

import pytest

from tests.test_compiles import KERNELS, check


@pytest.mark.parametrize("kernel_file", KERNELS)
def test_every_kernel_compiles_for_every_target(kernel_file):
    check(kernel_file, "all")
