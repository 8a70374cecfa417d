"""Every kernel compiles for its targets (sm_80, sm_90, gfx942), on any machine, and stays within its budgets.

The interpreter checks what a kernel computes; this checks that the real compiler takes it. How kernels are launched and
what they may cost stands beside their tests: `LAUNCHES` in tests/kernels/test_<file>.py.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kernels

KERNELS = {  # kernel file -> names of its kernels
    file.stem: names
    for file in sorted(Path(kernels.__path__[0]).glob("*.py"))
    if (names := re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.MULTILINE))
}


@pytest.mark.parametrize("kernel_file", KERNELS)
def test_every_kernel_compiles_within_its_budget(kernel_file):
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    launches = importlib.import_module(f"tests.kernels.test_{kernel_file}").LAUNCHES
    assert {row.kernel for row in launches} == set(KERNELS[kernel_file])

    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ahead_of_time", kernel_file]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]

    costs = [json.loads(line) for line in done.stdout.splitlines()]
    rows = [(row, element, target) for row in launches for element in row.elements for target in row.targets]
    assert len(costs) == len(rows)
    for (row, element, target), cost in zip(rows, costs, strict=True):
        assert (cost["kernel"], cost["element"], cost["target"]) == (row.kernel, element, target)
        assert not cost.get("narrow"), "go to int64 before the product, or tell tests/addresses.py why int32 is enough"
        assert ("stack" in cost) == (target in row.budgets)
        for resource in {"registers", "stack", "shared"} & cost.keys():
            assert cost[resource] <= getattr(row, resource), f"{cost} exceeds {row}"
        mma = row.matrix(target)
        assert cost.get("mma", mma) == mma, f"no {mma} in {cost}"
