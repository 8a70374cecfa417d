"""Features are channels-last from the images to the volume, so that kernels and cuDNN need no copies of them."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_rays import make_batch, seeded_generators
from unipad import config
from unipad.model.camera import CameraEncoder
from unipad.model.pretrain import Pretrain
from unipad.model.volume import Conv3x3x3
from unipad.recipes.encoders import TINY_CAMERA

GRID = config.Grid(low=(-8.0, -8.0, -2.0), high=(8.0, 8.0, 2.0), cell=(1.0, 2.0, 2.0))
POOL = replace(TINY_CAMERA, fpn_start=3, fpn_levels=1, view="pool", depth="complex", aspp_channels=8, volume_convs=1)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class LayoutRecorder(TorchDispatchMode):
    """Counts convolutions and layer norms, and records those whose inputs or outputs are not channels-last.

    Layer norms get [..., C] tensors, which are channels-last if they are contiguous.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.not_channels_last = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("convolution", "convolution_backward", "native_layer_norm"):
            self.calls += 1
            # a backward takes the output's gradient and the input, and returns the input's gradient first
            features = [*args[: 2 if name == "convolution_backward" else 1], out if torch.is_tensor(out) else out[0]]
            for x in filter(torch.is_tensor, features):  # the gradient of images is None
                layout = CHANNELS_LAST[x.dim()] if name.startswith("convolution") else torch.contiguous_format
                if not x.is_contiguous(memory_format=layout):
                    self.not_channels_last.append((name, tuple(x.shape), x.stride()))
        return out


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("camera", [TINY_CAMERA, POOL], ids=["gather", "pool"])
def test_convolutions_and_layer_norms_are_channels_last(camera, precision):
    net = Pretrain(config.PretrainRecipe(grid=GRID, camera=camera, rays=config.RayChoice(per_view=4)))
    batch = make_batch([[]], size=(64, 96), unpadded=(60, 90))  # one sample without points
    with LayoutRecorder() as recorder, torch.autocast("cpu", precision, enabled=precision != torch.float32):
        volume, _ = net.encode(batch, seeded_generators(0))
        volume.square().sum().backward()
    assert volume.is_contiguous(memory_format=torch.channels_last_3d)
    assert recorder.calls > 60  # layer norms forward, convolutions forward and backward
    assert not recorder.not_channels_last


@pytest.mark.parametrize("depth", ["simple", "complex"])
def test_levels_are_contiguous_without_a_copy(depth, monkeypatch):
    """The kernels need contiguous [..., C] tensors; `.contiguous()` must never have to copy to make them."""
    copied, original = [], torch.Tensor.contiguous

    def recording(tensor, *args, **kwargs):
        if not args and not kwargs and not tensor.is_contiguous():
            copied.append(tensor.shape)
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "contiguous", recording)
    encoder = CameraEncoder(replace(TINY_CAMERA, depth=depth, aspp_channels=8, depth_bins=5))
    features, depths = encoder(torch.rand(1, 2, 3, 64, 96), torch.tensor([60, 90]).expand(1, 2, 2))
    assert len(features) == len(depths) == 3 and all(t.is_contiguous() for t in features + depths)
    assert not copied


def test_weights_of_the_volume_convolution_are_channels_last():
    """Like the volume: otherwise cuDNN would convert them at every call. Loading a state dict keeps their format."""
    conv = Conv3x3x3(4, 6)
    conv.load_state_dict({"weight": torch.randn(6, 4, 3, 3, 3), "bias": torch.zeros(6)})
    assert conv.weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_depth_probabilities_keep_the_dtype_of_their_logits():
    """Not a layout, but memory too: under autocast a softmax returns fp32, though only its sums need fp32."""
    encoder = CameraEncoder(replace(TINY_CAMERA, depth_bins=64))
    logits = 5 * torch.randn(1, 64, 3, 4, dtype=torch.bfloat16)
    stubs = dict(  # the depth head returns `logits`
        backbone=lambda *args: [], neck=lambda levels: [logits], input_proj=lambda x: x, depth_net=lambda x, _: x
    )
    for name, function in stubs.items():
        delattr(encoder, name)  # a function cannot replace a submodule that is still registered
        setattr(encoder, name, function)
    with torch.autocast("cpu", torch.bfloat16):
        _, (depth,) = encoder(torch.rand(1, 1, 3, 96, 128), torch.tensor([[[96, 128]]]))
    assert depth.dtype == torch.bfloat16
    expected = logits.double().softmax(1).permute(0, 2, 3, 1)[None]
    torch.testing.assert_close(depth.double(), expected, rtol=2**-8, atol=1e-30)  # only the result is rounded
