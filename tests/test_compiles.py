"""Every kernel compiles, also on machines without a GPU, within its budgets and its target's shared memory.

Triton's interpreter checks what a kernel computes; this checks that the real compiler accepts it. How kernels are
launched and what they may cost (registers, stack, shared memory) is defined next to their tests: `LAUNCHES` in
tests/kernels/test_<file>.py. The suite compiles one launch of each kernel for sm_90; `python -m pytest
tests/every_target.py` compiles every launch for every target.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import unipad.kernels
from tests import scripts
from tests.ahead_of_time import AMD, MAX_SHARED, launches_of

KERNELS = {  # kernel file -> names of its kernels
    file.stem: names
    for file in sorted(Path(unipad.kernels.__path__[0]).glob("*.py"))
    if (names := re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.MULTILINE))
}


@pytest.mark.parametrize("kernel_file", KERNELS)
def test_every_kernel_compiles_within_its_budget(kernel_file):
    check(kernel_file, "first")


def check(kernel_file, which):
    """Compile the kernels of a file in a process without the interpreter, and check their cost against `LAUNCHES`.

    which: a target, for all launches, or "first" for one launch of each kernel on sm_90, as in `launches_of`.
    """
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    expected = launches_of(kernel_file, which)
    assert {launch.kernel for launch, _, _ in expected} == set(KERNELS[kernel_file]), "a kernel without a launch"

    done = scripts.run("-m", "tests.ahead_of_time", kernel_file, which, timeout=3000)
    assert done.returncode == 0, done.stderr[-4000:]

    costs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(costs) == len(expected)
    for (launch, element, target), cost in zip(expected, costs, strict=True):
        assert (cost["kernel"], cost["element"], cost["target"]) == (launch.kernel, element, target)
        assert not cost.get("int32_products"), "widen to int64 first, or explain in tests/addresses.py why not"
        assert cost["shared"] <= MAX_SHARED[target], f"{cost}: {target} has {MAX_SHARED[target]} bytes for {launch}"
        assert ("stack" in cost) == (target in launch.limits_on)  # without a budget only shared memory is read
        if target not in launch.limits_on:
            continue
        for resource in ("stack",) if target in AMD else ("registers", "stack", "shared"):
            assert cost[resource] <= getattr(launch, resource), f"{cost} exceeds {launch}"
        mma = launch.matrix_instruction(target)
        assert cost.get("mma", mma) == mma, f"no {mma} in {cost}"  # on AMD instructions are not read


def test_kernels_are_decorated_by_the_backend():
    """`backend.jit` launches on the tensors' GPU and sets `enable_fp_fusion`; `triton.jit` does neither."""
    for kernel_file, names in KERNELS.items():
        source = (Path(unipad.kernels.__path__[0]) / f"{kernel_file}.py").read_text()
        for name in names:
            before = source[: source.index(f"def {name}(")].rstrip()
            assert re.search(r"@(backend\.)?jit(\([^@]*\))?$", before), f"{kernel_file}.{name}"


def test_precision_and_stages_on_amd_gpus():
    """No tf32, and fewer pipeline stages than on NVIDIA's, where they are 5 and 3. They are set on import, hence the
    separate process."""
    code = """
import torch
torch.version.hip = "7.0"  # as in PyTorch for AMD
from unipad.kernels import sdf_field, sparse_gemm
assert sdf_field.precision(exact=False) == sdf_field.precision(exact=True) == "ieee"
assert (sparse_gemm.STAGES, sparse_gemm.FEWER_STAGES) == (2, 1)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=scripts.REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_launch_that_exceeds_shared_memory_is_detected(monkeypatch):
    monkeypatch.setitem(MAX_SHARED, "sm_90", 64)
    with pytest.raises(AssertionError, match="sm_90 has 64 bytes"):
        check("composite", "first")
