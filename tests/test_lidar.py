"""LiDAR encoder: voxel mask, sparse encoder and neck, compared with the original and with values computed by hand."""

import dataclasses
import json
from unittest import mock

import pytest
import torch

from tests import scripts
from tests.check import WaitRecorder
from tests.golden import assert_close_to_max, load, recorded
from unipad import config
from unipad.errors import UserError
from unipad.kernels import backend
from unipad.model import sparse
from unipad.model.lidar import LidarEncoder, Second, SecondFPN, SparseEncoder
from unipad.model.mask import draw_voxel_mask
from unipad.model.norm import SyncedBatchNorm
from unipad.model.sparse import NORM
from unipad.spconv.conv import SparseConv3d, SubMConv3d
from unipad.spconv.tensor import SparseConvTensor
from unipad.spconv.voxels import VoxelSet

GRID = config.Grid(low=(-8.0, -4.0, -2.0), high=(8.0, 4.0, 4.0), cell=(1.0, 1.0, 2.0))  # 16 x 8 x 3 cells (x, y, z)
TINY = config.LidarConfig(
    cell=(0.25, 0.25, 0.5),  # of the input voxels: a quarter of the grid's
    widths=(4, 8, 8), blocks=1, sparse_channels=8, mask_block=4,
    neck_widths=(8, 12), neck_strides=(1, 2), neck_layers=1, channels=6,
)  # fmt: skip


def recorded_noise(arrays):
    """The recorded random numbers of the original, one per occupied block, scattered to [B, z, y, x] of all blocks."""
    noise = torch.zeros(2, 6, 20, 20)
    drawn = torch.cat([arrays["in/rand_masking_0"][0], arrays["in/rand_masking_1"][0]])
    noise[tuple(arrays["out/block_coords"].long().unbind(1))] = drawn
    return noise


