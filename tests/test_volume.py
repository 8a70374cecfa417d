import pytest
import torch
from torch import nn

from tests import golden
from unipad import config
from unipad.model.volume import Conv3x3x3, ConvNormReLU3d, GatherLift

GRID = config.Grid(low=(-54.0, -54.0, -5.0), high=(54.0, 54.0, 3.0), cell=(5.4, 6.0, 1.6))  # of the record


def test_gather_lift_reproduces_the_original():
    arrays, _ = golden.load("view_trans_2lvl")
    features = [arrays[f"in/feat_{l}"].permute(0, 1, 3, 4, 2) for l in range(2)]
    depths = [arrays[f"in/depth_{l}"].unflatten(0, (2, 6)).permute(0, 1, 3, 4, 2) for l in range(2)]
    volume = GatherLift(GRID, config.Camera())(features, depths, arrays["in/lidar2img"][:, :, 0], (256, 448))
    golden.assert_close_to_max(volume, arrays["out/volume"], 1e-5)
    assert volume.is_contiguous(memory_format=torch.channels_last_3d)


def test_render_projection_reproduces_the_original():
    arrays, _ = golden.load("render_head_viewtrans_train")
    leaves = "pts_bbox_head.render_conv."
    project = ConvNormReLU3d(12, 32)
    project.load_state_dict(golden.under(arrays, f"state/{leaves}"))
    golden.assert_close_to_max(project(arrays["out/unified_volume"]), arrays["out/render_volume"], 1e-5)
    for name, after in golden.under(arrays, f"out/after/{leaves}").items():
        golden.assert_close_to_max(project.state_dict()[name], after, 1e-5, name)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("Z", [1, 4])
def test_sliced_convolution_is_conv3d(Z, memory_format):
    ours, plain = Conv3x3x3(3, 5).double(), nn.Conv3d(3, 5, kernel_size=3, padding=1).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, Z, 6, 7, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    d_out = torch.randn(2, 5, Z, 6, 7, dtype=torch.float64)
    a, b = ((out := conv(x), *torch.autograd.grad(out, [x, *conv.parameters()], d_out)) for conv in (ours, plain))
    for ours, truth in zip(a, b, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
