import pytest
import torch

import unipad.kernels.lift
import unipad.kernels.pixel_sum
from tests import golden
from tests.ahead_of_time import ASSEMBLED_TARGETS, Launch
from tests.check import check_against_ref, launches
from tests.conftest import HAS_GPU
from unipad.kernels.lift import lift, lift_ref


def launch(kernel, levels, channels, divisible, elements, registers, shared, gathered=()):
    """A launch for tests/test_compiles.py to compile; registers, shared (bytes): its limits.

    levels: their number. gathered: those whose gradients `pixel_sum` sums; atomic adds compute the others'.
    """
    forward = kernel == "_lift_fwd_kernel"
    tile = unipad.kernels.lift.FWD_TILE if forward else unipad.kernels.lift.BWD_TILE
    constexprs = unipad.kernels.lift._blocks(tile // (4 if "fp32" in elements else 2), channels)  # tiles are in bytes
    constexprs |= {} if forward else dict(GATHERED=sum(1 << l for l in gathered))
    types = dict(
        feature_ptrs=("*",) * levels,
        depth_ptrs=("*",) * levels,
        counts_ptr="*i32",
        # of gathered levels: quad, slot and hit of each (voxel, view); of others: d_feature, d_depth
        out_ptrs=tuple(("*i32", "*i32", "*fp32") if l in gathered else ("*fp32", "*fp32") for l in range(levels)),
        first_quads=("i32",) * levels,
        lidar2image_ptr="*fp32",
        sizes=(("i32", "i32"),) * levels,
        low=("fp32",) * 3,
        cell=("fp32",) * 3,
        shape=("i32",) * 3,
        image_size=("i32",) * 2,
        depth_range=("fp32",) * 2,
    )
    return Launch(
        kernel, constexprs, types, divisible, elements,
        registers=registers, shared=shared, limits_on=ASSEMBLED_TARGETS,
    )  # fmt: skip


# kernel, levels, channels, divisible sizes, element types, registers, bytes of shared memory
LAUNCHES = [
    launch("_lift_fwd_kernel", 4, 128, ("C", "D"), ("bf16",), 176, 0),
    launch("_lift_bwd_kernel", 4, 128, ("C", "D"), ("bf16",), 255, 4096, gathered=(2, 3)),
    launch("_lift_bwd_kernel", 4, 128, ("C", "D"), ("bf16",), 128, 32, gathered=(0, 1, 2, 3)),
    launch("_lift_fwd_kernel", 1, 16, (), ("fp32",), 136, 0),
    launch("_lift_bwd_kernel", 1, 16, (), ("fp32",), 192, 128),
]

IMAGE = (24, 40)  # (H, W) pixels


def views(B, N, device):
    """lidar2image [B, N, 4, 4] of cameras near the origin that look along y; each matrix is slightly perturbed."""
    intrinsics = torch.tensor([[20.0, 0, 20, 0], [0, 20, 12, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    extrinsics = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # x right, y ahead, z up
    perturbed = extrinsics + 0.05 * torch.randn(B, N, 4, 4) * torch.tensor([1.0, 1, 1, 0])[:, None]  # not the last row
    return (intrinsics @ perturbed).to(device)


def make_inputs(B, N, sizes, C, D, shape, device):
    """Arguments of `lift`, with its letters for sizes; `sizes`: (h, w) of each level.

    A grid of 12 x 12 x 4 m ahead of the cameras, which see about half of it, its first voxel included.
    """
    extent = 12.0, 12.0, 4.0
    return dict(
        features=[torch.randn(B, N, h, w, C, device=device, dtype=torch.float64) for h, w in sizes],
        depths=[torch.rand(B, N, h, w, D, device=device, dtype=torch.float64) for h, w in sizes],
        lidar2image=views(B, N, device),
        low=(-1.3, 1.9, -0.7),
        cell=tuple(e / max(n, 1) for e, n in zip(extent, shape, strict=True)),
        shape=shape,
        image_size=IMAGE,
        depth_range=(1.0, 9.0),
    )


# coarse: voxels per pixel from which a level's gradients are gathered; 0: always, 10**9: never
@pytest.mark.parametrize(
    "dtype, coarse",
    [(torch.float32, 0), (torch.float32, 10**9), (torch.float16, 10**9), (torch.bfloat16, 0)],
    ids=["fp32 gathered", "fp32 atomic", "fp16 atomic", "bf16 gathered"],
)
@pytest.mark.parametrize(
    "B, N, sizes, C, D, shape",
    [
        (1, 1, [(1, 1)], 1, 1, (1, 1, 1)),
        (3, 2, [(5, 7), (3, 5)], 3, 5, (5, 7, 1)),  # odd sizes
        (1, 2, [(3, 5)], 4, 8, (8, 4, 2)),  # exactly one block per slice of Z
        (1, 1, [(6, 10), (3, 5), (2, 3), (1, 2)], 32, 16, (9, 3, 1)),  # one voxel in x more than a block; four levels
        (1, 1, [(3, 5)], 65, 4, (3, 3, 1)),  # fewer voxels per program, so that its tile stays small
        (1, 1, [(2, 3)], 512, 4, (2, 3, 1)),  # many channels
        (1, 12, [(2, 3)], 2, 3, (4, 3, 1)),  # two frames of six views
        (0, 2, [(3, 5)], 3, 4, (2, 2, 2)),  # no samples
        (2, 0, [(3, 5)], 3, 4, (2, 2, 2)),  # no views
        (1, 2, [(3, 5)], 0, 4, (2, 2, 2)),  # no channels
        (1, 2, [(3, 5)], 3, 4, (2, 0, 2)),  # no voxels
    ],
)
def test_matches_reference(B, N, sizes, C, D, shape, dtype, coarse, device, monkeypatch):
    monkeypatch.setattr(unipad.kernels.lift, "COARSE", coarse)
    if not HAS_GPU:
        monkeypatch.setattr(unipad.kernels.pixel_sum, "TILE", 2**13)  # fewer programs: the interpreter is slow
    inputs = make_inputs(B, N, sizes, C, D, shape, device)
    assert lift_ref(**inputs).any() or not B * N * C * min(shape), "no voxel is visible"
    check_against_ref(lift, lift_ref, inputs, dtype, wrt=("features", "depths"))


RECORDED = dict(  # geometry of the golden record view_trans_2lvl
    low=(-54.0, -54.0, -5.0),
    cell=(5.4, 6.0, 1.6),
    shape=(20, 18, 5),
    image_size=(256, 448),
    depth_range=(0.0, 64.0),
)


@pytest.fixture
def large_blocks(monkeypatch):
    """Larger blocks, so fewer programs, in the interpreter, whose time grows with their number."""
    if not HAS_GPU:
        for name, size in dict(FWD_TILE=2**17, BWD_TILE=2**17, MAX_VOXELS=2**10).items():
            monkeypatch.setattr(unipad.kernels.lift, name, size)
        monkeypatch.setattr(unipad.kernels.pixel_sum, "TILE", 2**17)
        monkeypatch.setattr(unipad.kernels.pixel_sum, "BLOCK", 2**14)


@pytest.mark.parametrize("op", [lift, lift_ref])
def test_reproduces_the_original(op, device, large_blocks, monkeypatch):
    """Volume and gradients of Uni3DViewTrans: 2 samples, 6 views, 2 levels; the second one's gradients are gathered.

    `w_out` is the gradient w.r.t. the volume. The record's arrays are channels first, ours channels last.
    """
    monkeypatch.setattr(unipad.kernels.lift, "COARSE", 2)  # the levels have 0.7 and 2.7 voxels per pixel
    arrays = {name: array.to(device) for name, array in golden.load("view_trans_2lvl")[0].items()}
    features = [arrays[f"in/feat_{l}"].permute(0, 1, 3, 4, 2).requires_grad_() for l in range(2)]
    depths = [arrays[f"in/depth_{l}"].unflatten(0, (2, 6)).permute(0, 1, 3, 4, 2).requires_grad_() for l in range(2)]
    volume = op(features, depths, arrays["in/lidar2img"][:, :, 0], **RECORDED)
    golden.assert_close_to_max(volume, arrays["out/volume"].permute(0, 2, 3, 4, 1), 1e-5, "volume")
    grads = torch.autograd.grad(volume, features + depths, arrays["in/w_out"].permute(0, 2, 3, 4, 1))
    for l in range(2):
        golden.assert_close_to_max(grads[l].permute(0, 1, 4, 2, 3), arrays[f"grad/feat_{l}"], 1e-5, f"feat_{l}")
        d_depth = grads[2 + l].permute(0, 1, 4, 2, 3).flatten(0, 1)
        golden.assert_close_to_max(d_depth, arrays[f"grad/depth_{l}"], 1e-5, f"depth_{l}")


def test_projection_matches_the_original_bitwise():
    """Which voxels a view sees must not depend on rounding: 3854 pairs of a view and a voxel that it sees."""
    arrays, _ = golden.load("view_trans_2lvl")
    uvd, visible = unipad.kernels.lift._project_ref(arrays["in/lidar2img"][:, :, 0], **RECORDED)
    xyz = RECORDED["shape"]
    expected = arrays["out/mask"][:, :, 0].unflatten(2, xyz).permute(0, 1, 4, 3, 2).flatten(2)
    assert torch.equal(visible, expected) and visible.sum() == 3854
    expected = arrays["out/reference_voxel_cam"][:, :, 0].unflatten(2, xyz).permute(5, 0, 1, 4, 3, 2).flatten(3)
    assert torch.equal(uvd[:, visible], expected[:, visible])


def flat_view(device):
    """lidar2image [1, 1, 4, 4] that makes x and y the pixel, with depth 1 everywhere."""
    return torch.tensor([[[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]]], device=device)


@pytest.mark.parametrize("op", [lift, lift_ref])
def test_by_hand(op, device):
    """Worked on paper: an image of 4 x 4 pixels and 3 x 3 features, each 10 row + column: 5 y + x / 2 at pixel (x, y).

    Depth 1 in the range (0, 2) is midway between two bins of probability 0.25 and 0.5: 0.375. Voxel corners on the
    image's border count as outside.
    """
    row, column = torch.meshgrid(torch.arange(3.0), torch.arange(3.0), indexing="ij")
    feature = (10 * row + column).view(1, 1, 3, 3, 1).to(device).requires_grad_()
    depth = torch.tensor([0.25, 0.5], device=device).expand(1, 1, 3, 3, 2).contiguous().requires_grad_()
    volume = op(
        [feature], [depth], flat_view(device),
        low=(0, 0, 0), cell=(1, 1, 1), shape=(5, 5, 1), image_size=(4, 4), depth_range=(0, 2),
    )  # fmt: skip

    y, x = torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij")
    inside = (x > 0) & (x < 4) & (y > 0) & (y < 4)
    expected = torch.where(inside, 0.375 * (5 * y + x / 2), 0).view(1, 1, 5, 5, 1).to(device)
    torch.testing.assert_close(volume, expected, rtol=0, atol=0)

    # the voxel at x = 1, y = 2, midway between the features of row 1, columns 0 and 1
    d_feature, d_depth = torch.autograd.grad(volume[0, 0, 2, 1, 0], (feature, depth))
    expected = torch.zeros(3, 3, device=device)
    expected[1, :2] = 0.5 * 0.375
    torch.testing.assert_close(d_feature[0, 0, ..., 0], expected, rtol=0, atol=0)
    expected = torch.zeros(3, 3, 2, device=device)
    expected[1, :2] = 0.5 * 0.5 * 10.5  # weight of the column, weight of the bin, interpolated feature
    torch.testing.assert_close(d_depth[0, 0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("op", [lift, lift_ref])
def test_corners_use_the_cell_size_rounded_to_fp32(op, device):
    """As in the original, the cell size is rounded before it is multiplied: corner 179 of -54, -53.4, ... is at
    x = 53.400005, not at 53.400002, the fp32 number nearest to 53.4.

    So it is just inside an image whose left border is at x = 53.4.
    """
    view = flat_view(device).clone()
    view[..., 0, 3] = -53.4
    view[..., 1, 3] = 0.5
    ones = [torch.ones(1, 1, 1, 1, 1, device=device)]
    volume = op(
        ones, ones, view,
        low=(-54.0, 0.0, 0.0), cell=(0.6, 1.0, 1.0), shape=(180, 1, 1), image_size=(1, 1), depth_range=(0.0, 2.0),
    )  # fmt: skip
    assert volume.flatten().nonzero().flatten().tolist() == [179]


@pytest.mark.parametrize("op", [lift, lift_ref])
def test_invisible_voxels_are_zero(op, device):
    """Voxel corners behind the camera, at its center, on the limits of the depth range; a matrix of NaNs."""
    view = torch.eye(4, device=device).expand(1, 2, 4, 4).clone()  # depth is z, pixel (x, y) / z
    view[:, 1] = torch.nan
    ones = [torch.ones(1, 2, 1, 1, 1, device=device)]
    volume = op(
        ones, ones, view,
        low=(0.5, 0.5, -1.0), cell=(1.0, 1.0, 1.0), shape=(1, 1, 6), image_size=(2, 2), depth_range=(1.0, 4.0),
    )  # fmt: skip
    assert volume.flatten().tolist() == [0, 0, 0, 1, 1, 0]  # at depths -1, 0, 1, 2, 3, 4


def test_views_of_one_voxel_are_summed(device):
    """Three equal views, so that each sees the same voxels; in each, atomic adds of many voxels to a pixel collide."""
    inputs = make_inputs(B=1, N=1, sizes=[(2, 2)], C=4, D=2, shape=(4, 4, 2), device=device)
    inputs["lidar2image"] = inputs["lidar2image"].expand(1, 3, 4, 4)
    for name in ("features", "depths"):
        inputs[name] = [level.expand(1, 3, *level.shape[2:]) for level in inputs[name]]
    check_against_ref(lift, lift_ref, inputs, torch.float32, wrt=("features", "depths"))


def test_each_gradient_has_the_type_of_its_input(device):
    """Features in bf16, depths in fp32."""
    inputs = make_inputs(B=1, N=1, sizes=[(3, 5)], C=8, D=4, shape=(4, 4, 2), device=device)
    features = [level.to(torch.bfloat16).requires_grad_() for level in inputs.pop("features")]
    depths = [level.float().requires_grad_() for level in inputs.pop("depths")]
    ours, expected = (op(features, depths, **inputs) for op in (lift, lift_ref))
    assert ours.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)
    d_ours, d_expected = (torch.autograd.grad(out.float().sum(), (*features, *depths)) for out in (ours, expected))
    assert [d.dtype for d in d_ours] == [torch.bfloat16, torch.float32]
    for a, b in zip(d_ours, d_expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_gradcheck(device):
    inputs = make_inputs(B=1, N=1, sizes=[(2, 3), (1, 2)], C=2, D=2, shape=(2, 2, 1), device=device)
    features, depths = inputs.pop("features"), inputs.pop("depths")
    leaves = [level.requires_grad_() for level in features + depths]
    torch.autograd.gradcheck(lambda *levels: lift(levels[:2], levels[2:], **inputs), leaves)


@pytest.mark.parametrize("strict, coarse, gathered_levels", [(True, 10**9, 2), (False, 10, 1), (False, 10**9, 0)])
def test_gradients_of_coarse_levels_are_gathered(strict, coarse, gathered_levels, device, large_blocks, monkeypatch):
    """Gradients are gathered on levels with at least `coarse` voxels per pixel of the level (the two have 200 / 15 and
    200 / 60); if strict, on both."""
    monkeypatch.setattr(unipad.kernels.lift, "COARSE", coarse)
    inputs = make_inputs(B=1, N=1, sizes=[(3, 5), (6, 10)], C=3, D=4, shape=(10, 10, 2), device=device)
    features, depths = inputs.pop("features"), inputs.pop("depths")
    leaves = [level.float().requires_grad_() for level in features + depths]
    if strict:
        # without warn_only, which the fixture `poisoned_memory` sets; it switches the mode off after the test
        torch.use_deterministic_algorithms(True)
    runs, sorts = [], ["_place_kernel", "_rank_kernel"] if gathered_levels else []
    for _ in range(2):
        with launches() as launched:
            volume = lift(leaves[:2], leaves[2:], **inputs)
            runs.append(torch.autograd.grad(volume.square().sum(), leaves))
        assert launched == ["_lift_fwd_kernel", "_lift_bwd_kernel", *sorts, *gathered_levels * ["_pixel_sum_kernel"]]
    if strict:
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("op", [lift, lift_ref])
def test_a_feature_changes_only_voxels_on_its_ray(op, device, large_blocks):
    """Exactly the voxels that project to within one column and one row of it in the feature map."""
    inputs = make_inputs(B=1, N=2, sizes=[(5, 7)], C=3, D=4, shape=(8, 8, 3), device=device)
    before = op(**inputs)
    inputs["features"][0][0, 1, 2, 3] += 1  # level 0; sample 0, view 1, row 2, column 3
    changed = (op(**inputs) != before).any(-1)
    geometry = list(inputs.values())[2:]  # without features and depths
    (u, v, _), visible = unipad.kernels.lift._project_ref(*geometry)
    near = ((u + 1) * 3 - 3).abs() < 1  # u in [-1, 1]: less than one column from column 3 of 0 to 6
    near &= ((v + 1) * 2 - 2).abs() < 1  # less than one row from row 2 of 0 to 4
    assert torch.equal(changed.flatten(), (visible & near)[0, 1]) and 1 < changed.sum() < visible[0, 1].sum()


def test_frames_can_be_passed_as_more_views(device, large_blocks):
    """One call with two frames of two views each gives the sum of a call per frame."""
    inputs = make_inputs(B=2, N=4, sizes=[(3, 5)], C=3, D=4, shape=(5, 4, 2), device=device)
    frames = [
        inputs
        | {name: [inputs[name][0][:, frame]] for name in ("features", "depths")}
        | dict(lidar2image=inputs["lidar2image"][:, frame])
        for frame in (slice(2), slice(2, 4))
    ]
    torch.testing.assert_close(lift(**inputs), sum(lift(**frame) for frame in frames), rtol=1e-12, atol=1e-12)


def test_rejects_invalid_arguments(device):
    inputs = make_inputs(B=1, N=2, sizes=[(3, 5)], C=3, D=4, shape=(2, 2, 2), device=device)
    with pytest.raises(AssertionError, match="does not match"):
        lift(**inputs | dict(lidar2image=views(1, 3, device)))
    with pytest.raises(AssertionError, match="does not match"):
        lift(**inputs | dict(depths=[torch.rand(1, 2, 3, 4, 4, device=device)]))
    with pytest.raises(AssertionError, match="32 bits"):
        lift(**inputs | dict(shape=(2**10, 2**10, 2**10)))
    with pytest.raises(AssertionError, match="levels"):
        lift(**inputs | dict(depths=[]))
