"""Depth head, depth targets and depth loss, compared with records of the original and by hand."""

from dataclasses import replace

import pytest
import torch

from tests.check import DivideLikeGpu
from tests.golden import assert_close_to_max, load, recorded
from tests.test_rays import make_batch
from unipad.config import CameraConfig
from unipad.kernels.voxel_pool import voxel_pool
from unipad.model.depth import ASPP, ComplexDepth, depth_head, depth_loss, depth_targets


def generators(B):
    """One per sample, with the seeds 0 to B - 1."""
    return [torch.Generator().manual_seed(b) for b in range(B)]


def test_complex_depth_matches_the_original():
    arrays, _ = load("depth_net_aspp")
    net = ComplexDepth(channels=16, bins=30, aspp_channels=6).eval()
    net.load_state_dict(recorded(arrays, "encoder.camera.depth_net."))
    x = arrays["in/x"].requires_grad_()
    logits = net(x)
    assert_close_to_max(logits, arrays["out/logits"], 1e-5, "logits")
    depth = logits.softmax(1)
    assert_close_to_max(depth, arrays["out/depth"], 1e-5, "depth")
    (depth * arrays["in/w_out"]).sum().backward()
    assert_close_to_max(x.grad, arrays["grad/x"], 1e-5, "x")
    gradients = recorded(arrays, "encoder.camera.depth_net.", "grad/")
    assert gradients.keys() == dict(net.named_parameters()).keys()
    for key, param in net.named_parameters():
        assert_close_to_max(param.grad, gradients[key], 1e-5, key)


def test_receptive_field_of_aspp():
    """Without the global average pooling, an output depends on its own cell and on those 6, 12 or 18 cells away along
    an axis or a diagonal: eight at each distance, or fewer where a ReLU cuts them off."""
    net = ASPP(channels=2, hidden=3).eval().double()
    torch.nn.init.zeros_(net.global_avg_pool[1].weight)
    x = torch.randn(1, 2, 41, 41, dtype=torch.float64, requires_grad=True)
    torch.nn.init.constant_(net.bn1.bias, 100.0)  # so that the last ReLU passes every value
    net(x)[0, :, 20, 20].sum().backward()
    reached = {tuple(cell) for cell in (x.grad[0] != 0).any(0).nonzero().sub(20).tolist()}
    dilations = [0, 6, 12, 18]  # 0: the 1 x 1 convolution
    taps = {(d * a, d * b) for d in dilations for a in (-1, 0, 1) for b in (-1, 0, 1)}
    assert reached <= taps and {max(map(abs, cell)) for cell in reached} == set(dilations)  # every ring is reached


def test_dropout_is_drawn_per_sample():
    """Half of the values are dropped, the others doubled; a sample's mask does not depend on the other samples."""
    net = ComplexDepth(channels=8, bins=4, aspp_channels=2).train()
    net.depth_conv[4] = torch.nn.Identity()  # the convolution after the dropout
    x = torch.randn(4, 8, 6, 7)  # two samples of two views
    dropped = net(x, generators(2))
    other = net(x, [torch.Generator().manual_seed(7), *generators(2)[1:]])  # another seed for the first sample
    assert torch.equal(dropped[2:], other[2:]) and not torch.equal(dropped[:2], other[:2])
    whole = net(x)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])
    assert 0.4 < kept[whole > 0].float().mean() < 0.6
    passed = (whole[0] > 0) & (whole[1] > 0)  # by the ReLU
    assert not torch.equal(kept[0][passed], kept[1][passed])  # the two views of a sample have different masks


def test_no_dropout_in_evaluation():
    net = ComplexDepth(channels=8, bins=4, aspp_channels=2).eval()
    x = torch.randn(2, 8, 6, 7)
    torch.testing.assert_close(net(x, generators(2)), net(x), rtol=0, atol=0)


