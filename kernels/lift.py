"""Lift image features into a voxel volume: every voxel sums what the views see at its lower corner, as in the original.

    volume[x] = sum_{n, l} F_nl(u, v) * P_nl(u, v, d)        (u d, v d, d, 1) = lidar2image_n @ (x, 1)

    dL/dF_nl = P_nl * g,   dL/dP_nl = <g, F_nl>,   g = dL/dvolume[x]

x is that corner, F_nl(u, v) the bilinearly interpolated feature of level l of view n, P_nl(u, v, d) the trilinearly
interpolated probability that the surface visible there lies at depth d; both gradients are distributed over the taps
(the pixels and bins interpolated) with the weights of the forward. Every voxel is projected into every view, but
features are read only from views that see it: 1.1 on average with nuScenes' six cameras.

A program handles a block of voxels adjacent in x and y, most of which project into the same view and pixels. The
backward adds atomically to the gradients of fine levels, where few voxels project onto a pixel. On coarse levels, where
many do, and on every level under strict determinism, it records each projection that the view sees (a "hit") instead:
`sort_hits` sorts the hits by the square between four pixels (a "quad") that they lie in, and each pixel gathers its
gradients from the quads around it. Such a level is called gathered.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from unipad.kernels.backend import jit, on_triton, strictly_deterministic, tl, triton
from unipad.kernels.pixel_sum import HIT, pixel_sum, sort_hits


def lift(
    features: Sequence[Tensor], depths: Sequence[Tensor], lidar2image: Tensor, low: Sequence[float],
    cell: Sequence[float], shape: Sequence[int], image_size: Sequence[int], depth_range: Sequence[float],
) -> Tensor:  # fmt: skip
    """Sum feature times depth probability over all views and levels, at the lower corner of each voxel.

    Args:
        features:    one [B, N, h, w, C] per level: image features of N views.
        depths:      one [B, N, h, w, D] per level: probability of each depth bin; bins are evenly spaced, the first at
                     depth_range[0], the last at depth_range[1].
        lidar2image: [B, N, 4, 4] LiDAR meters -> (u*d, v*d, d, 1), pixels of an image of `image_size`.
        low, cell:   (x, y, z) meters, LiDAR frame: lower corner of the grid, size of a voxel.
        shape:       voxels (X, Y, Z).
        image_size:  (H, W) pixels; u = 0 and u = W are the centers of a level's first and last column.
        depth_range: (nearest, farthest) meters along the optical axis.

    Returns:
        [B, Z, Y, X, C] in the features' type. A view sees a corner that lies strictly inside its image and the depth
        range, and deeper than 1e-5 m; a voxel that no view sees is 0.

    Differentiable once w.r.t. `features` and `depths`. Accumulates in fp32 (fp64 for fp64 features); projects in fp32.
    Gradients of fine levels are added atomically, so their last bits vary from run to run, except under
    `torch.use_deterministic_algorithms(True)`. To lift several frames into one volume, pass them as more views. Raises
    AssertionError if shapes do not match. Follows Uni3DViewTrans of the original.
    """
    assert len(features) == len(depths) > 0, f"{len(features)} levels of features, {len(depths)} of depths"
    (feature, depth), triples = (features[0], depths[0]), (low, cell, shape)
    fits = feature.dim() == depth.dim() == 5
    assert fits, f"features {tuple(feature.shape)} and depths {tuple(depth.shape)} are not [B, N, h, w, channels]"
    assert all(len(t) == 3 for t in triples), f"low, cell and shape are (x, y, z) each, not {triples}"
    (B, N, _, _, C), D = feature.shape, depth.shape[4]
    assert lidar2image.shape == (B, N, 4, 4), f"lidar2image {tuple(lidar2image.shape)} does not match {B} x {N} views"
    for feature, depth in zip(features, depths, strict=True):
        h, w = feature.shape[2:4]
        assert feature.shape == (B, N, h, w, C), f"level {tuple(feature.shape)} is not [{B}, {N}, h, w, {C}]"
        assert depth.shape == (B, N, h, w, D), f"depth {tuple(depth.shape)} does not match {tuple(feature.shape)}"
        assert h * w * D, f"empty level: {h} x {w} pixels, {D} depth bins"
    max_hits = len(features) * B * N * math.prod(shape)
    # indices are int32; the limit leaves room for those of lanes past the end
    assert max_hits < 2**30, "views x voxels of all levels must fit 32 bits: use fewer samples"
    if not on_triton(features[0]):
        return lift_ref(features, depths, lidar2image, low, cell, shape, image_size, depth_range)
    return Lift.apply(lidar2image.detach(), low, cell, shape, image_size, depth_range, *features, *depths)


def lift_ref(features, depths, lidar2image, low, cell, shape, image_size, depth_range):
    """`lift` in plain PyTorch: a voxel is a weighted sum of 4 feature rows per level and view that sees it."""
    (B, N, _, _, C), D = features[0].shape, depths[0].shape[4]
    X, Y, Z = shape
    acc_type = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    uvd, visible = _project_ref(lidar2image.detach(), low, cell, shape, image_size, depth_range)
    b, voxel, n = visible.transpose(1, 2).nonzero(as_tuple=True)  # [P] voxels and views that see them, by voxel
    u, v, d = uvd[:, b, n, voxel].to(acc_type)  # [P]
    view = b * N + n

    taps = 4 * visible.sum(dim=1).flatten()  # [B * V] rows that a voxel sums, per level
    begin = taps.cumsum(dim=0) - taps
    volume = 0
    for feature, depth in zip(features, depths, strict=True):
        h, w = feature.shape[2:4]
        x, x_weight = _nodes_ref(u, w)  # [2, P] each; x, y and z: column, row and depth bin
        y, y_weight = _nodes_ref(v, h)
        z, z_weight = _nodes_ref(d, D)
        pixel = ((view * h + y)[:, None] * w + x).flatten(0, 1)  # [4, P]
        weight = (y_weight[:, None] * x_weight).flatten(0, 1)  # [4, P]
        at_nodes = depth.flatten().index_select(0, (pixel[:, None] * D + z).flatten()).view(4, 2, -1)
        probability = (weight[:, None] * z_weight * at_nodes).sum(dim=(0, 1))  # [P]
        table = feature.flatten(0, 3).to(acc_type)
        table = table if C else F.pad(table, (0, 1))  # `embedding_bag` refuses a table without columns
        volume = volume + F.embedding_bag(
            pixel.T.flatten(), table, begin, mode="sum", per_sample_weights=(weight * probability).T.flatten()
        )
    return volume[:, :C].view(B, Z, Y, X, C).to(features[0].dtype)


def _project_ref(lidar2image, low, cell, shape, image_size, depth_range):
    """Project the voxels' lower corners into each view.

    Returns:
        uvd:     [3, B, N, V] fp32 u, v, depth, normalized so that the image and the depth range span -1 to 1.
        visible: [B, N, V] bool, True strictly inside both and deeper than 1e-5 m.
    """
    X, Y, Z = shape
    low, cell = (torch.tensor(t, dtype=torch.float32, device=lidar2image.device).double() for t in (low, cell))
    index = torch.arange(max(shape), device=lidar2image.device)[:, None]
    # in fp64, rounded once, so that kernel and reference project the same corner: one ulp can cross an image border
    x, y, z = (index * cell + low).float().T
    x, y, z = x[:X], y[:Y, None], z[:Z, None, None]  # [X], [Y, 1], [Z, 1, 1]

    rows = lidar2image.float()[..., None, None, None]  # [B, N, 4, 4, 1, 1, 1]
    ud, vd, d = (
        (rows[:, :, i, 0] * x + rows[:, :, i, 1] * y + rows[:, :, i, 2] * z + rows[:, :, i, 3]).flatten(2)
        for i in range(3)
    )  # [B, N, V]
    (H, W), (near, far) = image_size, depth_range
    in_front = d > 1e-5
    clamped = d.clamp(min=1e-5)
    uvd = torch.stack([ud / clamped / W, vd / clamped / H, (d - near) / (far - near)]) * 2 - 1
    return uvd, in_front & (uvd.abs() < 1).all(dim=0)


def _nodes_ref(coord, size):
    """Of `size` nodes evenly spaced from -1 to 1, the two around each coordinate: indices [2, P] and weights [2, P]."""
    position = (coord + 1) / 2 * (size - 1)
    first = position.floor()
    weight = position - first
    first = first.long()
    return torch.stack([first, (first + 1).clamp(max=size - 1)]), torch.stack([1 - weight, weight])


class Lift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lidar2image, low, cell, shape, image_size, depth_range, *levels):
        levels = [level.contiguous() for level in levels]
        features, depths = levels[: len(levels) // 2], levels[len(levels) // 2 :]
        lidar2image = lidar2image.float().contiguous()
        B, _, _, _, C = features[0].shape
        volume = features[0].new_empty(B, *reversed(shape), C)
        ctx.save_for_backward(lidar2image, *levels)
        # rounded to fp32 as for a compiled kernel; the interpreter would pass fp64
        low, cell = (tuple(torch.tensor(t, dtype=torch.float32).tolist()) for t in (low, cell))
        ctx.geometry = dict(
            low=low, cell=cell, shape=tuple(shape), image_size=tuple(image_size), depth_range=tuple(depth_range)
        )
        ctx.deterministic = strictly_deterministic()
        if volume.numel():
            _launch(_lift_fwd_kernel, FWD_TILE, features, depths, lidar2image, ctx.geometry, volume_ptr=volume)
        return volume

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_volume):
        lidar2image, *levels = ctx.saved_tensors
        if d_volume.numel() and lidar2image.numel():
            half = len(levels) // 2
            d_volume = d_volume.contiguous()
            d_levels = _backward(d_volume, levels[:half], levels[half:], lidar2image, ctx.geometry, ctx.deterministic)
        else:
            d_levels = [torch.zeros_like(level) for level in levels]
        return None, None, None, None, None, None, *d_levels


def _backward(d_volume, features, depths, lidar2image, geometry, deterministic):
    """The gradients of the features of all levels, then of the depths."""
    (B, N), V = lidar2image.shape[:2], math.prod(geometry["shape"])
    acc_type = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    coarse = [V >= COARSE * N * feature.shape[2:4].numel() for feature in features]
    gathered = [l for l in range(len(features)) if coarse[l] or deterministic]
    pixels = [B * N * features[l].shape[2:4].numel() for l in gathered]
    ends, quads = list(accumulate(pixels)), sum(pixels)  # a quad per pixel: the one right of and below it
    # an entry of quad_idx stays -1 where the view does not see the voxel; those of slot and hits are not read there
    quad_idx = torch.full((len(gathered), B * N * V), -1, dtype=torch.int32, device=d_volume.device)
    slot = torch.empty_like(quad_idx)
    counts = torch.zeros(quads + 1, dtype=torch.int32, device=d_volume.device)
    hits = torch.empty(len(gathered), B * N * V, HIT.value, dtype=acc_type, device=d_volume.device)

    outs, first_quads = [], []  # what the kernel writes, per level: hits if gathered, else the gradients
    for l, (feature, depth) in enumerate(zip(features, depths, strict=True)):
        if l in gathered:
            i = gathered.index(l)
            outs.append((quad_idx[i], slot[i], hits[i]))
            first_quads.append(ends[i] - pixels[i])
        else:
            outs.append((torch.zeros_like(feature, dtype=acc_type), torch.zeros_like(depth, dtype=acc_type)))
            first_quads.append(0)
    _launch(
        _lift_bwd_kernel, BWD_TILE, features, depths, lidar2image, geometry, d_volume_ptr=d_volume, counts_ptr=counts,
        out_ptrs=tuple(outs), first_quads=tuple(first_quads), GATHERED=sum(1 << l for l in gathered),
    )  # fmt: skip

    if gathered:
        begin, order = sort_hits(quad_idx, slot, counts)
    for l in gathered:
        outs[l] = torch.empty_like(features[l]), torch.empty_like(depths[l])
        pixel_sum(*outs[l], begin[first_quads[l] :], order, hits, d_volume, many_hits=coarse[l])
    d_features, d_depths = zip(*outs, strict=True)
    return [d.to(level.dtype) for d, level in zip((*d_features, *d_depths), (*features, *depths), strict=True)]


# All untuned: chosen from the compiler's output for sm_90, without timing on a GPU
FWD_TILE = 4096  # bytes of features per program: voxels x channels x size of a number
BWD_TILE = 2048  # the same; 4096 would spill registers
MAX_VOXELS = 32  # per program, at most: with few channels the tiles would hold so many that projecting them dominates
COARSE = 4  # a level is coarse if the volume has at least this many voxels per pixel of the level's views


def _launch(kernel, tile_bytes, features, depths, lidar2image, geometry, **rest):
    """Launch the forward or backward kernel with their common arguments and `rest`."""
    B, N, _, _, C = features[0].shape
    X, Y, Z = geometry["shape"]
    blocks = _blocks(tile_bytes // features[0].element_size(), C)
    kernel[(triton.cdiv(X, blocks["BLOCK_X"]) * triton.cdiv(Y, blocks["BLOCK_Y"]) * Z, B)](
        feature_ptrs=tuple(features), depth_ptrs=tuple(depths), lidar2image_ptr=lidar2image,
        sizes=tuple(tuple(feature.shape[2:4]) for feature in features), N=N, C=C, D=depths[0].shape[4],
        **geometry, **blocks, **rest,
    )  # fmt: skip


def _blocks(values, C):
    """Block sizes of a program with that many values, voxels x channels."""
    BLOCK_C = triton.next_power_of_2(C)
    voxels = min(max(values // BLOCK_C, 1), MAX_VOXELS)
    BLOCK_X = 1 << (voxels.bit_length() // 2)  # equal to BLOCK_Y or twice as large
    return dict(BLOCK_X=BLOCK_X, BLOCK_Y=voxels // BLOCK_X, BLOCK_C=BLOCK_C)


@jit
def _lift_fwd_kernel(
    feature_ptrs, depth_ptrs,  # per level [B, N, h, w, C], [B, N, h, w, D]
    volume_ptr, lidar2image_ptr,  # [B, Z, Y, X, C], [B, N, 4, 4]
    sizes, low, cell, shape, image_size, depth_range,  # per level (h, w); the rest as in `lift`
    N, C, D,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    acc_ty: tl.constexpr = tl.float64 if volume_ptr.dtype.element_ty == tl.float64 else tl.float32
    i, x, y, z, i_ok = _corners(low, cell, shape, BLOCK_X, BLOCK_Y)
    c = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    b = tl.program_id(1).to(tl.int64)
    c_ok = c < C

    acc = tl.zeros((BLOCK_X * BLOCK_Y, BLOCK_C), acc_ty)
    for n in range(N):
        view = b * N + n
        u, v, d, visible = _project(lidar2image_ptr + view * 16, x, y, z, i_ok, image_size, depth_range)
        if tl.max(visible.to(tl.int32), axis=0) > 0:
            mask = visible[:, None] & c_ok[None, :]
            z0, z1, z_weight = _nodes(d, D)  # depth bins, not the corner's z
            for l in tl.static_range(len(feature_ptrs)):
                h, w = sizes[l]
                pixels, weights = _taps(view, u, v, h, w)
                feature, probability = _interpolate(
                    feature_ptrs[l], depth_ptrs[l], pixels, weights, z0, z1, z_weight, visible, mask, c, C, D, acc_ty
                )
                acc += feature * probability[:, None]
    row = b * shape[0] * shape[1] * shape[2] + i
    tl.store(volume_ptr + row[:, None] * C + c[None, :], acc, mask=i_ok[:, None] & c_ok[None, :])


@jit
def _lift_bwd_kernel(
    feature_ptrs, depth_ptrs,  # per level [B, N, h, w, C], [B, N, h, w, D]
    d_volume_ptr,  # [B, Z, Y, X, C]
    counts_ptr,  # [1 + quads of all gathered levels], added to: counts[q + 1] is the number of hits in quad q
    # per level (d_feature, d_depth), added to; for a gathered one (quad_idx [B, N, V], slot [B, N, V], hits [.., HIT])
    out_ptrs,
    first_quads,  # per level, index of its first quad among those of all gathered levels; 0 if it is not gathered
    lidar2image_ptr,  # [B, N, 4, 4]
    sizes, low, cell, shape, image_size, depth_range,  # per level (h, w); the rest as in `lift`
    N, C, D,
    GATHERED: tl.constexpr,  # bit l: level l is gathered
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    acc_ty: tl.constexpr = tl.float64 if d_volume_ptr.dtype.element_ty == tl.float64 else tl.float32
    i, x, y, z, i_ok = _corners(low, cell, shape, BLOCK_X, BLOCK_Y)
    c = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    b = tl.program_id(1).to(tl.int64)
    c_ok = c < C

    V = shape[0] * shape[1] * shape[2]
    row = b * V + i
    g = tl.load(d_volume_ptr + row[:, None] * C + c[None, :], mask=i_ok[:, None] & c_ok[None, :], other=0.0).to(acc_ty)
    for n in range(N):
        view = b * N + n
        u, v, d, visible = _project(lidar2image_ptr + view * 16, x, y, z, i_ok, image_size, depth_range)
        if tl.max(visible.to(tl.int32), axis=0) > 0:
            mask = visible[:, None] & c_ok[None, :]
            z0, z1, z_weight = _nodes(d, D)  # depth bins, not the corner's z
            for l in tl.static_range(len(feature_ptrs)):
                h, w = sizes[l]
                pixels, weights = _taps(view, u, v, h, w)
                feature, probability = _interpolate(
                    feature_ptrs[l], depth_ptrs[l], pixels, weights, z0, z1, z_weight, visible, mask, c, C, D, acc_ty
                )
                d_probability = tl.sum(g * feature, axis=1)
                if GATHERED & (1 << l):
                    quad = first_quads[l] + pixels[0]
                    # hits of the quad counted so far; their order varies, `sort_hits` replaces it by a fixed one
                    slot = tl.atomic_add(counts_ptr + quad + 1, 1, mask=visible, sem="relaxed")
                    tl.store(out_ptrs[l][0] + view * V + i, quad, mask=visible)
                    tl.store(out_ptrs[l][1] + view * V + i, slot, mask=visible)
                    hit_ptr = out_ptrs[l][2] + (view * V + i) * HIT  # as `pixel_sum` reads it
                    tl.store(hit_ptr, _position(u, w), mask=visible)
                    tl.store(hit_ptr + 1, _position(v, h), mask=visible)
                    tl.store(hit_ptr + 2, _position(d, D), mask=visible)
                    tl.store(hit_ptr + 3, probability, mask=visible)
                    tl.store(hit_ptr + 4, d_probability, mask=visible)
                else:
                    _scatter(
                        out_ptrs[l][0], out_ptrs[l][1], g * probability[:, None], d_probability,
                        pixels, weights, z0, z1, z_weight, visible, mask, c, C, D,
                    )  # fmt: skip


@triton.jit
def _corners(low, cell, shape, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr):
    """The program's voxels [BLOCK_X * BLOCK_Y]: indices, lower corners in meters, whether they exist."""
    lane = tl.arange(0, BLOCK_X * BLOCK_Y)
    block = tl.program_id(0)
    along_x, along_y = tl.cdiv(shape[0], BLOCK_X), tl.cdiv(shape[1], BLOCK_Y)
    x = block % along_x * BLOCK_X + lane % BLOCK_X
    y = block // along_x % along_y * BLOCK_Y + lane // BLOCK_X
    z = block // (along_x * along_y)
    i = (z * shape[1] + y) * shape[0] + x
    ok = (x < shape[0]) & (y < shape[1])
    # in fp64, rounded once: exactly the corners of `_project_ref`
    x = (x.to(tl.float64) * cell[0] + low[0]).to(tl.float32)
    y = (y.to(tl.float64) * cell[1] + low[1]).to(tl.float32)
    z = (z.to(tl.float64) * cell[2] + low[2]).to(tl.float32)
    return i, x, y, z, ok


