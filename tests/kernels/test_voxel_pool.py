import pytest
import torch

import unipad.kernels.voxel_pool
from tests import golden
from tests.ahead_of_time import ASSEMBLED_TARGETS, Launch
from tests.check import OperatorRecorder, check_against_ref, launches
from tests.conftest import HAS_GPU
from unipad.kernels.backend import StreamCache
from unipad.kernels.voxel_pool import BLOCK_P, CHUNK, voxel_pool, voxel_pool_ref


def launch(kernel, channels, divisible, elements, registers, shared=0):
    """A launch for tests/test_compiles.py to compile; registers, shared (bytes): its limits."""
    blocks = unipad.kernels.voxel_pool._blocks(channels)
    if kernel != "_voxel_pool_bwd_kernel":
        blocks["CHUNK"] = CHUNK
    types = dict(weight_ptr="*fp32", partial_ptr="*fp32", chunks="i32")
    return Launch(
        kernel, blocks, types, divisible, elements,
        registers=registers, shared=shared, limits_on=ASSEMBLED_TARGETS,
    )  # fmt: skip


# checked by tests/test_compiles.py
LAUNCHES = [
    Launch(
        "_runs_kernel",
        dict(BLOCK_P=BLOCK_P),
        dict(weight_ptr="*fp32"),
        registers=48,
        shared=64,
        limits_on=ASSEMBLED_TARGETS,
    ),
    # kernel, channels, divisible sizes, element types, registers, bytes of shared memory
    launch("_chunks_kernel", 256, ("C",), ("bf16",), 56, 4096),
    launch("_voxel_pool_fwd_kernel", 256, ("C",), ("bf16",), 64),
    launch("_voxel_pool_bwd_kernel", 256, ("C",), ("bf16",), 72, 16),
    launch("_chunks_kernel", 32, (), ("fp32",), 160),
    launch("_voxel_pool_fwd_kernel", 32, (), ("fp32",), 200),
    launch("_voxel_pool_bwd_kernel", 32, (), ("fp32",), 168, 128),
]


