"""Points to voxels: the mean of the first points of each occupied cell, and one point a cell.

    cell = floor((point - low) / size)  in float32, as the original's; a voxel's feature is the mean of its points

Points are sorted by the key of their cell, stably: those of a cell then lie together, the first to come in front, and
which points count and the order of the sums are the same from run to run. Nothing is atomic.

Sizes: P points of B samples, F features a point, V voxels.
"""

import torch
import torch.nn.functional as F

from kernels.backend import on_triton, tl, triton  # noqa: F401

NO_KEY = 2**62  # of points outside the grid: sorts behind every cell


@torch.no_grad()
def voxelize(points, point_counts, low, cell, shape, max_points, max_voxels):
    """Mean of the points in each occupied cell of a grid.

    Args:
        points:       [P, F] fp32, first x, y, z in metres; the samples one after the other. A point that is not finite
                      lies in no cell.
        point_counts: [B] integers on the CPU, points of each sample.
        low, cell:    (x, y, z) metres: lower corner of the grid, size of a cell.
        shape:        cells (Z, Y, X). A point on the lower border is inside, one on the upper border is not.
        max_points:   of a voxel, at least 1; the first ones count, later ones are dropped.
        max_voxels:   of a sample; the first to appear stay.

    Returns:
        features: [V, F] means.
        coords:   [V, 4] int32 (b, z, y, x), each once; sample after sample, within one in the order of first points.

    Waits for the device, once: for V. Not differentiable. Follows hard_voxelize_cpu and HardSimpleVFE of the original.
    """
    return voxelize_ref(points, point_counts, low, cell, shape, max_points, max_voxels)


@torch.no_grad()
def voxelize_ref(points, point_counts, low, cell, shape, max_points, max_voxels):
    """`voxelize` in plain PyTorch."""
    (Z, Y, X), P = shape, len(points)
    low, cell = points.new_tensor(low), points.new_tensor(cell)
    place = ((points[:, :3] - low) / cell).floor()
    inside = ((place >= 0) & (place < points.new_tensor([X, Y, Z]))).all(dim=1)
    x, y, z = torch.where(inside[:, None], place, 0).long().unbind(1)  # [P] each
    b = _samples(point_counts, points)
    key = torch.where(inside, ((b * Z + z) * Y + y) * X + x, NO_KEY)

    key, order = key.sort(stable=True)
    new = F.pad(key[1:] != key[:-1], (1, 0), value=True)[:P] & (key != NO_KEY)
    at = new.nonzero()[:, 0]  # where the points of each voxel start in `order`
    count = at.diff(append=inside.sum()[None]).clamp(max=max_points)
    first = order.index_select(0, at)  # the first point of each voxel

    appearance = first.argsort()
    number = torch.arange(len(at), device=points.device)  # of all voxels, by appearance
    sample = b.index_select(0, first.index_select(0, appearance))
    number_in_sample = number - torch.searchsorted(sample, sample)
    kept = appearance[number_in_sample < max_voxels]  # [V]
    first, at, count = (t.index_select(0, kept) for t in (first, at, count))
    coords = torch.stack([b, z, y, x], dim=1).index_select(0, first).int()

    before = count.cumsum(0) - count
    slot = torch.arange(int(count.sum()), device=points.device)
    which = (at - before).repeat_interleave(count) + slot  # places in `order`, voxel after voxel
    features = F.embedding_bag(order.index_select(0, which), points, before, mode="mean")
    return features, coords


@torch.no_grad()
def grid_sample(points, point_counts, cell, noise=None):
    """One point of each occupied cell, for segmentation.

    Args:
        points:       [P, F] fp32, first x, y, z in metres, finite; the samples one after the other.
        point_counts: [B] integers on the CPU, points of each sample.
        cell:         metres, size of a cell on all axes. Cells are multiples of it: floor(point / cell) in float32.
        noise:        [P] uniform in [0, 1): the point of a cell with the smallest one is taken. None: the first.

    Returns:
        rows: [V] int64 ascending, rows of `points`.

    Elementwise torch and its sorts on every device: nothing is left for a kernel of our own. Follows GridSample of
    Pointcept, which counts cells from each sample's minimum; that moves their numbers, not their borders.
    """
    P = len(points)
    if not P:
        return torch.empty(0, dtype=torch.int64, device=points.device)
    place = (points[:, :3] / cell).floor().long()
    place = place - place.amin(dim=0)
    X, Y, Z = (place.amax(dim=0) + 1).unbind()
    x, y, z = place.unbind(1)
    key = ((_samples(point_counts, points) * Z + z) * Y + y) * X + x
    if noise is None:
        key, order = key.sort(stable=True)
    else:
        order = noise.argsort(stable=True)
        key, within = key.index_select(0, order).sort(stable=True)
        order = order.index_select(0, within)
    new = F.pad(key[1:] != key[:-1], (1, 0), value=True)
    return order[new].sort().values


def _samples(point_counts, points):
    """[P] int64, the sample of each point."""
    counts = torch.as_tensor(point_counts, dtype=torch.int64)
    assert int(counts.sum()) == len(points), f"{counts.tolist()} points in the samples, {len(points)} in all"
    sample = torch.arange(len(counts)).repeat_interleave(counts)
    return sample.to(points.device, non_blocking=True)
