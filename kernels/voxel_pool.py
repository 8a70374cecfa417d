"""Pool image features into a volume of voxels: every pixel spreads along its ray, by the probability of each depth.

    volume[x] = sum_{x(r, k) = x} F[r] * P[r, k]

    dL/dF[r] = sum_k P[r, k] * g[x(r, k)],   dL/dP[r, k] = <g[x(r, k)], F[r]>,   g = dL/dvolume

x(r, k) is the voxel that holds point k of pixel r's ray. For the forward the points are sorted by voxel, stably, and
each voxel's are summed in order by the program that owns it; where they are many, whole chunks of them were summed by
programs of their own before. In the backward a program owns pixels and walks along their rays. Nothing is atomic.

Sizes: R pixels of all views with D depth bins each, so R D points; V voxels of all samples.
"""

import torch
import torch.nn.functional as F

from kernels.backend import on_triton, tl, triton


def voxel_pool(features, depths, lidar2image, low, cell, shape, stride, depth_range, truncate=False):
    """Sum feature times depth probability over the points of all views' frusta that fall into each voxel.

    Args:
        features:    [B, N, h, w, C] image features of N views; that of row i and column j stands at pixel
                     (j * stride, i * stride), its upper left corner.
        depths:      [B, N, h, w, D] probability of each depth bin; bin k stands at its lower edge.
        lidar2image: [B, N, 4, 4] LiDAR metres -> (u*d, v*d, d, 1).
        low, cell:   (x, y, z) metres, LiDAR frame: lower corner of the grid, size of a voxel.
        shape:       voxels (X, Y, Z).
        stride:      pixels from one feature to the next.
        depth_range: (nearest, farthest) metres along the optical axis, cut into D bins.
        truncate:    round a point's place in the grid towards zero, as the original does, instead of down: points up
                     to a voxel below the grid's lower faces then count in the voxels behind them.

    Returns:
        [B, Z, Y, X, C] in the features' type; a voxel without points is 0.

    Differentiable once in `features` and `depths`. Accumulates in fp32 (fp64 for fp64 features); bit-equal from run to
    run. Points are placed in fp64, by kernel and reference to the bit alike; those of a singular matrix lie nowhere.
    Follows Uni3DVoxelPoolDepth of the original.
    """
    (B, N, h, w, _), D = features.shape, depths.shape[4]
    assert lidar2image.shape == (B, N, 4, 4), f"lidar2image {tuple(lidar2image.shape)} does not fit {B} x {N} views"
    assert depths.shape == (B, N, h, w, D), f"depths {tuple(depths.shape)} do not fit features {tuple(features.shape)}"
    X, Y, Z = shape
    assert max(B * N * h * w * D, B * X * Y * Z) < 2**30, "points and voxels are counted in 32 bits: take fewer samples"
    if not on_triton(features):
        return voxel_pool_ref(features, depths, lidar2image, low, cell, shape, stride, depth_range, truncate)
    return VoxelPool.apply(features, depths, lidar2image, low, cell, shape, stride, depth_range, truncate)


def voxel_pool_ref(features, depths, lidar2image, low, cell, shape, stride, depth_range, truncate=False):
    """`voxel_pool` in plain PyTorch: a voxel is a weighted sum of the rows of its points."""
    (B, _, _, _, C), D = features.shape, depths.shape[4]
    X, Y, Z = shape
    V = B * X * Y * Z
    acc_type = torch.float64 if features.dtype == torch.float64 else torch.float32
    matrices, bins = _geometry(lidar2image, low, cell, depth_range, D)
    voxel = _voxels_ref(matrices, bins, features.shape, shape, stride, truncate)

    point = (voxel < V).nonzero()[:, 0]
    voxel, order = voxel.index_select(0, point).sort(stable=True)
    point = point.index_select(0, order)
    begin = torch.searchsorted(voxel, torch.arange(V, device=voxel.device))
    table = features.flatten(0, 3).to(acc_type)
    volume = F.embedding_bag(
        point // max(D, 1),
        F.pad(table, (0, 1 if C == 0 else 0)),  # `embedding_bag` refuses a table without columns
        begin,
        mode="sum",
        per_sample_weights=depths.flatten().index_select(0, point).to(acc_type),
    )
    return volume[:, :C].view(B, Z, Y, X, C).to(features.dtype)


