"""Gradients of one level of `lift`, summed in a fixed order: projections of voxels ("hits") are sorted by quad.

    d_feature_pixel = sum over its 4 quads, over the hits in each:  weight probability g
    d_depth_pixel,k = sum over its 4 quads, over the hits in each:  weight max(0, 1 - |z - k|) <g, feature>

A quad is the square between four neighboring pixels. For each hit, weight is the pixel's bilinear weight, z the depth
in bins (k is a bin), g the gradient w.r.t. the voxel; probability and feature are those interpolated in the forward.

With nuScenes' rig, a view sees the voxel in 18 % of all pairs of view and voxel. So the pairs are not sorted by key,
which would sort the other 82 % too. Instead, the backward of `lift` counts the hits of each quad, and they are written
straight to their quad's range. They arrive there in any order; then each hit finds its rank among the others (16 to 52
on average). So each quad sums its hits in a fixed order, that of a stable sort.

Part of `lift`: the reference is the gradient of `lift_ref`; timed by benchmarks.bench_lift.
"""

import torch

from unipad.kernels.backend import jit, tl, triton


def sort_hits(quad_idx, slot, counts):
    """The hits of all gathered levels by quad, those of a quad by index.

    Args:
        quad_idx: [levels, B * N * V] int32 quad of each pair of a view and a voxel; -1 where the view does not see it.
        slot:     of the same size, int32: numbers the hits of each quad from 0, in any order; only hits' are read.
        counts:   [Q + 1] int32: 0, then the number of hits in each of Q quads.

    Returns, int32:
        begin: [Q + 1] start of each quad's hits in `order`, then the end of the last quad's.
        order: [levels * B * N * V] indices of hits; entries after the last hit are not written.

    Deterministic; time grows with the square of a quad's hits. Tensors must be contiguous. GPU and interpreter only.
    """
    P = quad_idx.numel()
    begin = counts.cumsum(0, dtype=torch.int32)
    placed, order = quad_idx.new_empty(P), quad_idx.new_empty(P)
    grid = (triton.cdiv(P, BLOCK),)
    _place_kernel[grid](
        quad_idx_ptr=quad_idx, slot_ptr=slot, begin_ptr=begin, placed_ptr=placed, P=P, BLOCK=BLOCK
    )  # fmt: skip
    _rank_kernel[grid](
        quad_idx_ptr=quad_idx, placed_ptr=placed, begin_ptr=begin, order_ptr=order, P=P, BLOCK=BLOCK
    )  # fmt: skip
    return begin, order


def pixel_sum(d_feature, d_depth, begin, order, hits, d_volume, many_hits):
    """Fill d_feature [B, N, h, w, C] and d_depth [B, N, h, w, D].

    Args:
        begin:     [>= P + 1] int32 start of each quad's hits in `order`, then the end of the last quad's. A quad has
                   the index of its upper left pixel among the P pixels of the level's views.
        order:     [levels * B * N * V] int32 rows of all gathered levels' `hits` by quad; only this level's are read.
        hits:      [levels, B * N * V, HIT] for each view and each of V voxels: column and row in pixels, depth in bins,
                   probability, <g, feature>.
        d_volume:  [B, Z, Y, X, C].
        many_hits: True: several lanes share the hits of a pixel, meant for pixels with many.

    Accumulates in the type of `hits`. Deterministic. Tensors must be contiguous. GPU and interpreter only.
    """
    (B, N, h, w, C), D = d_feature.shape, d_depth.shape[4]
    P, V = B * N * h * w, d_volume[0, ..., 0].numel()
    blocks = _blocks(MAX_LANES if many_hits else 1, C, D)
    _pixel_sum_kernel[(triton.cdiv(P, blocks["BLOCK_P"]),)](
        begin_ptr=begin, order_ptr=order, hits_ptr=hits, d_volume_ptr=d_volume,
        d_feature_ptr=d_feature, d_depth_ptr=d_depth, P=P, h=h, w=w, B=B, N=N, V=V, C=C, D=D, **blocks,
    )  # fmt: skip


HIT = tl.constexpr(5)  # values per hit
# Untuned: chosen from the compiler's output for sm_90, without timing on a GPU
TILE = 1024  # per program: lanes x channels or bins; a lane, here a row of the tile, sums one hit at a time
MAX_LANES = 8  # lanes that share the hits of a pixel, at most
BLOCK = 256  # pairs of a view and a voxel per program of `sort_hits`


