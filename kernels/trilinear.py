"""Trilinear interpolation of a feature volume at points, with the spatial gradient as a second output.

A point lies between 8 voxel centers, its corners. Along an axis, at the fraction f of the way from the lower to the
upper corner, the two have the weights a = (1 - f, f), with the slopes b = da / df = (-1, 1):

    value = sum_ijk az_i ay_j ax_k V_ijk,   d/dx = sum_ijk az_i ay_j bx_k V_ijk,   d/dy, d/dz likewise

which are four sums over the same 8 voxels. A corner outside the volume has weight and slope 0 (zero padding, as
F.grid_sample with align_corners=True). Both outputs are differentiable: dL/dV uses the weights of the four sums again;
dL/dpoint through the gradient uses the mixed second derivatives (az_i by_j bx_k, ...), since the pure ones are 0. So
one backward computes what would take autograd a double backward through an interpolation.

Sizes: R rays with S points each, so N = R * S points; C channels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from unipad.kernels.backend import jit, on_triton, tl, triton, without_autocast


def trilinear(volume: Tensor, points: Tensor, volume_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Interpolate `volume` at `points`.

    Args:
        volume:     [B, Z, Y, X, C] features, at least one voxel.
        points:     [R, S, 3] finite (x, y, z) in voxels: 0 = center of the first voxel, X - 1 = of the last; fp32 or
                    fp64.
        volume_idx: [R] int32, index of the volume that each ray reads, in [0, B); not checked.

    Returns:
        value:    [R, S, C].
        gradient: [R, S, 3, C] d value / d (x, y, z), per voxel; at an integer coordinate, that on its upper side.

    Outputs have the promoted type of `volume` and `points` and are accumulated in it. Differentiable once w.r.t.
    `volume` and `points`, through both outputs. The kernel adds atomically to the gradient of `volume`, so its last
    bits vary from run to run; under `torch.use_deterministic_algorithms(True)` the reference runs instead. Raises
    AssertionError if shapes or types do not match.
    """
    _check(volume, points, volume_idx)
    if not on_triton(volume, deterministic=False):
        return trilinear_ref(volume, points, volume_idx)
    return Trilinear.apply(volume, points, volume_idx)


@without_autocast
def trilinear_ref(volume, points, volume_idx):
    """`trilinear` in plain PyTorch."""
    rows, weights = _four_weights(volume, points, volume_idx)
    features = volume.flatten(0, 3).index_select(0, rows.flatten()).unflatten(0, rows.shape)  # [N, 8, C]
    out = torch.bmm(weights, features.to(weights.dtype)).unflatten(0, points.shape[:2])  # [R, S, 4, C]
    return out[:, :, 0], out[:, :, 1:]


def trilinear_value(volume: Tensor, points: Tensor, volume_idx: Tensor) -> Tensor:
    """Only the value of `trilinear`, for searches along rays, which need no gradient: not differentiable."""
    _check(volume, points, volume_idx)
    if not on_triton(volume):
        return trilinear_value_ref(volume, points, volume_idx)
    return _forward(volume.detach(), points.detach(), volume_idx, with_gradient=False)[0]


@torch.no_grad()
def trilinear_value_ref(volume, points, volume_idx):
    """`trilinear_value` in plain PyTorch."""
    rows, weight, _ = corners(volume, points, volume_idx)
    ax, ay, az = weight.unbind(1)  # [2, N] each
    weights = (az[:, None, None] * ay[:, None] * ax).flatten(0, 2).t().contiguous()  # [N, 8]
    if not points.numel() or not volume.shape[4]:  # embedding_bag may reject a table without columns
        return weights.new_zeros(*points.shape[:2], volume.shape[4])
    # a bag is a weighted sum of table rows: the 8 rows are never materialized
    value = F.embedding_bag(rows, volume.flatten(0, 3).to(weights.dtype), per_sample_weights=weights, mode="sum")
    return value.unflatten(0, points.shape[:2])