@triton.jit
def _project(p, x, y, z, ok, image_size, depth_range):
    """Project points with the matrix at p: u, v, depth, normalized to (-1, 1), and whether the view sees them."""
    ud = tl.load(p) * x + tl.load(p + 1) * y + tl.load(p + 2) * z + tl.load(p + 3)
    vd = tl.load(p + 4) * x + tl.load(p + 5) * y + tl.load(p + 6) * z + tl.load(p + 7)
    d = tl.load(p + 8) * x + tl.load(p + 9) * y + tl.load(p + 10) * z + tl.load(p + 11)
    clamped = tl.maximum(d, 1e-5)
    u = ud / clamped / image_size[1] * 2 - 1
    v = vd / clamped / image_size[0] * 2 - 1
    depth = (d - depth_range[0]) / (depth_range[1] - depth_range[0]) * 2 - 1
    visible = ok & (d > 1e-5) & (tl.abs(u) < 1) & (tl.abs(v) < 1) & (tl.abs(depth) < 1)
    return _clamp(u), _clamp(v), _clamp(depth), visible


@triton.jit
def _clamp(coord):
    """Clamped to [-1, 1], NaN replaced: invisible points load 0, but 0 times a weight of inf or NaN would be NaN."""
    return tl.minimum(tl.maximum(coord, -1.0), 1.0)