def test_mask_matches_the_original():
    arrays, record = load("sparse_encoder_mask_eval")
    coords, cfg = arrays["in/coors"], record["config"]["mae_cfg"]
    edge = cfg["downsample_scale"]  # of a block, in voxels
    visible = draw_voxel_mask(coords, recorded_noise(arrays), edge, cfg["mask_ratio"])
    kept = {tuple(c) for c in arrays["out/block_coords"][arrays["out/block_active"]].tolist()}
    assert visible.tolist() == [(b, z // edge, y // edge, x // edge) in kept for b, z, y, x in coords.tolist()]


@pytest.mark.parametrize("name", ["sparse_encoder_eval", "sparse_encoder_mask_eval"])
def test_sparse_encoder_matches_the_original(name):
    arrays, record = load(name)
    widths = [stage[0] for stage in record["config"]["encoder_channels"]]
    net = SparseEncoder(in_channels=5, widths=widths, blocks=2, out_channels=32).eval()
    net.load_state_dict(recorded(arrays, "encoder.lidar.encoder."))
    features = arrays["in/voxel_features"].requires_grad_()
    visible = torch.ones(len(features), dtype=torch.bool)
    if "mask" in name:
        visible = draw_voxel_mask(arrays["in/coors"], recorded_noise(arrays), block=8, ratio=0.8)
    rows = visible.nonzero()[:, 0]
    out = net(SparseConvTensor.of(features[rows], VoxelSet(arrays["in/coors"][rows], (41, 160, 160), batch_size=2)))
    assert_close_to_max(out.dense(), arrays["out/dense"], 1e-5)
    assert out.voxels.shape == tuple(arrays["out/out_spatial_shape"].tolist())
    active = {tuple(c) for c in arrays["out/out_active_indices"].tolist()}
    assert {tuple(c) for c in out.voxels.coords.tolist()} == active and len(out.voxels) == len(active)
    (out.dense() * arrays["in/w_out"]).sum().backward()
    assert_close_to_max(features.grad, arrays["grad/voxel_features"], 1e-5, "features")
    gradients = recorded(arrays, "encoder.lidar.encoder.", "grad/")
    assert gradients.keys() == dict(net.named_parameters()).keys()
    for key, param in net.named_parameters():
        assert_close_to_max(param.grad, gradients[key], 1e-5, key)


def test_neck_matches_the_original():
    arrays, record = load("second3d_fpn_eval")
    widths, strides = record["config"]["backbone"]["out_channels"], record["config"]["backbone"]["layer_strides"]
    backbone = Second(in_channels=32, widths=widths, strides=strides, layers=2).eval()
    neck = SecondFPN(widths, strides, channels=24).eval()
    backbone.load_state_dict(recorded(arrays, "encoder.lidar.backbone."))
    neck.load_state_dict(recorded(arrays, "encoder.lidar.neck."))
    x = arrays["in/x"].requires_grad_()
    branches = backbone(x)
    out = neck(branches)
    for i, branch in enumerate(branches):
        assert_close_to_max(branch, arrays[f"out/backbone_{i}"], 1e-5, f"branch {i}")
    assert_close_to_max(out, arrays["out/fpn"], 1e-5)
    (out * arrays["in/w_out"]).sum().backward()
    assert_close_to_max(x.grad, arrays["grad/x"], 1e-5, "x")
    for net, prefix in ((backbone, "backbone."), (neck, "neck.")):
        expected = recorded(arrays, "encoder.lidar." + prefix, "grad/")
        assert expected.keys() == dict(net.named_parameters()).keys()
        for key, param in net.named_parameters():
            assert_close_to_max(param.grad, expected[key], 1e-5, prefix + key)


def test_size_of_the_paper_model():
    """Shapes of the voxel grid and of the mask, and the number of parameters, of the original's
    uvtr_lidar_vs0.075_pretrain, whose sizes are the defaults of `LidarConfig`."""
    grid = config.Grid(low=(-54.0, -54.0, -5.0), high=(54.0, 54.0, 3.0), cell=(0.6, 0.6, 1.6))
    with torch.device("meta"):
        encoder = LidarEncoder(config.LidarConfig(), grid)
    assert encoder.voxel_counts == (40, 1440, 1440) and encoder.mask_shape == (5, 180, 180)
    assert sum(p.numel() for p in encoder.parameters()) == 22_629_840


@pytest.mark.parametrize("ratio, kept", [(0.0, [5, 10, 0]), (0.8, [1, 2, 0]), (0.5, [2, 5, 0]), (0.25, [4, 8, 0])])
def test_mask_hides_a_fraction_of_the_occupied_blocks(ratio, kept):
    """Samples with 5, 10 and no occupied blocks, of 8 or 7 voxels; 1 - ratio of the blocks are kept, rounded half to
    even."""
    occupied = [torch.randperm(3 * 4 * 5)[:n] for n in (5, 10)]  # indices into 3 x 4 x 5 blocks (z, y, x) of a sample
    coords = []
    for b, index in enumerate(occupied):
        z, y, x = index // (4 * 5), index // 5 % 4, index % 5
        for dz, dy, dx in torch.cartesian_prod(*[torch.arange(2)] * 3)[: 8 - b]:  # voxels of a block
            coords.append(torch.stack([torch.full_like(z, b), z * 2 + dz, y * 2 + dy, x * 2 + dx], dim=1))
    coords = torch.cat(coords).int()
    coords = coords[torch.randperm(len(coords))]
    noise = torch.rand(3, 3, 4, 5)  # of 3 samples
    visible = draw_voxel_mask(coords, noise, block=2, ratio=ratio)
    block = coords.clone()
    block[:, 1:] //= 2
    visible_blocks, masked_blocks = ({tuple(c) for c in block[rows].tolist()} for rows in (visible, ~visible))
    assert not visible_blocks & masked_blocks
    assert [sum(c[0] == b for c in visible_blocks) for b in range(3)] == kept
    for b in range(2):  # blocks with the smallest noise are visible
        visible_noise, masked_noise = (
            [noise[c].item() for c in blocks if c[0] == b] for blocks in (visible_blocks, masked_blocks)
        )
        assert max(visible_noise) < min(masked_noise, default=1)


def cloud(counts=(300, 200), seed=0):
    """Points [P, 5] as in `Batch`, inside `GRID`: on the ground, on a wall and scattered; and their counts [B]."""
    gen = torch.Generator().manual_seed(seed)
    points = torch.rand(sum(counts), 5, generator=gen) * torch.tensor([16.0, 8, 6, 1, 0.5])
    points[::2, 2] = 0.3
    points[1::4, 0] = 5.0
    return points + torch.tensor([-8.0, -4, -2, 0, 0]), torch.tensor(counts)


def make_encoder(**settings):
    """An encoder whose batch norms have realistic running statistics, for evaluation."""
    encoder = LidarEncoder(dataclasses.replace(TINY, **settings), GRID)
    norms = [module for module in encoder.modules() if isinstance(module, SyncedBatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        encoder(*cloud())
    for norm in norms:
        norm.momentum = NORM["momentum"]
    return encoder


def sparse_part(encoder, *args):
    """Input and output (`SparseConvTensor`s) of `encoder.encoder` in a call of `encoder` with these arguments."""
    passed = []
    handle = encoder.encoder.register_forward_hook(lambda _, inputs, out: passed.extend([*inputs, out]))
    encoder(*args)
    handle.remove()
    return passed


def noise_of(encoder, B, seed=0):
    return torch.rand(B, *encoder.mask_shape, generator=torch.Generator().manual_seed(seed))


def test_volume_fits_the_grid_and_every_parameter_gets_a_gradient():
    encoder = make_encoder()
    points, counts = cloud()
    volume = encoder(points, counts, noise_of(encoder, 2))[0]
    assert volume.shape == (2, 6, *GRID.shape[::-1])
    assert volume.is_contiguous(memory_format=torch.channels_last_3d)
    volume.square().sum().backward()
    for name, param in encoder.named_parameters():
        assert param.grad is not None and param.grad.isfinite().all() and param.grad.any(), name


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_evaluation_without_gradients_is_fused(precision):
    """Convolution, norm and ReLU are one op, with the same results as three, also after a change of the norms, whose
    scale and shift are cached."""
    encoder = make_encoder(blocks=2).eval()
    features, voxels = (x := sparse_part(encoder, *cloud())[0]).features, x.voxels
    net, cast = encoder.encoder, torch.autocast("cpu", precision, enabled=precision != torch.float32)
    # the last one, 1 x 1 x 1, has no neighbor table and is not fused
    convolutions = sum(isinstance(m, SubMConv3d | SparseConv3d) for m in net.modules()) - 1
    for change in (lambda norm: None, lambda norm: norm.running_mean.add_(0.5), lambda norm: norm.weight.mul_(2)):
        with torch.no_grad():
            [change(module) for module in net.modules() if isinstance(module, SyncedBatchNorm)]
        with cast, mock.patch.object(sparse, "sparse_conv_act", wraps=sparse.sparse_conv_act) as fused:
            unfused = net(SparseConvTensor.of(features, voxels))
            assert not fused.called
            with torch.no_grad():
                out = net(SparseConvTensor.of(features, voxels))
            assert fused.call_count == convolutions
        assert out.voxels is unfused.voxels and out.features.dtype == unfused.features.dtype
        assert_close_to_max(out.features, unfused.features, 1e-5 if precision == torch.float32 else 0.05)


def test_voxels_are_where_the_points_are():
    encoder = make_encoder()
    point = torch.tensor([[5.3, -2.1, 3.2, 0.5, 0.1]])
    x, out = sparse_part(encoder, point, torch.tensor([1]))
    # batch, z, y, x: (3.2 + 2) / 0.5, (-2.1 + 4) / 0.25, (5.3 + 8) / 0.25
    assert x.voxels.coords.tolist() == [[0, 10, 7, 53]] and torch.equal(x.features, point)
    assert out.voxels.shape == GRID.shape[::-1]
    assert [0, 2, 1, 13] in out.voxels.coords.tolist()  # (3.2 + 2) / 2, (-2.1 + 4) / 1, (5.3 + 8) / 1
    # strided convolutions also reach neighboring cells
    assert (out.voxels.coords[:, 1:] - torch.tensor([2, 1, 13])).abs().max() <= 1


def test_voxels_are_sorted_by_linear_index():
    encoder = make_encoder()
    x, _ = sparse_part(encoder, *cloud())
    assert (x.voxels.keys().diff() > 0).all()


def test_masked_blocks_are_not_encoded():
    """Points in masked blocks make no difference. Evaluation masks too, if it is given noise."""
    encoder = make_encoder().eval()
    points, counts = cloud((400,))
    noise = noise_of(encoder, 1)
    size = torch.tensor(TINY.cell) * TINY.mask_block
    x, y, z = ((points[:, :3] - torch.tensor(GRID.low)) / size).long().unbind(1)
    block_of_point = torch.stack([torch.zeros_like(z), z, y, x], dim=1)
    visible = draw_voxel_mask(block_of_point.int(), noise, block=1, ratio=TINY.mask_ratio)  # of points
    assert 0 < visible.sum() < len(points)
    brighter = points.clone()
    brighter[~visible, 3] += 1  # intensity: their voxels stay the same, their features do not
    volume = encoder(points, counts, noise)[0]
    assert torch.equal(encoder(brighter, counts, noise)[0], volume)
    assert_close_to_max(encoder(points[visible], visible.sum()[None])[0], volume, 1e-5)
    assert not torch.equal(encoder(brighter, counts)[0], encoder(points, counts)[0])  # without a mask


def test_mask_of_ratio_zero_changes_nothing():
    encoder = make_encoder(mask_ratio=0.0).eval()
    assert torch.equal(encoder(*cloud(), noise_of(encoder, 2))[0], encoder(*cloud())[0])


def test_learnable_token_replaces_features_of_masked_voxels():
    encoder = make_encoder(learnable_token=True)
    torch.nn.init.normal_(encoder.mask_token)
    noise = noise_of(encoder, 2)
    unmasked, _ = sparse_part(encoder, *cloud())
    masked, _ = sparse_part(encoder, *cloud(), noise)
    assert torch.equal(masked.voxels.coords, unmasked.voxels.coords)
    visible_coords = encoder(*cloud(), noise)[1]
    visible = draw_voxel_mask(unmasked.voxels.coords, noise, TINY.mask_block, TINY.mask_ratio)
    assert torch.equal(visible_coords, unmasked.voxels.coords[visible])
    assert torch.equal(masked.features[visible], unmasked.features[visible])
    assert (masked.features[~visible] == encoder.mask_token).all() and 0 < visible.sum() < len(visible)
    encoder(*cloud(), noise)[0].square().sum().backward()
    assert encoder.mask_token.grad.any()


def test_samples_are_independent():
    encoder = make_encoder().eval()
    points, counts = cloud((300, 0, 200))
    noise = noise_of(encoder, 3)
    volume = encoder(points, counts, noise)[0]
    assert_close_to_max(encoder(points[300:], counts[2:], noise[2:])[0], volume[2:], 1e-5)
    assert_close_to_max(encoder(points[:0], counts[1:2], noise[1:2])[0], volume[1:2], 1e-5)


def test_a_batch_without_points_works():
    encoder = make_encoder()
    volume = encoder(torch.zeros(0, 5), torch.tensor([0, 0]), noise_of(encoder, 2))[0]
    assert volume.shape == (2, 6, *GRID.shape[::-1])
    volume.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    assert all(b.isfinite().all() for b in encoder.buffers())


def test_max_voxels_differs_between_training_and_evaluation():
    """Both samples of the cloud have more voxels than either limit."""
    encoder = make_encoder(max_voxels=(7, 40))  # in training, in evaluation
    assert len(sparse_part(encoder, *cloud())[0].voxels) == 2 * 7
    assert len(sparse_part(encoder.eval(), *cloud())[0].voxels) == 2 * 40


def test_autocast_runs_in_bf16():
    encoder = make_encoder()
    points, counts = cloud()
    noise = noise_of(encoder, 2)
    exact = encoder(points, counts, noise)[0]
    with torch.autocast("cpu", torch.bfloat16):
        volume = encoder(points, counts, noise)[0]
    assert volume.dtype == torch.bfloat16
    assert_close_to_max(volume, exact, 0.1)
    volume.float().square().sum().backward()
    for name, param in encoder.named_parameters():
        assert param.grad.dtype == torch.float32 and param.grad.isfinite().all(), name


def test_runs_are_bit_equal():
    encoder = make_encoder()
    results = []
    for _ in range(2):
        encoder.zero_grad()
        volume = encoder(*cloud(), noise_of(encoder, 2))[0]
        volume.square().sum().backward()
        results.append([volume, *(p.grad for p in encoder.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_step_synchronizes_only_to_read_sizes(monkeypatch, device):
    """The host waits for the GPU, marked by `backend.host_wait`, only to learn the sizes of tensors.

    Without a GPU, in the interpreter. Kernels whose results determine no size are not run, to save time.
    """
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    monkeypatch.setattr(backend, "interpret", device == "cpu")
    encoder = LidarEncoder(TINY, GRID).to(device)
    points, counts = cloud((40, 20))
    points, noise = points.to(device), noise_of(encoder, 2).to(device)
    with WaitRecorder(without=("unipad.kernels.sparse_tiles", "unipad.kernels.sparse_gemm")) as waits:
        encoder(points, counts, noise)[0].square().sum().backward()
    output_size = "number of a convolution's output voxels"
    assert waits.marked == ["number of occupied voxels", "indices of the visible voxels", output_size, output_size]
    assert set(waits.unmarked) <= {"_local_scalar_dense"}  # from point counts, which are on the host


def test_voxels_that_do_not_fit_the_grid_are_rejected():
    with pytest.raises(UserError, match=r"an encoder of stride 4 needs \(64, 32, 12\).*use voxels of \(0.25, 0.25"):
        make_encoder(cell=(0.25, 0.5, 0.5))
    with pytest.raises(UserError, match="multiples of 3"):
        make_encoder(neck_strides=(1, 3))


def test_the_encoder_launches_no_more_than():
    """Of lidar-0.075, one sample under autocast. Each launch and operator takes host time, which bounds its step."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    code = "import json; from benchmarks.count_launches import launches; print(json.dumps(launches()))"
    done = scripts.run("-c", code)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = {part: sum(of_part.values()) for part, of_part in json.loads(done.stdout).items()}
    ceilings = {"neighbor tables": 17, "forward": 56, "backward": 74, "forward, inference": 28}
    assert counts.keys() == ceilings.keys() and all(counts[part] <= ceilings[part] for part in ceilings), counts