def _blocks(lanes_per_pixel, C, D):
    """Block sizes of a program, which has BLOCK_P pixels with LANES lanes each."""
    BLOCK_C, BLOCK_D = triton.next_power_of_2(C), triton.next_power_of_2(D)
    lanes = max(TILE // max(BLOCK_C, BLOCK_D), 1)
    lanes_per_pixel = min(lanes_per_pixel, lanes)
    return dict(BLOCK_P=lanes // lanes_per_pixel, LANES=lanes_per_pixel, BLOCK_C=BLOCK_C, BLOCK_D=BLOCK_D)


@jit(varying=("P",))
def _place_kernel(quad_idx_ptr, slot_ptr, begin_ptr, placed_ptr, P, BLOCK: tl.constexpr):  # [P], [P], [Q + 1], [P]
    """placed: the hits of each quad, in the order of their slots."""
    hit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    quad = tl.load(quad_idx_ptr + hit, mask=hit < P, other=-1)
    ok = quad >= 0
    slot = tl.load(slot_ptr + hit, mask=ok, other=0)
    begin = tl.load(begin_ptr + quad, mask=ok, other=0)
    tl.store(placed_ptr + begin + slot, hit, mask=ok)


@jit(varying=("P",))
def _rank_kernel(quad_idx_ptr, placed_ptr, begin_ptr, order_ptr, P, BLOCK: tl.constexpr):  # [P], [P], [Q + 1], [P]
    """order: the hits of each quad by index. A hit's rank is the number of smaller ones in its quad."""
    hit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    quad = tl.load(quad_idx_ptr + hit, mask=hit < P, other=-1)
    ok = quad >= 0
    begin = tl.load(begin_ptr + quad, mask=ok, other=0)
    end = tl.load(begin_ptr + quad + 1, mask=ok, other=0)
    rank = tl.zeros((BLOCK,), tl.int32)
    for i in range(tl.max(end - begin, axis=0)):
        at = begin + i
        other = tl.load(placed_ptr + at, mask=at < end, other=0)
        rank += ((at < end) & (other < hit)).to(tl.int32)
    tl.store(order_ptr + begin + rank, hit, mask=ok)


@jit(varying=("P", "B"))
def _pixel_sum_kernel(
    begin_ptr, order_ptr, hits_ptr,  # [P + 1], [levels * B * N * V], [levels, B, N, V, HIT]
    d_volume_ptr,  # [B, V, C]
    d_feature_ptr, d_depth_ptr,  # [P, C], [P, D]
    P, h, w, B, N, V, C, D,  # P pixels of all views of a level
    BLOCK_P: tl.constexpr, LANES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    acc_ty: tl.constexpr = hits_ptr.dtype.element_ty
    lane = tl.arange(0, BLOCK_P * LANES)
    p = tl.program_id(0) * BLOCK_P + lane // LANES
    x, y = p % w, p // w % h
    c = tl.arange(0, BLOCK_C)[None, :]
    k = tl.arange(0, BLOCK_D)[None, :]
    d_feature = tl.zeros((BLOCK_P * LANES, BLOCK_C), acc_ty)
    d_depth = tl.zeros((BLOCK_P * LANES, BLOCK_D), acc_ty)
    for up in range(2):  # the two quads below the pixel, then those above: left and right are adjacent in `order`
        ok = (p < P) & (y >= up)
        quad = p - up * w  # the right one
        begin = tl.load(begin_ptr + quad - (x > 0).to(tl.int32), mask=ok, other=0)
        end = tl.load(begin_ptr + quad + 1, mask=ok, other=0)
        for i in range(0, tl.max(end - begin, axis=0), LANES):
            at = begin + i + lane % LANES
            at_ok = at < end
            hit = tl.load(order_ptr + at, mask=at_ok, other=0)
            hit_ptr = hits_ptr + hit.to(tl.int64) * HIT
            hit_x = tl.load(hit_ptr, mask=at_ok, other=0.0)
            hit_y = tl.load(hit_ptr + 1, mask=at_ok, other=0.0)
            hit_z = tl.load(hit_ptr + 2, mask=at_ok, other=0.0)
            probability = tl.load(hit_ptr + 3, mask=at_ok, other=0.0)
            d_probability = tl.load(hit_ptr + 4, mask=at_ok, other=0.0)
            weight = (1 - tl.abs(hit_x - x)) * (1 - tl.abs(hit_y - y))
            voxel = hit // V // N % B * V + hit % V  # of all volumes; hit = ((level * B + b) * N + n) * V + voxel of b
            row = voxel.to(tl.int64)[:, None] * C + c
            g = tl.load(d_volume_ptr + row, mask=at_ok[:, None] & (c < C), other=0.0).to(acc_ty)
            d_feature += (weight * probability)[:, None] * g
            d_depth += (weight * d_probability)[:, None] * tl.maximum(1 - tl.abs(hit_z[:, None] - k), 0)
    d_feature = tl.sum(tl.reshape(d_feature, (BLOCK_P, LANES, BLOCK_C)), axis=1)
    d_depth = tl.sum(tl.reshape(d_depth, (BLOCK_P, LANES, BLOCK_D)), axis=1)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    tl.store(d_feature_ptr + p.to(tl.int64) * C + c, d_feature, mask=(p < P) & (c < C))
    tl.store(d_depth_ptr + p.to(tl.int64) * D + k, d_depth, mask=(p < P) & (k < D))
