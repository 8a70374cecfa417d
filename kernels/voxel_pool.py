"""Pool image features into a voxel volume: each pixel's feature is spread along its ray, weighted by depth probability.

    volume[v] = sum_{v(r, k) = v} F[r] * prob[r, k]

    dL/dF[r] = sum_k prob[r, k] * g[v(r, k)],   dL/dprob[r, k] = <g[v(r, k)], F[r]>,   g = dL/dvolume

F[r] is the feature of pixel r, prob[r, k] the probability of its depth bin k, and v(r, k) the voxel that contains the
bin's point on the pixel's ray. Consecutive points of a ray in one voxel form a run: the pixel's feature is read once
and multiplied by the sum of their probabilities. For the forward, runs are sorted stably by voxel, and each voxel's
runs are summed in order by one program; where a voxel has many, an earlier kernel has summed chunks of CHUNK runs. In
the backward a program handles a block of pixels and walks along their rays. No atomics.

Sizes: R pixels of the feature maps of all views, with D depth bins each, so P = R * D points; V voxels of all samples.
`depths` are the probabilities, `bins` the depths of the bins in meters. Voxels and the order of runs depend only on
the cameras: a caller that passes a `StreamCache` finds and sorts them once per calibration.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unipad.kernels.backend import StreamCache, jit, on_triton, tl, triton
from unipad.kernels.pool_points import find_points, geometry_ref, voxels_ref


def voxel_pool(
    features: Tensor, depths: Tensor, lidar2image: Tensor, low: Sequence[float], cell: Sequence[float],
    shape: Sequence[int], stride: int, depth_range: Sequence[float], truncate: bool = False,
    cache: StreamCache | None = None,
) -> Tensor:  # fmt: skip
    """Sum feature times depth probability over the points of all views' frusta in each voxel.

    Args:
        features:    [B, N, h, w, C] image features of N views; row i, column j is at pixel (j * stride, i * stride),
                     the upper left corner of the feature's patch.
        depths:      [B, N, h, w, D] probability of each depth bin; a bin's point is at its near edge.
        lidar2image: [B, N, 4, 4] LiDAR meters -> (u*d, v*d, d, 1); the last row, (0, 0, 0, 1), is not read.
        low, cell:   (x, y, z) meters, LiDAR frame: lower corner of the grid, size of a voxel.
        shape:       voxels (X, Y, Z).
        stride:      image pixels from one feature to the next.
        depth_range: (nearest, farthest) meters along the optical axis, divided into D bins.
        truncate:    round cell coordinates toward zero, as the original does, instead of down: points up to one voxel
                     below the grid's lower faces then go to the first voxels.
        cache:       keeps the voxels of the points for later calls with the same cache; `lidar2image` must have the
                     same values in all of them. None: nothing is kept.

    Returns:
        [B, Z, Y, X, C] in the features' type; a voxel without points is 0.

    Differentiable once w.r.t. `features` and `depths`. Accumulates in fp32 (fp64 for fp64 features). Deterministic.
    Points are assigned to voxels in fp64, bitwise equal in kernel and reference; those of a view with a singular
    matrix are dropped. To pool several frames into one volume, pass them as more views. Raises AssertionError if shapes
    do not match. Follows Uni3DVoxelPoolDepth of the original.
    """
    fits = features.dim() == depths.dim() == 5
    assert fits, f"features {tuple(features.shape)} and depths {tuple(depths.shape)} are not [B, N, h, w, channels]"
    triples = low, cell, shape
    assert all(len(t) == 3 for t in triples), f"low, cell and shape are (x, y, z) each, not {triples}"
    (B, N, h, w, _), D = features.shape, depths.shape[4]
    assert lidar2image.shape == (B, N, 4, 4), f"lidar2image {tuple(lidar2image.shape)} does not match {B} x {N} views"
    fits = depths.shape == (B, N, h, w, D)
    assert fits, f"depths {tuple(depths.shape)} do not match features {tuple(features.shape)}"
    X, Y, Z = shape
    # indices are int32; the limit leaves room for those of lanes past the end
    assert max(B * N * h * w * D, B * X * Y * Z) < 2**30, "points and voxels must fit 32 bits: use fewer samples"
    if not on_triton(features):
        return voxel_pool_ref(features, depths, lidar2image, low, cell, shape, stride, depth_range, truncate)
    geometry = features.shape[:4], D, *map(tuple, (low, cell, shape)), stride, tuple(depth_range), truncate
    points = None  # there are none
    if features.numel() and D and min(shape):
        cache = StreamCache() if cache is None else cache
        points = cache.get(
            (features.device, geometry), features.device, lambda: find_points(lidar2image.detach(), *geometry)
        )
    return VoxelPool.apply(features, depths, points, shape)


def voxel_pool_ref(features, depths, lidar2image, low, cell, shape, stride, depth_range, truncate=False, cache=None):
    """`voxel_pool` in plain PyTorch: a voxel is a weighted sum of the feature rows of its points. Caches nothing."""
    (B, _, _, _, C), D = features.shape, depths.shape[4]
    X, Y, Z = shape
    V = B * X * Y * Z
    acc_type = torch.float64 if features.dtype == torch.float64 else torch.float32
    matrices, bins = geometry_ref(lidar2image.detach(), low, cell, depth_range, D)
    voxel = voxels_ref(matrices, bins, features.shape, shape, stride, truncate)

    point = (voxel < V).nonzero()[:, 0]
    voxel, order = voxel.index_select(0, point).sort(stable=True)
    point = point.index_select(0, order)
    begin = torch.searchsorted(voxel, torch.arange(V, device=voxel.device))  # each voxel's first entry of `point`
    table = features.flatten(0, 3).to(acc_type)
    table = table if C else F.pad(table, (0, 1))  # `embedding_bag` refuses a table without columns
    volume = F.embedding_bag(
        point // max(D, 1),  # pixels
        table,
        begin,
        mode="sum",
        per_sample_weights=depths.flatten().index_select(0, point).to(acc_type),
    )
    return volume[:, :C].view(B, Z, Y, X, C).to(features.dtype)


class VoxelPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, depths, points, shape):
        features, depths = features.contiguous(), depths.contiguous()
        (B, _, _, _, C), D, (X, Y, Z) = features.shape, depths.shape[4], shape
        P, V = depths.numel(), B * X * Y * Z
        volume = features.new_empty(B, Z, Y, X, C)
        if points is None:
            ctx.save_for_backward(features, depths, torch.empty(0))
            ctx.V = 0  # `backward` returns zeros
            return volume.zero_()
        voxel, order, pixel, begin = points
        ctx.save_for_backward(features, depths, voxel)
        ctx.V = V
        acc_type = torch.float64 if features.dtype == torch.float64 else torch.float32
        weight = torch.empty(P, dtype=acc_type, device=features.device)  # of each run, at most P runs
        _runs_kernel[(triton.cdiv(P, BLOCK_P),)](
            depths_ptr=depths, voxel_idx_ptr=voxel, order_idx_ptr=order, begin_idx_ptr=begin, weight_ptr=weight,
            P=P, V=V, D=D, BLOCK_P=BLOCK_P,
        )  # fmt: skip
        chunks = P // CHUNK  # at most: only the device knows the number of runs
        partial = torch.empty(chunks, C, dtype=acc_type, device=features.device)
        blocks = _blocks(C)
        if chunks:
            _chunks_kernel[(triton.cdiv(chunks, blocks["BLOCK_R"]),)](
                features_ptr=features, weight_ptr=weight, voxel_idx_ptr=voxel, order_idx_ptr=order,
                pixel_idx_ptr=pixel, begin_idx_ptr=begin, partial_ptr=partial,
                chunks=chunks, V=V, C=C, CHUNK=CHUNK, **blocks,
            )  # fmt: skip
        _voxel_pool_fwd_kernel[(triton.cdiv(V, blocks["BLOCK_R"]),)](
            features_ptr=features, weight_ptr=weight, pixel_idx_ptr=pixel, begin_idx_ptr=begin,
            partial_ptr=partial, volume_ptr=volume, V=V, C=C, CHUNK=CHUNK, **blocks,
        )  # fmt: skip
        return volume

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_volume):
        features, depths, voxel = ctx.saved_tensors
        C, D = features.shape[4], depths.shape[4]
        R, V = features.shape[:4].numel(), ctx.V
        if V:
            d_features, d_depths = torch.empty_like(features), torch.empty_like(depths)
            blocks = _blocks(C)
            _voxel_pool_bwd_kernel[(triton.cdiv(R, blocks["BLOCK_R"]),)](
                features_ptr=features, depths_ptr=depths, voxel_idx_ptr=voxel, d_volume_ptr=d_volume.contiguous(),
                d_features_ptr=d_features, d_depths_ptr=d_depths, R=R, V=V, C=C, D=D, **blocks,
            )  # fmt: skip
        else:
            d_features, d_depths = torch.zeros_like(features), torch.zeros_like(depths)
        return d_features, d_depths, None, None


# All untuned: chosen from the compiler's output for sm_90, without timing on a GPU
BLOCK_P = 256  # points per program
TILE = 1024  # elements per program: channels x voxels, chunks or pixels
CHUNK = 64  # runs per chunk; chunks begin at multiples of it, so a voxel of 2 * CHUNK - 1 runs contains a whole chunk
UNROLL = tl.constexpr(4)  # loop iterations, over runs or depth bins, whose loads are in flight together


def _blocks(C):
    """BLOCK_C channels of BLOCK_R voxels, chunks or pixels per program."""
    block_c = triton.next_power_of_2(C)
    return dict(BLOCK_R=max(TILE // block_c, 1), BLOCK_C=block_c)


@jit(varying=("P", "V"))
def _runs_kernel(
    depths_ptr, voxel_idx_ptr, order_idx_ptr, begin_idx_ptr, weight_ptr,  # [P], [P], [P], [V + 1], [P]
    P, V, D,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The weight of each sorted run: the sum of its points' probabilities."""
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    p = tl.load(order_idx_ptr + i, mask=i < P, other=0)
    ok = i < tl.load(begin_idx_ptr + V)  # the number of runs inside the grid
    voxel = tl.load(voxel_idx_ptr + p, mask=ok, other=0)
    weight = tl.zeros((BLOCK_P,), weight_ptr.dtype.element_ty)
    continues, k = ok, 0
    while tl.max(continues.to(tl.int32), axis=0) > 0:
        weight += tl.load(depths_ptr + p + k, mask=continues, other=0.0).to(weight.dtype)
        k += 1
        continues &= p % D + k < D
        continues &= tl.load(voxel_idx_ptr + p + k, mask=continues, other=-1) == voxel
    tl.store(weight_ptr + i, weight, mask=ok)


