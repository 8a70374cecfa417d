"""Signed distance to opacity: NeuS, VolSDF, UniSurf.

NeuS (eq. 13, as in UniPAD's get_alpha): `slope` is the change of the SDF per unit length along the ray, 0 where it
rises; prev and next are the SDF extrapolated by half an interval to both sides of the sample; sigma is the sigmoid.

    slope = min(direction . gradient, 0),   prev, next = sdf -+ slope * delta / 2
    P = sigma(prev * inv_s),   N = sigma(next * inv_s),   alpha = clip((P - N + e) / (P + e), 0, 1),   e = 1e-5

    a = dL/dprev / inv_s =  d_alpha * N / (P + e)^2 * P (1 - P)
    b = dL/dnext / inv_s = -d_alpha / (P + e) * N (1 - N)
    d_sdf = inv_s (a + b),   d_slope = inv_s (b - a) delta / 2,   d_inv_s = sum(prev * a + next * b)

VolSDF (eq. 2): density = Psi(-sdf / beta) / beta, Psi the standard Laplace CDF; alpha = 1 - exp(-density * delta).

    tail = exp(-|sdf| / beta) / 2,   d_density = d_alpha delta exp(-density * delta)
    d_sdf = -d_density tail / beta^2,   d_beta = -sum(d_density density + d_sdf sdf) / beta

UniSurf: occupancy sigma(-10 sdf).

Sizes: R rays, S samples on each. Sigmoids are computed from exp(-|x|), which cannot overflow, whatever inv_s is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unipad.kernels.backend import jit, on_triton, tl, triton, without_autocast


def neus_alpha(sdf: Tensor, gradient: Tensor, directions: Tensor, deltas: Tensor, inv_s: Tensor) -> Tensor:
    """Opacity of each sample from the SDF and its gradient there.

    Args:
        sdf:        [R, S] signed distance at the samples.
        gradient:   [R, S, 3] d sdf / d point, (x, y, z).
        directions: [R, 3] unit vectors.
        deltas:     [R, S] length of the sample's interval, in the unit of sdf.
        inv_s:      [1] inverse scale of the logistic distribution (s in the paper).

    Returns:
        alpha: [R, S] in [0, 1].

    Differentiable once w.r.t. `sdf`, `gradient` and `inv_s`; clipped values pass no gradient. Accumulates in fp32 (fp64
    for fp64 inputs). Deterministic. Raises AssertionError if shapes do not match.
    """
    _check(sdf, deltas, inv_s)
    R, S = sdf.shape
    assert gradient.shape == (R, S, 3), f"gradient {tuple(gradient.shape)} does not match sdf {(R, S)}"
    assert directions.shape == (R, 3), f"directions {tuple(directions.shape)} do not match sdf {(R, S)}"
    if not on_triton(sdf):
        return neus_alpha_ref(sdf, gradient, directions, deltas, inv_s)
    return NeusAlpha.apply(sdf, gradient, directions, deltas, inv_s)


@without_autocast
def neus_alpha_ref(sdf, gradient, directions, deltas, inv_s):
    """`neus_alpha` in plain PyTorch."""
    slope = -F.relu(-torch.einsum("rsi,ri->rs", gradient, directions.detach()))  # [R, S]
    half = slope * deltas.detach() / 2
    prev_cdf, next_cdf = torch.sigmoid((sdf - half) * inv_s), torch.sigmoid((sdf + half) * inv_s)
    return ((prev_cdf - next_cdf + 1e-5) / (prev_cdf + 1e-5)).clip(0, 1)


class NeusAlpha(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sdf, gradient, directions, deltas, inv_s):
        R, S = sdf.shape
        sdf, gradient, directions, deltas, inv_s = (
            t.contiguous() for t in (sdf, gradient, directions, deltas, inv_s)
        )  # fmt: skip
        alpha = torch.empty_like(sdf)
        if sdf.numel():
            _neus_alpha_fwd_kernel[_grid(sdf)](
                sdf_ptr=sdf, gradient_ptr=gradient, directions_ptr=directions, deltas_ptr=deltas, inv_s_ptr=inv_s,
                alpha_ptr=alpha, R=R, S=S, BLOCK=BLOCK,
            )  # fmt: skip
        ctx.save_for_backward(sdf, gradient, directions, deltas, inv_s)
        return alpha

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_alpha):
        sdf, gradient, directions, deltas, inv_s = ctx.saved_tensors
        R, S = sdf.shape
        d_sdf, d_gradient, d_inv_s = torch.empty_like(sdf), torch.empty_like(gradient), _new_partial_sums(sdf)
        if sdf.numel():
            _neus_alpha_bwd_kernel[_grid(sdf)](
                sdf_ptr=sdf, gradient_ptr=gradient, directions_ptr=directions, deltas_ptr=deltas, inv_s_ptr=inv_s,
                d_alpha_ptr=d_alpha.contiguous(), d_sdf_ptr=d_sdf, d_gradient_ptr=d_gradient, d_inv_s_ptr=d_inv_s,
                R=R, S=S, BLOCK=BLOCK,
            )  # fmt: skip
        return d_sdf, d_gradient, None, None, d_inv_s.sum().to(inv_s.dtype).reshape(inv_s.shape)


@torch.no_grad()
def interval_alpha(sdf: Tensor, deltas: Tensor, inv_s: float) -> Tensor:
    """Opacity of the intervals between samples from SDF values alone, for NeuS's importance sampling.

    The slope of an interval is the smaller of its own and its predecessor's difference quotient (0 for the missing
    predecessor of the first), clipped to [-1000, 0] as in the original. The opacity needs no clipping: with a slope of
    at most 0 it is in [0, 1].

    Args:
        sdf:    [R, S] signed distance at the samples, S at least 1.
        deltas: [R, S] length of the intervals, in the unit of sdf; the last is not read.
        inv_s:  fixed inverse scale of the logistic distribution (64 in the original).

    Returns:
        alpha: [R, S]; the last column is 0, since S samples have S - 1 intervals between them.

    Not differentiable. Plain PyTorch: on a GPU, `neus_resample` of ray_sample.py computes it inside its kernel.
    """
    deltas = deltas[:, :-1]
    slope = sdf.diff(dim=1) / (deltas + 1e-5)  # [R, S - 1]
    slope = torch.minimum(slope, F.pad(slope[:, :-1], (1, 0))).clip(-1000, 0)
    middle, half = (sdf[:, :-1] + sdf[:, 1:]) / 2, slope * deltas / 2
    prev_cdf, next_cdf = torch.sigmoid((middle - half) * inv_s), torch.sigmoid((middle + half) * inv_s)
    return F.pad((prev_cdf - next_cdf + 1e-5) / (prev_cdf + 1e-5), (0, 1))


def volsdf_alpha(sdf: Tensor, deltas: Tensor, beta: Tensor) -> Tensor:
    """Opacity of each sample from VolSDF's density.

    Args:
        sdf:    [R, S] signed distance at the samples.
        deltas: [R, S] length of the sample's interval, in the unit of sdf.
        beta:   [1] > 0, scale of the Laplace distribution, in the unit of sdf.

    Returns:
        alpha: [R, S] in [0, 1).

    Differentiable once w.r.t. `sdf` and `beta`. Accumulates in fp32 (fp64 for fp64 inputs). Deterministic.
    Raises AssertionError if shapes do not match.
    """
    _check(sdf, deltas, beta)
    if not on_triton(sdf):
        return volsdf_alpha_ref(sdf, deltas, beta)
    return VolsdfAlpha.apply(sdf, deltas, beta)


def volsdf_alpha_ref(sdf, deltas, beta):
    """`volsdf_alpha` in plain PyTorch."""
    return 1 - torch.exp(-laplace_density(sdf, beta) * deltas.detach())


def laplace_density(sdf: Tensor, beta: Tensor) -> Tensor:
    """VolSDF's volume density per unit of sdf, in [0, 1 / beta], 1 / (2 beta) at the surface; `beta` broadcasts."""
    tail = torch.exp(-torch.where(sdf < 0, -sdf, sdf) / beta) / 2  # not abs(), whose gradient at 0 is 0
    return torch.where(sdf < 0, 1 - tail, tail) / beta


