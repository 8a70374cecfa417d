"""Carry the end of each ray into source images, and read their colors there: view synthesis by inverse warping.

    (u d, v d, d) = P_m (o + t w)             the end of a ray at depth t, in source image m
    color_m       = sum_ij ay_i ax_j I_ij     over the four pixels around (u, v), with weights a = (1 - f, f)
    d color / d t = (d color / d u) du/dt + (d color / d v) dv/dt
    du/dt         = (p_u - u p_d) / d         where p = P_m w, without translation, is the step of (u d, v d, d) per t

The center of a pixel is at half coordinates: that of the first one is (0.5, 0.5). So u - 0.5 is counted in pixels from
it, and f is its fractional part. d color / d u is the difference of the two columns, and jumps where (u, v) crosses a
line through pixel centers.

Sizes: R rays; B samples with M source images of C channels each.
"""

import torch
from torch import Tensor

from unipad.kernels.backend import jit, on_triton, tl, triton, without_autocast

MIN_DEPTH = 0.1  # meters in front of a camera: what is nearer is not seen
NEAREST = tl.constexpr(MIN_DEPTH)  # the same for the kernel


def warp(
    depth: Tensor, rays: tuple[Tensor, Tensor, Tensor], images: Tensor, projections: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """The colors of the rays' ends in all source images of their sample.

    Args:
        depth:       [R] distance along the ray; fp32 or fp64.
        rays:        origins [R, 3], unit directions [R, 3], and [R] int32 the sample whose images a ray reads, in
                     [0, B); not checked.
        images:      [B, M, H, W, C] uint8, of which 255 reads as 1, or a floating type; at least one pixel.
        projections: [B, M, 4, 4] frame of the rays -> (u d, v d, d, 1), pixels and meters along the optical axis.
        sizes:       [B, M, 2] int64 height and width of each image inside its padding; 0: there is no such image.

    Returns:
        colors: [R, M, C] in the type of `depth`, which is also that of the computation; 0 where `seen` is False.
        seen:   [R, M] bool: the end of the ray is in front of the camera, and four pixel centers lie around it. True
                where the depth is NaN: so is the color then.

    Differentiable once w.r.t. `depth`; not w.r.t. anything else. Deterministic. Raises AssertionError if shapes or
    types do not match.
    """
    origins, directions, volume_idx = rays
    R, (B, M) = len(depth), images.shape[:2]
    fits = images.dim() == 5 and projections.shape == (B, M, 4, 4) and sizes.shape == (B, M, 2)
    fits &= depth.shape == volume_idx.shape == (R,) and origins.shape == directions.shape == (R, 3)
    shapes = [tuple(t.shape) for t in (depth, *rays, images, projections, sizes)]
    assert fits, f"depth, rays, images, projections, sizes of {shapes} do not match"
    assert depth.dtype in (torch.float32, torch.float64), f"depth is fp32 or fp64, not {depth.dtype}"
    assert min(images.shape[2:4]) > 0, f"images {tuple(images.shape)} have no pixels"
    if not on_triton(depth):
        return warp_ref(depth, rays, images, projections, sizes)
    return Warp.apply(depth, origins, directions, volume_idx, images, projections, sizes)


@without_autocast
def warp_ref(depth, rays, images, projections, sizes):
    """`warp` in plain PyTorch. Colors are read of seen pairs of a ray and an image only: of few, where cameras look in
    all directions."""
    origins, directions, volume_idx = (t.detach() for t in rays)
    (B, M, H, W, C), R, dtype = images.shape, len(depth), depth.dtype
    sample = volume_idx.long()

    def of_rays(t):  # [.., M, B] -> [.., M, R], or [.., M, 1] for one sample
        return t if B == 1 else t[..., sample]

    columns = of_rays(projections.detach().to(dtype)[:, :, :3].permute(3, 2, 1, 0)).unbind()  # 4 of [3, M, R]
    # written out: a matmul on a GPU might run in TF32
    start, step = (
        sum(column * x for column, x in zip(columns[:3], t.to(dtype).t(), strict=True)) for t in (origins, directions)
    )
    start = start + columns[3]  # [3, M, R]
    with torch.no_grad():
        u, v, d = start + depth * step  # [M, R]
        behind = d < MIN_DEPTH
        d = d.masked_fill(behind, 1.0)
        height, width = of_rays(sizes.permute(2, 1, 0))  # [M, R]
        x, y = u / d - 0.5, v / d - 0.5
        unseen = behind | (x < 0) | (y < 0) | (x > width - 1) | (y > height - 1) | (width < 1) | (height < 1)
        image, ray = (~unseen).nonzero().unbind(1)  # [P] of each seen pair
    height, width = sizes[sample[ray], image].unbind(-1)
    u, v, d = start[:, image, ray] + depth[ray] * step[:, image, ray]  # [P]

    def corners(at, size):
        """Indices of the two pixels around a coordinate, and its fraction of the way between them; NaN: some pixels."""
        low = torch.where(at > 0, at.detach(), 0).floor().long().minimum((size - 2).clamp(min=0))
        return (low, (low + 1).minimum((size - 1).clamp(min=0))), (at - low)[:, None]

    (columns, fx), (rows, fy) = corners(u / d - 0.5, width), corners(v / d - 0.5, height)
    first = (sample[ray] * M + image) * H  # of the image's rows among all
    scale = 255 if images.dtype == torch.uint8 else 1
    pixels = images.detach().flatten(0, 3)
    (a, b), (c, e) = [[pixels[(first + row) * W + column].to(dtype) / scale for column in columns] for row in rows]
    top, bottom = a + fx * (b - a), c + fx * (e - c)  # [P, C]
    colors = depth.new_zeros(R, M, C).index_put((ray, image), top + fy * (bottom - top))
    return colors, ~unseen.t()


class Warp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, depth, origins, directions, volume_idx, images, projections, sizes):
        B, M, H, W, C = images.shape
        R, with_slope = len(depth), ctx.needs_input_grad[0]
        colors, seen = depth.new_empty(R, M, C), depth.new_empty(R, M, dtype=torch.bool)
        slope = torch.empty_like(colors) if with_slope else colors  # d color / d depth; else a placeholder
        if R * M:
            block_c = triton.next_power_of_2(max(C, 1))
            block_n = max(1, TILE // block_c)
            _warp_fwd_kernel[(triton.cdiv(R * M, block_n),)](
                depth_ptr=depth.contiguous(), origins_ptr=origins.to(depth.dtype).contiguous(),
                directions_ptr=directions.to(depth.dtype).contiguous(), volume_idx_ptr=volume_idx.contiguous(),
                images_ptr=images.contiguous(), projections_ptr=projections.to(depth.dtype).contiguous(),
                sizes_ptr=sizes.contiguous(), colors_ptr=colors, slope_ptr=slope, seen_ptr=seen,
                N=R * M, M=M, H=H, W=W, C=C,
                BYTES=images.dtype == torch.uint8, WITH_SLOPE=with_slope, BLOCK_C=block_c, BLOCK_N=block_n,
            )  # fmt: skip
        if with_slope:
            ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(seen)
        return colors, seen

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_colors, _):
        (slope,) = ctx.saved_tensors
        return (d_colors * slope).flatten(1).sum(dim=1), None, None, None, None, None, None


