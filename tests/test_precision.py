"""--precision, whose default depends on the GPU."""

import pytest
import torch

from unipad.errors import UserError
from unipad.runtime import mixed_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
VOLTA, TURING, AMPERE = (7, 0), (7, 5), (8, 0)  # compute capabilities


@pytest.fixture
def gpu(monkeypatch):
    """A function that simulates a GPU of a given compute capability, always called Tesla T4. `torch.autocast` then
    returns its arguments, `GradScaler` whether it is enabled."""

    def pretend(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        monkeypatch.setattr(torch, "autocast", lambda device_type, dtype, enabled: (device_type, dtype, enabled))
        monkeypatch.setattr(torch.amp, "GradScaler", lambda device_type, enabled: enabled)

    return pretend


@pytest.mark.parametrize(
    "capability, precision, dtype, scaled",
    [
        (AMPERE, None, torch.bfloat16, False),
        (AMPERE, "bf16", torch.bfloat16, False),
        (TURING, None, torch.float16, True),
        (TURING, "fp16", torch.float16, True),
        (TURING, "fp32", torch.float32, False),
        (VOLTA, None, torch.float16, True),
    ],
)
def test_precision_of_a_gpu(capability, precision, dtype, scaled, gpu):
    """dtype: of autocast, which is off for fp32; scaled: whether gradients are scaled."""
    gpu(capability)
    assert mixed_precision(precision, GPU) == (("cuda", dtype, dtype != torch.float32), scaled)


def test_bf16_on_a_gpu_without_it_is_a_user_error(gpu):
    gpu(TURING)
    with pytest.raises(UserError, match="--precision bf16: Tesla T4 does not support bf16; use fp16, or leave"):
        mixed_precision("bf16", GPU)


def test_precision_of_a_cpu():
    autocast, scaler = mixed_precision(None, CPU)
    assert not autocast._enabled and not scaler.is_enabled()
    assert mixed_precision("bf16", CPU)[0].fast_dtype == torch.bfloat16
