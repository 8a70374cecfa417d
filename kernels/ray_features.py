"""The features of a volume along rays, summed with the weights of their samples.

    f_s = sum_k a_sk V_k  (the 8 voxels around sample s, trilinear as in `trilinear`),   out = sum_s w_s f_s

    dL/dw_s = d_out . f_s,   dL/dV_k = sum over rays and samples of w_s a_sk d_out

This is `composite` of features with weights that are known: those that `sdf_render` or `composite` returns. A linear
layer of any width after it equals one of all samples before it, so what is composited is the volume's C channels, not
the layer's outputs; and [R, S, C] features are never stored. It is an op of its own, since inside the kernels of
`sdf_render`, which have the features, further sums would need registers that these do not have.

Sizes: R rays, S samples on each, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unipad.kernels.backend import jit, on_triton, tl, triton, without_autocast
from unipad.kernels.trilinear import axis_corner, corners


def ray_features(
    volume: Tensor, rays: tuple[Tensor, Tensor, Tensor], edges: Tensor, weights: Tensor, cells: tuple[Tensor, Tensor]
) -> Tensor:
    """Composite the features of `volume` along rays.

    Args:
        volume:  [B, Z, Y, X, C] features, at least one voxel.
        rays:    origins [R, 3], directions [R, 3], and volume_idx [R] int32 in [0, B), not checked; in the unit and the
                 frame of `edges` and `cells`.
        edges:   [R, S + 1] distances along the rays: S samples, each at the start of its interval.
        weights: [R, S] weight of each sample.
        cells:   cells_per_unit [3] and cell_offset [3]: grid coordinates (x, y, z) = point * cells_per_unit +
                 cell_offset; integers are voxel centers. Beyond the outermost ones, features fade to 0 within a cell.

    Returns [R, C]: sum of weight * feature; 0 for rays without samples.

    All floats of one type, fp32 or fp64. Differentiable once w.r.t. `volume` and `weights`. The kernel adds atomically
    to the gradient of `volume`, so its last bits vary from run to run; under `torch.use_deterministic_algorithms(True)`
    the reference runs instead. Raises AssertionError if shapes or types do not match.
    """
    (origins, directions, volume_idx), (R, S) = rays, weights.shape
    shapes = [tuple(t.shape) for t in (volume, *rays, edges, weights)]
    fits = volume.dim() == 5 and origins.shape == directions.shape == (R, 3) and volume_idx.shape == (R,)
    assert fits and edges.shape == (R, S + 1), f"volume, rays, edges and weights of {shapes} do not match"
    assert min(volume.shape[1:4]) > 0, f"volume {tuple(volume.shape)} has no voxels"
    sizes = [tuple(t.shape) for t in cells]
    assert sizes == [(3,), (3,)], f"cells_per_unit and cell_offset are [3] each, not {sizes}"
    types = {t.dtype for t in (volume, origins, directions, edges, weights, *cells)}
    assert types in ({torch.float32}, {torch.float64}), f"all are fp32 or all are fp64, not {types}"
    if not on_triton(volume, deterministic=False):
        return ray_features_ref(volume, rays, edges, weights, cells)
    geometry = dict(
        origins_ptr=origins, directions_ptr=directions, volume_idx_ptr=volume_idx, edges_ptr=edges,
        cells_per_unit_ptr=cells[0], cell_offset_ptr=cells[1],
    )  # fmt: skip
    return RayFeatures.apply(volume, weights, {name: t.detach().contiguous() for name, t in geometry.items()})


@without_autocast
def ray_features_ref(volume, rays, edges, weights, cells):
    """`ray_features` in plain PyTorch."""
    (origins, directions, volume_idx), edges = (t.detach() for t in rays), edges.detach()
    cells_per_unit, cell_offset = (t.detach() for t in cells)
    points = origins[:, None] + directions[:, None] * edges[:, :-1, None]
    rows, share, _ = corners(volume, points * cells_per_unit + cell_offset, volume_idx)
    ax, ay, az = share.unbind(1)  # [2, N] each
    shares = (az[:, None, None] * ay[:, None] * ax).flatten(0, 2).t()  # [N, 8]
    table, rows = volume.flatten(0, 3), rows.view(len(weights), 8 * weights.shape[1])  # [R, S * 8]
    factors = (weights[..., None] * shares.unflatten(0, weights.shape)).flatten(1)  # [R, S * 8]
    if not rows.numel() or not table.shape[1]:  # embedding_bag rejects these
        return torch.einsum("rk,rkc->rc", factors, table[rows])
    # a bag is a weighted sum of table rows, a ray's here: they are never materialized
    return F.embedding_bag(rows, table, per_sample_weights=factors, mode="sum")


class RayFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, volume, weights, geometry):
        volume, weights = volume.contiguous(), weights.contiguous()
        out = volume.new_empty(len(weights), volume.shape[4])
        if out.numel():
            _ray_features_fwd_kernel[(len(weights),)](
                volume_ptr=volume, **geometry, weights_ptr=weights, out_ptr=out, **_sizes(volume, weights)
            )
        ctx.names = tuple(geometry)
        ctx.save_for_backward(volume, weights, *geometry.values())
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        volume, weights, *geometry = ctx.saved_tensors
        d_volume, d_weights = torch.zeros_like(volume), torch.zeros_like(weights)
        if weights.numel() and d_out.numel():
            sizes = _sizes(volume, weights)
            R, S = weights.shape
            _ray_features_bwd_kernel[(R, triton.cdiv(S, sizes["BLOCK_S"]))](
                volume_ptr=volume, **dict(zip(ctx.names, geometry, strict=True)), weights_ptr=weights,
                d_out_ptr=d_out.contiguous(), d_volume_ptr=d_volume, d_weights_ptr=d_weights, **sizes,
            )  # fmt: skip
        return d_volume, d_weights, None


TILE, BLOCK_S = 1024, 32  # samples x channels per program, 8 per thread; samples, at most


def _sizes(volume, weights):
    """The size arguments of both kernels."""
    _, Z, Y, X, C = volume.shape
    block_c = triton.next_power_of_2(C)
    block_s = max(1, min(BLOCK_S, TILE // block_c))
    return dict(S=weights.shape[1], Z=Z, Y=Y, X=X, C=C, BLOCK_C=block_c, BLOCK_S=block_s)


@jit
def _ray_features_fwd_kernel(
    volume_ptr,  # [B, Z, Y, X, C]
    origins_ptr, directions_ptr, volume_idx_ptr, edges_ptr,  # [R, 3] x 2, [R], [R, S + 1]
    cells_per_unit_ptr, cell_offset_ptr,  # [3], [3]
    weights_ptr, out_ptr,  # [R, S], [R, C]
    S, Z, Y, X, C,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)[None, :]
    acc = tl.zeros((BLOCK_S, BLOCK_C), out_ptr.dtype.element_ty)
    first_z = tl.load(volume_idx_ptr + r).to(tl.int64) * Z
    for begin in range(0, S, BLOCK_S):
        s = begin + tl.arange(0, BLOCK_S)
        ok = s < S
        start = tl.load(edges_ptr + r * (S + 1) + s, mask=ok, other=0.0)
        weight = tl.load(weights_ptr + r * S + s, mask=ok, other=0.0)
        px, py, pz = _grid_coords(origins_ptr, directions_ptr, cells_per_unit_ptr, cell_offset_ptr, r, start)
        for k in tl.static_range(8):
            row, row_ok, share = _corner(px, py, pz, first_z, Z, Y, X, k)
            feature_ok = (row_ok & ok)[:, None] & (c < C)
            feature = tl.load(volume_ptr + row[:, None] * C + c, mask=feature_ok, other=0.0)
            acc += (weight * share)[:, None] * feature
    c = tl.arange(0, BLOCK_C)
    tl.store(out_ptr + r * C + c, tl.sum(acc, axis=0), mask=c < C)


@jit
def _ray_features_bwd_kernel(
    volume_ptr,  # [B, Z, Y, X, C]
    origins_ptr, directions_ptr, volume_idx_ptr, edges_ptr,  # [R, 3] x 2, [R], [R, S + 1]
    cells_per_unit_ptr, cell_offset_ptr,  # [3], [3]
    weights_ptr, d_out_ptr,  # [R, S], [R, C]
    d_volume_ptr, d_weights_ptr,  # [B, Z, Y, X, C] zeros, [R, S]
    S, Z, Y, X, C,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)[None, :]
    ok = s < S
    first_z = tl.load(volume_idx_ptr + r).to(tl.int64) * Z
    start = tl.load(edges_ptr + r * (S + 1) + s, mask=ok, other=0.0)
    weight = tl.load(weights_ptr + r * S + s, mask=ok, other=0.0)
    px, py, pz = _grid_coords(origins_ptr, directions_ptr, cells_per_unit_ptr, cell_offset_ptr, r, start)
    d_out = tl.load(d_out_ptr + r * C + c, mask=c < C, other=0.0)  # [1, BLOCK_C]
    d_weight = tl.zeros((BLOCK_S,), weight.dtype)
    for k in range(8):  # not unrolled: several corners at once would need many registers
        row, row_ok, share = _corner(px, py, pz, first_z, Z, Y, X, k)
        feature_ok = (row_ok & ok)[:, None] & (c < C)
        feature = tl.load(volume_ptr + row[:, None] * C + c, mask=feature_ok, other=0.0)
        d_weight += share * tl.sum(feature * d_out, axis=1)
        factor = weight * share
        # samples of weight 0 add nothing: of NeuS, all where the distance grows along the ray
        adds = feature_ok & (factor != 0)[:, None]
        tl.atomic_add(d_volume_ptr + row[:, None] * C + c, factor[:, None] * d_out, mask=adds, sem="relaxed")
    tl.store(d_weights_ptr + r * S + s, d_weight, mask=ok)


@triton.jit
def _grid_coords(origins_ptr, directions_ptr, cells_per_unit_ptr, cell_offset_ptr, r, start):
    """Grid coordinates x, y, z, [BLOCK_S] each, of the samples at `start` on ray r."""
    x = tl.load(origins_ptr + 3 * r) + tl.load(directions_ptr + 3 * r) * start
    y = tl.load(origins_ptr + 3 * r + 1) + tl.load(directions_ptr + 3 * r + 1) * start
    z = tl.load(origins_ptr + 3 * r + 2) + tl.load(directions_ptr + 3 * r + 2) * start
    px = x * tl.load(cells_per_unit_ptr) + tl.load(cell_offset_ptr)
    py = y * tl.load(cells_per_unit_ptr + 1) + tl.load(cell_offset_ptr + 1)
    pz = z * tl.load(cells_per_unit_ptr + 2) + tl.load(cell_offset_ptr + 2)
    return px, py, pz


@triton.jit
def _corner(px, py, pz, first_z, Z, Y, X, k):
    """Corner k of the samples' cells: its row among all voxels, whether it exists, its share, [BLOCK_S] each."""
    z, z_ok, az, _ = axis_corner(pz, Z, k // 4)
    y, y_ok, ay, _ = axis_corner(py, Y, k // 2 % 2)
    x, x_ok, ax, _ = axis_corner(px, X, k % 2)
    return ((first_z + z) * Y + y) * X + x, z_ok & y_ok & x_ok, az * ay * ax
