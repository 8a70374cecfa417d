"""Check that the kernels compute correct results on your GPU: compare every op with its PyTorch reference in fp64.

    python -m unipad.selfcheck                           all ops, at small and at recipe sizes
    python -m unipad.selfcheck --sizes small             small sizes only
    python -m unipad.selfcheck --ops lift sdf_render     ops whose names start with one of these

Prints one line per check: the error of the output or gradient that comes closest to its bound, the bound, and, for
information, the time of forward and backward. The exit code is 1 if a check fails. A check at recipe size that does not
fit into the GPU's memory is skipped. Without a GPU, the references run at small sizes.

An error is the largest absolute difference of an output or gradient from its true values, as a fraction of the largest
true value. Its bound is twice the error of the reference in the check's dtype (fp32, tf32, bf16 or fp16), plus a slack.
The true values are computed by the reference in fp64 from the inputs that the kernels read, which are rounded to that
dtype. (For voxels and their neighbor tables, the reference computes in fp32, whose rounding decides a point's cell.)
Integers and booleans must be equal. NaN and infinity always fail. A check named "..., bit-equal" runs the op twice
under `torch.use_deterministic_algorithms(True)`; both results must also be equal in every bit.

A faulting kernel can corrupt the GPU context of its process. So the checks run in a separate process, and after a crash
the remaining ones continue in a new process.
"""

import contextlib
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
import tyro

from unipad.errors import UserError
from unipad.exit import exit_on_user_error
from unipad.kernels.backend import on_triton, triton
from unipad.run_folder import commit
from unipad.selfcheck.cases import SIZES, checks
from unipad.selfcheck.processes import results, work


@dataclass
class Args:
    sizes: tuple[Literal["small", "recipe"], ...] = SIZES  # sizes of the inputs: small, or those of a recipe
    ops: tuple[str, ...] = ()  # prefixes of op names (default: all ops)


def main(args):
    """Print a line per check, then a summary or, if checks failed, the lines to report; returns the exit code."""
    interpreted = on_triton(torch.empty(0))  # whether kernels take CPU tensors, in Triton's interpreter: only in tests
    if not (torch.cuda.is_available() or interpreted):
        print("There is no GPU to check: the PyTorch references run instead of the kernels, at small sizes.")
        args = replace(args, sizes=("small",))
    cases = [check for check in checks(args.sizes) if not args.ops or check.name.startswith(args.ops)]
    if not cases:
        raise UserError(f"--ops {' '.join(args.ops)}: no op's name starts with that; leave the flag out to run all.")
    began, finished = time.perf_counter(), []
    for result in results(cases):
        print(result, flush=True)
        finished.append(result)
    took = time.perf_counter() - began
    failed = [result for result in finished if result.status == "FAIL"]
    if failed:
        print(f"{len(failed)} of {len(cases)} checks failed. Please report these lines: {_machine()}")
        print(*failed, sep="\n")
        return 1
    skipped = sum(result.status == "skipped" for result in finished)
    passed = len(cases) - skipped
    counts = f"{passed} checks passed, {skipped} skipped" if skipped else f"All {passed} checks passed"
    print(f"{counts}, in {took:.0f} s on {_machine()}.")
    return 0


def _machine():
    """GPU, driver, versions and commit."""
    device = "no GPU"
    if torch.cuda.is_available():
        driver = "unknown"
        with contextlib.suppress(OSError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0] or driver
        device = f"{torch.cuda.get_device_name()}, driver {driver}"
    versions = f"torch {torch.__version__}, triton {getattr(triton, '__version__', 'none')}"
    return f"{device}, {versions}, Python {platform.python_version()}, commit {commit()}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2])
    else:
        with exit_on_user_error():
            sys.exit(main(tyro.cli(Args, description=__doc__)))
