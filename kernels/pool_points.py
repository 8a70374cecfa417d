"""The voxels of the points of `voxel_pool`, and the order in which it sums them; they depend on the cameras only.

    x, y, z = (A^-1 (bin (u, v, 1) - t) - low) / cell        A, t: left 3 x 3 part and last column of lidar2image

(u, v) is the pixel, bin the depth of the point in meters. Consecutive points of a ray in one voxel form a run. Voxels
are computed in fp64; kernel and reference do the same operations in the same order, and round after each.

Part of `voxel_pool`, which explains the letters of the sizes and has the benchmark.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from unipad.kernels.backend import jit, tl, triton


class Points(NamedTuple):
    """Voxels and runs of all points, int32. They depend on the cameras only."""

    voxel: Tensor  # [P] voxel of each point; V for points outside the grid
    order: Tensor  # [P] first point of each run inside the grid, sorted by voxel, then all other points
    pixel: Tensor  # [P] pixel of each point of `order`
    begin: Tensor  # [V + 1] position in `order` of each voxel's first run; then the number of runs inside the grid


def find_points(lidar2image, sizes, D, low, cell, shape, stride, depth_range, truncate):
    """`Points` of D bins at each pixel; sizes: the features' (B, N, h, w), none 0. Arguments as in `voxel_pool`.

    GPU and interpreter only; the reference is `voxels_ref`.
    """
    (B, N, h, w), (X, Y, Z), (near, far) = sizes, shape, depth_range
    P, V = B * N * h * w * D, B * X * Y * Z
    voxel = torch.empty(P, dtype=torch.int32, device=lidar2image.device)
    run_voxel, order, pixel = (torch.empty_like(voxel) for _ in range(3))
    begin = voxel.new_empty(V + 1)
    matrices = torch.empty(B * N, 3, 4, dtype=torch.float64, device=lidar2image.device)
    # a fused multiply-add could move a point on a voxel face to the other side
    unfused = dict(enable_fp_fusion=False)
    _matrices_kernel[(triton.cdiv(B * N, BLOCK_N),)](
        lidar2image_ptr=lidar2image.contiguous(), matrices_ptr=matrices, VIEWS=B * N, LOW=low, CELL=cell,
        BLOCK_N=BLOCK_N, **unfused,
    )  # fmt: skip
    per_view = h * w * D
    _voxels_kernel[(triton.cdiv(per_view, BLOCK_P), B * N)](
        matrices_ptr=matrices, voxel_idx_ptr=voxel, run_voxel_idx_ptr=run_voxel, PER_VIEW=per_view,
        N=N, w=w, D=D, stride=stride, shape=shape, V=V, NEAR=near, STEP=(far - near) / D,
        TRUNCATE=truncate, BLOCK_P=BLOCK_P, **unfused,
    )  # fmt: skip
    sorted_voxel, by_voxel = run_voxel.sort(stable=True)
    _begin_kernel[(triton.cdiv(max(P, V + 1), BLOCK_P),)](
        sorted_voxel_idx_ptr=sorted_voxel, by_voxel_ptr=by_voxel, order_idx_ptr=order, pixel_idx_ptr=pixel,
        begin_idx_ptr=begin, P=P, V=V, D=D, BLOCK_P=BLOCK_P,
    )  # fmt: skip
    return Points(voxel, order, pixel, begin)


def geometry_ref(lidar2image, low, cell, depth_range, D):
    """In fp64: matrices (u*d, v*d, d, 1) -> cell coordinates (x, y, z) [B, N, 3, 4], and bins' depths, meters [D].

    Rounds after every operation, in the order of `_matrices_kernel`. A singular matrix gives inf and NaN.
    """
    rows = lidar2image.double()
    a, b, c, d = ([rows[..., i, j] for i in range(3)] for j in range(4))  # columns: [B, N] each
    # rows of the inverse of the left 3 x 3 part, times its determinant
    crosses = [
        [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]]
        for u, v in ((b, c), (c, a), (a, b))
    ]
    det = a[0] * crosses[0][0] + a[1] * crosses[0][1] + a[2] * crosses[0][2]
    matrix = []
    for cross, lowest, size in zip(crosses, low, cell, strict=True):
        x, y, z = (entry / det for entry in cross)
        row = torch.stack([x, y, z, -(x * d[0] + y * d[1] + z * d[2]) - lowest], dim=-1)
        # on a GPU, dividing by a Python number multiplies by its reciprocal, which moves points on cell faces
        matrix.append(row / row.new_full((), size))
    near, far = depth_range
    bins = near + (far - near) / max(D, 1) * torch.arange(D, dtype=torch.float64, device=lidar2image.device)
    return torch.stack(matrix, dim=-2), bins


def voxels_ref(matrices, bins, sizes, shape, stride, truncate):
    """[P] index of each point's voxel in the volumes of all samples; V for points outside. sizes: features.shape."""
    B, _, h, w, _ = sizes
    X, Y, Z = shape
    u = torch.arange(w, device=bins.device)[:, None] * stride  # [w, 1]
    v = torch.arange(h, device=bins.device)[:, None, None] * stride  # [h, 1, 1]
    cells, inside = [], True
    for row, size in zip(matrices[..., None, None, None].unbind(2), shape, strict=True):  # [B, N, 4, 1, 1, 1]
        a, b, c, shift = row.unbind(2)
        coord = (a * u + b * v + c) * bins + shift  # [B, N, h, w, D]
        coord = coord.trunc() if truncate else coord.floor()
        inside = inside & (coord >= 0) & (coord < size)
        cells.append(torch.where(inside, coord, 0).long())
    x, y, z = cells
    sample = torch.arange(B, device=bins.device).view(B, 1, 1, 1, 1)
    return torch.where(inside, ((sample * Z + z) * Y + y) * X + x, B * Z * Y * X).flatten()


