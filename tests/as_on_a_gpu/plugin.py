"""What pytest loads before it reads any test (PYTEST_PLUGINS): tests ask at once whether there is a GPU."""

import inspect

import pytest

from tests.as_on_a_gpu.pretended import pretended_gpu

# Words in a test's own source, and why it cannot be judged; pytest's summary names the tests that they skip.
BEYOND = {
    "CUDAGraph": "a graph records what a GPU is given",
    "torch.compile(": "compiled code asks PyTorch's build for CUDA",
    "opcheck(": "fake tensors know nothing of a pretended GPU",
}


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config):
    gpu = pretended_gpu()
    gpu.__enter__()
    early_config.add_cleanup(lambda: gpu.__exit__(None, None, None))


def pytest_collection_modifyitems(items):
    for item in items:
        source = inspect.getsource(item.function)
        for word, reason in BEYOND.items():
            if word in source:
                item.add_marker(pytest.mark.skip(reason=f"as on a GPU: {reason} ({word.rstrip('(')})"))
