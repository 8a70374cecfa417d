"""Pytest plugin that simulates a GPU. PYTEST_PLUGINS loads it before any test, since tests look for a GPU at import."""

import inspect

import pytest

from tests.as_on_a_gpu.simulated_gpu import simulated_gpu

# Text in a test's source -> why such tests are skipped; pytest's summary lists them
UNSUPPORTED = {
    "CUDAGraph": "a CUDA graph records the work of a real GPU",
    "torch.compile(": "compiled code needs a CUDA build of PyTorch",
    "opcheck(": "fake tensors bypass this simulated GPU, on which kernels run",
    "WaitRecorder(": "the simulation itself reads tensors on the host; these reads would be recorded as waits",
    'load("render_neus_eval")': "the launches of this test are too large to be checked for races",
}


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config):
    gpu = simulated_gpu()
    gpu.__enter__()
    early_config.add_cleanup(lambda: gpu.__exit__(None, None, None))


def pytest_collection_modifyitems(items):
    for item in items:
        source = inspect.getsource(item.function)
        for word, reason in UNSUPPORTED.items():
            if word in source:
                item.add_marker(pytest.mark.skip(reason=f"as on a GPU: {reason} ({word.rstrip('(')})"))
