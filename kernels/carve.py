"""Free and full cells of a grid, carved by rays: what they cross is free, where they end is full.

A ray from o to e, in cells from the grid's lower corner, passes from one cell to the next where a coordinate is an
integer k: along axis i at t = (k - o_i) / (e_i - o_i). Of the next crossings along x, y and z, the earliest decides
which neighbor the ray enters (3D DDA: Amanatides and Woo, A Fast Voxel Traversal Algorithm for Ray Tracing, 1987).
Every t is computed anew from its k, since sums of steps would drift; crossings at the same t are one step, through an
edge or a corner, so that a cell which a ray only touches is not crossed.

    mark of a cell = max over the rays that cross it or end in it:  2 rank + 2 where crossed, 2 rank + 3 where ended
    state = 0 (unknown) without a mark, 2 (full) for an odd mark, 1 (free) for an even one

Maxima of integers do not depend on the order of the rays, so atomics are deterministic here.

Sizes: R rays, B volumes of Z x Y x X cells.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unipad.kernels.backend import cdiv, jit, on_triton, tl, triton
from unipad.kernels.voxel_keys import check_grid

UNKNOWN, FREE, FULL = 0, 1, 2  # states


@torch.no_grad()
def carve(
    origins: Tensor, ends: Tensor, volume_idx: Tensor, low: Sequence[float], cell: Sequence[float],
    shape: Sequence[int], B: int, rank: Tensor | None = None, hit: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """State of every cell of B volumes after carving by rays.

    Args:
        origins:    [R, 3] fp32 x, y, z in meters where each ray starts, inside the grid or outside.
        ends:       [R, 3] fp32 meters where it ends, inside or outside. Rays with a number that is not finite, and rays
                    that miss the grid, mark nothing.
        volume_idx: [R] int32 volume that the ray carves, from 0 to B - 1; others, such as -1: the ray is not used.
        low, cell:  (x, y, z) meters: lower corner of the grid, size of a cell.
        shape:      cells (Z, Y, X).
        B:          number of volumes, at least 1.
        rank:       [R] int32 from 0 to 2^30 - 2: in a cell, the rays of the highest rank decide; among these, an end
                    counts more than a crossing. None: all are equal.
        hit:        [R] bool, whether the ray ends at a surface; else it frees its last cell too. None: all do.

    Returns [B, Z, Y, X] uint8: `UNKNOWN`, `FREE` or `FULL`.

    A cell contains its lower borders and not its upper ones, for ends as in `voxelize`; it is crossed by rays that have
    a part of positive length in it, along a lower border too. Not differentiable. Deterministic. Waits for nothing.
    Raises ValueError for a grid that `check_grid` rejects, AssertionError on other shapes or types.
    """
    R = len(origins)
    fits = origins.shape == ends.shape == (R, 3) and volume_idx.shape == (R,)
    fits = fits and all(t is None or t.shape == (R,) for t in (rank, hit))
    shapes = [None if t is None else tuple(t.shape) for t in (origins, ends, volume_idx, rank, hit)]
    assert fits, f"origins, ends, volume_idx, rank, hit of {shapes} do not match: [R, 3], [R, 3], then [R]"
    types = {origins.dtype, ends.dtype}
    assert types == {torch.float32}, f"origins and ends are float32, not {origins.dtype} and {ends.dtype}"
    integers = volume_idx.dtype == torch.int32 and (rank is None or rank.dtype == torch.int32)
    assert integers, "volume_idx and rank are int32"
    assert hit is None or hit.dtype == torch.bool, f"hit is bool, not {hit.dtype}"
    assert all(len(t) == 3 for t in (low, cell, shape)), f"low, cell and shape are triples, not {low}, {cell}, {shape}"
    assert min(cell) > 0, f"cells have a size above 0, not {cell}"
    assert B >= 1, f"there is at least 1 volume, not {B}"
    check_grid(shape, B)
    if not on_triton(origins):
        return carve_ref(origins, ends, volume_idx, low, cell, shape, B, rank, hit)
    marks = torch.zeros((B, *shape), dtype=torch.int32, device=origins.device)
    if R:
        # a compiled kernel receives floats as fp32; the interpreter would pass them as fp64
        low, cell = (tuple(np.float32(t).tolist()) for t in (low, cell))
        _carve_kernel[(cdiv(R, BLOCK_R),)](
            origins_ptr=origins.contiguous(), ends_ptr=ends.contiguous(), volume_idx_ptr=volume_idx.contiguous(),
            rank_idx_ptr=volume_idx if rank is None else rank.contiguous(),
            hit_ptr=volume_idx if hit is None else hit.contiguous(), marks_ptr=marks,
            R=R, B=B, low=low, cell=cell, shape=tuple(shape),
            RANKED=rank is not None, ALL_HIT=hit is None, BLOCK_R=BLOCK_R,
            enable_fp_fusion=False,  # as in the reference, so that both find the same cells
        )  # fmt: skip
    return _states(marks)


@torch.no_grad()
def carve_ref(origins, ends, volume_idx, low, cell, shape, B, rank=None, hit=None):
    """`carve` in plain PyTorch: one step of all rays at a time."""
    (Z, Y, X), sizes = shape, origins.new_tensor(shape[::-1])  # (X, Y, Z)
    low, cell = origins.new_tensor(low), origins.new_tensor(cell)
    rank = torch.zeros_like(volume_idx) if rank is None else rank
    hit = torch.ones_like(volume_idx, dtype=torch.bool) if hit is None else hit
    start, end = (origins - low) / cell, (ends - low) / cell  # [R, 3] in cells
    used = (volume_idx >= 0) & (volume_idx < B) & (start.isfinite() & end.isfinite()).all(dim=1)
    start, end, hit, volume_idx, rank = start[used], end[used], hit[used], volume_idx[used], rank[used]

    along = end - start
    flat = start.floor() == end.floor()  # the ray stays in one slice of cells along this axis
    along = along.where(~flat, 1.0)
    up = along > 0
    at_low, at_high = -start / along, (sizes - start) / along  # where it meets the grid's two faces
    outside = flat & ((start < 0) | (start >= sizes))
    enter = torch.minimum(at_low, at_high).masked_fill(flat, 0.0).clamp(min=0).amax(dim=1, keepdim=True)
    leave = torch.maximum(at_low, at_high).masked_fill(flat, 1.0).clamp(max=1).amin(dim=1, keepdim=True)
    ends_inside = ((end >= 0) & (end < sizes)).all(dim=1, keepdim=True)
    full = hit[:, None] & ends_inside  # [R, 1]
    crosses = ((enter < leave) & (start != end).any(dim=1, keepdim=True)) | full
    crosses = crosses & ~outside.any(dim=1, keepdim=True)
    first = torch.where(enter > 0, start + enter * along, start)
    last = torch.where(ends_inside, end, start + leave * along)
    # of two cells that meet in a point of the ray, the one in which it begins or ends
    first = torch.where(up, first.floor(), first.ceil() - 1).clamp(min=0).minimum(sizes - 1)
    last = torch.where(full | ~up, last.floor(), last.ceil() - 1).clamp(min=0).minimum(sizes - 1)
    last = torch.where(flat, start.floor(), last)
    # cells still to go along each axis; rounding must not put the first cell behind the last one
    left = torch.where(up, last - first, first - last).clamp(min=0).masked_fill(flat, 0.0)
    step = torch.where(up, 1.0, -1.0)

    marks = torch.zeros(B * Z * Y * X, dtype=torch.int32, device=origins.device)
    row = crosses.squeeze(1).nonzero().squeeze(1)
    at, left, step, start, along = (last - step * left)[row], left[row], step[row], start[row], along[row]
    full, mark, volume = full[row, 0], 2 * rank[row] + 2, volume_idx[row].long() * Z
    while len(at):
        going = (left > 0).any(dim=1)
        x, y, z = at.long().unbind(1)
        index = ((volume + z) * Y + y) * X + x
        marks.scatter_reduce_(0, index, mark + (full & ~going), "amax")
        at, left, step, start, along = at[going], left[going], step[going], start[going], along[going]
        full, mark, volume = full[going], mark[going], volume[going]
        t = ((at + (step > 0) - start) / along).masked_fill(left <= 0, torch.inf)
        stepped = t == t.amin(dim=1, keepdim=True)
        at, left = at + step * stepped, left - 1.0 * stepped
    return _states(marks.view(B, Z, Y, X))


def _states(marks):
    return ((marks & 1) + (marks > 0)).to(torch.uint8)


BLOCK_R = 128  # rays per program


@jit(varying=("R", "B"))
def _carve_kernel(
    origins_ptr, ends_ptr, volume_idx_ptr, rank_idx_ptr, hit_ptr,  # [R, 3], [R, 3], [R], [R], [R]
    marks_ptr,  # [B, Z, Y, X] int32
    R, B, low, cell, shape,  # low and cell: (x, y, z); shape: (Z, Y, X)
    RANKED: tl.constexpr, ALL_HIT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    ok = r < R
    volume = tl.load(volume_idx_ptr + r, mask=ok, other=-1)
    ok &= (volume >= 0) & (volume < B)
    mark = tl.full((BLOCK_R,), 2, tl.int32)
    if RANKED:
        mark += 2 * tl.load(rank_idx_ptr + r, mask=ok, other=0)
    hit = ok
    if not ALL_HIT:
        hit &= tl.load(hit_ptr + r, mask=ok, other=0) != 0

    sx, ex, ax, flat_x = _axis(origins_ptr, ends_ptr, r, 0, ok, low[0], cell[0])
    sy, ey, ay, flat_y = _axis(origins_ptr, ends_ptr, r, 1, ok, low[1], cell[1])
    sz, ez, az, flat_z = _axis(origins_ptr, ends_ptr, r, 2, ok, low[2], cell[2])
    # NaN and infinity give NaN here, which equals nothing
    sum_of_0 = (sx - sx) + (sy - sy) + (sz - sz) + (ex - ex) + (ey - ey) + (ez - ez)
    ok &= sum_of_0 == 0
    enter_x, leave_x, inside_x, out_x = _faces(sx, ex, ax, flat_x, shape[2])
    enter_y, leave_y, inside_y, out_y = _faces(sy, ey, ay, flat_y, shape[1])
    enter_z, leave_z, inside_z, out_z = _faces(sz, ez, az, flat_z, shape[0])
    enter = tl.maximum(tl.maximum(enter_x, enter_y), tl.maximum(enter_z, 0.0))
    leave = tl.minimum(tl.minimum(leave_x, leave_y), tl.minimum(leave_z, 1.0))
    ends_inside = inside_x & inside_y & inside_z
    full = hit & ends_inside
    moves = (sx != ex) | (sy != ey) | (sz != ez)
    ok &= (full | ((enter < leave) & moves)) & ~(out_x | out_y | out_z)
    x, left_x, step_x = _cells(sx, ex, ax, flat_x, enter, leave, ends_inside, full, shape[2], ok)
    y, left_y, step_y = _cells(sy, ey, ay, flat_y, enter, leave, ends_inside, full, shape[1], ok)
    z, left_z, step_z = _cells(sz, ez, az, flat_z, enter, leave, ends_inside, full, shape[0], ok)

    volume = volume.to(tl.int64) * shape[0]
    longest = tl.max(tl.where(ok, left_x + left_y + left_z, -1), axis=0)  # of the program's rays, in steps
    for _ in range(0, longest + 1):
        going = (left_x > 0) | (left_y > 0) | (left_z > 0)
        index = ((volume + z) * shape[1] + y) * shape[2] + x
        tl.atomic_max(marks_ptr + index, mark + (full & ~going).to(tl.int32), mask=ok, sem="relaxed")
        ok &= going
        tx = _crossing(x, sx, ax, step_x, left_x)
        ty = _crossing(y, sy, ay, step_y, left_y)
        tz = _crossing(z, sz, az, step_z, left_z)
        first = tl.minimum(tl.minimum(tx, ty), tz)
        x, left_x = _stepped(x, left_x, step_x, ok & (tx == first))
        y, left_y = _stepped(y, left_y, step_y, ok & (ty == first))
        z, left_z = _stepped(z, left_z, step_z, ok & (tz == first))


@triton.jit
def _axis(origins_ptr, ends_ptr, r, i, ok, low, cell):
    """Start and end of a ray along axis i, in cells; their difference, 1 if flat; whether both are in one slice."""
    start = tl.load(origins_ptr + r * 3 + i, mask=ok, other=0.0)
    end = tl.load(ends_ptr + r * 3 + i, mask=ok, other=0.0)
    start = tl.div_rn(start - low, cell + tl.zeros_like(start))  # `/` is approximate
    end = tl.div_rn(end - low, cell + tl.zeros_like(end))
    flat = tl.floor(start) == tl.floor(end)
    return start, end, tl.where(flat, 1.0, end - start), flat


@triton.jit
def _faces(start, end, along, flat, N):
    """Where a ray enters the grid's N slices along an axis, and leaves them, as fractions of its length; whether it
    ends in them; whether it is flat and not in them."""
    at_low, at_high = tl.div_rn(0.0 - start, along), tl.div_rn(N - start, along)
    enter = tl.where(flat, 0.0, tl.minimum(at_low, at_high))
    leave = tl.where(flat, 1.0, tl.maximum(at_low, at_high))
    return enter, leave, (end >= 0) & (end < N), flat & ((start < 0) | (start >= N))


@triton.jit
def _cells(start, end, along, flat, enter, leave, ends_inside, full, N, ok):
    """First cell along an axis, number of cells still to go, and 1 or -1: the step to the next cell."""
    up = along > 0
    first = tl.where(enter > 0, start + enter * along, start)
    last = tl.where(ends_inside, end, start + leave * along)
    # of two cells that meet in a point of the ray, the one in which it begins or ends
    first = tl.where(up, tl.floor(first), tl.ceil(first) - 1)
    last = tl.where(full | ~up, tl.floor(last), tl.ceil(last) - 1)
    first = tl.minimum(tl.maximum(first, 0.0), N - 1.0)
    last = tl.where(flat, tl.floor(start), tl.minimum(tl.maximum(last, 0.0), N - 1.0))
    # rounding must not put the first cell behind the last one
    left = tl.where(flat, 0.0, tl.maximum(tl.where(up, last - first, first - last), 0.0))
    first = tl.where(ok, tl.where(up, last - left, last + left), 0.0)  # not of unused rays, whose cells may be NaN
    return first.to(tl.int64), tl.where(ok, left, 0.0).to(tl.int32), tl.where(up, 1, -1)


@triton.jit
def _crossing(at, start, along, step, left):
    """Where the ray leaves cell `at` along an axis, as a fraction of its length; infinite if it goes no further."""
    border = (at + (step > 0).to(tl.int64)).to(tl.float32)
    return tl.where(left > 0, tl.div_rn(border - start, along), float("inf"))


@triton.jit
def _stepped(at, left, step, moves):
    return tl.where(moves, at + step, at), tl.where(moves, left - 1, left)
