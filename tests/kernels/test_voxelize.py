from functools import partial

import pytest
import torch

from tests import golden
from tests.ahead_of_time import Launch
from tests.check import DivideLikeGpu, launches
from unipad.kernels.voxelize import BLOCK_P, NO_KEY, TILE, grid_subsample, voxelize, voxelize_ref

TYPES = dict.fromkeys(["ends_ptr", "keys_ptr", "order_ptr", "first_ptr"], "*i64")
TYPES |= dict(coords_ptr="*i32", low=("fp32",) * 3, cell=("fp32",) * 3, shape=("i32",) * 3, max_points="i32")
LAUNCHES = [  # checked by tests/test_compiles.py
    Launch(kernel, blocks | dict(NO_KEY=NO_KEY), TYPES, elements=("fp32",), registers=registers, shared=shared)
    for kernel, blocks, registers, shared in [
        ("_cell_keys_kernel", dict(BLOCK_P=BLOCK_P), 48, 2048),
        ("_mark_first_kernel", dict(BLOCK_P=BLOCK_P), 32, 2048),
        ("_mean_kernel", dict(BLOCK_V=TILE // 8, BLOCK_C=8), 64, 1024),
        ("_mean_kernel", dict(BLOCK_V=TILE // 4, BLOCK_C=4), 72, 2048),
    ]
]

GRID = dict(low=(-2.0, -1.5, -1.0), cell=(0.5, 0.3, 0.7), shape=(3, 10, 8))  # meters (x, y, z); cells (Z, Y, X)


def make_inputs(point_counts, C, device, max_points=3, max_voxels=1000):
    """Points in the grid and up to a cell outside, some on the borders of cells, some of them equal."""
    P = sum(point_counts)
    points = torch.rand(P, C, device=device)
    points[:, :3] = (points[:, :3] * torch.tensor([10, 12, 5], device=device) - 1) * points.new_tensor(GRID["cell"])
    points[:, :3] += points.new_tensor(GRID["low"])
    points[1::7, :3] = ((points[1::7, :3] * 2).round() / 2).clamp(-2, 2)  # multiples of 0.5 m: borders along x
    if P > 5:
        points[5::11] = points[4:-1:11]  # equal to the point before
    return dict(points=points, point_counts=list(point_counts), max_points=max_points, max_voxels=max_voxels, **GRID)


def check_matches_reference(inputs):
    """Compare kernel and reference in fp32 only: in fp64, points near a border may lie in other cells."""
    with launches() as launched:
        features, coords = voxelize(**inputs)
    expected, expected_coords = voxelize_ref(**inputs)
    assert bool(launched) == bool(len(inputs["points"]))
    assert coords.dtype == torch.int32 and torch.equal(coords, expected_coords)
    torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("C", [3, 5, 8])
@pytest.mark.parametrize(
    "point_counts",
    [[1], [BLOCK_P], [BLOCK_P + 1], [0, 211, 0, 305, 17, 0], [0], [0, 0], []],
    ids=str,
)
def test_matches_reference(point_counts, C, device):
    check_matches_reference(make_inputs(point_counts, C, device))


@pytest.mark.parametrize("max_points, max_voxels", [(1, 1), (2, 40), (1000, 1000)])
def test_max_points_and_max_voxels_match_reference(max_points, max_voxels, device):
    inputs = make_inputs([300, 0, 200], 5, device, max_points, max_voxels)
    check_matches_reference(inputs)
    _, coords = voxelize(**inputs)
    assert coords[:, 0].bincount(minlength=3).max() <= max_voxels


def one_by_one(points, point_counts, low, cell, shape, max_points, max_voxels):
    """The original's hard_voxelize_cpu and HardSimpleVFE, point by point."""
    low, cell = torch.tensor(low), torch.tensor(cell)
    features, coords = [], []
    for b, sample in enumerate(points.cpu().split(point_counts)):
        voxels = {}
        for point in sample:
            x, y, z = ((point[:3] - low) / cell).floor().tolist()
            if not (0 <= x < shape[2] and 0 <= y < shape[1] and 0 <= z < shape[0]):
                continue
            if (z, y, x) not in voxels and len(voxels) == max_voxels:
                continue
            voxel = voxels.setdefault((z, y, x), [])
            if len(voxel) < max_points:
                voxel.append(point)
        features += [torch.stack(voxel).sum(dim=0) / len(voxel) for voxel in voxels.values()]
        coords += [[b, *voxel] for voxel in voxels]
    return torch.stack(features), torch.tensor(coords, dtype=torch.int32)


@pytest.mark.parametrize("fn", [voxelize, voxelize_ref])
@pytest.mark.parametrize("max_points, max_voxels", [(3, 1000), (2, 40), (1, 1)])
def test_matches_a_loop_over_points(fn, max_points, max_voxels, device):
    inputs = make_inputs([200, 0, 311], 5, device, max_points, max_voxels)
    inputs["points"][3::50, :3] = torch.tensor([float("nan"), 1e30, -float("inf")], device=device)  # in no cell
    features, coords = fn(**inputs)
    expected, expected_coords = one_by_one(**inputs)
    assert torch.equal(coords.cpu(), expected_coords)
    torch.testing.assert_close(features.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fn", [voxelize, voxelize_ref])
def test_by_hand(fn, device):
    """Cells of 0.5 m along x, from -1 m on. At most 2 points per voxel and 2 voxels per sample: in the first sample,
    the third point of a cell is dropped, and so is the third occupied cell."""
    points = torch.tensor(
        [
            [0.0, 0, 0, 8],  # first sample: cell 2, on the lower border of the cell
            [-1.0, 0, 0, 1],  # cell 0, on the lower border of the grid
            [0.25, 0, 0, 4],  # cell 2
            [0.3, 0, 0, 100],  # cell 2, one too many
            [-0.5, 0, 0, 9],  # cell 1, one voxel too many
            [-0.75, 0, 0, 3],  # cell 0: already a voxel, so this point is still used
            [1.0, 0, 0, 7],  # upper border of the grid: outside
            [0.5, 0, 0, 2],  # second sample: cell 3
        ],
        device=device,
    )
    grid = dict(low=(-1, -1, -1), cell=(0.5, 2, 2), shape=(1, 1, 4))
    features, coords = fn(points, torch.tensor([7, 1]), **grid, max_points=2, max_voxels=2)
    assert coords.tolist() == [[0, 0, 0, 2], [0, 0, 0, 0], [1, 0, 0, 3]]
    assert features.tolist() == [[0.125, 0, 0, 6], [-0.875, 0, 0, 2], [0.5, 0, 0, 2]]


@pytest.mark.parametrize("fn", [voxelize, voxelize_ref])
def test_cells_are_computed_in_float32(fn, device):
    """x - low = 6.075 m is 81 cells of 0.075 m, but in float32, as the original computes, 80.99999: in cell 80."""
    points = torch.tensor([[0.075, 0, 0]], device=device)
    grid = dict(low=(-6, -6, -5), cell=(0.075, 0.075, 0.2), shape=(40, 160, 160))
    _, coords = fn(points, [1], **grid, max_points=10, max_voxels=10)
    assert coords.tolist() == [[0, 25, 80, 80]]


@pytest.mark.parametrize("fn", [voxelize, voxelize_ref])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_matches_the_original(fn, mode, device):
    arrays, meta = golden.load("voxelize_vfe")
    config = meta["config"]
    samples = [arrays["in/points_0"], arrays["in/points_1"]]
    features, coords = fn(
        torch.cat(samples).to(device),
        [len(sample) for sample in samples],
        low=config["point_cloud_range"][:3],
        cell=config["voxel_size"],
        shape=meta["grid_size_xyz"][::-1],
        max_points=config["max_num_points"],
        max_voxels=config["max_voxels"][mode == "eval"],  # one for training, one for evaluation
    )
    assert torch.equal(coords.cpu(), arrays[f"out/{mode}_coors"])
    golden.assert_close_to_max(features.cpu(), arrays[f"out/{mode}_features"], 1e-7)


@pytest.mark.parametrize("fn", [voxelize, voxelize_ref])
def test_voxelizes_a_grid_of_more_than_2_to_the_31_cells(fn, device):
    far = 50000.0
    points = torch.tensor([[0.5, 0.5, 0.5], [far - 0.5, far - 0.5, 1.5], [far - 0.5, far - 0.5, 1.5]], device=device)
    grid = dict(low=(0, 0, 0), cell=(1, 1, 1), shape=(2, int(far), int(far)))
    _, coords = fn(points, [1, 2], **grid, max_points=10, max_voxels=10)
    assert coords.tolist() == [[0, 0, 0, 0], [1, 1, int(far) - 1, int(far) - 1]]


def test_bit_equal_from_run_to_run(device):
    inputs = make_inputs([300, 200], 5, device)
    (features, coords), (again, same) = voxelize(**inputs), voxelize(**inputs)
    assert torch.equal(features, again) and torch.equal(coords, same)


def test_no_points_or_none_in_the_grid_give_no_voxels(device):
    with launches() as launched:
        features, coords = voxelize(**make_inputs([0, 0], 4, device))
    assert not launched and features.shape == (0, 4) and coords.shape == (0, 4) and coords.dtype == torch.int32
    outside = make_inputs([50], 4, device) | dict(low=(100.0, 100.0, 100.0))
    for fn in (voxelize, voxelize_ref):
        features, coords = fn(**outside)
        assert features.shape == (0, 4) and coords.shape == (0, 4)


def test_grid_subsample_by_hand(device):
    # in cells 0, -1, 1, 0, 1 of the first sample and 0, -1 of the second
    x = torch.tensor([0.1, -0.1, 0.6, 0.2, 0.9, 0.2, -0.1], device=device)
    points = torch.stack([x, torch.zeros_like(x), torch.ones_like(x)], dim=1)
    noise = torch.tensor([0.5, 0.1, 0.3, 0.2, 0.3, 0.0, 0.9], device=device)
    counts = [5, 2]
    rows, coords, cell_of, extent = grid_subsample(points, counts, cell=0.5)
    assert extent == ([2, 0, -1], [2, 0, 1])  # lowest and highest (z, y, x)
    assert rows.tolist() == [1, 0, 2, 6, 5]  # the first row of each cell
    assert coords.tolist() == [[0, 2, 0, -1], [0, 2, 0, 0], [0, 2, 0, 1], [1, 2, 0, -1], [1, 2, 0, 0]]
    assert cell_of.tolist() == [1, 0, 2, 1, 2, 4, 3]
    rows, same_coords, cell_of, _ = grid_subsample(points, counts, 0.5, noise)  # the row with the smallest noise
    assert rows.tolist() == [1, 3, 2, 6, 5]  # of rows 2 and 4, with equal noise, the first
    assert torch.equal(same_coords, coords) and cell_of.tolist() == [1, 0, 2, 1, 2, 4, 3]
    *empty, extent = grid_subsample(points[:0], [0, 0], 0.5)
    assert [t.shape for t in empty] == [(0,), (0, 4), (0,)] and extent == ([0, 0, 0], [0, 0, 0])


def test_grid_subsample_divides_by_the_cell_size_on_a_gpu_too(device):
    """Points just below cell borders, which multiplying by the reciprocal of the size would move onto the border."""
    x = (torch.arange(1, 2000, device=device).double() * 0.05).float()
    x = x.nextafter(x.new_zeros(()))
    assert ((x * (1 / 0.05)).floor() != (x / x.new_full((), 0.05)).floor()).any()
    points = torch.stack([x, -x, x], dim=1)
    with DivideLikeGpu():
        _, coords, cell_of, _ = grid_subsample(points, [len(x)], 0.05)
    cells = (points / points.new_full((), 0.05)).floor().int().flip(1)
    assert torch.equal(coords[cell_of, 1:], cells)


@pytest.mark.parametrize("far", [1e9, torch.inf, torch.nan])
def test_points_in_cells_beyond_32_bits_are_rejected(far, device):
    points = torch.tensor([[1.0, 2.0, 3.0], [1.0, far, 3.0]], device=device)
    with pytest.raises(ValueError, match="beyond 32 bits"):
        grid_subsample(points, [2], 0.05)


def test_too_large_grids_are_rejected(device):
    points, others = torch.zeros(1, 3, device=device), dict(low=(0, 0, 0), cell=(1, 1, 1), max_points=1, max_voxels=1)
    with pytest.raises(ValueError, match="too many"):
        voxelize(points, [1], shape=(1, 1, 2**31), **others)
    with pytest.raises(ValueError, match="3 samples.*too many"):
        voxelize(points, [1, 0, 0], shape=(2**15, 2**16, 2**30), **others)


def test_grid_subsample_takes_one_point_of_each_cell(device):
    """The one with the smallest noise; without noise, the first."""
    points = torch.randn(3000, 4, device=device) * 3
    counts = [1000, 0, 2000]
    sample = torch.tensor([0, 2], device=device).repeat_interleave(torch.tensor([1000, 2000], device=device))
    cells = torch.cat([sample[:, None], (points[:, :3] / 0.5).floor().long().flip(1)], dim=1)  # (b, z, y, x)
    occupied, occupied_of = cells.unique(dim=0, return_inverse=True)  # occupied_of: row of `occupied` of each point
    for noise in (None, torch.rand(3000, device=device)):
        rows, coords, cell_of, _ = grid_subsample(points, counts, cell=0.5, noise=noise)
        assert torch.equal(coords.long(), occupied) and torch.equal(cell_of, occupied_of)
        assert torch.equal(occupied_of[rows], torch.arange(len(occupied), device=device))
        # what the point taken has the smallest value of: its row in the input, or the noise
        value = torch.arange(3000, device=device).double() if noise is None else noise.double()
        smallest = torch.full((len(occupied),), 1e9, dtype=torch.float64, device=device)
        smallest = smallest.scatter_reduce(0, occupied_of, value, "amin")
        assert torch.equal(value[rows], smallest)


@pytest.mark.parametrize("fn", [voxelize, partial(grid_subsample, cell=0.5)], ids=["voxelize", "grid_subsample"])
def test_rejects_mismatched_arguments(fn, device):
    inputs = make_inputs([4, 5], 4, device)
    if isinstance(fn, partial):
        inputs = {name: inputs[name] for name in ("points", "point_counts")}
    with pytest.raises(AssertionError, match="points in the samples, 9 in all"):
        fn(**inputs | dict(point_counts=[4, 4]))
    with pytest.raises(AssertionError, match="float32"):
        fn(**inputs | dict(points=inputs["points"].double()))
    with pytest.raises(AssertionError, match="3 or more"):
        fn(**inputs | dict(points=inputs["points"][:, :2]))
