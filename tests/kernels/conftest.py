"""Here ops run their kernels on CPU tensors too, in the interpreter, where elsewhere they take their references."""

import importlib.util

import pytest
import torch

from kernels import backend
from tests.conftest import HAS_GPU


@pytest.fixture(autouse=True)
def kernels_run_without_a_gpu(monkeypatch):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton has wheels for Linux only")
    monkeypatch.setattr(backend, "interpret", not HAS_GPU)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty comes back as NaN (ints: max), so a kernel that leaves an output unwritten fails its test."""
    # also turns on torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
