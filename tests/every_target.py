"""test_compiles.py for every launch and target, which takes too long for the suite:

python -m pytest tests/every_target.py
"""

import pytest

from tests.test_compiles import KERNELS, check


@pytest.mark.parametrize("kernel_file", KERNELS)
def test_every_kernel_compiles_for_every_target(kernel_file):
    check(kernel_file, "all")