def views(B, N, device):
    """lidar2image [B, N, 4, 4] of cameras near the origin that look roughly along y; images of 40 x 24 pixels."""
    intrinsics = torch.tensor([[20.0, 0, 20, 0], [0, 20, 12, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    extrinsics = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # x right, y ahead, z up
    perturbed = extrinsics + 0.05 * torch.randn(B, N, 4, 4) * torch.tensor([1.0, 1, 1, 0])[:, None]  # not the last row
    return (intrinsics @ perturbed).to(device)


def make_inputs(B, N, size, C, D, shape, device, truncate=False):
    """A grid of 12 x 12 x 4 m ahead of the cameras; some points lie outside, also below its lower faces.

    size: (h, w) of the feature maps; C channels, D depth bins; shape: voxels (X, Y, Z).
    """
    h, w = size
    extent = 12.0, 12.0, 4.0
    return dict(
        features=torch.randn(B, N, h, w, C, device=device, dtype=torch.float64),
        depths=torch.rand(B, N, h, w, D, device=device, dtype=torch.float64),
        lidar2image=views(B, N, device),
        low=(-6.3, 1.4, -1.7),
        cell=tuple(e / max(n, 1) for e, n in zip(extent, shape, strict=True)),
        shape=shape,
        stride=-(-40 // max(w, 1)),  # w features cover the 40 pixels
        depth_range=(2.0, 14.0),
        truncate=truncate,
    )


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "B, N, size, C, D, shape",
    [
        (1, 1, (1, 1), 1, 1, (1, 1, 1)),
        (3, 2, (5, 7), 3, 5, (5, 7, 2)),  # odd sizes
        (2, 2, (8, 8), 4, 4, (8, 8, 2)),  # exactly one block of pixels and of voxels
        (1, 1, (3, 3), 65, 9, (3, 3, 1)),  # one pixel and one voxel more than a block of this many channels
        (1, 1, (1, 2), 512, 3, (2, 2, 1)),  # many channels
        (1, 3, (7, 10), 3, 9, (2, 3, 1)),  # whole chunks of runs (consecutive points of a ray) in one voxel
        (0, 2, (3, 5), 3, 4, (2, 2, 2)),  # no samples
        (2, 0, (3, 5), 3, 4, (2, 2, 2)),  # no views
        (1, 2, (3, 0), 3, 4, (2, 2, 2)),  # no pixels
        (1, 2, (3, 5), 0, 4, (2, 2, 2)),  # no channels
        (1, 2, (3, 5), 3, 0, (2, 2, 2)),  # no depth bins
        (1, 2, (3, 5), 3, 4, (2, 0, 2)),  # no voxels
    ],
)
def test_matches_reference(B, N, size, C, D, shape, dtype, truncate, device):
    inputs = make_inputs(B, N, size, C, D, shape, device, truncate)
    assert voxel_pool_ref(**inputs).any() or not B * N * min(size) * C * D * min(shape), "no point is inside the grid"
    check_against_ref(voxel_pool, voxel_pool_ref, inputs, dtype, wrt=("features", "depths"))


RECORDED = dict(  # geometry of the golden record voxel_pool_depth
    low=(-54.0, -54.0, -5.0),
    cell=(5.4, 6.0, 1.6),
    shape=(20, 18, 5),
    stride=16,
    depth_range=(1.0, 61.0),
    truncate=True,
)


@pytest.mark.parametrize("op", [voxel_pool, voxel_pool_ref])
def test_reproduces_the_original(op, device, monkeypatch):
    """Volume and gradients of Uni3DVoxelPoolDepth: 2 samples, 6 views, 161280 points."""
    if not HAS_GPU:  # few large programs: the interpreter takes a fixed time for each
        monkeypatch.setattr(unipad.kernels.voxel_pool, "TILE", 2**16)
        monkeypatch.setattr(unipad.kernels.voxel_pool, "BLOCK_P", 2**18)
    arrays = {name: array.to(device) for name, array in golden.load("voxel_pool_depth")[0].items()}
    features = arrays["in/feat"].permute(0, 1, 3, 4, 2).requires_grad_()
    depths = arrays["in/depth"].unflatten(0, (2, 6)).permute(0, 1, 3, 4, 2).requires_grad_()
    volume = op(features, depths, arrays["in/lidar2img"][:, :, 0], **RECORDED)  # [:, :, 0]: the only sweep
    golden.assert_close_to_max(volume, arrays["out/volume"].permute(0, 2, 3, 4, 1), 1e-5, "volume")
    upstream = arrays["in/w_out"].permute(0, 2, 3, 4, 1)
    d_features, d_depths = torch.autograd.grad(volume, (features, depths), upstream)
    golden.assert_close_to_max(d_features.permute(0, 1, 4, 2, 3), arrays["grad/feat"], 1e-5, "features")
    # the recorded gradient w.r.t. depths includes that of the depth loss, which is 0 at pixels without a target
    no_target = arrays["out/downsampled_gt_onehot_argmax"].view(2, 6, 16, 28) < 0
    expected = arrays["grad/depth"].unflatten(0, (2, 6)).permute(0, 1, 3, 4, 2)
    golden.assert_close_to_max(d_depths[no_target], expected[no_target], 1e-5, "depths")


def straight_view(device):
    """lidar2image [1, 1, 4, 4] of a camera for which pixel (u, v) at depth d is the point (u * d, v * d, d)."""
    return torch.eye(4, device=device)[None, None]


@pytest.mark.parametrize("op", [voxel_pool, voxel_pool_ref])
def test_by_hand(op, device):
    """Worked on paper: a row of features at pixels 0 and 2, bins at depths 1, 2, 3. The points of pixel 0 have x = 0,
    of pixel 2 x = 2, 4, 6; two voxels, 4 m wide, start at x = -1, so they meet at 3. Points on the grid's upper face,
    z = 3, are outside."""
    features = torch.tensor([[1.0, 10.0], [2.0, 20.0]], device=device).view(1, 1, 1, 2, 2).requires_grad_()
    # probabilities of the bins; 8: of points outside, which must not count
    depths = torch.tensor([[0.25, 0.5, 8.0], [0.125, 0.75, 8.0]], device=device).view(1, 1, 1, 2, 3).requires_grad_()
    grid = dict(low=(-1, 0, 1), cell=(4, 1, 2), shape=(2, 1, 1))
    volume = op(features, depths, straight_view(device), **grid, stride=2, depth_range=(1, 4))
    # left voxel: pixel 0 at depths 1 and 2, pixel 2 at depth 1; right voxel: pixel 2 at depth 2
    expected = torch.tensor([[0.75 + 0.25, 7.5 + 2.5], [1.5, 15.0]], device=device).view(1, 1, 1, 2, 2)
    torch.testing.assert_close(volume, expected, rtol=0, atol=0)

    upstream = torch.tensor([[1.0, 2.0], [4.0, 8.0]], device=device).view(1, 1, 1, 2, 2)
    d_features, d_depths = torch.autograd.grad(volume, (features, depths), upstream)
    expected = torch.tensor([[0.75, 1.5], [0.125 + 3.0, 0.25 + 6.0]], device=device)
    torch.testing.assert_close(d_features[0, 0, 0], expected, rtol=0, atol=0)
    expected = torch.tensor([[21.0, 21.0, 0.0], [42.0, 168.0, 0.0]], device=device)
    torch.testing.assert_close(d_depths[0, 0, 0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("op", [voxel_pool, voxel_pool_ref])
@pytest.mark.parametrize("truncate, counted", [(False, 1), (True, 2)])
def test_points_below_the_grid_count_only_when_truncated(op, truncate, counted, device):
    """Points at x = 0, 0.75 and 1.5 m; voxels of 1 m from 1 to 3. The point at 0, a voxel below, is always outside.

    counted: number of points that go to the first voxel.
    """
    ones = torch.ones(1, 1, 1, 3, 1, device=device)
    view = straight_view(device) * torch.tensor([1 / 0.75, 1, 1, 1], device=device)
    grid = dict(low=(1, -0.5, 0.5), cell=(1, 1, 1), shape=(2, 1, 1))
    volume = op(ones, ones, view, **grid, stride=1, depth_range=(1, 2), truncate=truncate)
    assert volume.flatten().tolist() == [counted, 0]


@pytest.mark.parametrize("op", [voxel_pool, voxel_pool_ref])
def test_points_of_invalid_cameras_are_dropped(op, device):
    """Views 1 and 2 have a matrix of NaNs and a singular one; their gradients are 0."""
    features = torch.ones(1, 3, 1, 2, 1, device=device, requires_grad=True)
    depths = torch.ones(1, 3, 1, 2, 1, device=device, requires_grad=True)
    lidar2image = straight_view(device).repeat(1, 3, 1, 1)
    lidar2image[:, 1] = torch.nan
    lidar2image[:, 2] = 0
    grid = dict(low=(-8, -8, -8), cell=(16, 16, 16), shape=(1, 1, 1))
    volume = op(features, depths, lidar2image, **grid, stride=1, depth_range=(1, 2))
    assert volume.item() == 2
    for grad in torch.autograd.grad(volume.sum(), (features, depths)):
        assert grad.flatten().tolist() == [1, 1, 0, 0, 0, 0]


def test_points_on_faces_lie_on_the_same_side_for_kernel_and_reference(device):
    """Cameras along the grid's axes, bins as far apart as voxels: planes of points lie on faces, up to rounding."""
    inputs = make_inputs(1, 4, (5, 8), 3, 12, (9, 9, 5), device)
    # the columns for x, y (ahead), z and 1
    a, b, c, d = torch.tensor([[20.0, 20, 0, 0], [0, 12, -20, 0], [0, 1, 0, 0], [0, 0, 0, 1]]).unbind(1)
    rotated = [[a, b, c, d], [b, -a, c, d], [-a, -b, c, d], [-b, a, c, d]]
    inputs["lidar2image"] = torch.stack([torch.stack(view, dim=1) for view in rotated])[None].to(device)
    inputs |= dict(low=(-2.7, -2.7, -1.5), cell=(0.6, 0.6, 0.6), depth_range=(0.3, 7.5), stride=4)
    check_against_ref(voxel_pool, voxel_pool_ref, inputs, torch.float32, wrt=("features", "depths"))


@pytest.mark.parametrize("pixels", [CHUNK - 1, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, 5 * CHUNK + 7])
def test_many_runs_of_a_voxel_are_summed_in_chunks(pixels, device):
    """Two voxels, each with a run of every pixel; the runs of the second may begin in the middle of a chunk."""
    inputs = dict(
        features=torch.randn(1, 1, 1, pixels, 3, device=device, dtype=torch.float64),
        depths=torch.rand(1, 1, 1, pixels, 2, device=device, dtype=torch.float64),
        lidar2image=straight_view(device),
        low=(0, -1, 0.5),  # depth 1 in the lower voxel, depth 2 in the upper one
        cell=(1e4, 2, 1),
        shape=(1, 1, 2),
        stride=1,
        depth_range=(1.0, 3.0),
    )
    check_against_ref(voxel_pool, voxel_pool_ref, inputs, torch.float32, wrt=("features", "depths"))


def test_cameras_are_not_cached_unless_asked_for(device):
    inputs = make_inputs(1, 2, (3, 5), 3, 6, (4, 4, 2), device)
    before = voxel_pool(**inputs)
    inputs["lidar2image"].data[:, 0, 0, 3] += 40  # moves a camera by 2 m; `.data`: unnoticed by version counters
    volume = voxel_pool(**inputs)
    torch.testing.assert_close(volume, voxel_pool_ref(**inputs), rtol=1e-12, atol=1e-12)
    assert not torch.equal(volume, before)


def test_points_are_found_once_with_a_cache(device):
    """Until the geometry changes. Finding and sorting takes four launches, of which PyTorch's sort is one."""
    inputs = make_inputs(1, 2, (3, 5), 3, 6, (4, 4, 2), device)
    expected, cache = voxel_pool(**inputs), StreamCache()
    find = ["_matrices_kernel", "_voxels_kernel", "_begin_kernel"]
    pool = ["_runs_kernel", "_chunks_kernel", "_voxel_pool_fwd_kernel"]
    for found, operators in ((find, ["sort"]), ([], [])):
        with launches() as launched, OperatorRecorder() as recorder:
            volume = voxel_pool(**inputs, cache=cache)
        assert launched == found + pool
        # `fill_`: of uninitialized memory, in tests.as_on_a_gpu
        assert [name for name in recorder.operators if name != "fill_"] == operators
        assert torch.equal(volume, expected)
    moved = inputs | dict(low=(-6.0, 1.4, -1.7))
    assert torch.equal(voxel_pool(**moved, cache=cache), voxel_pool(**moved))
    assert torch.equal(voxel_pool(**inputs, cache=cache), expected)


def test_frames_can_be_passed_as_more_views(device):
    """One call with two frames of two views each gives the sum of a call per frame."""
    inputs = make_inputs(2, 4, (3, 5), 3, 6, (4, 4, 2), device)
    frames = [
        inputs | {name: inputs[name][:, frame] for name in ("features", "depths", "lidar2image")}
        for frame in (slice(2), slice(2, 4))
    ]
    together = voxel_pool(**inputs)
    torch.testing.assert_close(together, sum(voxel_pool(**frame) for frame in frames), rtol=1e-12, atol=1e-12)


def test_a_feature_changes_only_voxels_on_its_ray(device):
    inputs = make_inputs(1, 2, (5, 7), 3, 12, (6, 6, 2), device)
    before = voxel_pool(**inputs)
    inputs["features"][0, 1, 2, 3] += 1
    changed = (voxel_pool(**inputs) != before).any(-1)
    only = torch.zeros_like(inputs["depths"])
    only[0, 1, 2, 3] = 1
    ray = voxel_pool(**inputs | dict(depths=only)).any(-1)
    assert torch.equal(changed, ray) and 1 < ray.sum() <= 12


def test_bit_equal_from_run_to_run(device):
    inputs = make_inputs(1, 2, (6, 10), 3, 9, (2, 2, 1), device)
    results = []
    for _ in range(2):
        leaves = {name: inputs[name].float().requires_grad_() for name in ("features", "depths")}
        volume = voxel_pool(**inputs | leaves)
        results.append([volume, *torch.autograd.grad(volume.square().sum(), list(leaves.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_each_gradient_has_the_type_of_its_input(device):
    inputs = make_inputs(1, 1, (3, 5), 8, 4, (4, 4, 2), device)
    features = inputs.pop("features").to(torch.bfloat16).requires_grad_()
    depths = inputs.pop("depths").float().requires_grad_()
    ours, truth = (op(features, depths, **inputs) for op in (voxel_pool, voxel_pool_ref))
    assert ours.dtype == truth.dtype == torch.bfloat16
    torch.testing.assert_close(ours, truth, rtol=1e-2, atol=1e-2)
    d_ours, d_truth = (torch.autograd.grad(out.float().sum(), (features, depths)) for out in (ours, truth))
    assert [d.dtype for d in d_ours] == [torch.bfloat16, torch.float32]
    for a, b in zip(d_ours, d_truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("op", [voxel_pool, voxel_pool_ref])
def test_gradcheck(op, device):
    inputs = make_inputs(1, 1, (2, 3), 2, 3, (2, 2, 1), device)
    leaves = [inputs.pop(name).requires_grad_() for name in ("features", "depths")]
    torch.autograd.gradcheck(lambda *x: op(*x, **inputs), leaves)


def test_strict_determinism_keeps_the_kernels(device):
    inputs = make_inputs(1, 1, (3, 5), 3, 4, (2, 2, 2), device)
    torch.use_deterministic_algorithms(True)  # strict: fixture `poisoned_memory` sets it with warn_only, and ends it
    with launches() as launched:
        voxel_pool(**inputs)
    assert launched


def test_rejects_mismatched_and_too_large_shapes(device):
    inputs = make_inputs(1, 2, (3, 5), 3, 4, (2, 2, 2), device)
    with pytest.raises(AssertionError, match="do[es]* not match"):
        voxel_pool(**inputs | dict(lidar2image=views(1, 3, device)))
    with pytest.raises(AssertionError, match="do not match"):
        voxel_pool(**inputs | dict(depths=torch.rand(1, 2, 3, 4, 4, device=device)))
    with pytest.raises(AssertionError, match="32 bits"):
        voxel_pool(**inputs | dict(shape=(2**10, 2**10, 2**10)))
