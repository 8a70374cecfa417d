"""Means over rays: first over the rays of each volume, then over the volumes.

    out = 1 / B sum_b (sum_r m_br x_r) / max(sum_r m_br n_r, 1)
    d_x_r = d_out / B sum_b m_br / max(sum_r m_br n_r, 1)

where x_r is the sum of n_r values of ray r, and m_br is 1 if the ray counts for volume b, else 0. The losses of the
renderer are such means.

Sizes: R rays of B volumes.
"""

import torch
from torch import Tensor

from unipad.kernels.backend import jit, on_triton, tl, triton, without_autocast


def ray_mean(of_ray: Tensor, of_volume: Tensor, count: int | Tensor = 1) -> Tensor:
    """The mean of values of rays over each volume's rays, then over the volumes; 0 for a volume without any.

    Args:
        of_ray:    [R] the sum of each ray's values.
        of_volume: [B, R] 1 where a ray counts for a volume, else 0; same type.
        count:     number of values of each ray; one for all rays, or [R] int64.

    Returns:
        mean: [] scalar.

    Differentiable once w.r.t. `of_ray`. Deterministic. Above MAX_VALUES entries of `of_volume`, such as those of all
    LiDAR points, the reference runs. Raises AssertionError if shapes or types do not match.
    """
    R = len(of_ray)
    fits = of_ray.shape == (R,) and of_volume.dim() == 2 and of_volume.shape[1] == R and len(of_volume)
    fits = fits and (not torch.is_tensor(count) or count.shape == (R,))
    shapes = [tuple(t.shape) for t in (of_ray, of_volume, count) if torch.is_tensor(t)]
    assert fits, f"of_ray, of_volume, count of {shapes} do not match: [R], [B, R], [R], B > 0"
    assert of_ray.dtype == of_volume.dtype, f"of_ray is {of_ray.dtype}, of_volume {of_volume.dtype}"
    if not on_triton(of_ray) or not 0 < of_volume.numel() <= MAX_VALUES:
        return ray_mean_ref(of_ray, of_volume, count)
    return RayMean.apply(of_ray, of_volume, count)


@without_autocast
def ray_mean_ref(of_ray, of_volume, count=1):
    """`ray_mean` in plain PyTorch."""
    of_volume = of_volume.detach()
    if torch.is_tensor(count):
        count = of_volume @ count.to(of_volume.dtype)
    else:
        count = of_volume.sum(dim=1) if count == 1 else of_volume.sum(dim=1) * count
    return (of_volume @ of_ray / count.clamp(min=1)).mean()


class RayMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, of_ray, of_volume, count):
        of_ray, of_volume, has_counts = of_ray.contiguous(), of_volume.contiguous(), torch.is_tensor(count)
        (B, R), out, slope = of_volume.shape, of_ray.new_empty(()), torch.empty_like(of_ray)
        block_b = triton.next_power_of_2(B)
        _ray_mean_kernel[(1,)](
            of_ray_ptr=of_ray, of_volume_ptr=of_volume, count_ptr=count.contiguous() if has_counts else of_volume,
            out_ptr=out, slope_ptr=slope, R=R, B=B, K=0 if has_counts else count, COUNTS=has_counts,
            BLOCK_B=block_b, BLOCK_R=max(1, BLOCK // block_b), num_warps=8,
        )  # fmt: skip
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        (slope,) = ctx.saved_tensors
        return d_out * slope, None, None


BLOCK = 2048  # rays x volumes at once, of the one program
MAX_VALUES = 2**15  # rays x volumes; untuned: with more, one program takes longer than it saves in launches


@jit(varying=("R", "K"))
def _ray_mean_kernel(
    of_ray_ptr, of_volume_ptr, count_ptr,  # [R], [B, R], [R] int64 (read if COUNTS)
    out_ptr, slope_ptr,  # [], [R] d out / d of_ray
    R, B, K,
    COUNTS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    acc_ty: tl.constexpr = tl.float64 if of_ray_ptr.dtype.element_ty == tl.float64 else tl.float32
    b = tl.arange(0, BLOCK_B)[:, None].to(tl.int64)
    total, count = tl.zeros((BLOCK_B,), acc_ty), tl.zeros((BLOCK_B,), acc_ty)
    for begin in range(0, R, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)[None, :].to(tl.int64)
        m = tl.load(of_volume_ptr + b * R + r, mask=(b < B) & (r < R), other=0.0).to(acc_ty)
        x = tl.load(of_ray_ptr + r, mask=r < R, other=0.0).to(acc_ty)
        total += tl.sum(m * x, axis=1)
        if COUNTS:
            count += tl.sum(m * tl.load(count_ptr + r, mask=r < R, other=0).to(acc_ty), axis=1)
        else:
            count += tl.sum(m, axis=1) * K
    count = tl.maximum(count, 1.0)
    tl.store(out_ptr, tl.sum(total / count, axis=0) / B)  # volumes of the padding have total 0
    for begin in range(0, R, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R).to(tl.int64)
        at = b * R + r[None, :]
        m = tl.load(of_volume_ptr + at, mask=(b < B) & (r < R)[None, :], other=0.0).to(acc_ty)
        tl.store(slope_ptr + r, tl.sum(m / count[:, None], axis=0) / B, mask=r < R)
