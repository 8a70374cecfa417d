"""Shared fixtures. With a GPU ops run compiled kernels. Without one they run their references or, where a test sets
`backend.interpret`, the kernels in Triton's interpreter.
"""

import importlib.util
import os
import shutil
import signal

# The processes of pytest-xdist share the cores. Must be set before torch loads OpenMP.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without this, matrix products on a GPU raise under `torch.use_deterministic_algorithms(True)`. Must be set before CUDA
# starts; a program with --deterministic sets it itself, but tests run `main` in this process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before the first `import triton`


@pytest.fixture(autouse=True, scope="session")
def faster_interpreter():
    """Skip the repeated patches of `triton.language` in Triton's interpreter.

    The interpreter patches the module at each launch, and again at every call of a device function within it. The
    repetition changes nothing, but takes up to two fifths of the run time.
    """
    if HAS_GPU or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton import language as tl
    from triton.runtime import interpreter

    plain = interpreter._patch_lang

    def patch(fn):
        modules = [module for module in fn.__globals__.values() if module is tl or module is tl.core]
        # the interpreter replaces the built-in `load`
        already_patched = modules and not any(tl.core.is_builtin(module.load) for module in modules)
        return interpreter._LangPatchScope() if already_patched else plain(fn)  # an empty scope: nothing to restore

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang", patch)
        yield


@pytest.fixture
def device():
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def signal_handlers():
    """Restore the signal handlers after each test file: a program whose `main` a test calls here leaves its own set."""
    from unipad.exit import SIGNALS

    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def city(tmp_path_factory):
    """Root of a small synthetic dataset, v1.0-mini, shared by all tests; those that modify it use `city_copy`."""
    from unipad.data.synthetic import generate

    root = tmp_path_factory.mktemp("data") / "city"
    generate(root, scenes=2, keyframes=3, image_size=(72, 128), workers=2, features=16)
    return root


@pytest.fixture(scope="session")
def labeled(city, tmp_path_factory):
    """Root of a copy of `city` with occupancy labels, as a run of that task completes it."""
    from unipad.data.synthetic import add_occupancy

    root = tmp_path_factory.mktemp("labeled") / "city"
    shutil.copytree(city, root, ignore=shutil.ignore_patterns("unipad-index", "gts"))
    add_occupancy(root, workers=2)
    return root


@pytest.fixture
def city_copy(city, tmp_path, own_user_cache):
    """Root of a copy of `city` that the test may modify; no index is cached, in it or in the user's cache folder."""
    return shutil.copytree(city, tmp_path / "city", ignore=shutil.ignore_patterns("unipad-index"))


@pytest.fixture
def own_user_cache(tmp_path, monkeypatch):
    """Makes the user's cache folder a temporary one of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
