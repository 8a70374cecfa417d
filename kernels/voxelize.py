"""Points to voxels: the mean of the first `max_points` points of each occupied cell, or one point per cell.

    cell coordinates = floor((point - low) / size of a cell)   in float32, as in the original
    feature of a voxel (an occupied cell) = mean of its first `max_points` points

Points are sorted stably by the key of their cell, so those of a cell are adjacent, in input order: which points are
used and the order of summation are the same from run to run. No atomics.

Sizes: P points of B samples, C values per point, V voxels.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unipad.kernels.backend import host_wait, jit, on_triton, tl, to_host, triton
from unipad.kernels.voxel_keys import NO_KEY, check_grid  # NO_KEY: the key of points outside the grid


@torch.no_grad()
def voxelize(
    points: Tensor, point_counts: Tensor | Sequence[int], low: Sequence[float], cell: Sequence[float],
    shape: Sequence[int], max_points: int, max_voxels: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean of the first points in each occupied cell of a grid.

    Args:
        points:       [P, C] fp32, first x, y, z in meters; samples concatenated. Non-finite points are dropped.
        point_counts: [B] integers on the CPU, points of each sample.
        low, cell:    (x, y, z) meters: lower corner of the grid, size of a cell.
        shape:        cells (Z, Y, X). A point on the lower border is inside, one on the upper border is not.
        max_points:   per voxel, at least 1; later points are dropped.
        max_voxels:   per sample; voxels whose first points come later are dropped.

    Returns:
        features: [V, C] means.
        coords:   [V, 4] int32 (b, z, y, x), unique; sorted by sample, then by their first points in input order.

    Waits for the device once, for V. Not differentiable. Deterministic. Raises ValueError for a grid that `check_grid`
    rejects, AssertionError on points of another shape or type. Follows hard_voxelize_cpu and HardSimpleVFE of the
    original.
    """
    counts = _check(points, point_counts)
    assert all(len(t) == 3 for t in (low, cell, shape)), f"low, cell and shape are triples, not {low}, {cell}, {shape}"
    assert min(cell) > 0, f"cells have a size above 0, not {cell}"
    assert max_points >= 1, f"max_points is at least 1, not {max_points}"
    check_grid(shape, len(counts))
    if not on_triton(points):
        return voxelize_ref(points, counts, low, cell, shape, max_points, max_voxels)
    (P, C), B = points.shape, len(counts)
    if not P:
        return points.new_empty(0, C), points.new_empty(0, 4, dtype=torch.int32)
    points = points.contiguous()
    device_counts = counts.to(points.device, non_blocking=True)
    ends = device_counts.cumsum(0)
    # a compiled kernel receives floats as fp32; the interpreter would pass them as fp64
    low, cell = (tuple(np.float32(t).tolist()) for t in (low, cell))

    keys = torch.empty(P, dtype=torch.int64, device=points.device)
    grid = (triton.cdiv(P, BLOCK_P),)
    _cell_keys_kernel[grid](
        points_ptr=points, ends_ptr=ends, keys_ptr=keys, P=P, C=C, B=B, low=low, cell=cell, shape=tuple(shape),
        NO_KEY=NO_KEY, BLOCK_P=BLOCK_P,
    )  # fmt: skip
    keys, order = keys.sort(stable=True)
    # for the first point of each voxel, where the voxel's points start in `order`; -1 for other points
    start = torch.empty(P, dtype=torch.int32, device=points.device)
    _mark_first_kernel[grid](
        keys_ptr=keys, order_ptr=order, start_idx_ptr=start, P=P, NO_KEY=NO_KEY, BLOCK_P=BLOCK_P
    )  # fmt: skip

    kept = start >= 0  # [P] whether a point is the first of a voxel
    if int(counts.max()) > max_voxels:  # else no sample has too many: voxels are at most as many as points
        number = F.pad(kept.cumsum(0), (1, 0))  # [P + 1] number of voxels that start before each point, then of all
        before_sample = number[ends - device_counts].repeat_interleave(device_counts, output_size=P)
        kept &= number[:-1] - before_sample < max_voxels
    with host_wait("number of occupied voxels"):
        first = kept.nonzero()[:, 0]  # [V] first point of each voxel
    V = len(first)
    features = points.new_empty(V, C)
    coords = points.new_empty(V, 4, dtype=torch.int32)
    if V:
        block_c = triton.next_power_of_2(C)
        block_v = max(1, TILE // block_c)
        _mean_kernel[(triton.cdiv(V, block_v),)](
            points_ptr=points, keys_ptr=keys, order_ptr=order, start_idx_ptr=start, first_ptr=first,
            features_ptr=features, coords_ptr=coords, P=P, C=C, V=V, shape=tuple(shape), max_points=max_points,
            NO_KEY=NO_KEY, BLOCK_V=block_v, BLOCK_C=block_c,
        )  # fmt: skip
    return features, coords


@torch.no_grad()
def voxelize_ref(points, point_counts, low, cell, shape, max_points, max_voxels):
    """`voxelize` in plain PyTorch."""
    counts = torch.as_tensor(point_counts, dtype=torch.int64)
    (Z, Y, X), P = shape, len(points)
    low, cell = points.new_tensor(low), points.new_tensor(cell)
    coord = ((points[:, :3] - low) / cell).floor()
    inside = ((coord >= 0) & (coord < points.new_tensor([X, Y, Z]))).all(dim=1)
    x, y, z = torch.where(inside[:, None], coord, 0).long().unbind(1)  # [P] each
    b = _samples(counts, points)
    key = torch.where(inside, ((b * Z + z) * Y + y) * X + x, NO_KEY)

    key, order = key.sort(stable=True)
    new = F.pad(key[1:] != key[:-1], (1, 0), value=True)[:P] & (key != NO_KEY)
    at = new.nonzero()[:, 0]  # where the points of each voxel start in `order`
    count = at.diff(append=inside.sum()[None]).clamp(max=max_points)  # points of each voxel that are used
    first = order.index_select(0, at)  # the first point of each voxel

    appearance = first.argsort()  # voxels in the order of their first points
    number = torch.arange(len(at), device=points.device)  # of each voxel in that order
    sample = b.index_select(0, first.index_select(0, appearance))
    number_in_sample = number - torch.searchsorted(sample, sample)  # which finds the sample's first voxel
    kept = appearance[number_in_sample < max_voxels]  # [V]
    first, at, count = (t.index_select(0, kept) for t in (first, at, count))
    coords = torch.stack([b, z, y, x], dim=1).index_select(0, first).int()

    begin = count.cumsum(0) - count  # where each voxel's points begin among all points that are used
    used = torch.arange(int(count.sum()), device=points.device)
    position = (at - begin).repeat_interleave(count) + used  # in `order`, voxel after voxel
    features = F.embedding_bag(order.index_select(0, position), points, begin, mode="mean")
    return features, coords


@torch.no_grad()
def grid_subsample(
    points: Tensor, point_counts: Tensor | Sequence[int], cell: float, noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, tuple[list[int], list[int]]]:
    """One point of each occupied cell, for segmentation.

    Args:
        points:       [P, C] fp32, first x, y, z in meters, finite; samples concatenated.
        point_counts: [B] integers on the CPU, points of each sample.
        cell:         meters, size of a cell on all axes; cell coordinates are floor(point / cell) in float32.
        noise:        [P] uniform in [0, 1): of each cell, the point with the smallest value is taken. None: the first.

    Returns:
        rows:    [V] int64, rows of `points`, one per cell, in ascending order of `coords`.
        coords:  [V, 4] int32 (b, z, y, x) of the cells, possibly negative.
        cell_of: [P] int64, row of `coords` of each point.
        extent:  lowest and highest cell along each axis, two lists (z, y, x); zeros without points.

    Waits for the device once, for V and the extent. Raises ValueError if the coordinates of a cell do not fit int32,
    e.g. because a point is not finite, and if `check_grid` rejects the extent. Plain PyTorch on every device, without a
    Triton kernel. Follows GridSample of Pointcept, which counts cells from each sample's minimum; that shifts their
    coordinates, not their borders. (The original's copy of GridSample rounds toward zero, so that the cells at x = 0,
    y = 0 or z = 0 are twice as long across that plane.)
    """
    counts, P = _check(points, point_counts), len(points)
    assert cell > 0, f"cells have a size above 0, not {cell}"
    assert noise is None or noise.shape == (P,), f"noise {tuple(noise.shape)} does not match {P} points"
    if not P:
        none = torch.empty(0, dtype=torch.int64, device=points.device)
        return none, none.new_empty((0, 4), dtype=torch.int32), none, ([0, 0, 0], [0, 0, 0])
    # on a GPU, dividing by a Python number multiplies by its reciprocal, which could move points into other cells
    sample, coord = _samples(counts, points), (points[:, :3] / points.new_full((), cell)).floor().long()
    low, high = coord.amin(dim=0), coord.amax(dim=0)
    x, y, z = (coord - low).unbind(1)
    X, Y, Z = (high - low + 1).unbind()
    key = ((sample * Z + z) * Y + y) * X + x
    if noise is None:
        key, order = key.sort(stable=True)
    else:
        order = noise.argsort(stable=True)
        key, by_key = key.index_select(0, order).sort(stable=True)
        order = order.index_select(0, by_key)  # by cell, then by noise
    new = F.pad(key[1:] != key[:-1], (1, 0), value=True)
    numbers = torch.cat([new.sum()[None], low.flip(0), high.flip(0)])
    V, *extent = to_host(numbers, "number and extent of occupied cells")
    low, high = extent[:3], extent[3:]
    if min(low) < -(2**31) or max(high) >= 2**31:
        raise ValueError(f"points lie in cells (z, y, x) = {low} to {high}, beyond 32 bits: are all points finite?")
    check_grid([h - l + 1 for l, h in zip(low, high, strict=True)], len(counts))
    rows, cell_of = order[new.nonzero_static(size=V)[:, 0]], torch.empty_like(order)
    cell_of[order] = new.cumsum(0) - 1
    return rows, torch.cat([sample[:, None], coord.flip(1)], dim=1)[rows].int(), cell_of, (low, high)


def _check(points, point_counts):
    """The number of points of each sample, [B] int64 on the CPU, after checks of the arguments."""
    counts = torch.as_tensor(point_counts, dtype=torch.int64)
    fits = points.dim() == 2 and points.shape[1] >= 3 and points.dtype == torch.float32
    assert fits, f"points are [P, 3 or more] float32, not {tuple(points.shape)} {points.dtype}"
    assert counts.device.type == "cpu", "point_counts must be on the CPU, so that nothing waits for the device"
    assert int(counts.sum()) == len(points), f"{counts.tolist()} points in the samples, {len(points)} in all"
    return counts


def _samples(counts, points):
    """[P] int64, index of the sample of each point."""
    samples, counts = torch.arange(len(counts), device=points.device), counts.to(points.device, non_blocking=True)
    return samples.repeat_interleave(counts, output_size=len(points))


BLOCK_P = 256  # points per program
TILE = 1024  # voxels x values per program


@jit(varying=("P", "B"))
def _cell_keys_kernel(
    points_ptr, ends_ptr, keys_ptr,  # [P, C], [B], [P]
    P, C, B, low, cell, shape,  # low and cell: (x, y, z); shape: (Z, Y, X)
    NO_KEY: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    p_ok = p < P
    point_ptr = points_ptr + p.to(tl.int64) * C
    x, x_ok = _cell(tl.load(point_ptr, mask=p_ok, other=0.0), low[0], cell[0], shape[2])
    y, y_ok = _cell(tl.load(point_ptr + 1, mask=p_ok, other=0.0), low[1], cell[1], shape[1])
    z, z_ok = _cell(tl.load(point_ptr + 2, mask=p_ok, other=0.0), low[2], cell[2], shape[0])
    b = tl.zeros((BLOCK_P,), tl.int64)
    for sample in range(B):
        b += (p >= tl.load(ends_ptr + sample)).to(tl.int64)
    key = ((b * shape[0] + z) * shape[1] + y) * shape[2] + x
    tl.store(keys_ptr + p, tl.where(x_ok & y_ok & z_ok, key, NO_KEY), mask=p_ok)


@triton.jit
def _cell(point, low, size, cells):
    """Cell of a point on one axis with `cells` cells, and whether it is in the grid; 0 where not."""
    # `/` is approximate and would put points on a border into another cell than the original does
    coord = tl.floor(tl.div_rn(point - low, size + tl.zeros_like(point)))
    inside = (coord >= 0) & (coord < cells)  # false for NaN
    return tl.where(inside, coord, 0.0).to(tl.int64), inside


@jit(varying=("P",))
def _mark_first_kernel(
    keys_ptr, order_ptr, start_idx_ptr,  # [P] sorted, [P], [P]
    P, NO_KEY: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write, for the first point of each voxel, where the voxel's points start in `order`; -1 for other points."""
    q = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P] positions in `order`; p: rows of points
    q_ok = q < P
    key = tl.load(keys_ptr + q, mask=q_ok, other=NO_KEY)
    previous = tl.load(keys_ptr + q - 1, mask=q_ok & (q > 0), other=-1)
    p = tl.load(order_ptr + q, mask=q_ok, other=0)
    tl.store(start_idx_ptr + p, tl.where((key != previous) & (key != NO_KEY), q, -1), mask=q_ok)


@jit(varying=("P", "V"))
def _mean_kernel(
    points_ptr, keys_ptr, order_ptr, start_idx_ptr, first_ptr,  # [P, C], [P] sorted, [P], [P], [V]
    features_ptr, coords_ptr,  # [V, C], [V, 4]
    P, C, V, shape, max_points,
    NO_KEY: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)  # [BLOCK_V]
    c = tl.arange(0, BLOCK_C)[None, :]
    v_ok = v < V
    first = tl.load(first_ptr + v, mask=v_ok, other=0)
    q = tl.load(start_idx_ptr + first, mask=v_ok, other=0)  # position of the voxel's points in `order`
    key = tl.load(keys_ptr + q, mask=v_ok, other=0)

    total = tl.zeros((BLOCK_V, BLOCK_C), tl.float32)
    count = tl.zeros((BLOCK_V,), tl.int32)
    member = v_ok  # whether the point at q + count is one of the voxel's and is used
    while tl.max(member.to(tl.int32), axis=0) > 0:
        p = tl.load(order_ptr + q + count, mask=member, other=0)
        total += tl.load(points_ptr + p[:, None] * C + c, mask=member[:, None] & (c < C), other=0.0)
        count += member.to(tl.int32)
        member &= (count < max_points) & (q + count < P)
        member &= tl.load(keys_ptr + q + count, mask=member, other=NO_KEY) == key
    mean = tl.div_rn(total, tl.maximum(count, 1).to(tl.float32)[:, None] + tl.zeros_like(total))
    tl.store(features_ptr + v.to(tl.int64)[:, None] * C + c, mean, mask=v_ok[:, None] & (c < C))

    Z, Y, X = shape
    voxel_ptr = coords_ptr + v.to(tl.int64) * 4
    row = key // X  # of cells: (b Z + z) Y + y
    tl.store(voxel_ptr, (row // Y // Z).to(tl.int32), mask=v_ok)
    tl.store(voxel_ptr + 1, (row // Y % Z).to(tl.int32), mask=v_ok)
    tl.store(voxel_ptr + 2, (row % Y).to(tl.int32), mask=v_ok)
    tl.store(voxel_ptr + 3, (key % X).to(tl.int32), mask=v_ok)