def _geometry(lidar2image, low, cell, depth_range, D):
    """The frusta in fp64: matrices (u*d, v*d, d, 1) -> place in the grid [B, N, 3, 4], depths of the bins [D]."""
    # does not wait for the device to look for errors, as `torch.inverse` does
    metres = torch.linalg.inv_ex(lidar2image.double()).inverse[..., :3, :]
    places = [torch.cat([metres[..., i, :3], metres[..., i, 3:] - low[i]], dim=-1) / cell[i] for i in range(3)]
    near, far = depth_range
    bins = near + (far - near) / max(D, 1) * torch.arange(D, dtype=torch.float64, device=lidar2image.device)
    return torch.stack(places, dim=-2), bins


def _voxels_ref(matrices, bins, sizes, shape, stride, truncate):
    """[R * D] the voxel that each point lies in, counted over all samples; their number where it lies in none."""
    B, _, h, w, _ = sizes
    X, Y, Z = shape
    u = torch.arange(w, device=bins.device)[:, None] * stride  # [w, 1]
    v = torch.arange(h, device=bins.device)[:, None, None] * stride  # [h, 1, 1]
    cells, inside = [], True
    for row, size in zip(matrices[..., None, None, None].unbind(2), shape, strict=True):  # [B, N, 4, 1, 1, 1]
        a, b, c, d = row.unbind(2)
        place = (a * u + b * v + c) * bins + d  # [B, N, h, w, D]
        place = place.trunc() if truncate else place.floor()
        inside = inside & (place >= 0) & (place < size)
        cells.append(torch.where(inside, place, 0).long())
    x, y, z = cells
    sample = torch.arange(B, device=bins.device).view(B, 1, 1, 1, 1)
    return torch.where(inside, ((sample * Z + z) * Y + y) * X + x, B * Z * Y * X).flatten()


class VoxelPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, depths, lidar2image, low, cell, shape, stride, depth_range, truncate):
        features, depths = features.contiguous(), depths.contiguous()
        (B, N, h, w, C), D, (X, Y, Z) = features.shape, depths.shape[4], shape
        P, V = depths.numel(), B * X * Y * Z
        volume = features.new_empty(B, Z, Y, X, C)
        voxel = torch.empty(P, dtype=torch.int32, device=features.device)
        ctx.save_for_backward(features, depths, voxel)
        ctx.voxels = V
        if not min(P, V, C):
            return volume.zero_()
        matrices, bins = _geometry(lidar2image, low, cell, depth_range, D)
        _voxels_kernel[(triton.cdiv(P, BLOCK_P),)](
            matrices.contiguous(), bins, voxel, P, N, h, w, D, stride, tuple(shape), V,
            TRUNCATE=truncate, BLOCK_P=BLOCK_P,
            enable_fp_fusion=False,  # a point on a voxel's face would lie on the other side of it
        )  # fmt: skip
        by_voxel, order = voxel.sort(stable=True)
        numbers = torch.arange(V + 1, dtype=torch.int32, device=voxel.device)
        begin = torch.searchsorted(by_voxel, numbers, out_int32=True)
        chunks = P // CHUNK
        acc_type = torch.float64 if features.dtype == torch.float64 else torch.float32
        partial = torch.empty(chunks, C, dtype=acc_type, device=features.device)
        blocks = _blocks(C)
        if chunks:
            _chunks_kernel[(triton.cdiv(chunks, blocks["BLOCK_R"]),)](
                features, depths, by_voxel, order, partial, chunks, V, C, D, CHUNK=CHUNK, **blocks
            )
        _voxel_pool_fwd_kernel[(triton.cdiv(V, blocks["BLOCK_R"]),)](
            features, depths, order, begin, partial, volume, V, C, D, CHUNK=CHUNK, **blocks
        )
        return volume

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_volume):
        features, depths, voxel = ctx.saved_tensors
        C, D = features.shape[4], depths.shape[4]
        R, V = features.shape[:4].numel(), ctx.voxels
        d_features, d_depths = torch.empty_like(features), torch.empty_like(depths)
        if not min(R, C, D, V):
            d_features.zero_(), d_depths.zero_()
        else:
            blocks = _blocks(C)
            _voxel_pool_bwd_kernel[(triton.cdiv(R, blocks["BLOCK_R"]),)](
                features, depths, voxel, d_volume.contiguous(), d_features, d_depths, R, V, C, D, **blocks
            )
        return d_features, d_depths, None, None, None, None, None, None, None


