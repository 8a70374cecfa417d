"""The checks of test_compiles.py for every launch and target, too slow for the test suite: pytest does not collect this
file unless it is named:

python -m pytest tests/every_target.py
"""

import pytest

from tests.ahead_of_time import TARGETS
from tests.test_compiles import KERNELS, check


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel_file", KERNELS)
def test_every_launch_compiles(kernel_file, target):
    check(kernel_file, target)
