"""How many operators and launches a rendered training step has: what the host needs for it, also without a GPU."""

import pytest
import torch

from tests.conftest import HAS_GPU
from unipad.kernels import backend

pytest.importorskip("triton", reason="Triton has wheels for Linux only")


@pytest.mark.skipif(HAS_GPU, reason="counts on CPU tensors, as the command does")
def test_a_rendered_step_has_few_operators_and_launches(monkeypatch):
    """Of camera-0.1, with the recipe's losses. `python -m benchmarks.count_rendered` lists them."""
    from benchmarks.count_rendered import RenderedStep, counted, of_kernels

    monkeypatch.setattr(backend, "interpret", True)
    step = RenderedStep()
    with counted(run=False) as counts:
        step.whole()
    launches = of_kernels(counts)
    assert launches <= 13 and counts.total() - launches <= 45, counts
    for parameter in step.renderer.parameters():  # the step is whole: everything that is trained has a gradient
        assert (parameter.grad is not None) == parameter.requires_grad
    assert step.volume.grad.dtype == torch.bfloat16