TILE = 512  # pairs of a ray and an image x channels per program: four per thread of 4 warps


@jit(varying=("N",))
def _warp_fwd_kernel(
    depth_ptr, origins_ptr, directions_ptr, volume_idx_ptr,  # [R], [R, 3], [R, 3], [R]
    images_ptr, projections_ptr, sizes_ptr,  # [B, M, H, W, C], [B, M, 4, 4], [B, M, 2]
    colors_ptr, slope_ptr, seen_ptr,  # [R, M, C], [R, M, C] d color / d depth, [R, M]
    N, M, H, W, C,  # N = R * M pairs of a ray and an image
    BYTES: tl.constexpr, WITH_SLOPE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    acc_ty: tl.constexpr = colors_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    c = tl.arange(0, BLOCK_C)[None, :]
    ok = n < N
    r = n // M
    image = tl.load(volume_idx_ptr + r, mask=ok, other=0).to(tl.int64) * M + n % M  # among all B * M

    depth = tl.load(depth_ptr + r, mask=ok, other=0.0)
    u_d, u_step = _row(projections_ptr + image * 16, origins_ptr + r * 3, directions_ptr + r * 3, ok)
    v_d, v_step = _row(projections_ptr + image * 16 + 4, origins_ptr + r * 3, directions_ptr + r * 3, ok)
    d, d_step = _row(projections_ptr + image * 16 + 8, origins_ptr + r * 3, directions_ptr + r * 3, ok)
    d += depth * d_step
    behind = d < NEAREST
    d = tl.where(behind, 1.0, d)
    u, v = (u_d + depth * u_step) / d, (v_d + depth * v_step) / d
    x, y = u - 0.5, v - 0.5
    height = tl.load(sizes_ptr + image * 2, mask=ok, other=0)
    width = tl.load(sizes_ptr + image * 2 + 1, mask=ok, other=0)
    # comparisons that are False for NaN, which then reaches the color
    unseen = behind | (x < 0) | (y < 0) | (x > width - 1) | (y > height - 1) | (width < 1) | (height < 1)
    seen = ok & (unseen == 0)
    tl.store(seen_ptr + n, seen, mask=ok)

    left, right, fx = _corners(x, width)
    upper, lower, fy = _corners(y, height)
    rc_ok = seen[:, None] & (c < C)
    row_ptr = images_ptr + (image * H + upper)[:, None] * W * C + c
    a = tl.load(row_ptr + left[:, None] * C, mask=rc_ok, other=0).to(acc_ty)
    b = tl.load(row_ptr + right[:, None] * C, mask=rc_ok, other=0).to(acc_ty)
    row_ptr = images_ptr + (image * H + lower)[:, None] * W * C + c
    e = tl.load(row_ptr + left[:, None] * C, mask=rc_ok, other=0).to(acc_ty)
    f = tl.load(row_ptr + right[:, None] * C, mask=rc_ok, other=0).to(acc_ty)
    if BYTES:
        a, b, e, f = a / 255, b / 255, e / 255, f / 255
    fx, fy = fx[:, None], fy[:, None]
    top, bottom = a + fx * (b - a), e + fx * (f - e)
    at = n[:, None] * C + c
    at_ok = ok[:, None] & (c < C)
    tl.store(colors_ptr + at, tl.where(rc_ok, top + fy * (bottom - top), 0.0), mask=at_ok)
    if WITH_SLOPE:
        along_u = (b - a) + fy * ((f - e) - (b - a))  # d color / d u
        slope = along_u * ((u_step - u * d_step) / d)[:, None] + (bottom - top) * ((v_step - v * d_step) / d)[:, None]
        tl.store(slope_ptr + at, tl.where(rc_ok, slope, 0.0), mask=at_ok)


@triton.jit
def _row(row_ptr, origin_ptr, direction_ptr, ok):
    """A row of the projection times the ray's origin, and times its direction (without the translation)."""
    a = tl.load(row_ptr, mask=ok, other=0.0)
    b = tl.load(row_ptr + 1, mask=ok, other=0.0)
    c = tl.load(row_ptr + 2, mask=ok, other=0.0)
    start = a * tl.load(origin_ptr, mask=ok, other=0.0) + b * tl.load(origin_ptr + 1, mask=ok, other=0.0)
    start += c * tl.load(origin_ptr + 2, mask=ok, other=0.0) + tl.load(row_ptr + 3, mask=ok, other=0.0)
    step = a * tl.load(direction_ptr, mask=ok, other=0.0) + b * tl.load(direction_ptr + 1, mask=ok, other=0.0)
    return start, step + c * tl.load(direction_ptr + 2, mask=ok, other=0.0)


@triton.jit
def _corners(at, size):
    """int64 indices of the two pixels around a coordinate that is seen, and its fraction of the way between them."""
    # NaN and coordinates that are not seen: some pixels of the image
    low = tl.floor(tl.where((at > 0) & (at < size), at, 0.0)).to(tl.int64)
    low = tl.minimum(low, tl.maximum(size - 2, 0))
    return low, tl.minimum(low + 1, tl.maximum(size - 1, 0)), at - low
