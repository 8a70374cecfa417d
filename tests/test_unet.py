"""SpUNet matches the original; features of points do not depend on the other samples of a batch."""

import pytest
import torch

from tests.check import DivideLikeGpu, WaitRecorder
from tests.golden import assert_close_to_max, load, recorded
from unipad import config
from unipad.kernels import backend
from unipad.model.unet import Unet, UnetEncoder
from unipad.names import to_original
from unipad.spconv.tensor import SparseConvTensor
from unipad.spconv.voxels import VoxelSet

GRID = config.Grid(low=(-8.0, -8.0, -2.0), high=(8.0, 8.0, 4.0), cell=(1.0, 1.0, 2.0))  # 16 x 16 x 3 cells
# Two stages down, two up; features have 5 channels (the last width), and by coincidence points have 5 columns
SMALL = config.UnetConfig(cell=0.5, mask_block=2, stem=4, widths=(4, 6, 6, 5), blocks=(1, 1, 1, 1))


def cloud(counts=(300, 200)):
    """Random points [P, 5] of the keyframe, at least 0.1 m inside `GRID`, and the counts of both samples."""
    low, extent = torch.tensor([-7.9, -7.9, -1.9, 0, 0]), torch.tensor([15.8, 15.8, 5.8, 255, 0])
    return low + torch.rand(sum(counts), 5) * extent, torch.tensor(counts)


