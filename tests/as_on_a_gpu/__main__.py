"""Execute the GPU's path without a GPU: kernel tests, and one small training step of each modality.

    python -m tests.as_on_a_gpu                                     everything
    python -m tests.as_on_a_gpu tests/kernels/test_lift.py -k crowd  some of it; arguments are pytest's
    python -m tests.as_on_a_gpu --env PATH ...                      in that environment, made if it is not there

Linux, Python 3.11 or newer. The first run makes a virtual environment in ~/.cache/unipad-triton. Every launch is
compiled by Triton's front end for sm_90 and executed on the CPU as its TTIR, by the package ttsem. The exit code is 1
if there is
  - an access outside of the tensors that a kernel was given,
  - a race: two programs of a launch touch an element, one of them writes it, and not both atomically,
  - memory that nobody wrote: new tensors are NaN (integers: the largest), and the tests' comparisons find that,
  - an operation without a defined result: a division by 0, one store of two values to one element,
  - an operator between tensors on the CPU and on the GPU, or a kernel that is given one on the CPU,
  - a test that fails: tests see a GPU and take the branches that they would take on one,
  - a step whose loss or gradient differs from the CPU's by more than its bound (`whole_steps.py`).
Faults come with the kernel's line. `seeded_faults.py` holds one of each kind, which has to be found.

What it cannot judge: the order between the threads of one program (read the `debug_barrier`s), shared memory and
registers (tests/test_compiles.py), what comes after TTIR (layouts, PTX), tf32x3 (computed in fp32), cuBLAS and cuDNN
(the CPU's products and convolutions; autocast by the CPU's lists), several streams or GPUs, and time. A host that waits
for the device is no fault here. Tests of CUDA graphs, torch.compile and opcheck are skipped by the words in
`plugin.BEYOND`, and named.
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
PINS = {"torch": "2.13.0", "triton": "3.8.0", "ttsem": "0.1.0"}  # ttsem reads Triton's insides: these go together
OTHERS = ["numpy<2", "nuscenes-devkit>=1.2", "tyro", "tensorboard", "pytest", "pytest-xdist", "scikit-image", "shapely"]
EVERYTHING = ["tests/kernels", "tests/as_on_a_gpu/whole_steps.py", "tests/as_on_a_gpu/seeded_faults.py"]
PROCESSES = ["-n", str(os.cpu_count())]


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m tests.as_on_a_gpu", add_help=False)
    parser.add_argument("--env", type=Path)
    args, for_pytest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(for_pytest):
        return print(__doc__)
    python = sys.executable if args.env is None and _is_ready() else environment(args.env)
    if not any((REPO / a.split("::")[0]).exists() for a in for_pytest):
        for_pytest = EVERYTHING + for_pytest
    command = [python, "-m", "pytest", "-o", "addopts=", "-q", "-rs", *PROCESSES, *for_pytest]
    return subprocess.run(command, cwd=REPO, env=_variables()).returncode


def _is_ready():
    """True where this Python has what the check needs."""
    try:
        return all(version(name).split("+")[0] == wanted for name, wanted in PINS.items())
    except PackageNotFoundError:
        return False


def environment(folder):
    """The Python of the environment in `folder` (None: one of our own), made first where there is none."""
    pins = hashlib.sha256(repr((PINS, OTHERS, sys.version_info[:2])).encode()).hexdigest()[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    own = cache / "unipad-triton" / f"as-on-a-gpu-{pins}"
    python, finished = (folder or own) / "bin" / "python", own / "finished"
    if finished.exists() if folder is None else python.exists():
        return python
    if sys.version_info < (3, 11):
        sys.exit("error: the check needs Python 3.11 or newer.")
    print(f"making {folder or own}", flush=True)
    if folder is None:
        shutil.rmtree(own, ignore_errors=True)  # half made
    subprocess.run([sys.executable, "-m", "venv", folder or own], check=True)
    pip = [python, "-m", "pip", "install", "-q"]
    exact = [f"{name}=={wanted}" for name, wanted in PINS.items()]
    subprocess.run([*pip, *exact[:2], *OTHERS], check=True)
    # its metadata asks for Python 3.12 and torch 2.14; it runs on 3.11 and 2.13
    subprocess.run([*pip, "--no-deps", "--ignore-requires-python", exact[2]], check=True)
    if folder is None:
        finished.touch()
    return python


def _variables():
    ours = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return ours | {"PYTEST_PLUGINS": "tests.as_on_a_gpu.plugin", "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