@jit(varying=("chunks", "V"))
def _chunks_kernel(
    features_ptr, weight_ptr,  # [R, C], [P] of sorted runs
    voxel_idx_ptr, order_idx_ptr, pixel_idx_ptr, begin_idx_ptr, partial_ptr,  # [P], [P], [P], [V + 1], [chunks, C]
    chunks, V, C,
    CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sum of each chunk of sorted runs that lies in one voxel; other chunks are not written."""
    chunk = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    c = tl.arange(0, BLOCK_C)[None, :]
    ok = (chunk + 1) * CHUNK <= tl.load(begin_idx_ptr + V)  # whole chunks of runs
    first = tl.load(order_idx_ptr + chunk * CHUNK, mask=ok, other=0)  # point where the chunk's first run begins
    last = tl.load(order_idx_ptr + chunk * CHUNK + CHUNK - 1, mask=ok, other=0)
    voxel = tl.load(voxel_idx_ptr + first, mask=ok, other=0)
    ok &= voxel == tl.load(voxel_idx_ptr + last, mask=ok, other=-1)
    if tl.max(ok.to(tl.int32), axis=0) > 0:
        mask = ok[:, None] & (c < C)
        acc = tl.zeros((BLOCK_R, BLOCK_C), partial_ptr.dtype.element_ty)
        for i in tl.range(0, CHUNK, loop_unroll_factor=UNROLL):
            acc += _run(features_ptr, weight_ptr, pixel_idx_ptr, chunk * CHUNK + i, ok, mask, c, C, acc.dtype)
        tl.store(partial_ptr + chunk.to(tl.int64)[:, None] * C + c, acc, mask=mask)


@jit(varying=("V",))
def _voxel_pool_fwd_kernel(
    features_ptr, weight_ptr,  # [R, C], [P] of sorted runs
    pixel_idx_ptr, begin_idx_ptr, partial_ptr, volume_ptr,  # [P], [V + 1], [chunks, C], [V, C]
    V, C,
    CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    v = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    c = tl.arange(0, BLOCK_C)[None, :]
    v_ok = v < V
    begin = tl.load(begin_idx_ptr + v, mask=v_ok, other=0)
    end = tl.load(begin_idx_ptr + v + 1, mask=v_ok, other=0)
    # a voxel's sum: runs before the first whole chunk, whole chunks, the remaining runs
    first = tl.cdiv(begin, CHUNK)  # index of the first whole chunk
    whole = tl.maximum(end // CHUNK - first, 0)  # number of whole chunks
    before = tl.where(whole > 0, first * CHUNK - begin, end - begin)  # number of runs before them
    terms = end - begin - whole * (CHUNK - 1)  # number of single runs and whole chunks

    acc = tl.zeros((BLOCK_R, BLOCK_C), partial_ptr.dtype.element_ty)
    for i in tl.range(0, tl.max(terms, axis=0), loop_unroll_factor=UNROLL):
        in_chunk = (i >= before) & (i < before + whole)
        run = begin + i + tl.where(i < before, 0, whole * (CHUNK - 1))
        single = (i < terms) & ~in_chunk
        mask = single[:, None] & (c < C)
        acc += _run(features_ptr, weight_ptr, pixel_idx_ptr, run, single, mask, c, C, acc.dtype)
        chunk = (first + i - before).to(tl.int64)[:, None]
        acc += tl.load(partial_ptr + chunk * C + c, mask=in_chunk[:, None] & (c < C), other=0.0)
    tl.store(volume_ptr + v.to(tl.int64)[:, None] * C + c, acc, mask=v_ok[:, None] & (c < C))


@triton.jit
def _run(features_ptr, weight_ptr, pixel_idx_ptr, at, ok, mask, c, C, acc_ty: tl.constexpr):
    """Weighted features of the sorted runs at indices `at`: [BLOCK_R, BLOCK_C]; 0 where not ok."""
    pixel = tl.load(pixel_idx_ptr + at, mask=ok, other=0)
    weight = tl.load(weight_ptr + at, mask=ok, other=0.0)
    feature = tl.load(features_ptr + pixel.to(tl.int64)[:, None] * C + c, mask=mask, other=0.0).to(acc_ty)
    return weight[:, None] * feature


@jit(varying=("R", "V"))
def _voxel_pool_bwd_kernel(
    features_ptr, depths_ptr, voxel_idx_ptr, d_volume_ptr,  # [R, C], [R, D], [R, D], [V, C]
    d_features_ptr, d_depths_ptr,  # [R, C], [R, D]
    R, V, C, D,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    acc_ty: tl.constexpr = tl.float64 if features_ptr.dtype.element_ty == tl.float64 else tl.float32
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    c = tl.arange(0, BLOCK_C)[None, :]
    r_ok = r < R
    row = r.to(tl.int64)[:, None] * C + c
    feature = tl.load(features_ptr + row, mask=r_ok[:, None] & (c < C), other=0.0).to(acc_ty)

    acc = tl.zeros((BLOCK_R, BLOCK_C), acc_ty)
    g = tl.zeros((BLOCK_R, BLOCK_C), acc_ty)
    previous = tl.full((BLOCK_R,), V, tl.int32)
    for k in tl.range(0, D, loop_unroll_factor=UNROLL):
        p = r * D + k
        voxel = tl.load(voxel_idx_ptr + p, mask=r_ok, other=V)
        ok = voxel < V
        probability = tl.load(depths_ptr + p, mask=ok, other=0.0).to(acc_ty)
        # later points of a run reuse the gradient of its first; outside the grid it is 0
        is_new = voxel != previous
        at = voxel.to(tl.int64)[:, None] * C + c
        d_voxel = tl.load(d_volume_ptr + at, mask=(ok & is_new)[:, None] & (c < C), other=0.0).to(acc_ty)
        g = tl.where(is_new[:, None], d_voxel, g)
        previous = voxel
        acc += probability[:, None] * g
        tl.store(d_depths_ptr + p, tl.sum(g * feature, axis=1), mask=r_ok)
    tl.store(d_features_ptr + row, acc, mask=r_ok[:, None] & (c < C))