def test_an_unknown_depth_head_is_rejected():
    with pytest.raises(ValueError, match="choose simple or complex"):
        depth_head(CameraConfig(depth="deep"))


RECORDED_CFG = CameraConfig(depth_range=(1.0, 61.0), depth_weight=3.0)


def load_recorded():
    """Batch, depths [B, N, h, w, bins] and arrays of the record voxel_pool_depth: two samples of six views."""
    arrays, _ = load("voxel_pool_depth")
    points = [arrays["in/points_0"], arrays["in/points_1"]]
    batch = replace(
        make_batch([[], []]),
        images=torch.zeros(2, 6, 3, 256, 448),  # only their size is read
        image_sizes=arrays["in/pad_before_shape"][..., :2],
        lidar2image=arrays["in/lidar2img"][:, :, 0],  # of the only camera frame, the keyframe
        points=torch.cat(points),
        point_counts=torch.tensor([len(p) for p in points]),
    )
    depths = arrays["in/depth"].unflatten(0, (2, 6)).permute(0, 1, 3, 4, 2)
    return batch, depths, arrays


def test_targets_match_the_original():
    batch, _, arrays = load_recorded()
    targets = depth_targets(batch, h=16, w=28, bins=30, depth_range=RECORDED_CFG.depth_range)
    expected = arrays["out/downsampled_gt_onehot_argmax"].view(2, 6, 16, 28)
    assert torch.equal(targets, expected) and (targets >= 0).sum() > 1000


def test_loss_matches_the_original():
    """Also the gradient w.r.t. the depths, of the loss and of the volume that is pooled with them."""
    batch, depths, arrays = load_recorded()
    depths.requires_grad_()
    loss = depth_loss([depths], batch, RECORDED_CFG)
    assert_close_to_max(loss, arrays["out/loss_depth_0"], 1e-5, "loss")
    features = arrays["in/feat"].permute(0, 1, 3, 4, 2)
    volume = voxel_pool(
        features,
        depths,
        batch.lidar2image,
        low=(-54.0, -54.0, -5.0),
        cell=(5.4, 6.0, 1.6),
        shape=(20, 18, 5),
        stride=16,
        depth_range=RECORDED_CFG.depth_range,
        truncate=True,
    )
    ((volume.permute(0, 4, 1, 2, 3) * arrays["in/w_out"]).sum() + loss).backward()
    assert_close_to_max(depths.grad.permute(0, 1, 4, 2, 3).flatten(0, 1), arrays["grad/depth"], 1e-5, "depths")


def test_targets_do_not_depend_on_how_a_gpu_divides():
    """Depths at and just below bin borders, some of which would get another bin if they were multiplied by the
    reciprocal of the bin size, as a GPU does when it divides by a Python number."""
    near, far, bins = 3.0, 8.0, 100
    # y of points; view 0 looks along y from y = 1
    ahead = (torch.arange(1, bins).double() * (far - near) / bins + near + 1).float()
    ahead = torch.cat([ahead, ahead.nextafter(torch.zeros(()))])
    distance, size = ahead - 1 - near, torch.tensor((far - near) / bins)
    assert ((distance * (1 / size)).floor() != (distance / size).floor()).any()
    batch = make_batch([[[0.0, y, 2.0]] for y in ahead.tolist()], views=1)  # a sample per point
    targets = depth_targets(batch, h=2, w=4, bins=bins, depth_range=(near, far))
    assert targets.amax(dim=(1, 2, 3)).tolist() == (distance / size).long().tolist()  # the one cell with a point
    with DivideLikeGpu():
        assert torch.equal(depth_targets(batch, h=2, w=4, bins=bins, depth_range=(near, far)), targets)


