"""Shared fixtures. With a GPU the kernels run compiled; without one, in Triton's interpreter."""

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite's processes share the cores; before torch loads OpenMP
# cuBLAS raises under strict determinism without it (`unipad.runtime.start` sets it too); before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before the first `import triton`


@pytest.fixture
def device():
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def city(tmp_path_factory):
    """Root of a small synthetic dataset, v1.0-mini. Read-only: tests that modify it use `copy`."""
    from unipad.data.synthetic import generate

    root = tmp_path_factory.mktemp("data") / "city"
    generate(root, scenes=2, keyframes=3, image_size=(72, 128), workers=2)
    return root


@pytest.fixture
def copy(city, tmp_path, own_user_cache):
    """Root of a copy of the city that the test may modify."""
    return shutil.copytree(city, tmp_path / "city", ignore=shutil.ignore_patterns("unipad-index"))


@pytest.fixture
def own_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
