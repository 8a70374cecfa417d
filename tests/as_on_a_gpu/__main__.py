"""Execute the GPU code path without a GPU: the kernel tests, and a training step of each tiny pre-training recipe and
of occupancy fine-tuning.

    python -m tests.as_on_a_gpu                                     everything
    python -m tests.as_on_a_gpu tests/kernels/test_lift.py -k hand  some tests; arguments go to pytest
    python -m tests.as_on_a_gpu --env PATH ...                      in the virtual environment PATH, created if missing

Linux, Python 3.11 or newer. The first run creates a virtual environment in ~/.cache/unipad-triton, unless this Python
has the packages of `PINS`. The PyPI package ttsem compiles every launch to TTIR for sm_90 with Triton's front end and
executes it on the CPU. The exit code is 1 on
  - an access outside the tensors passed to a kernel,
  - a race: two programs of a launch access the same element, at least one writes it, and not both are atomic,
  - use of uninitialized memory: `torch.empty` fills with NaN (integers: the largest value), which comparisons catch,
  - an operation with an undefined result: a division by 0, or a store of two values to one element,
  - an operator on both CPU and GPU tensors, or a CPU tensor passed to a kernel,
  - a failing test: tests see a GPU and take the same branches as on one,
  - a training step whose loss or gradient differs from that on the CPU by more than its bound (`training_steps.py`).
Kernel faults are reported with their source line. `seeded_faults.py` has deliberate faults, which must be found.

Not checked: the order between threads of one program (check `debug_barrier`s by reading), shared memory and registers
(tests/test_compiles.py), everything below TTIR (layouts, PTX), tf32x3 (computed in fp32), cuBLAS and cuDNN (replaced by
the CPU's matrix products and convolutions; autocast uses the CPU's lists of operators), several streams or GPUs, host
waits, and speed. Tests that cannot run this way are skipped and listed, each with its reason (`plugin.UNSUPPORTED`).
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REPO = Path(__file__).parents[2]
PINS = {"torch": "2.13.0", "triton": "3.8.0", "ttsem": "0.1.0"}  # ttsem uses Triton's internals
# What else the tests import, in any version unless restricted
OTHERS = ["numpy<2", "nuscenes-devkit>=1.2", "tyro", "tensorboard", "pytest", "pytest-xdist", "scikit-image", "shapely"]
ALL_TESTS = ["tests/kernels", "tests/as_on_a_gpu/training_steps.py", "tests/as_on_a_gpu/seeded_faults.py"]
WORKERS = ["-n", str(os.cpu_count())]


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m tests.as_on_a_gpu", add_help=False)
    parser.add_argument("--env", type=Path)
    args, for_pytest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(for_pytest):
        return print(__doc__)
    python = sys.executable if args.env is None and _is_ready() else virtual_environment(args.env)
    if not any((REPO / a.split("::")[0]).exists() for a in for_pytest):  # only options, no test file or folder
        for_pytest = ALL_TESTS + for_pytest
    # without the addopts of pyproject.toml, which set another number of workers
    command = [python, "-m", "pytest", "-o", "addopts=", "-q", "-rs", *WORKERS, *for_pytest]
    return subprocess.run(command, cwd=REPO, env=_environment_variables()).returncode


def _is_ready():
    """Whether this Python has the pinned packages."""
    try:
        return all(version(name).split("+")[0] == pin for name, pin in PINS.items())
    except PackageNotFoundError:
        return False


def virtual_environment(folder):
    """The Python executable of the virtual environment in `folder` (None: one in ~/.cache), created if missing."""
    pins_hash = hashlib.sha256(repr((PINS, OTHERS, sys.version_info[:2])).encode()).hexdigest()[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    default = cache / "unipad-triton" / f"as-on-a-gpu-{pins_hash}"
    python, finished = (folder or default) / "bin" / "python", default / "finished"
    complete = finished if folder is None else python  # the file whose existence says that nothing is to be done
    if complete.exists():
        return python
    if sys.version_info < (3, 11):
        sys.exit("error: the check needs Python 3.11 or newer.")
    print(f"creating {folder or default}", flush=True)
    if folder is None:
        shutil.rmtree(default, ignore_errors=True)  # from an interrupted run
    subprocess.run([sys.executable, "-m", "venv", folder or default], check=True)
    pip = [python, "-m", "pip", "install", "-q"]
    torch, triton, ttsem = (f"{name}=={pin}" for name, pin in PINS.items())
    subprocess.run([*pip, torch, triton, *OTHERS], check=True)
    # ttsem's metadata requires Python 3.12 and torch 2.14; it runs with 3.11 and 2.13
    subprocess.run([*pip, "--no-deps", "--ignore-requires-python", ttsem], check=True)
    if folder is None:
        finished.touch()
    return python


def _environment_variables():
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return inherited | {"PYTEST_PLUGINS": "tests.as_on_a_gpu.plugin", "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