def _check(volume, points, volume_idx):
    fits = volume.dim() == 5 and points.shape[2:] == (3,) and volume_idx.shape == points.shape[:1]
    assert fits, f"{tuple(volume.shape)=}, {tuple(points.shape)=} and {tuple(volume_idx.shape)=} do not match"
    assert points.dtype in (torch.float32, torch.float64), f"points are fp32 or fp64, not {points.dtype}"
    assert min(volume.shape[1:4]) > 0, f"volume {tuple(volume.shape)} has no voxels"


def corners(volume, points, volume_idx):
    """The 8 voxels around each point.

    Returns:
        rows:   [N, 8] int64 rows of `volume.flatten(0, 3)`; some existing row for a corner outside the volume or NaN.
        weight: [2, 3, N] of the lower and upper corner along x, y, z; 0 outside.
        slope:  [2, 3, N] d weight / d point: -1, 1; 0 outside.
    """
    Z, Y, X = volume.shape[1:4]
    dtype = torch.promote_types(volume.dtype, points.dtype)
    point = points.to(dtype).flatten(0, 1).t().contiguous()  # [3, N]
    size = torch.cat([point.new_full((1, 1), n) for n in (X, Y, Z)])  # not new_tensor: the host would wait for its copy
    low = point.detach().floor()
    fraction = point - low
    corner = torch.stack([low, low + 1])  # [2, 3, N]
    inside = (corner >= 0) & (corner < size)
    exists = inside.to(dtype)  # 0 or 1
    weight = torch.stack([1 - fraction, fraction]) * exists
    slope = torch.stack([-exists[0], exists[1]])
    x, y, z = corner.where(inside, 0).long().unbind(1)  # [2, N] each
    first_z = volume_idx.long().repeat_interleave(points.shape[1]) * Z  # [N], where volumes are stacked along z
    rows = ((first_z + z[:, None, None]) * Y + y[:, None]) * X + x  # [2, 2, 2, N]
    return rows.flatten(0, 2).t().contiguous(), weight, slope


def _four_weights(volume, points, volume_idx):
    """Rows [N, 8] of the 8 voxels, and [N, 4, 8] their weights in the value and its derivatives w.r.t. x, y, z."""
    rows, weight, slope = corners(volume, points, volume_idx)
    (ax, ay, az), (bx, by, bz) = weight.unbind(1), slope.unbind(1)  # [2, N] each
    wx = torch.stack([ax, bx, ax, ax])  # [4, 2, N]: for the value, d/dx, d/dy, d/dz
    wy = torch.stack([ay, ay, by, ay])
    wz = torch.stack([az, az, az, bz])
    weights = wz[:, :, None, None] * wy[:, None, :, None] * wx[:, None, None]  # [4, 2, 2, 2, N]
    # contiguous, since bmm would otherwise run matrix by matrix
    return rows, weights.flatten(1, 3).permute(2, 0, 1).contiguous()


class Trilinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, volume, points, volume_idx):
        ctx.save_for_backward(volume, points, volume_idx)
        return _forward(volume, points, volume_idx, with_gradient=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_value, d_gradient):
        volume, points, volume_idx = (t.contiguous() for t in ctx.saved_tensors)
        d_value, d_gradient = d_value.contiguous(), d_gradient.contiguous()
        for_volume, for_points, _ = ctx.needs_input_grad
        # both are summed in the accumulation type; a gradient that is not needed gets a placeholder
        d_volume = torch.zeros_like(volume, dtype=d_value.dtype) if for_volume else d_value
        d_points = torch.zeros_like(points, dtype=d_value.dtype) if for_points else d_value
        if d_value.numel():
            grid, sizes = _launch(volume, points)
            _trilinear_bwd_kernel[grid](
                volume_ptr=volume, points_ptr=points, volume_idx_ptr=volume_idx,
                d_value_ptr=d_value, d_gradient_ptr=d_gradient, d_volume_ptr=d_volume, d_points_ptr=d_points,
                FOR_VOLUME=for_volume, FOR_POINTS=for_points, **sizes,
            )  # fmt: skip
        return (
            d_volume.to(volume.dtype) if for_volume else None,
            d_points.to(points.dtype) if for_points else None,
            None,
        )