# All untuned: chosen by what the compiler makes of them for sm_90, without a GPU to time them on
BLOCK_P = 256  # points per program
TILE = 1024  # voxels, chunks or pixels x channels per program
CHUNK = 64  # points; wherever it begins, a voxel of 2 * CHUNK - 1 points or more holds a whole chunk
UNROLL = tl.constexpr(4)  # points whose loads are under way together


def _blocks(C):
    block_c = triton.next_power_of_2(C)
    return dict(BLOCK_R=max(TILE // block_c, 1), BLOCK_C=block_c)


@triton.jit
def _voxels_kernel(
    matrices_ptr, bins_ptr, voxel_idx_ptr,  # [B, N, 3, 4], [D], [P]
    P, N, h, w, D, stride, shape, V,
    TRUNCATE: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    p_ok = p < P
    pixel = p // D
    view = pixel // w // h
    u = (pixel % w * stride).to(tl.float64)
    v = (pixel // w % h * stride).to(tl.float64)
    d = tl.load(bins_ptr + p % D, mask=p_ok, other=0.0)
    row = matrices_ptr + view * 12
    x, x_ok = _cell(row, u, v, d, p_ok, shape[0], TRUNCATE)
    y, y_ok = _cell(row + 4, u, v, d, p_ok, shape[1], TRUNCATE)
    z, z_ok = _cell(row + 8, u, v, d, p_ok, shape[2], TRUNCATE)
    voxel = ((view // N * shape[2] + z) * shape[1] + y) * shape[0] + x
    tl.store(voxel_idx_ptr + p, tl.where(x_ok & y_ok & z_ok, voxel, V), mask=p_ok)


@triton.jit
def _cell(row_ptr, u, v, d, ok, size, TRUNCATE: tl.constexpr):
    """The cell that a point lies in on one axis, and whether it is in the grid; 0 where not."""
    a = tl.load(row_ptr, mask=ok, other=0.0)
    b = tl.load(row_ptr + 1, mask=ok, other=0.0)
    c = tl.load(row_ptr + 2, mask=ok, other=0.0)
    place = (a * u + b * v + c) * d + tl.load(row_ptr + 3, mask=ok, other=0.0)
    if TRUNCATE:
        place = tl.where(place < 0, tl.ceil(place), tl.floor(place))
    else:
        place = tl.floor(place)
    inside = (place >= 0) & (place < size)  # false for NaN
    return tl.where(inside, place, 0.0).to(tl.int32), inside


@triton.jit
def _chunks_kernel(
    features_ptr, depths_ptr,  # [R, C], [R, D]
    voxel_idx_ptr, order_ptr, partial_ptr,  # [P] sorted, [P], [chunks, C]
    chunks, V, C, D,
    CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sum of each chunk of sorted points that lies in one voxel; of other chunks nothing is written."""
    chunk = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    c = tl.arange(0, BLOCK_C)[None, :]
    ok = chunk < chunks
    first = tl.load(voxel_idx_ptr + chunk * CHUNK, mask=ok, other=0)
    last = tl.load(voxel_idx_ptr + chunk * CHUNK + CHUNK - 1, mask=ok, other=0)
    ok &= (first == last) & (last < V)
    if tl.max(ok.to(tl.int32), axis=0) > 0:
        mask = ok[:, None] & (c < C)
        acc = tl.zeros((BLOCK_R, BLOCK_C), partial_ptr.dtype.element_ty)
        for i in tl.range(0, CHUNK, loop_unroll_factor=UNROLL):
            acc += _point(features_ptr, depths_ptr, order_ptr, chunk * CHUNK + i, ok, mask, c, C, D, acc.dtype)
        tl.store(partial_ptr + chunk.to(tl.int64)[:, None] * C + c, acc, mask=mask)


@triton.jit
def _voxel_pool_fwd_kernel(
    features_ptr, depths_ptr,  # [R, C], [R, D]
    order_ptr, begin_idx_ptr, partial_ptr, volume_ptr,  # [P], [V + 1], [chunks, C], [V, C]
    V, C, D,
    CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    v = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    c = tl.arange(0, BLOCK_C)[None, :]
    v_ok = v < V
    begin = tl.load(begin_idx_ptr + v, mask=v_ok, other=0)
    end = tl.load(begin_idx_ptr + v + 1, mask=v_ok, other=0)
    # a voxel's points: some up to the first whole chunk, whole chunks, the rest
    first = tl.cdiv(begin, CHUNK)
    whole = tl.maximum(end // CHUNK - first, 0)
    before = tl.where(whole > 0, first * CHUNK - begin, end - begin)
    terms = end - begin - whole * (CHUNK - 1)

    acc = tl.zeros((BLOCK_R, BLOCK_C), partial_ptr.dtype.element_ty)
    for i in tl.range(0, tl.max(terms, axis=0), loop_unroll_factor=UNROLL):
        in_chunk = (i >= before) & (i < before + whole)
        point = begin + i + tl.where(i < before, 0, whole * (CHUNK - 1))
        alone = (i < terms) & ~in_chunk
        acc += _point(features_ptr, depths_ptr, order_ptr, point, alone, alone[:, None] & (c < C), c, C, D, acc.dtype)
        chunk = (first + i - before).to(tl.int64)[:, None]
        acc += tl.load(partial_ptr + chunk * C + c, mask=in_chunk[:, None] & (c < C), other=0.0)
    tl.store(volume_ptr + v.to(tl.int64)[:, None] * C + c, acc, mask=v_ok[:, None] & (c < C))


@triton.jit
def _point(features_ptr, depths_ptr, order_ptr, at, ok, mask, c, C, D, acc_ty: tl.constexpr):
    """What the sorted points `at` add to their voxels [BLOCK_R, BLOCK_C]; 0 where not ok."""
    p = tl.load(order_ptr + at, mask=ok, other=0).to(tl.int32)
    probability = tl.load(depths_ptr + p, mask=ok, other=0.0).to(acc_ty)
    feature = tl.load(features_ptr + (p // D).to(tl.int64)[:, None] * C + c, mask=mask, other=0.0).to(acc_ty)
    return probability[:, None] * feature


@triton.jit
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
    for k in tl.range(0, D, loop_unroll_factor=UNROLL):
        p = r * D + k
        voxel = tl.load(voxel_idx_ptr + p, mask=r_ok, other=V)
        ok = voxel < V
        probability = tl.load(depths_ptr + p, mask=ok, other=0.0).to(acc_ty)
        at = voxel.to(tl.int64)[:, None] * C + c
        g = tl.load(d_volume_ptr + at, mask=ok[:, None] & (c < C), other=0.0).to(acc_ty)
        acc += probability[:, None] * g
        tl.store(d_depths_ptr + p, tl.sum(g * feature, axis=1), mask=r_ok)
    tl.store(d_features_ptr + row, acc, mask=r_ok[:, None] & (c < C))
