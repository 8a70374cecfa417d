"""A diverged run ends with a one-line error, whether its loss is checked or the model raises an exception first."""

import pytest
import torch
from torch import nn

from tests.test_train import run_train
from unipad.errors import UserError
from unipad.progress import Progress
from unipad.runtime import World


def test_a_diverging_run_ends_with_one_line(city, tmp_path):
    """From the second step on, neither the SDF nor the ray samples are finite. That is noticed at the fourth: the loss
    is checked only when it is logged or weights are saved (`run_train` saves every 99 steps)."""
    flags = ["--modality", "lidar", "--preset", "tiny", "--data-root", city, "--steps", 4, "--log-every", 4]
    done = run_train(*flags, "--lr", 1e5, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "at step 4, loss, gradients or weights are not finite. Lower --lr or use --precision fp32" in done.stderr
    assert not list(tmp_path.glob("outputs/*/*/checkpoints/*.pt"))  # diverged weights are not saved


def test_errors_of_diverged_weights_are_explained():
    """If weights are not finite, another exception than a `UserError` becomes the explanation; others are unchanged."""
    world = World(rank=0, size=1, device=torch.device("cpu"))
    net, progress = nn.Linear(2, 1), Progress(run=None, world=world, step=0, last=4, steps=4, batch_size=1)
    with progress.explains_divergence(net, step=3):
        pass
    for error in (IndexError, UserError):
        with pytest.raises(error), progress.explains_divergence(net, step=3):
            raise error
    nn.init.constant_(net.bias, torch.nan)
    with pytest.raises(UserError, match="at step 3, loss"), progress.explains_divergence(net, step=3):
        raise IndexError
    with pytest.raises(UserError, match="^unchanged$"), progress.explains_divergence(net, step=3):
        raise UserError("unchanged")
