"""View transforms and the convolutions on the volume, compared with records of the original and with PyTorch."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests import golden
from tests.check import launches
from tests.test_rays import make_batch, seeded_generators
from unipad import config
from unipad.errors import UserError
from unipad.kernels import backend
from unipad.model.encoder import Encoder
from unipad.model.volume import Conv3x3x3, ConvNormReLU3d, GatherLift, VoxelPoolLift, view_transform
from unipad.recipes.encoders import CAMERA_075

GRID = config.Grid(low=(-54.0, -54.0, -5.0), high=(54.0, 54.0, 3.0), cell=(5.4, 6.0, 1.6))  # of the records
# The records have 2 samples of 6 views, one frame each, and images of 256 x 448 pixels.


def test_gather_lift_reproduces_the_original():
    arrays, _ = golden.load("view_trans_2lvl")
    features = [arrays[f"in/feat_{l}"].permute(0, 1, 3, 4, 2) for l in range(2)]
    depths = [arrays[f"in/depth_{l}"].unflatten(0, (2, 6)).permute(0, 1, 3, 4, 2) for l in range(2)]
    volume = GatherLift(GRID, config.CameraConfig())(features, depths, arrays["in/lidar2img"][:, :, 0], (256, 448))
    golden.assert_close_to_max(volume, arrays["out/volume"], 1e-5)
    assert volume.is_contiguous(memory_format=torch.channels_last_3d)


def test_voxel_pool_lift_reproduces_the_original():
    arrays, _ = golden.load("voxel_pool_depth")
    feature = arrays["in/feat"].permute(0, 1, 3, 4, 2)
    depth = arrays["in/depth"].unflatten(0, (2, 6)).permute(0, 1, 3, 4, 2)
    camera = config.CameraConfig(fpn_levels=1, depth_range=(1.0, 61.0), truncate=True)
    volume = VoxelPoolLift(GRID, camera)([feature], [depth], arrays["in/lidar2img"][:, :, 0], (256, 448))
    golden.assert_close_to_max(volume, arrays["out/volume"], 1e-5)
    assert volume.is_contiguous(memory_format=torch.channels_last_3d)


def test_several_pooled_levels_and_unknown_view_transforms_are_errors():
    with pytest.raises(UserError, match="one level"):
        view_transform(GRID, config.CameraConfig(view="pool", fpn_levels=4))
    with pytest.raises(ValueError, match="choose gather or pool"):
        view_transform(GRID, config.CameraConfig(view="splat"))


# that of the paper's final recipes, at a small size
SMALL_CAMERA = replace(CAMERA_075, depths=(1, 1, 1, 1), widths=(4, 8, 16, 32), channels=8, aspp_channels=4)
SMALL_CAMERA = replace(SMALL_CAMERA, depth_bins=20, frozen_stages=0)


def test_points_are_found_once_per_calibration(device, monkeypatch):
    """In training steps of an encoder with batches that `Batch.to` has moved, each with tensors of its own."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    monkeypatch.setattr(backend, "interpret", device == "cpu")
    encoder = Encoder(config.Recipe(grid=GRID, camera=SMALL_CAMERA)).to(device)
    batch = make_batch([[]], size=(64, 96), unpadded=(60, 90))
    other = replace(batch, lidar2image=batch.lidar2image @ torch.diag(torch.tensor([1.0, -1, 1, 1])))
    copy = replace(batch, lidar2image=batch.lidar2image.clone())
    volumes = []
    for given, found in ((batch, True), (copy, False), (other, True), (other, False), (batch, True)):
        with launches() as launched:
            volumes.append(encoder.encode(given.to(device), None).volume)
        assert ("_voxels_kernel" in launched) == found
        volumes[-1].sum().backward()
    assert torch.equal(volumes[0], volumes[1]) and torch.equal(volumes[0], volumes[4])
    assert not torch.equal(volumes[0], volumes[2])
    # nothing is kept of cameras that the host does not know, such as those of a transformed batch
    moved = replace(batch.to(device), lidar2image=other.lidar2image.to(device))
    assert moved.calibration is None and torch.equal(encoder.encode(moved, None).volume, volumes[2])
    moved = batch.to(device)
    moved.lidar2image.copy_(other.lidar2image)
    assert moved.calibration is None and torch.equal(encoder.encode(moved, None).volume, volumes[2])


def test_every_parameter_of_the_final_camera_encoder_gets_a_gradient():
    """Also the shapes of its outputs, and that in evaluation equal generators give equal volumes."""
    encoder = Encoder(config.Recipe(grid=GRID, camera=SMALL_CAMERA))
    batch = make_batch([[], []], size=(64, 96), unpadded=(60, 90))  # two samples of two views, without points
    encoded = encoder.encode(batch, seeded_generators(0, 1))
    assert encoded.volume.shape == (2, 8, 5, 18, 20) and encoded.volume.any()  # [B, C, Z, Y, X]
    assert [tuple(d.shape) for d in encoded.depths] == [(2, 2, 2, 3, 20)]  # one level, of stride 32: [B, N, h, w, D]
    assert encoded.masks["camera"].shape == (2, 2, 2, 3)
    (encoded.volume.square().sum() + encoded.depths[0].square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())

    volume, masks = encoder.eval()(batch, seeded_generators(0, 1))
    again, _ = encoder(batch, seeded_generators(0, 1))
    assert torch.equal(volume, again) and masks.keys() == {"camera"}


def test_projection_to_the_render_volume_reproduces_the_original():
    arrays, _ = golden.load("render_head_viewtrans_train")
    project = ConvNormReLU3d(12, 32)
    project.load_state_dict(golden.recorded(arrays, "project."))
    golden.assert_close_to_max(project(arrays["out/unified_volume"]), arrays["out/render_volume"], 1e-5)
    # the running statistics of the batch norm after this forward pass
    for name, statistic in golden.recorded(arrays, "project.", "out/after/").items():
        golden.assert_close_to_max(project.state_dict()[name], statistic, 1e-5, name)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("Z", [1, 4])
def test_conv3x3x3_matches_conv3d(Z, memory_format):
    ours, plain = Conv3x3x3(3, 5).double(), nn.Conv3d(3, 5, kernel_size=3, padding=1).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, Z, 6, 7, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    d_out = torch.randn(2, 5, Z, 6, 7, dtype=torch.float64)
    a, b = ((out := conv(x), *torch.autograd.grad(out, [x, *conv.parameters()], d_out)) for conv in (ours, plain))
    for actual, expected in zip(a, b, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