@triton.jit
def _taps(view, u, v, h, w):
    """The four pixels around (u, v), as indices over all views, and their bilinear weights."""
    x0, x1, x_weight = _nodes(u, w)
    y0, y1, y_weight = _nodes(v, h)
    y0, y1 = (view * h + y0) * w, (view * h + y1) * w
    weights = (1 - y_weight) * (1 - x_weight), (1 - y_weight) * x_weight, y_weight * (1 - x_weight), y_weight * x_weight
    return (y0 + x0, y0 + x1, y1 + x0, y1 + x1), weights


@triton.jit
def _nodes(coord, size):
    """Of `size` nodes evenly spaced from -1 to 1, the two around each coordinate, and the weight of the second."""
    position = _position(coord, size)
    first = tl.floor(position)
    weight = position - first
    first = first.to(tl.int32)
    return first, tl.minimum(first + 1, size - 1), weight


@triton.jit
def _position(coord, size):
    """Coordinates from [-1, 1] to [0, size - 1]: integers are nodes."""
    return (coord + 1) / 2 * (size - 1)


@triton.jit
def _interpolate(
    feature_ptr, depth_ptr, pixels, weights, z0, z1, z_weight, visible, mask, c, C, D, acc_ty: tl.constexpr
):  # fmt: skip
    """One level's bilinear features [BLOCK_V, BLOCK_C] and trilinear probabilities [BLOCK_V]; 0 where not visible."""
    feature = tl.zeros(mask.shape, acc_ty)
    probability = tl.zeros(visible.shape, acc_ty)
    for k in tl.static_range(4):
        row = tl.load(feature_ptr + pixels[k][:, None] * C + c[None, :], mask=mask, other=0.0).to(acc_ty)
        near = tl.load(depth_ptr + pixels[k] * D + z0, mask=visible, other=0.0).to(acc_ty)
        far = tl.load(depth_ptr + pixels[k] * D + z1, mask=visible, other=0.0).to(acc_ty)
        feature += weights[k][:, None] * row
        probability += weights[k] * (near * (1 - z_weight) + far * z_weight)
    return feature, probability


@triton.jit
def _scatter(
    d_feature_ptr, d_depth_ptr, d_feature, d_probability, pixels, weights, z0, z1, z_weight, visible, mask, c, C, D
):  # fmt: skip
    """Add the gradients of what `_interpolate` returned to one level's features and depths."""
    for k in tl.static_range(4):
        # relaxed: only then does the compiler emit vector reductions (four channels) without a result to wait for
        row = pixels[k][:, None] * C + c[None, :]
        tl.atomic_add(d_feature_ptr + row, weights[k][:, None] * d_feature, mask=mask, sem="relaxed")
        d_tap = weights[k] * d_probability
        tl.atomic_add(d_depth_ptr + pixels[k] * D + z0, d_tap * (1 - z_weight), mask=visible, sem="relaxed")
        tl.atomic_add(d_depth_ptr + pixels[k] * D + z1, d_tap * z_weight, mask=visible, sem="relaxed")