def test_targets_by_hand():
    """8 x 8 pixels per cell, bins of 2 m from 2 m (near) to 10 m (far); view 0 looks along +y from (0, 1, 2), principal
    point (16, 8), focal length 10 pixels.

    In the comments, u, v are pixels, z is the depth in the camera in meters, and a cell is (row, column).
    """
    points = [
        [0.0, 7.0, 2.0],  # z 6: bin 2 of cell (1, 2)
        [0.0, 6.0, 2.0],  # z 5: nearer in the same cell, bin 1
        [0.2, 8.99, 2.0],  # z 7.99: farther in the same cell
        [-1.2, 7.0, 2.0],  # u 14, z 6: bin 2 of cell (1, 1)
        [-0.76, 5.0, 2.0],  # u 14.1, z 4: nearer in cell (1, 1), on the border of bins 0 and 1: bin 1
        [1.5, 2.5, 2.0],  # z 1.5 < near, and within 3 m of the LiDAR's vertical axis
        [-3.0, 3.0, 2.0],  # z 2 = near: excluded
        [4.0, 10.9, 2.0],  # u 20.04, z 9.9: farther in cell (1, 2)
        [8.0, 11.0, 2.0],  # u 24, z 10 = far: excluded
        [0.0, 7.0, 2.9],  # v 6.5 rounds to 6: cell (0, 2), z 6: bin 2
        [0.0, 7.0, 2.3],  # v 7.5 rounds to 8: cell (1, 2), z 6: farther
    ]
    targets = depth_targets(make_batch([points], views=1), h=2, w=4, bins=4, depth_range=(2.0, 10.0))
    assert targets.tolist() == [[[[-1, -1, 2, -1], [-1, 1, 1, -1]]]]


def test_loss_by_hand():
    """Binary cross entropy of two cells with a point in bin 0: -ln(1/2) - 2 ln(1 - 1/4), and -ln(1/4) - ln(1 - 1/2) -
    ln(1 - 1/4). depth_weight 2 times the mean over the two cells is their sum; two levels are added."""
    batch = make_batch([[[0.0, 6.0, 2.0], [-1.6, 6.0, 2.0]]], views=1)
    cfg = CameraConfig(depth_range=(4.0, 16.0), depth_weight=2.0)
    depths = torch.full((1, 1, 2, 4, 3), torch.nan)
    depths[0, 0, 1, 2] = torch.tensor([0.5, 0.25, 0.25])
    depths[0, 0, 1, 1] = torch.tensor([0.25, 0.5, 0.25])
    depths[depths.isnan()] = 0.9  # cells without a LiDAR point do not count
    likelihoods = torch.tensor([1 / 2, 3 / 4, 3 / 4, 1 / 4, 1 / 2, 3 / 4])
    torch.testing.assert_close(depth_loss([depths], batch, cfg), -likelihoods.log().sum())
    torch.testing.assert_close(depth_loss([depths, depths], batch, cfg), -2 * likelihoods.log().sum())


def test_loss_is_zero_without_points_and_finite_where_the_probability_is_0():
    depths = torch.zeros(1, 1, 2, 4, 3)
    depths[..., 2] = 1.0
    depths.requires_grad_()
    cfg = CameraConfig(depth_range=(4.0, 16.0), depth_weight=1.0)
    assert depth_loss([depths], make_batch([[]], views=1), cfg) == 0
    wrong = depth_loss([depths], make_batch([[[0.0, 6.0, 2.0]]], views=1), cfg)
    (grad,) = torch.autograd.grad(wrong, depths)
    # bin 0 should be 1 and bin 2 should be 0: each adds 87, -ln of the smallest normal fp32 number
    assert wrong.isfinite() and grad.isfinite().all() and 150 < wrong < 200


def test_loss_is_computed_in_fp32():
    batch, depths, _ = load_recorded()
    with torch.autocast("cpu", torch.bfloat16):
        loss = depth_loss([depths.bfloat16()], batch, RECORDED_CFG)
    assert loss.dtype == torch.float32
    assert_close_to_max(loss, depth_loss([depths], batch, RECORDED_CFG), 1e-2)  # the depths are rounded to bf16