class VolsdfAlpha(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sdf, deltas, beta):
        sdf, deltas, beta = (t.contiguous() for t in (sdf, deltas, beta))
        R, S = sdf.shape
        alpha = torch.empty_like(sdf)
        if sdf.numel():
            _volsdf_alpha_fwd_kernel[_grid(sdf)](
                sdf_ptr=sdf, deltas_ptr=deltas, beta_ptr=beta, alpha_ptr=alpha, R=R, S=S, BLOCK=BLOCK
            )
        ctx.save_for_backward(sdf, deltas, beta)
        return alpha

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_alpha):
        sdf, deltas, beta = ctx.saved_tensors
        R, S = sdf.shape
        d_sdf, d_beta = torch.empty_like(sdf), _new_partial_sums(sdf)
        if sdf.numel():
            _volsdf_alpha_bwd_kernel[_grid(sdf)](
                sdf_ptr=sdf, deltas_ptr=deltas, beta_ptr=beta, d_alpha_ptr=d_alpha.contiguous(),
                d_sdf_ptr=d_sdf, d_beta_ptr=d_beta, R=R, S=S, BLOCK=BLOCK,
            )  # fmt: skip
        return d_sdf, None, d_beta.sum().to(beta.dtype).reshape(beta.shape)


def unisurf_alpha(sdf: Tensor) -> Tensor:
    """UniSurf's opacity of each sample: [R, S] -> [R, S]. A plain sigmoid needs no custom kernel."""
    return torch.sigmoid(-10 * sdf)