def _forward(volume, points, volume_idx, with_gradient):
    R, S, _ = points.shape
    C = volume.shape[4]
    value = volume.new_empty(R, S, C, dtype=torch.promote_types(volume.dtype, points.dtype))
    gradient = value.new_empty(R, S, 3, C) if with_gradient else value  # a placeholder
    if value.numel():
        grid, sizes = _launch(volume, points)
        _trilinear_fwd_kernel[grid](
            volume_ptr=volume.contiguous(), points_ptr=points.contiguous(), volume_idx_ptr=volume_idx.contiguous(),
            value_ptr=value, gradient_ptr=gradient, WITH_GRADIENT=with_gradient, **sizes,
        )  # fmt: skip
    return value, gradient


TILE = 1024  # points x channels per program: 8 elements of each of the four sums per thread of 4 warps


def _launch(volume, points):
    """Launch grid, and the size arguments that both kernels take."""
    _, Z, Y, X, C = volume.shape
    R, S, _ = points.shape
    block_c = triton.next_power_of_2(C)
    block_n = max(1, TILE // block_c)
    sizes = dict(N=R * S, S=S, Z=Z, Y=Y, X=X, C=C, BLOCK_C=block_c, BLOCK_N=block_n)
    return (triton.cdiv(R * S, block_n),), sizes


@jit(varying=("N", "S"))
def _trilinear_fwd_kernel(
    volume_ptr, points_ptr, volume_idx_ptr,  # [B, Z, Y, X, C], [N, 3], [R]
    value_ptr, gradient_ptr,  # [N, C], [N, 3, C]
    N, S, Z, Y, X, C,  # N = R * S points
    WITH_GRADIENT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    acc_ty: tl.constexpr = value_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    c = tl.arange(0, BLOCK_C)[None, :]
    n_ok = n < N
    nc_ok = n_ok[:, None] & (c < C)
    px, py, pz, first_z = _load_points(points_ptr, volume_idx_ptr, n, n_ok, S, Z, acc_ty)

    value = tl.zeros((BLOCK_N, BLOCK_C), acc_ty)
    gx, gy, gz = value, value, value
    for k in tl.static_range(8):
        z, z_ok, az, bz = axis_corner(pz, Z, k // 4)
        y, y_ok, ay, by = axis_corner(py, Y, k // 2 % 2)
        x, x_ok, ax, bx = axis_corner(px, X, k % 2)
        row = ((first_z + z) * Y + y) * X + x
        row_ok = (z_ok & y_ok & x_ok)[:, None] & nc_ok
        feature = tl.load(volume_ptr + row[:, None] * C + c, mask=row_ok, other=0.0).to(acc_ty)
        value += (az * ay * ax)[:, None] * feature
        if WITH_GRADIENT:
            gx += (az * ay * bx)[:, None] * feature
            gy += (az * by * ax)[:, None] * feature
            gz += (bz * ay * ax)[:, None] * feature
    tl.store(value_ptr + n[:, None] * C + c, value, mask=nc_ok)
    if WITH_GRADIENT:
        row_ptr = gradient_ptr + n[:, None] * 3 * C + c
        tl.store(row_ptr, gx, mask=nc_ok)
        tl.store(row_ptr + C, gy, mask=nc_ok)
        tl.store(row_ptr + 2 * C, gz, mask=nc_ok)


@jit(varying=("N", "S"))
def _trilinear_bwd_kernel(
    volume_ptr, points_ptr, volume_idx_ptr,  # [B, Z, Y, X, C], [N, 3], [R]
    d_value_ptr, d_gradient_ptr,  # [N, C], [N, 3, C]
    d_volume_ptr, d_points_ptr,  # [B, Z, Y, X, C] zeros, [N, 3]
    N, S, Z, Y, X, C,  # N = R * S points
    FOR_VOLUME: tl.constexpr, FOR_POINTS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    acc_ty: tl.constexpr = d_value_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    c = tl.arange(0, BLOCK_C)[None, :]
    n_ok = n < N
    nc_ok = n_ok[:, None] & (c < C)
    px, py, pz, first_z = _load_points(points_ptr, volume_idx_ptr, n, n_ok, S, Z, acc_ty)

    row_ptr = d_gradient_ptr + n[:, None] * 3 * C + c
    d_value = tl.load(d_value_ptr + n[:, None] * C + c, mask=nc_ok, other=0.0)
    d_gx = tl.load(row_ptr, mask=nc_ok, other=0.0)
    d_gy = tl.load(row_ptr + C, mask=nc_ok, other=0.0)
    d_gz = tl.load(row_ptr + 2 * C, mask=nc_ok, other=0.0)

    d_px = tl.zeros((BLOCK_N,), acc_ty)
    d_py, d_pz = d_px, d_px
    for k in range(8):  # not unrolled: that would spill registers, and an atomic add has no latency to hide
        z, z_ok, az, bz = axis_corner(pz, Z, k // 4)
        y, y_ok, ay, by = axis_corner(py, Y, k // 2 % 2)
        x, x_ok, ax, bx = axis_corner(px, X, k % 2)
        row = ((first_z + z) * Y + y) * X + x
        row_ok = (z_ok & y_ok & x_ok)[:, None] & nc_ok
        if FOR_VOLUME:
            d_feature = (az * ay * ax)[:, None] * d_value + (az * ay * bx)[:, None] * d_gx
            d_feature += (az * by * ax)[:, None] * d_gy + (bz * ay * ax)[:, None] * d_gz
            tl.atomic_add(d_volume_ptr + row[:, None] * C + c, d_feature, mask=row_ok, sem="relaxed")
        if FOR_POINTS:
            feature = tl.load(volume_ptr + row[:, None] * C + c, mask=row_ok, other=0.0).to(acc_ty)
            v = tl.sum(feature * d_value, axis=1)  # dL / d weight of this corner, through the value
            vx = tl.sum(feature * d_gx, axis=1)  # ... and through each component of the gradient
            vy = tl.sum(feature * d_gy, axis=1)
            vz = tl.sum(feature * d_gz, axis=1)
            d_px += bx * (az * ay * v + az * by * vy + bz * ay * vz)
            d_py += by * (az * ax * v + az * bx * vx + bz * ax * vz)
            d_pz += bz * (ay * ax * v + ay * bx * vx + by * ax * vy)
    if FOR_POINTS:
        tl.store(d_points_ptr + n * 3, d_px, mask=n_ok)
        tl.store(d_points_ptr + n * 3 + 1, d_py, mask=n_ok)
        tl.store(d_points_ptr + n * 3 + 2, d_pz, mask=n_ok)


@triton.jit
def _load_points(points_ptr, volume_idx_ptr, n, n_ok, S, Z, acc_ty: tl.constexpr):
    """Coordinates of the points, and where the volume that each reads begins, counted in z slices of all volumes."""
    px = tl.load(points_ptr + n * 3, mask=n_ok, other=0.0).to(acc_ty)
    py = tl.load(points_ptr + n * 3 + 1, mask=n_ok, other=0.0).to(acc_ty)
    pz = tl.load(points_ptr + n * 3 + 2, mask=n_ok, other=0.0).to(acc_ty)
    first_z = tl.load(volume_idx_ptr + n // S, mask=n_ok, other=0).to(tl.int64) * Z
    return px, py, pz, first_z


@triton.jit
def axis_corner(p, size, upper):
    """Along one axis: index of a corner, whether it is inside, its weight and slope (0 outside).

    upper: 1 for the upper corner, 0 for the lower.
    """
    low = tl.floor(p)
    corner = low + upper
    inside = (corner >= 0) & (corner < size)
    index = tl.where(inside, corner, 0.0).to(tl.int64)
    slope = 2 * upper - 1  # -1 or 1
    weight = 1 - upper + slope * (p - low)  # 1 - f or f
    exists = inside.to(p.dtype)  # 0 or 1
    return index, inside, exists * weight, exists * slope
