"""Gradient of a volume interpolated along rays, without atomics: samples are sorted by cell.

A cell is the cube between 8 neighboring voxel centers, whose values are interpolated in it. Z voxels along an axis have
Z + 1 cells: the first and the last are bounded by voxels on one side only, beyond which values are 0.

The loss depends on a sample's interpolated feature f, and on the gradient g of its signed distance w.r.t. the point:

    d_volume_voxel = sum over its 8 cells, over the samples in each:  a d_feature + (b . v) feature_hat

where a is the voxel's interpolation weight for the sample, b = da / dpoint, d_feature = dL / df, v = dL / dg, and
feature_hat = d distance / df; see `sdf_backward`, whose last formula this is. The sort is stable, so each cell sums its
samples in a fixed order.

Part of `sdf_render`, which uses it under `torch.use_deterministic_algorithms(True)`; the reference is the gradient of
`trilinear_ref`. No benchmark times it: that of `sdf_render` does not set this mode.
"""

import torch

from unipad.kernels.backend import jit, tl, triton


def cell_sum(d_volume, cell, d_feature, feature_hat, v, *, origins, directions, edges, cells_per_unit, cell_offset):
    """Fill d_volume [B, Z, Y, X, CHANNELS] fp32.

    Args:
        cell:        [N] int32, each sample's cell, from `cell_of`.
        d_feature:   [N, C] of the formula above; columns from CHANNELS on are padding.
        feature_hat: [N, C] likewise.
        v:           [N, 3] likewise: per unit of the points (x, y, z), not normalized.
        origins, directions: [R, 3] each, of the rays.
        edges:       [R, S + 1] distances along the rays; sample n = r * S + s lies at the start of interval s of ray r.
        cells_per_unit, cell_offset: [3] each: grid coordinates = point * cells_per_unit + cell_offset.

    Deterministic. Tensors must be contiguous. GPU and interpreter only.
    """
    B, Z, Y, X, CHANNELS = d_volume.shape
    sorted_cell, order = cell.sort(stable=True)
    all_cells = torch.arange(B * (Z + 1) * (Y + 1) * (X + 1) + 1, dtype=torch.int32, device=cell.device)
    _cell_sum_kernel[(B * Z * Y * X,)](
        order_ptr=order, first_of_cell_ptr=torch.searchsorted(sorted_cell, all_cells),
        origins_ptr=origins, directions_ptr=directions, edges_ptr=edges,
        cells_per_unit_ptr=cells_per_unit, cell_offset_ptr=cell_offset,
        d_feature_ptr=d_feature, feature_hat_ptr=feature_hat, v_ptr=v, d_volume_ptr=d_volume,
        S=edges.shape[1] - 1, Z=Z, Y=Y, X=X, CHANNELS=CHANNELS, C=d_feature.shape[1], BLOCK_N=BLOCK_N, num_warps=1,
    )  # fmt: skip


BLOCK_N = 32  # samples of a cell per iteration


@triton.jit
def cell_of(coords, volume_idx, Z, Y, X):
    """Index of each sample's cell; the largest int32, sorted after all cells, if no corner of it is in the volume.

    coords, volume_idx: as `sample_at` in sdf_gather.py returns them.
    """
    x, y, z = tl.floor(coords[0]) + 1, tl.floor(coords[1]) + 1, tl.floor(coords[2]) + 1  # cell 0 ends at voxel 0
    inside = (x >= 0) & (x <= X) & (y >= 0) & (y <= Y) & (z >= 0) & (z <= Z)
    z = volume_idx.to(tl.int64) * (Z + 1) + tl.where(inside, z, 0.0).to(tl.int64)  # among the slices of all volumes
    cell = (z * (Y + 1) + tl.where(inside, y, 0.0).to(tl.int64)) * (X + 1) + tl.where(inside, x, 0.0).to(tl.int64)
    return tl.where(inside, cell, 2147483647).to(tl.int32)