def _check(sdf, deltas, scale=None):
    assert sdf.dim() == 2, f"sdf is [R, S], not {tuple(sdf.shape)}"
    assert deltas.shape == sdf.shape, f"deltas {tuple(deltas.shape)} do not match sdf {tuple(sdf.shape)}"
    assert scale is None or scale.shape == (1,), f"inv_s or beta is [1], not {tuple(scale.shape)}: one for all rays"


BLOCK = 512  # samples per program


def _grid(sdf):
    return (triton.cdiv(sdf.numel(), BLOCK),)


def _new_partial_sums(sdf):
    """Memory for one number per program, to be summed later: the gradient of a scalar without atomics."""
    return torch.empty(_grid(sdf), dtype=torch.promote_types(sdf.dtype, torch.float32), device=sdf.device)


@triton.jit
def sigmoid(x):
    decay = tl.exp(-tl.abs(x))
    return tl.where(x < 0, decay, 1.0) / (1.0 + decay)


@triton.jit
def clip_to_1(alpha):
    """alpha from 0 to 1; a NaN stays one, as in `clamp`, so that a broken field is noticed in the loss."""
    alpha = tl.maximum(alpha, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(alpha, 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _neus_interval(sdf_ptr, gradient_ptr, directions_ptr, deltas_ptr, i, r, ok, acc_ty: tl.constexpr):
    """prev and next of the file's header for samples i of rays r, and d next / d gradient (x, y, z).

    The latter is delta / 2 * direction where the SDF falls along the ray, else 0; d prev / d gradient is its negative.
    """
    sdf = tl.load(sdf_ptr + i, mask=ok, other=0.0).to(acc_ty)
    half_delta = tl.load(deltas_ptr + i, mask=ok, other=0.0).to(acc_ty) / 2
    dir_x = tl.load(directions_ptr + 3 * r, mask=ok, other=0.0).to(acc_ty)
    dir_y = tl.load(directions_ptr + 3 * r + 1, mask=ok, other=0.0).to(acc_ty)
    dir_z = tl.load(directions_ptr + 3 * r + 2, mask=ok, other=0.0).to(acc_ty)
    slope = tl.load(gradient_ptr + 3 * i, mask=ok, other=0.0).to(acc_ty) * dir_x
    slope += tl.load(gradient_ptr + 3 * i + 1, mask=ok, other=0.0).to(acc_ty) * dir_y
    slope += tl.load(gradient_ptr + 3 * i + 2, mask=ok, other=0.0).to(acc_ty) * dir_z
    half_delta = tl.where(slope < 0, half_delta, 0.0)  # instead of clipping slope: only their product is used
    prev_sdf, next_sdf = sdf - slope * half_delta, sdf + slope * half_delta
    return prev_sdf, next_sdf, half_delta * dir_x, half_delta * dir_y, half_delta * dir_z


@jit(varying=("R",))
def _neus_alpha_fwd_kernel(
    sdf_ptr, gradient_ptr, directions_ptr, deltas_ptr, inv_s_ptr,  # [R, S], [R, S, 3], [R, 3], [R, S], [1]
    alpha_ptr,  # [R, S]
    R, S,
    BLOCK: tl.constexpr,
):  # fmt: skip
    acc_ty: tl.constexpr = tl.float64 if sdf_ptr.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    r = i // S
    ok = r < R
    prev_sdf, next_sdf, _, _, _ = _neus_interval(sdf_ptr, gradient_ptr, directions_ptr, deltas_ptr, i, r, ok, acc_ty)
    inv_s = tl.load(inv_s_ptr).to(acc_ty)
    prev_cdf, next_cdf = sigmoid(prev_sdf * inv_s), sigmoid(next_sdf * inv_s)
    alpha = (prev_cdf - next_cdf + 1e-5) / (prev_cdf + 1e-5)
    tl.store(alpha_ptr + i, clip_to_1(alpha), mask=ok)


@jit(varying=("R",))
def _neus_alpha_bwd_kernel(
    sdf_ptr, gradient_ptr, directions_ptr, deltas_ptr, inv_s_ptr,  # [R, S], [R, S, 3], [R, 3], [R, S], [1]
    d_alpha_ptr,  # [R, S]
    d_sdf_ptr, d_gradient_ptr, d_inv_s_ptr,  # [R, S], [R, S, 3], [programs]
    R, S,
    BLOCK: tl.constexpr,
):  # fmt: skip
    acc_ty: tl.constexpr = tl.float64 if sdf_ptr.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    r = i // S
    ok = r < R
    prev_sdf, next_sdf, half_x, half_y, half_z = _neus_interval(
        sdf_ptr, gradient_ptr, directions_ptr, deltas_ptr, i, r, ok, acc_ty
    )
    inv_s = tl.load(inv_s_ptr).to(acc_ty)
    prev_cdf, next_cdf = sigmoid(prev_sdf * inv_s), sigmoid(next_sdf * inv_s)

    d_alpha = tl.load(d_alpha_ptr + i, mask=ok, other=0.0).to(acc_ty)
    alpha = (prev_cdf - next_cdf + 1e-5) / (prev_cdf + 1e-5)
    d_alpha = tl.where((alpha >= 0) & (alpha <= 1), d_alpha, 0.0) / (prev_cdf + 1e-5)  # header: d_alpha / (P + e)
    a = d_alpha * next_cdf / (prev_cdf + 1e-5) * prev_cdf * (1.0 - prev_cdf)
    b = -d_alpha * next_cdf * (1.0 - next_cdf)
    tl.store(d_sdf_ptr + i, inv_s * (a + b), mask=ok)
    d_offset = inv_s * (b - a)  # w.r.t. slope * delta / 2
    tl.store(d_gradient_ptr + 3 * i, d_offset * half_x, mask=ok)
    tl.store(d_gradient_ptr + 3 * i + 1, d_offset * half_y, mask=ok)
    tl.store(d_gradient_ptr + 3 * i + 2, d_offset * half_z, mask=ok)
    tl.store(d_inv_s_ptr + tl.program_id(0), tl.sum(prev_sdf * a + next_sdf * b, axis=0))


@jit(varying=("R",))
def _volsdf_alpha_fwd_kernel(
    sdf_ptr, deltas_ptr, beta_ptr,  # [R, S], [R, S], [1]
    alpha_ptr,  # [R, S]
    R, S,
    BLOCK: tl.constexpr,
):  # fmt: skip
    acc_ty: tl.constexpr = tl.float64 if sdf_ptr.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    ok = i // S < R
    sdf = tl.load(sdf_ptr + i, mask=ok, other=0.0).to(acc_ty)
    delta = tl.load(deltas_ptr + i, mask=ok, other=0.0).to(acc_ty)
    beta = tl.load(beta_ptr).to(acc_ty)
    tail = tl.exp(-tl.abs(sdf) / beta) / 2
    density = tl.where(sdf < 0, 1.0 - tail, tail) / beta
    tl.store(alpha_ptr + i, 1.0 - tl.exp(-density * delta), mask=ok)


@jit(varying=("R",))
def _volsdf_alpha_bwd_kernel(
    sdf_ptr, deltas_ptr, beta_ptr,  # [R, S], [R, S], [1]
    d_alpha_ptr,  # [R, S]
    d_sdf_ptr, d_beta_ptr,  # [R, S], [programs]
    R, S,
    BLOCK: tl.constexpr,
):  # fmt: skip
    acc_ty: tl.constexpr = tl.float64 if sdf_ptr.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    ok = i // S < R
    sdf = tl.load(sdf_ptr + i, mask=ok, other=0.0).to(acc_ty)
    delta = tl.load(deltas_ptr + i, mask=ok, other=0.0).to(acc_ty)
    beta = tl.load(beta_ptr).to(acc_ty)
    tail = tl.exp(-tl.abs(sdf) / beta) / 2
    density = tl.where(sdf < 0, 1.0 - tail, tail) / beta

    d_alpha = tl.load(d_alpha_ptr + i, mask=ok, other=0.0).to(acc_ty)
    d_density = d_alpha * delta * tl.exp(-density * delta)
    d_sdf = -d_density * tail / (beta * beta)
    tl.store(d_sdf_ptr + i, d_sdf, mask=ok)
    tl.store(d_beta_ptr + tl.program_id(0), tl.sum(-(d_density * density + d_sdf * sdf) / beta, axis=0))
