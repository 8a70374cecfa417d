"""In this folder ops run their kernels, not their references: without a GPU, in Triton's interpreter.

pytest tests/kernels --reverse-programs     the interpreter runs programs in reverse order
"""

import importlib.util

import pytest
import torch

from tests.conftest import HAS_GPU
from unipad.kernels import backend


@pytest.fixture(autouse=True)
def kernels_run_without_a_gpu(monkeypatch):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton has wheels for Linux only")
    monkeypatch.setattr(backend, "interpret", not HAS_GPU)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is filled with NaN (or the largest integer), so that a kernel that leaves outputs unwritten fails."""
    # torch.utils.deterministic.fill_uninitialized_memory, on by default, takes effect only in deterministic mode;
    # with warn_only, ops that add atomically still run their kernels (see `backend.on_triton`)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_addoption(parser):
    parser.addoption("--reverse-programs", action="store_true", help="the interpreter runs programs in reverse order")


@pytest.fixture(autouse=True)
def order_of_programs(request, monkeypatch):
    """With --reverse-programs, reverses the interpreter's fixed order of programs, in which a race may go unnoticed."""
    if request.config.getoption("--reverse-programs", False) and not HAS_GPU:
        monkeypatch.setattr(*reversed_programs())


def reversed_programs():
    """Arguments of `monkeypatch.setattr` that reverse the order of programs."""
    from triton.runtime.interpreter import InterpreterBuilder

    plain = InterpreterBuilder.set_grid_idx

    def set_reversed(builder, *program):
        return plain(builder, *(n - 1 - i for n, i in zip(builder.grid_dim, program, strict=True)))

    return InterpreterBuilder, "set_grid_idx", set_reversed