def test_matches_the_original():
    arrays, record = load("spunet_eval")
    cfg = record["config"]
    net = Unet(cfg["in_channels"], cfg["base_channels"], cfg["channels"], cfg["layers"]).eval()
    net.load_state_dict(recorded(arrays, "encoder.lidar.encoder."))
    coords = arrays["in/coors"].int()
    features = arrays["in/voxel_features"].requires_grad_()
    # multiples of 16: the record's net halves the resolution four times
    shape = [-(-size // 16) * 16 for size in (coords[:, 1:].amax(dim=0) + 1).tolist()]
    out = net(SparseConvTensor.of(features, VoxelSet(coords, shape, int(arrays["in/batch_size"])))).features
    assert_close_to_max(out, arrays["out/features"], 1e-5)
    (out * arrays["in/w_out"]).sum().backward()  # the sum whose gradients were recorded
    assert_close_to_max(features.grad, arrays["grad/voxel_features"], 1e-5, "features")
    gradients = recorded(arrays, "encoder.lidar.encoder.", "grad/")
    assert gradients.keys() == dict(net.named_parameters()).keys()
    for key, param in net.named_parameters():
        assert_close_to_max(param.grad, gradients[key], 1e-5, key)


def test_weights_convert_back_to_the_originals_keys():
    arrays, _ = load("spunet_eval")
    ours = {f"encoder.lidar.encoder.{name}": w for name, w in recorded(arrays, "encoder.lidar.encoder.").items()}
    theirs = {name.removeprefix("state/"): w for name, w in arrays.items() if name.startswith("state/")}
    del theirs["pts_middle_encoder.mtoken"]  # the mask token, which `Unet` does not have
    back, unknown = to_original(ours, spconv=2)
    assert not unknown and back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_size_of_the_default_unet():
    """In mask blocks and in parameters: Pointcept reports 39.2 M, with a head for 20 classes (96 * 20 + 20)."""
    with torch.device("meta"):
        net = UnetEncoder(config.UnetConfig(), config.Grid((-54.0, -54.0, -5.0), (54.0, 54.0, 3.0), (0.6, 0.6, 1.6)))
    assert net.mask_shape == (10, 135, 135)  # z, y, x: blocks of 0.8 m
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(39.2e6, rel=2e-3)


def test_points_have_the_features_of_their_voxels_in_any_batch():
    """A sample's features do not depend on other samples of the batch, or on a point far outside the grid."""
    points, counts = cloud()
    net = UnetEncoder(SMALL, GRID).eval()
    features, rows, voxel_of = net.voxel_features(points, counts)
    assert features.shape == (len(rows), SMALL.channels)
    # every point is in the same voxel as the point that was chosen for it
    assert torch.equal((points[:, :3] / SMALL.cell).floor(), (points[rows[voxel_of], :3] / SMALL.cell).floor())
    assert torch.equal(voxel_of[rows], torch.arange(len(rows)))
    far = torch.tensor([[-91.3, 70.0, 9.0, 1.0, 0.0]])
    # the second sample alone, with that point
    alone, _, alone_of = net.voxel_features(torch.cat([points[300:], far]), [201])
    torch.testing.assert_close(alone[alone_of[:200]], features[voxel_of[300:]], rtol=1e-4, atol=1e-5)


def test_without_points_every_layer_runs_and_has_a_gradient():
    """The gradient is zero. If there were none, the other processes of distributed training would wait forever for the
    one without points."""
    net = UnetEncoder(SMALL, GRID)
    features, rows, voxel_of = net.voxel_features(torch.zeros(0, 5), [0, 0])
    assert features.shape == (0, 5) and not len(rows) and not len(voxel_of)
    volume, grid_coords = net(torch.zeros(0, 5), [0, 0], torch.rand(2, *net.mask_shape))
    assert volume.shape == (2, 5, 3, 16, 16) and not volume.any() and not len(grid_coords)
    for out in (features, volume):
        net.zero_grad()
        out.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_a_cell_of_the_volume_is_the_mean_of_its_voxels():
    points, counts = cloud()
    net = UnetEncoder(SMALL, GRID).eval()
    volume, grid_coords = net(points, counts)
    assert volume.shape == (2, 5, 3, 16, 16) and volume.is_contiguous(memory_format=torch.channels_last_3d)
    features, rows, _ = net.voxel_features(points, counts)
    x, y, z = ((points[rows, :3] - torch.tensor(GRID.low)) / torch.tensor(GRID.cell)).long().unbind(1)
    sample = (rows >= 300).long()  # the first sample has 300 points
    total, count = torch.zeros(2, 3, 16, 16, 5), torch.zeros(2, 3, 16, 16, 1)
    total.index_put_((sample, z, y, x), features, accumulate=True)
    count.index_put_((sample, z, y, x), torch.ones(len(rows), 1), accumulate=True)
    torch.testing.assert_close(volume, (total / count.clamp(min=1)).permute(0, 4, 1, 2, 3), rtol=1e-4, atol=1e-5)
    assert torch.equal(grid_coords[:, 1:], ((points[rows, :3] - torch.tensor(GRID.low)) / SMALL.cell).int().flip(1))


def test_a_step_only_waits_for_sizes(monkeypatch, device):
    """The host waits for a GPU only to learn how large tensors must be. Kernels that do not determine sizes are left
    out, to save time."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    monkeypatch.setattr(backend, "interpret", device == "cpu")
    net = UnetEncoder(SMALL, GRID).to(device)
    points, counts = cloud((40, 20))
    points, noise = points.to(device), torch.rand(2, *net.mask_shape, device=device)
    with WaitRecorder(without=("unipad.kernels.sparse_tiles", "unipad.kernels.sparse_gemm")) as waits:
        net(points, counts, noise)[0].square().sum().backward()
    occupied, visible = "number and extent of occupied cells", "indices of the visible voxels"
    outputs = "number of a convolution's output voxels"
    # reasons given to `backend.host_wait`; outputs: of two strided convolutions
    assert waits.marked == [occupied, visible, outputs, outputs]
    assert set(waits.unmarked) <= {"_local_scalar_dense"}  # from point counts, which are on the host


def test_cells_of_points_are_the_same_on_a_gpu():
    """PyTorch on a GPU divides by a number by multiplying with its reciprocal: for cells of 0.3 m, that would move some
    points to other cells."""
    net = UnetEncoder(SMALL, config.Grid(low=(-3.0, -3.0, -2.0), high=(3.0, 3.0, 4.0), cell=(0.3, 0.3, 2.0)))
    x = (torch.arange(1, 20).double() * 0.3 - 3).float()
    points = torch.stack([x, x, torch.zeros_like(x)], dim=1)
    features, sample = torch.arange(1.0, 20)[:, None], torch.zeros(19, dtype=torch.int32)
    volume = net._volume(features, points, sample, 1)
    # these points include some that it would move
    assert ((x + 3) * (1 / torch.tensor(0.3))).floor().ne(((x + 3) / torch.tensor(0.3)).floor()).any()
    with DivideLikeGpu():
        assert torch.equal(net._volume(features, points, sample, 1), volume)


def test_masked_blocks_are_not_encoded():
    """Visible blocks are encoded as if there were no masked ones."""
    points, counts = cloud((400, 200))
    # a point just below the grid's upper border, where rounding must not put it outside
    points[0, :3] = torch.tensor([8.0, 8.0, 4.0]).nextafter(torch.zeros(3))
    net = UnetEncoder(SMALL, GRID).eval()
    noise = torch.rand(2, *net.mask_shape)
    volume, visible_coords = net(points, counts, noise)
    _, all_coords = net(points, counts)
    blocks = [
        {tuple(c) for c in torch.cat([v[:, :1], v[:, 1:] // SMALL.mask_block], dim=1).tolist()}
        for v in (visible_coords, all_coords)
    ]
    for b in range(2):
        kept, occupied = (sum(c[0] == b for c in block_coords) for block_coords in blocks)
        assert kept == round(occupied * 0.2)  # 1 - mask_ratio, which is 0.8 by default
    voxel = ((points[:, :3] - torch.tensor(GRID.low)) / SMALL.cell).long().flip(1)
    block = voxel.clamp(max=torch.tensor([11, 31, 31])) // SMALL.mask_block  # z, y, x; the last voxels of the grid
    sample = torch.tensor([0, 1]).repeat_interleave(counts)
    visible = torch.tensor([(b, *zyx) in blocks[0] for b, zyx in zip(sample.tolist(), block.tolist(), strict=True)])
    alone, _ = net(points[visible], [int(visible[:400].sum()), int(visible[400:].sum())])
    torch.testing.assert_close(volume, alone, rtol=1e-4, atol=1e-5)
    volume.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
