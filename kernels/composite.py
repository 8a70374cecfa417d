"""Alpha-composite samples along rays, front to back.

    k_s = 1 - alpha_s + 1e-7   (what sample s lets through; 1e-7 as in the original)
    T_s = prod_{t<s} k_t (transmittance up to sample s),   w_s = T_s * alpha_s,   out = sum_s w_s * value_s

    dL/dalpha_s = T_s * (g_s - B_s),   g_s = d_weights_s + d_out . value_s
    B_{s-1} = alpha_s * g_s + k_s * B_s,   B_{S-1} = 0

d_weights and d_out are the upstream gradients: the weights are an output too. B_s = dL/dT_{s+1}, through the samples
behind s, is accumulated from the far end. Nothing is divided by k, so the gradient is exact where alpha is 0 or 1.
"""

import torch
from torch import Tensor

from unipad.kernels.backend import jit, on_triton, tl, triton, without_autocast

EPS = 1e-7  # what an opaque sample lets through, as in UniPAD's renderers; the kernels have it as a literal


def composite(alpha: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Composite `values` along each ray by opacity.

    Args:
        alpha:  [R, S] opacity of each sample, in [0, 1].
        values: [R, S, C] RGB, metric depth, features, ...

    Returns:
        out:     [R, C] rendered value; rays with S == 0 give 0.
        weights: [R, S] weight of each sample; sums to at most 1 (+ S * 1e-7) along a ray.

    Differentiable once w.r.t. `alpha` and `values` on a GPU (the reference: any number of times). Deterministic.
    Accumulates in fp32 (fp64 for fp64 inputs). Raises AssertionError if shapes or types do not match.
    """
    fits = values.dim() == 3 and alpha.shape == values.shape[:2]
    assert fits, f"alpha {tuple(alpha.shape)} does not match values {tuple(values.shape)}"
    assert alpha.dtype == values.dtype, f"alpha is {alpha.dtype}, values are {values.dtype}"
    if not on_triton(values):
        return composite_ref(alpha, values)
    return Composite.apply(alpha, values)


@without_autocast
def composite_ref(alpha, values):
    """`composite` in plain PyTorch: what the kernels are compared with."""
    ones = alpha.new_ones(alpha.shape[0], 1)  # [R, 1]
    trans = torch.cat([ones, 1 - alpha + EPS], dim=1).cumprod(dim=1)[:, :-1]  # [R, S]
    weights = trans * alpha  # [R, S]
    return torch.einsum("rs,rsc->rc", weights, values), weights


class Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, alpha, values):
        R, S, C = values.shape
        alpha, values = alpha.contiguous(), values.contiguous()
        out, weights = values.new_empty(R, C), torch.empty_like(alpha)
        trans = torch.empty_like(alpha, dtype=torch.promote_types(alpha.dtype, torch.float32))  # [R, S], T_s
        if R:
            grid, blocks = _blocks(R, C)
            _composite_fwd_kernel[grid](
                alpha_ptr=alpha, values_ptr=values, out_ptr=out, trans_ptr=trans, weights_ptr=weights,
                R=R, S=S, C=C, **blocks,
            )  # fmt: skip
        ctx.save_for_backward(alpha, values, trans)
        return out, weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_weights):
        alpha, values, trans = ctx.saved_tensors
        R, S, C = values.shape
        d_out, d_weights = d_out.contiguous(), d_weights.contiguous()
        d_alpha, d_values = torch.empty_like(alpha), torch.empty_like(values)
        if R and S:
            grid, blocks = _blocks(R, C)
            _composite_bwd_kernel[grid](
                alpha_ptr=alpha, values_ptr=values, trans_ptr=trans, d_out_ptr=d_out, d_weights_ptr=d_weights,
                d_alpha_ptr=d_alpha, d_values_ptr=d_values, R=R, S=S, C=C, **blocks,
            )  # fmt: skip
        return d_alpha, d_values


BLOCK_R = 32  # rays per program, at most: one warp, one ray per lane
TILE = 512  # rays x channels per program, at most, unless one ray has more channels: 16 registers per lane


def _blocks(R, C):
    """Grid and launch options of both kernels."""
    block_c = triton.next_power_of_2(max(C, 1))
    block_r = max(1, min(BLOCK_R, TILE // block_c))
    return (triton.cdiv(R, block_r),), dict(BLOCK_C=block_c, BLOCK_R=block_r, num_warps=1)


@jit(varying=("R",))
def _composite_fwd_kernel(
    alpha_ptr, values_ptr,  # [R, S], [R, S, C]
    out_ptr, trans_ptr, weights_ptr,  # [R, C], [R, S], [R, S]
    R, S, C,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    acc_ty: tl.constexpr = trans_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    c = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    r_ok = r < R
    rc_ok = r_ok[:, None] & (c < C)[None, :]

    trans = tl.full((BLOCK_R,), 1.0, acc_ty)
    acc = tl.zeros((BLOCK_R, BLOCK_C), acc_ty)
    for s in range(S):
        rs = r * S + s
        alpha = tl.load(alpha_ptr + rs, mask=r_ok, other=0.0).to(acc_ty)
        value = tl.load(values_ptr + rs[:, None] * C + c[None, :], mask=rc_ok, other=0.0).to(acc_ty)
        weight = trans * alpha
        acc += weight[:, None] * value
        tl.store(trans_ptr + rs, trans, mask=r_ok)
        tl.store(weights_ptr + rs, weight, mask=r_ok)
        trans *= 1.0 - alpha + 1e-7
    tl.store(out_ptr + r[:, None] * C + c[None, :], acc, mask=rc_ok)


@jit(varying=("R",))
def _composite_bwd_kernel(
    alpha_ptr, values_ptr, trans_ptr,  # [R, S], [R, S, C], [R, S]
    d_out_ptr, d_weights_ptr,  # [R, C], [R, S]
    d_alpha_ptr, d_values_ptr,  # [R, S], [R, S, C]
    R, S, C,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    acc_ty: tl.constexpr = trans_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    c = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    r_ok = r < R
    rc_ok = r_ok[:, None] & (c < C)[None, :]

    d_out = tl.load(d_out_ptr + r[:, None] * C + c[None, :], mask=rc_ok, other=0.0).to(acc_ty)
    behind = tl.zeros((BLOCK_R,), acc_ty)  # B_s
    for i in range(S):
        rs = r * S + (S - 1 - i)
        rsc = rs[:, None] * C + c[None, :]
        alpha = tl.load(alpha_ptr + rs, mask=r_ok, other=0.0).to(acc_ty)
        trans = tl.load(trans_ptr + rs, mask=r_ok, other=0.0)
        value = tl.load(values_ptr + rsc, mask=rc_ok, other=0.0).to(acc_ty)
        g = tl.load(d_weights_ptr + rs, mask=r_ok, other=0.0).to(acc_ty) + tl.sum(d_out * value, axis=1)
        tl.store(d_alpha_ptr + rs, trans * (g - behind), mask=r_ok)
        tl.store(d_values_ptr + rsc, (trans * alpha)[:, None] * d_out, mask=rc_ok)
        behind = alpha * g + (1.0 - alpha + 1e-7) * behind
