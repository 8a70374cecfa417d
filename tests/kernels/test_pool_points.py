import pytest
import torch

from tests import golden
from tests.ahead_of_time import ASSEMBLED_TARGETS, Launch
from tests.check import DivideLikeGpu
from tests.kernels.test_voxel_pool import RECORDED, make_inputs, straight_view
from unipad.kernels.pool_points import BLOCK_N, BLOCK_P, find_points, geometry_ref, voxels_ref


def launch_voxels(truncate):
    types = dict(matrices_ptr="*fp64", w="i32", stride="i32", shape=("i32",) * 3)
    constexprs = dict(NEAR=1.0, STEP=1.0, TRUNCATE=truncate, BLOCK_P=BLOCK_P)
    return Launch("_voxels_kernel", constexprs, types, elements=("fp32",), registers=48, limits_on=ASSEMBLED_TARGETS)


LAUNCHES = [
    Launch(
        "_matrices_kernel",
        dict(LOW=(-54.0, -54.0, -5.0), CELL=(0.6, 0.6, 1.6), BLOCK_N=BLOCK_N),
        dict(matrices_ptr="*fp64"),
        elements=("fp32",),
        registers=64,
        limits_on=ASSEMBLED_TARGETS,
    ),
    launch_voxels(truncate=False),
    launch_voxels(truncate=True),
    Launch(
        "_begin_kernel",
        dict(BLOCK_P=BLOCK_P),
        dict(by_voxel_ptr="*i64"),
        elements=("fp32",),
        registers=48,
        shared=64,
        limits_on=ASSEMBLED_TARGETS,
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize(
    "B, N, size, D, shape",
    [
        (1, 1, (1, 1), 1, (1, 1, 1)),
        (3, 2, (5, 7), 5, (5, 7, 2)),  # odd sizes
        (1, 1, (8, 8), 4, (16, 16, 1)),  # exactly one block of points; one voxel more than a block in `begin`
        (1, 2, (1, 1), BLOCK_P + 1, (2, 2, 1)),
        (1, BLOCK_N + 1, (1, 3), 4, (3, 3, 2)),
    ],
)
def test_points_match_reference(B, N, size, D, shape, truncate, dtype, device):
    """Bitwise: voxels, first points of runs in order, and where each voxel's begin."""
    inputs = make_inputs(B, N, size, 1, D, shape, device, truncate)
    geometry = {name: inputs[name] for name in ("low", "cell", "depth_range")}
    matrices, bins = geometry_ref(inputs["lidar2image"].to(dtype), D=D, **geometry)
    voxel = voxels_ref(matrices, bins, (B, N, *size, 1), shape, inputs["stride"], truncate)
    sizes, V = (B, N, *size), B * shape[0] * shape[1] * shape[2]
    points = find_points(
        inputs["lidar2image"].to(dtype), sizes, D, shape=shape, stride=inputs["stride"], truncate=truncate, **geometry
    )  # fmt: skip
    assert torch.equal(points.voxel, voxel.int()) and (voxel < V).any()
    rays = voxel.view(-1, D)
    is_first = torch.ones_like(rays, dtype=torch.bool)
    is_first[:, 1:] = rays[:, 1:] != rays[:, :-1]
    first = (is_first & (rays < V)).flatten().nonzero()[:, 0]
    order = first[voxel[first].argsort(stable=True)]
    assert torch.equal(points.order[: len(order)], order.int())
    assert torch.equal(points.pixel, points.order // D)
    begin = (voxel[first] < torch.arange(V + 1, device=device)[:, None]).sum(dim=1)
    assert torch.equal(points.begin, begin.int())


def test_points_lie_where_the_original_puts_them():
    """All points of the golden record, placed by the reference; of 79955 in the grid, 7632 are there only because the
    original rounds towards zero."""
    arrays, _ = golden.load("voxel_pool_depth")
    matrices, bins = geometry_ref(
        arrays["in/lidar2img"][:, :, 0], RECORDED["low"], RECORDED["cell"], RECORDED["depth_range"], D=30
    )
    sizes = (2, 6, 16, 28, 12)  # B, N, h, w, C of the features
    truncated, floored = (
        voxels_ref(matrices, bins, sizes, RECORDED["shape"], RECORDED["stride"], truncate) for truncate in (True, False)
    )
    b, x, y, z = arrays["out/voxel_coords_b_x_y_z"][:, :, 0].permute(5, 0, 1, 3, 4, 2).long()
    inside = arrays["out/mask"][:, :, 0].permute(0, 1, 3, 4, 2)
    V = 2 * 5 * 18 * 20  # B * Z * Y * X: the index of points outside
    expected = torch.where(inside, ((b * 5 + z) * 18 + y) * 20 + x, V).flatten()
    assert torch.equal(truncated, expected)
    moved = truncated != floored
    assert (truncated < V).sum() == 79955 and (floored[moved] == V).all() and moved.sum() == 7632


def test_geometry_divides_by_the_voxel_size_on_a_gpu_too(device):
    """Multiplying by its reciprocal would move some points."""
    inputs = make_inputs(1, 4, (5, 8), 3, 12, (9, 9, 5), device)
    cell = (0.7, 0.3, 1.1)
    geometry = {name: inputs[name] for name in ("lidar2image", "low", "depth_range")} | dict(cell=cell, D=12)
    matrices, bins = geometry_ref(**geometry)
    with DivideLikeGpu():
        matrices_on_gpu, bins_on_gpu = geometry_ref(**geometry)
    assert torch.equal(matrices_on_gpu, matrices) and torch.equal(bins_on_gpu, bins)
    cell = matrices.new_tensor(cell)[:, None]
    assert (matrices * cell * (1 / cell) != matrices).any()  # reciprocals would give other numbers


def test_consecutive_points_of_a_ray_in_one_voxel_are_one_run(device):
    """Pixels 0, 1, 2 at depths 1 to 9, so x = pixel * depth; five voxels of 4 m along x."""
    # begin: index of each voxel's first run, at last the number of runs; sizes: B, N, h, w
    *_, begin = find_points(
        straight_view(device), sizes=(1, 1, 1, 3), D=9, low=(0, -1, 0), cell=(4, 2, 20), shape=(5, 1, 1),
        stride=1, depth_range=(1, 10), truncate=False,
    )  # fmt: skip
    # x of the points of each run: pixel 0: 0 nine times; 1: 1 2 3, 4 5 6 7, 8 9; 2: 2, 4 6, 8 10, 12 14, 16 18
    # so the voxels have 3, 2, 2, 1 and 1 runs
    assert begin.tolist() == [0, 3, 5, 7, 8, 9]
