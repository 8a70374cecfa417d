"""The features of a volume along rays, summed with the weights of their samples.

    f_s = sum_k a_sk V_k  (the 8 voxels around sample s, trilinear as in `trilinear`),   out = sum_s w_s f_s

    dL/dw_s = d_out . f_s,   dL/dV_k = sum over rays and samples of w_s a_sk d_out

This is `composite` of features with given weights: those that `sdf_render` or `composite` returns. A linear layer of
any width applied to the result equals the layer applied to every sample, so only the volume's C channels are
composited, not the layer's outputs; and [R, S, C] features are never stored. It is an op of its own, because the
kernels of `sdf_render`, which have the features, have no registers left for further sums.

Sizes: R rays, S samples on each, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unipad.kernels.backend import jit, on_triton, tl, triton, without_autocast
from unipad.kernels.sdf_gather import cell_around, corner_ptr, load_corner, load_ray, sample_at, weight
from unipad.kernels.trilinear import corners


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

    Returns [R, C]: sum of weight * feature; 0 for rays without samples. A sample at a NaN coordinate adds nothing in
    the kernel, and NaN in the reference.

    All floats of one type, fp32 or fp64. Differentiable once w.r.t. `volume` and `weights`. The kernel adds atomically
    to the gradient of `volume`, so its last bits vary from run to run; under `torch.use_deterministic_algorithms(True)`
    the reference runs instead. Raises AssertionError if shapes or types do not match.
    """
    (origins, directions, volume_idx), (R, S) = rays, weights.shape
    shapes = [tuple(t.shape) for t in (volume, *rays, edges, weights)]
    fits = volume.dim() == 5 and origins.shape == directions.shape == (R, 3) and volume_idx.shape == (R,)
    assert fits and edges.shape == (R, S + 1), f"volume, rays, edges and weights of {shapes} do not match"
    assert min(volume.shape[1:4]) > 0, f"volume {tuple(volume.shape)} has no voxels"
    assert volume.shape[:4].numel() < 2**31, f"too many voxels: {tuple(volume.shape)}"  # their number is an int32
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
    """The size arguments of both kernels; those of the volume are constants, as for `sdf_render`."""
    _, Z, Y, X, CHANNELS = volume.shape
    C = triton.next_power_of_2(CHANNELS)
    block_s = max(1, min(BLOCK_S, TILE // C))
    return dict(S=weights.shape[1], Z=Z, Y=Y, X=X, CHANNELS=CHANNELS, C=C, BLOCK_S=block_s)


@jit
def _ray_features_fwd_kernel(
    volume_ptr,  # [B, Z, Y, X, CHANNELS]
    origins_ptr, directions_ptr, volume_idx_ptr, edges_ptr,  # [R, 3] x 2, [R], [R, S + 1]
    cells_per_unit_ptr, cell_offset_ptr,  # [3], [3]
    weights_ptr, out_ptr,  # [R, S], [R, CHANNELS]
    S,
    Z: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, CHANNELS: tl.constexpr, C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    ray = load_ray(origins_ptr, directions_ptr, volume_idx_ptr, r)
    acc = tl.zeros((BLOCK_S, C), out_ptr.dtype.element_ty)
    for begin in range(0, S, BLOCK_S):
        s = begin + tl.arange(0, BLOCK_S)
        ok = s < S
        n = r * S + s
        start = tl.load(edges_ptr + n + r, mask=ok, other=0.0)
        sample_weight = tl.load(weights_ptr + n, mask=ok, other=0.0)
        _, coords, volume_idx = sample_at(ray, start, cells_per_unit_ptr, cell_offset_ptr)
        cell = cell_around(coords, volume_idx, Z, Y, X)
        for z in range(2):  # not unrolled: all corners at once would need many registers
            for k in tl.static_range(4):
                voxel = load_corner(volume_ptr, cell, z, k, Z, Y, X, CHANNELS, C)
                acc += (sample_weight * weight(cell, z, k))[:, None] * voxel
    c = tl.arange(0, C)
    tl.store(out_ptr + r * CHANNELS + c, tl.sum(acc, axis=0), mask=c < CHANNELS)


@jit
def _ray_features_bwd_kernel(
    volume_ptr,  # [B, Z, Y, X, CHANNELS]
    origins_ptr, directions_ptr, volume_idx_ptr, edges_ptr,  # [R, 3] x 2, [R], [R, S + 1]
    cells_per_unit_ptr, cell_offset_ptr,  # [3], [3]
    weights_ptr, d_out_ptr,  # [R, S], [R, CHANNELS]
    d_volume_ptr, d_weights_ptr,  # [B, Z, Y, X, CHANNELS] zeros, [R, S]
    S,
    Z: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, CHANNELS: tl.constexpr, C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    ray = load_ray(origins_ptr, directions_ptr, volume_idx_ptr, r)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    ok = s < S
    n = r * S + s
    start = tl.load(edges_ptr + n + r, mask=ok, other=0.0)
    sample_weight = tl.load(weights_ptr + n, mask=ok, other=0.0)
    _, coords, volume_idx = sample_at(ray, start, cells_per_unit_ptr, cell_offset_ptr)
    cell = cell_around(coords, volume_idx, Z, Y, X)
    c = tl.arange(0, C)[None, :]
    d_out = tl.load(d_out_ptr + r * CHANNELS + c, mask=c < CHANNELS, other=0.0)  # [1, C]
    feature = tl.zeros((BLOCK_S, C), d_out.dtype)
    for z in range(2):
        for k in tl.static_range(4):
            share = weight(cell, z, k)
            feature += share[:, None] * load_corner(volume_ptr, cell, z, k, Z, Y, X, CHANNELS, C)
            factor = sample_weight * share
            # samples of weight 0 add nothing: of NeuS, all where the distance grows along the ray
            adds = (factor != 0)[:, None]
            if CHANNELS < C:
                adds = adds & (c < CHANNELS)
            d_ptr = corner_ptr(d_volume_ptr, cell, z, k, Z, Y, X, CHANNELS, C)
            tl.atomic_add(d_ptr, factor[:, None] * d_out, mask=adds, sem="relaxed")
    tl.store(d_weights_ptr + n, tl.sum(feature * d_out, axis=1), mask=ok)