@jit
def _cell_sum_kernel(
    order_ptr, first_of_cell_ptr,  # [N] int64 samples sorted by cell; [cells + 1] int64, where each begins
    origins_ptr, directions_ptr, edges_ptr, cells_per_unit_ptr, cell_offset_ptr,  # [R, 3] x 2, [R, S + 1], [3], [3]
    d_feature_ptr, feature_hat_ptr, v_ptr,  # [N, C], [N, C], [N, 3]
    d_volume_ptr,  # [B, Z, Y, X, CHANNELS]
    S, Z, Y, X, CHANNELS,
    C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    voxel = tl.program_id(0).to(tl.int64)
    x, y, z, volume = voxel % X, voxel // X % Y, voxel // X // Y % Z, voxel // X // Y // Z
    c = tl.arange(0, C)[None, :]
    acc = tl.zeros((C,), tl.float32)
    for k in range(8):  # the voxel is corner k of the cell
        kx, ky, kz = k % 2, k // 2 % 2, k // 4
        cell = ((volume * (Z + 1) + z + 1 - kz) * (Y + 1) + y + 1 - ky) * (X + 1) + x + 1 - kx
        end = tl.load(first_of_cell_ptr + cell + 1)
        for i in range(tl.load(first_of_cell_ptr + cell), end, BLOCK_N):
            i = i + tl.arange(0, BLOCK_N)
            ok = i < end
            n = tl.load(order_ptr + i, mask=ok, other=0)
            r = n // S
            start = tl.load(edges_ptr + n + r, mask=ok, other=0.0)  # n + r = r * (S + 1) + s
            ax, bx = _weight(origins_ptr, directions_ptr, cells_per_unit_ptr, cell_offset_ptr, 0, r, start, ok, x, kx)
            ay, by = _weight(origins_ptr, directions_ptr, cells_per_unit_ptr, cell_offset_ptr, 1, r, start, ok, y, ky)
            az, bz = _weight(origins_ptr, directions_ptr, cells_per_unit_ptr, cell_offset_ptr, 2, r, start, ok, z, kz)
            vx = tl.load(v_ptr + 3 * n, mask=ok, other=0.0)
            vy = tl.load(v_ptr + 3 * n + 1, mask=ok, other=0.0)
            vz = tl.load(v_ptr + 3 * n + 2, mask=ok, other=0.0)
            b_v = bx * ay * az * vx + ax * by * az * vy + ax * ay * bz * vz
            d_feature = tl.load(d_feature_ptr + n[:, None] * C + c, mask=ok[:, None], other=0.0)
            feature_hat = tl.load(feature_hat_ptr + n[:, None] * C + c, mask=ok[:, None], other=0.0)
            acc += tl.sum((ax * ay * az)[:, None] * d_feature + b_v[:, None] * feature_hat, axis=0)
    c = tl.arange(0, C)
    tl.store(d_volume_ptr + voxel * CHANNELS + c, acc, mask=c < CHANNELS)


@triton.jit
def _weight(origins_ptr, directions_ptr, cells_per_unit_ptr, cell_offset_ptr, AXIS, r, start, ok, voxel, upper):
    """Along one axis: the voxel's interpolation weight for the samples, and its derivative w.r.t. the point.

    voxel: its index along the axis. upper: 1 if it is the upper end of the cell, 0 if the lower.
    """
    direction = tl.load(directions_ptr + 3 * r + AXIS, mask=ok, other=0.0)
    point = tl.load(origins_ptr + 3 * r + AXIS, mask=ok, other=0.0) + direction * start
    cells_per_unit = tl.load(cells_per_unit_ptr + AXIS)
    coord = point * cells_per_unit + tl.load(cell_offset_ptr + AXIS)
    sign = 2 * upper - 1
    # 1 - |coord - voxel|: the cell lies below a voxel that is its upper end, else above
    return 1 + sign * (coord - voxel), sign * cells_per_unit