# Untuned
BLOCK_N = 32  # views per program
BLOCK_P = 256  # points per program


# Constants of the geometry are constexprs below, since float arguments would be fp32


@jit(varying=("VIEWS",))
def _matrices_kernel(
    lidar2image_ptr, matrices_ptr,  # [B, N, 4, 4], [B, N, 3, 4]
    VIEWS,
    LOW: tl.constexpr, CELL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The matrices of `geometry_ref`, in its order of operations."""
    view = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    ok = view < VIEWS
    row_ptr = lidar2image_ptr + view.to(tl.int64) * 16
    a0, b0, c0, d0 = _row(row_ptr, ok)
    a1, b1, c1, d1 = _row(row_ptr + 4, ok)
    a2, b2, c2, d2 = _row(row_ptr + 8, ok)
    x0, x1, x2 = _cross(b0, b1, b2, c0, c1, c2)
    y0, y1, y2 = _cross(c0, c1, c2, a0, a1, a2)
    z0, z1, z2 = _cross(a0, a1, a2, b0, b1, b2)
    det = tl.where(ok, a0 * x0 + a1 * x1 + a2 * x2, 1.0)
    out_ptr = matrices_ptr + view.to(tl.int64) * 12
    _store_row(out_ptr, ok, x0 / det, x1 / det, x2 / det, d0, d1, d2, LOW[0], CELL[0])
    _store_row(out_ptr + 4, ok, y0 / det, y1 / det, y2 / det, d0, d1, d2, LOW[1], CELL[1])
    _store_row(out_ptr + 8, ok, z0 / det, z1 / det, z2 / det, d0, d1, d2, LOW[2], CELL[2])


@triton.jit
def _row(p, ok):
    """Four numbers at p, fp64; 1 where not ok."""
    a = tl.load(p, mask=ok, other=1.0).to(tl.float64)
    b = tl.load(p + 1, mask=ok, other=1.0).to(tl.float64)
    c = tl.load(p + 2, mask=ok, other=1.0).to(tl.float64)
    d = tl.load(p + 3, mask=ok, other=1.0).to(tl.float64)
    return a, b, c, d


@triton.jit
def _store_row(p, ok, x, y, z, d0, d1, d2, LOW: tl.constexpr, CELL: tl.constexpr):
    """Store a row of a matrix at p, in cells. x, y, z: of the inverse; d: translation."""
    low, cell = tl.full((), LOW, tl.float64), tl.full((), CELL, tl.float64)
    tl.store(p, x / cell, mask=ok)
    tl.store(p + 1, y / cell, mask=ok)
    tl.store(p + 2, z / cell, mask=ok)
    tl.store(p + 3, (-(x * d0 + y * d1 + z * d2) - low) / cell, mask=ok)


@triton.jit
def _cross(u0, u1, u2, v0, v1, v2):
    """The cross product of two vectors."""
    return u1 * v2 - u2 * v1, u2 * v0 - u0 * v2, u0 * v1 - u1 * v0


@jit(varying=("PER_VIEW", "V"))
def _voxels_kernel(
    matrices_ptr, voxel_idx_ptr, run_voxel_idx_ptr,  # [B, N, 3, 4], [P], [P]
    PER_VIEW, N, w, D, stride, shape, V,  # points of a view; shape: (X, Y, Z)
    NEAR: tl.constexpr, STEP: tl.constexpr, TRUNCATE: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The voxel of each point, and that of each run at its first point; V for other points, and outside the grid."""
    view = tl.program_id(1)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    pixel, k = p // D, p % D
    u = (pixel % w * stride).to(tl.float64)
    v = (pixel // w * stride).to(tl.float64)
    matrix_ptr = matrices_ptr + view.to(tl.int64) * 12
    voxel = _voxel(matrix_ptr, u, v, k, view // N, shape, V, NEAR, STEP, TRUNCATE)
    before = _voxel(matrix_ptr, u, v, k - 1, view // N, shape, V, NEAR, STEP, TRUNCATE)
    at = view.to(tl.int64) * PER_VIEW + p
    tl.store(voxel_idx_ptr + at, voxel, mask=p < PER_VIEW)
    tl.store(run_voxel_idx_ptr + at, tl.where((k > 0) & (voxel == before), V, voxel), mask=p < PER_VIEW)


@triton.jit
def _voxel(
    matrix_ptr, u, v, k, sample, shape, V, NEAR: tl.constexpr, STEP: tl.constexpr, TRUNCATE: tl.constexpr
):  # fmt: skip
    """The voxel of bin k of pixels (u, v); V outside the grid."""
    d = tl.full((), NEAR, tl.float64) + tl.full((), STEP, tl.float64) * k.to(tl.float64)
    x, x_ok = _cell(matrix_ptr, u, v, d, shape[0], TRUNCATE)
    y, y_ok = _cell(matrix_ptr + 4, u, v, d, shape[1], TRUNCATE)
    z, z_ok = _cell(matrix_ptr + 8, u, v, d, shape[2], TRUNCATE)
    voxel = ((sample * shape[2] + z) * shape[1] + y) * shape[0] + x
    return tl.where(x_ok & y_ok & z_ok, voxel, V)


@triton.jit
def _cell(row_ptr, u, v, d, size, TRUNCATE: tl.constexpr):
    """Cell of points on one axis, and whether they are in the grid; 0 where not."""
    coord = (tl.load(row_ptr) * u + tl.load(row_ptr + 1) * v + tl.load(row_ptr + 2)) * d + tl.load(row_ptr + 3)
    if TRUNCATE:
        coord = tl.where(coord < 0, tl.ceil(coord), tl.floor(coord))
    else:
        coord = tl.floor(coord)
    inside = (coord >= 0) & (coord < size)  # false for NaN
    return tl.where(inside, coord, 0.0).to(tl.int32), inside


@jit(varying=("P", "V"))
def _begin_kernel(
    sorted_voxel_idx_ptr, by_voxel_ptr,  # [P], [P] int64: the sorted run_voxel of `_voxels_kernel`, and its order
    order_idx_ptr, pixel_idx_ptr, begin_idx_ptr,  # [P], [P], [V + 1]
    P, V, D,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """`order`, `pixel` and `begin` of `Points`."""
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    point = tl.load(by_voxel_ptr + i, mask=i < P, other=0).to(tl.int32)
    tl.store(order_idx_ptr + i, point, mask=i < P)
    tl.store(pixel_idx_ptr + i, point // D, mask=i < P)
    # binary search for the first run of voxel i
    low, high = tl.zeros((BLOCK_P,), tl.int32), tl.where(i <= V, P, 0)
    while tl.max(high - low, axis=0) > 0:
        middle = (low + high) // 2
        voxel = tl.load(sorted_voxel_idx_ptr + middle, mask=low < high, other=V)
        after = (low < high) & (voxel < i)
        low, high = tl.where(after, middle + 1, low), tl.where(after, high, middle)
    tl.store(begin_idx_ptr + i, low, mask=i <= V)
