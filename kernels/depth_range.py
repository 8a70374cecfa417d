"""Rendered depths clamped to the range of the samples of all rays through the same volume, as in the original.

    low_b, high_b = smallest start of a first sample, largest start of a last one, over the rays that hit volume b
    out_r         = clamp(depth_r, low_b, high_b) / scale, with the ray's own b; 0 for a ray that does not hit
    d_depth_r     = d_out_r / scale where the ray hits and its depth is in the range, else 0

Sizes: R rays of B volumes, S samples on each ray.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from unipad.kernels.backend import cdiv, jit, on_triton, tl


def depth_in_range(
    depth: Tensor, edges: Tensor, volume_idx: Tensor, hit: Tensor, B: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Depths, clamped and divided by `scale`, and which rays belong to which volume.

    Args:
        depth:      [R] rendered depth.
        edges:      [R, S + 1] ascending distances, S at least 1; the samples are at the first S.
        volume_idx: [R] int32 from 0 to B - 1.
        hit:        [R] bool.
        B:          number of volumes.
        scale:      above 0.

    Returns:
        depth:     [R].
        of_volume: [B, R] 1 where a ray hits the volume, else 0, in the type of `edges`.

    Differentiable once w.r.t. `depth`; at the ends of the range the gradient passes. Deterministic. Time and memory
    grow with B * R. Raises AssertionError if shapes do not match.
    """
    R = len(depth)
    fits = edges.dim() == 2 and edges.shape[1] > 1 and depth.shape == volume_idx.shape == hit.shape == edges.shape[:1]
    shapes = [tuple(t.shape) for t in (depth, edges, volume_idx, hit)]
    assert fits, f"depth, edges, volume_idx, hit of {shapes} do not match: [R], [R, S + 1], [R], [R], S > 0"
    if not on_triton(depth) or not R:
        return depth_in_range_ref(depth, edges, volume_idx, hit, B, scale)
    return DepthInRange.apply(depth, edges.detach(), volume_idx, hit, B, float(scale))


def depth_in_range_ref(depth, edges, volume_idx, hit, B, scale):
    """`depth_in_range` in plain PyTorch."""
    edges, idx = edges.detach(), volume_idx.long()
    of_volume = rows_of_volumes(volume_idx, B, edges.dtype) * hit
    same = of_volume.bool()
    low = torch.where(same, edges[:, 0], math.inf)  # [B, R]
    high = torch.where(same, edges[:, -2], -math.inf)
    low, high = F.pad(low, (0, 1), value=math.inf), F.pad(high, (0, 1), value=-math.inf)  # R may be 0
    low, high = low.amin(dim=1)[idx], high.amax(dim=1)[idx]  # [R]
    return torch.where(hit, depth.clamp(low, high), 0) / scale, of_volume


def rows_of_volumes(volume_idx: Tensor, B: int, dtype: torch.dtype) -> Tensor:
    """[B, R] 1 where the index [R] is that of the volume. Sums over its rays or points are then matrix products: no
    atomics, no sorting."""
    return (volume_idx == torch.arange(B, device=volume_idx.device)[:, None]).to(dtype)


class DepthInRange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, depth, edges, volume_idx, hit, B, scale):
        depth, edges, volume_idx, hit = (t.contiguous() for t in (depth, edges, volume_idx, hit))
        R, S = len(depth), edges.shape[1] - 1
        of_volume, ranges = edges.new_empty(B, R), edges.new_empty(B, 2)
        out, slope = torch.empty_like(depth), torch.empty_like(depth)
        _volume_range_kernel[(B,)](
            edges_ptr=edges, volume_idx_ptr=volume_idx, hit_ptr=hit, of_volume_ptr=of_volume, ranges_ptr=ranges,
            R=R, S=S, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
        _depth_in_range_kernel[(cdiv(R, BLOCK_R),)](
            depth_ptr=depth, volume_idx_ptr=volume_idx, hit_ptr=hit, ranges_ptr=ranges, out_ptr=out, slope_ptr=slope,
            R=R, scale=scale, BLOCK=BLOCK_R,
        )  # fmt: skip
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(of_volume)
        return out, of_volume

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, _):
        (slope,) = ctx.saved_tensors
        return d_out * slope, None, None, None, None, None


BLOCK = 2048  # rays at once, of the program that goes through all rays for its volume
BLOCK_R = 512  # rays per program


@jit(varying=("R",))
def _volume_range_kernel(
    edges_ptr, volume_idx_ptr, hit_ptr,  # [R, S + 1], [R], [R]
    of_volume_ptr, ranges_ptr,  # [B, R], [B, 2]
    R, S,
    BLOCK: tl.constexpr,
):  # fmt: skip
    acc_ty: tl.constexpr = tl.float64 if edges_ptr.dtype.element_ty == tl.float64 else tl.float32
    b = tl.program_id(0).to(tl.int64)
    low, high = tl.full((BLOCK,), float("inf"), acc_ty), tl.full((BLOCK,), float("-inf"), acc_ty)
    for begin in range(0, R, BLOCK):
        r = begin + tl.arange(0, BLOCK).to(tl.int64)
        ok = r < R
        hit = ok & tl.load(hit_ptr + r, mask=ok, other=0)
        same = hit & (tl.load(volume_idx_ptr + r, mask=ok, other=-1) == b)
        tl.store(of_volume_ptr + b * R + r, same.to(acc_ty), mask=ok)
        first = tl.load(edges_ptr + r * (S + 1), mask=same, other=0.0).to(acc_ty)
        last = tl.load(edges_ptr + r * (S + 1) + S - 1, mask=same, other=0.0).to(acc_ty)
        low = tl.minimum(low, tl.where(same, first, float("inf")), propagate_nan=tl.PropagateNan.ALL)
        high = tl.maximum(high, tl.where(same, last, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
    tl.store(ranges_ptr + 2 * b, tl.min(low, axis=0))
    tl.store(ranges_ptr + 2 * b + 1, tl.max(high, axis=0))


@jit(varying=("R",))
def _depth_in_range_kernel(
    depth_ptr, volume_idx_ptr, hit_ptr, ranges_ptr,  # [R], [R], [R], [B, 2]
    out_ptr, slope_ptr,  # [R], [R] d out / d depth
    R, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    acc_ty: tl.constexpr = tl.float64 if depth_ptr.dtype.element_ty == tl.float64 else tl.float32
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = r < R
    hit = ok & tl.load(hit_ptr + r, mask=ok, other=0)
    depth = tl.load(depth_ptr + r, mask=ok, other=0.0).to(acc_ty)
    range_ptr = ranges_ptr + 2 * tl.load(volume_idx_ptr + r, mask=ok, other=0).to(tl.int64)
    low = tl.load(range_ptr, mask=hit, other=0.0).to(acc_ty)
    high = tl.load(range_ptr + 1, mask=hit, other=0.0).to(acc_ty)
    # a NaN stays one, as in `clamp`
    out = tl.maximum(depth, low, propagate_nan=tl.PropagateNan.ALL)
    out = tl.minimum(out, high, propagate_nan=tl.PropagateNan.ALL) / scale
    tl.store(out_ptr + r, tl.where(hit, out, 0.0), mask=ok)
    passes = hit & (depth >= low) & (depth <= high)
    tl.store(slope_ptr + r, tl.where(passes, 1.0 / scale, 0.0), mask=ok)
