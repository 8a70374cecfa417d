"""Batch normalization over rows, residual and ReLU in one op, for training: two launches forward, two backward. Between
convolutions (kernels/sparse_layers.py), which compute the sums over the rows, it takes one launch each way.

    x^ = (x - mean) inv_std,  inv_std = (var + eps)^-1/2          mean, var over the N rows, by channel
    out = relu(w x^ + b + residual)
    g = dL/dout where out > 0, else 0                             dL/dresidual = g
    dL/db = sum g,  dL/dw = sum g x^
    dL/dx = w inv_std (g - dL/db / N - x^ dL/dw / N)              sums over the rows

Each part of the rows is summed by one program. Every program of the next launch merges the parts itself, in the same
order, which saves a launch (its time on a GPU has not been measured). A part stores its mean and the sum of squares
around it, because sums of x^2 would cancel where the mean is large.

Sizes: N rows, C channels, P parts of R rows; the last part may be shorter.
"""

from functools import lru_cache

import torch
from torch import Tensor

from unipad.kernels.backend import cdiv, jit, on_triton, tl, triton, without_autocast


def norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None,
    running: tuple[Tensor, Tensor, Tensor] | None = None, momentum: float = 0.1,
) -> Tensor:  # fmt: skip
    """relu(batch_norm(x) + residual), with the statistics of x.

    Args:
        x:            [N, C] fp16, bf16 or fp32; fp64 runs the reference.
        weight, bias: [C] of any floating type.
        eps:          added to the variance.
        residual:     [N, C] in the type of x, or None.
        running:      mean [C], unbiased variance [C] and number of batches [] int64, which are updated in place as in
                      `nn.BatchNorm1d`; unchanged if there are no rows. None: there are none.
        momentum:     weight of this batch in the running mean and variance.

    Returns:
        [N, C] in the type of x, computed in fp32 (fp64 for fp64) and rounded once. A single row gives
        relu(bias + residual).

    Differentiable once w.r.t. x, weight, bias and residual. Deterministic. In compiled code the reference runs, which
    the compiler fuses. Raises AssertionError if shapes or types do not match.
    """
    _check(x, weight, bias, residual, running)
    if x.dtype == torch.float64 or not on_triton(x) or torch.compiler.is_compiling():
        return norm_relu_ref(x, weight, bias, eps, residual, running, momentum)
    return NormReLU.apply(x, weight, bias, residual, running, eps, momentum)


@without_autocast
def norm_relu_ref(x, weight, bias, eps, residual=None, running=None, momentum=0.1):
    """`norm_relu` in plain PyTorch."""
    _check(x, weight, bias, residual, running)
    wide, N = x.to(torch.promote_types(x.dtype, torch.float32)), len(x)
    mean = wide.sum(dim=0) / max(N, 1)
    centered = wide - mean
    variance = centered.square().sum(dim=0) / max(N, 1)
    if running is not None and N:
        with torch.no_grad():
            running_mean, running_var, batches = running
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (N / max(N - 1, 1))).to(running_var.dtype), momentum)
            batches += 1
    out = centered * ((variance + eps).rsqrt() * weight) + bias
    return (out if residual is None else out + residual).relu().to(x.dtype)


def _check(x, weight, bias, residual, running):
    assert x.dim() == 2 and x.is_floating_point(), f"x is [N, C] of a floating type, not {tuple(x.shape)} {x.dtype}"
    C = x.shape[1]
    assert weight.shape == bias.shape == (C,), f"weight and bias are [{C}], not {[*weight.shape]} and {[*bias.shape]}"
    same = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    assert same, f"the residual is {[*x.shape]} {x.dtype}, not {residual is not None and [*residual.shape]}"
    check_running(running, C)


def check_running(running, C):
    """Raises AssertionError unless they are running statistics of C channels, or None."""
    if running is not None:
        mean, variance, batches = running
        fits = mean.shape == variance.shape == (C,) and not batches.shape and batches.dtype == torch.int64
        assert fits, f"running statistics are mean [{C}], variance [{C}] and a number of batches [] int64"
        assert mean.is_contiguous() and variance.is_contiguous(), "running statistics are not contiguous"


class NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, running, eps, momentum):
        x = x.contiguous()
        out, statistics = norm_relu_fwd(x, weight, bias, eps, residual, running, momentum)
        ctx.has_residual = residual is not None
        ctx.save_for_backward(x, out, weight, statistics)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        d_x, d_weight, d_bias, d_residual = norm_relu_bwd(d_out, *ctx.saved_tensors, ctx.has_residual)
        return d_x, d_weight, d_bias, d_residual, None, None, None


def norm_relu_fwd(x, weight, bias, eps, residual, running, momentum, moments=None, dtype=None):
    """(`norm_relu` of a contiguous x, statistics [2, C] fp32: mean and inv_std).

    moments: ([P, 2, C] fp32, R): the mean of each of P parts of R rows of x and the sum of squares around it; the last
             parts may have fewer rows. None: a launch computes them.
    dtype:   of the result; None: that of x.
    """
    (N, C), out = x.shape, torch.empty_like(x, dtype=dtype)
    statistics = x.new_empty(2, C, dtype=torch.float32)
    if not out.numel():
        return out, statistics
    moments, R = moments or _moments(x)
    mean, variance, batches = running or (None, None, None)
    block_n, block_c = _blocks(C)
    _norm_relu_fwd_kernel[(cdiv(N, block_n), cdiv(C, block_c))](
        x_ptr=x, residual_ptr=None if residual is None else residual.contiguous(),
        weight_ptr=weight.contiguous(), bias_ptr=bias.contiguous(), moments_ptr=moments, out_ptr=out,
        statistics_ptr=statistics, running_mean_ptr=mean, running_var_ptr=variance, batches_ptr=batches,
        N=N, C=C, P=moments.shape[0], R=R, EPS=eps, MOMENTUM=momentum,
        BLOCK_P=BLOCK_P, BLOCK_N=block_n, BLOCK_C=block_c, num_warps=WARPS,
    )  # fmt: skip
    if running is not None:
        torch.autograd.graph.increment_version(running)  # autograd does not see what kernels write
    return out, statistics


def norm_relu_bwd(d_out, x, out, weight, statistics, has_residual, sums=None):
    """Gradients w.r.t. x, weight, bias and, with `has_residual`, the residual; x and out are contiguous.

    sums: [P, 2, C] fp32, the sums of g and of g x^ over each of P parts of the rows. None: a launch computes them.
    """
    (N, C), d_out = x.shape, d_out.contiguous()
    d_x, d_residual = torch.empty_like(x), torch.empty_like(x) if has_residual else None
    if not out.numel():
        return d_x, torch.zeros_like(weight), torch.zeros_like(weight), d_residual
    d_weight, d_bias = torch.empty_like(weight), torch.empty_like(weight)
    sums = _sums(d_out, x, out, statistics) if sums is None else sums
    block_n, block_c = _blocks(C)
    _norm_relu_bwd_kernel[(cdiv(N, block_n), cdiv(C, block_c))](
        d_out_ptr=d_out, out_ptr=out, x_ptr=x, weight_ptr=weight.contiguous(), statistics_ptr=statistics, sums_ptr=sums,
        d_x_ptr=d_x, d_residual_ptr=d_residual, d_weight_ptr=d_weight, d_bias_ptr=d_bias,
        N=N, C=C, P=sums.shape[0], BLOCK_P=BLOCK_P, BLOCK_N=block_n, BLOCK_C=block_c, num_warps=WARPS,
    )  # fmt: skip
    return d_x, d_weight, d_bias, d_residual


# Untuned, for memory bandwidth: 16 bytes per thread and load in half precision, 32 values per thread
ELEMENTS = 4096  # rows x channels of a block
MAX_BLOCK_C = 64  # channels of a block, whose rows are then 128 consecutive bytes in half precision
WARPS = 4
MAX_PARTS = 128  # about as many programs as a GPU has multiprocessors; every program of the next launch reads all parts
MAX_TILES = 1024  # parts at most if they are a convolution's tiles: with more, reading the rows again costs less
BLOCK_P = 32  # parts that a program merges at once


@lru_cache
def _blocks(C):
    """(rows, channels) of a block."""
    block_c = min(triton.next_power_of_2(C), MAX_BLOCK_C)
    return ELEMENTS // block_c, block_c


def _part_rows(N, C):
    """Rows of a part: whole blocks, in at most MAX_PARTS parts."""
    block_n = _blocks(C)[0]
    return cdiv(cdiv(N, MAX_PARTS), block_n) * block_n


def _moments(x):
    """([P, 2, C] fp32, the mean of each part of the rows and the sum of squares around it; R)."""
    (N, C), (block_n, block_c), R = x.shape, _blocks(x.shape[1]), _part_rows(*x.shape)
    moments = x.new_empty(cdiv(N, R), 2, C, dtype=torch.float32)
    _moments_kernel[(len(moments), cdiv(C, block_c))](
        x_ptr=x, moments_ptr=moments, N=N, C=C, R=R, BLOCK_N=block_n, BLOCK_C=block_c, num_warps=WARPS
    )  # fmt: skip
    return moments, R


def _sums(d_out, x, out, statistics):
    """[P, 2, C] fp32, the sums of g and of g x^ over each part of the rows."""
    (N, C), (block_n, block_c), R = x.shape, _blocks(x.shape[1]), _part_rows(*x.shape)
    sums = x.new_empty(cdiv(N, R), 2, C, dtype=torch.float32)
    _norm_relu_sums_kernel[(len(sums), cdiv(C, block_c))](
        d_out_ptr=d_out, out_ptr=out, x_ptr=x, statistics_ptr=statistics, sums_ptr=sums,
        N=N, C=C, R=R, BLOCK_N=block_n, BLOCK_C=block_c, num_warps=WARPS,
    )  # fmt: skip
    return sums


@jit(varying=("N", "R"))
def _moments_kernel(
    x_ptr, moments_ptr,  # [N, C], [P, 2, C]
    N, C, R,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    end = tl.minimum((part + 1) * R, N)
    n = part * R + tl.arange(0, BLOCK_N)
    count = tl.zeros((), tl.float32)
    mean, squares = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for _ in range(R // BLOCK_N):
        ok = (n < end)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + n[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
        size = tl.sum((n < end).to(tl.float32), axis=0)
        block_mean = tl.sum(x, axis=0) / tl.maximum(size, 1.0)
        centered = tl.where(ok, x - block_mean[None, :], 0.0)
        share = size / tl.maximum(count + size, 1.0)
        delta = block_mean - mean
        mean += delta * share
        squares += tl.sum(centered * centered, axis=0) + delta * delta * count * share
        count += size
        n += BLOCK_N
    at = part * 2 * C + c
    tl.store(moments_ptr + at, mean, mask=c < C)
    tl.store(moments_ptr + at + C, squares, mask=c < C)


@triton.jit
def _load_moments(moments_ptr, p, c, N, C, P, R):
    """Rows, means and sums of squares of parts p: [BLOCK_P, 1] and twice [BLOCK_P, BLOCK_C]."""
    at = p[:, None] * 2 * C + c[None, :]
    ok = (p < P)[:, None] & (c < C)[None, :]
    mean = tl.load(moments_ptr + at, mask=ok, other=0.0)
    squares = tl.load(moments_ptr + at + C, mask=ok, other=0.0)
    return tl.minimum(tl.maximum(N - p * R, 0), R).to(tl.float32)[:, None], mean, squares


@triton.jit
def _merged_moments(moments_ptr, c, N, C, P, R, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and biased variance [BLOCK_C] of all rows, from the moments of their parts."""
    p = tl.arange(0, BLOCK_P).to(tl.int64)
    size, mean, _ = _load_moments(moments_ptr, p, c, N, C, P, R)
    # summed around the mean of the first BLOCK_P parts, so that little cancels
    pivot = tl.sum(size * mean, axis=0) / tl.sum(size, axis=0)
    shift, squares = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for _ in range(tl.cdiv(P, BLOCK_P)):
        size, mean, own = _load_moments(moments_ptr, p, c, N, C, P, R)
        delta = mean - pivot[None, :]
        shift += tl.sum(size * delta, axis=0) / N
        squares += tl.sum(own + size * delta * delta, axis=0)
        p += BLOCK_P
    return pivot + shift, tl.maximum(squares / N - shift * shift, 0.0)


@jit(varying=("N", "P", "R"))
def _norm_relu_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, moments_ptr,  # [N, C], [N, C] or None, [C], [C], [P, 2, C]
    out_ptr, statistics_ptr,  # [N, C], [2, C]: mean, inv_std
    running_mean_ptr, running_var_ptr, batches_ptr,  # [C], [C], []; each or None
    N, C, P, R, EPS, MOMENTUM,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, variance = _merged_moments(moments_ptr, c, N, C, P, R, BLOCK_P, BLOCK_C)
    inv_std = 1.0 / tl.sqrt_rn(variance + EPS)
    of_first = c < tl.where(tl.program_id(0) == 0, C, 0)  # one program writes the statistics
    tl.store(statistics_ptr + c, mean, mask=of_first)
    tl.store(statistics_ptr + C + c, inv_std, mask=of_first)
    if running_mean_ptr is not None:
        before = tl.load(running_mean_ptr + c, mask=of_first, other=0.0)
        tl.store(running_mean_ptr + c, before + MOMENTUM * (mean - before), mask=of_first)
        before = tl.load(running_var_ptr + c, mask=of_first, other=0.0)
        unbiased = variance * N / tl.maximum(N - 1, 1)
        tl.store(running_var_ptr + c, before + MOMENTUM * (unbiased - before), mask=of_first)
        is_first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
        batches = tl.load(batches_ptr, mask=is_first, other=0)
        tl.store(batches_ptr, batches + 1, mask=is_first)

    at, ok = n[:, None] * C + c[None, :], (n < N)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    y = (x - mean[None, :]) * (inv_std * weight)[None, :] + bias[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=ok, other=0.0).to(tl.float32)
    y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def masked_gradient(d_out, out_ptr, x_ptr, at, ok, mean, inv_std):
    """g and x^ of a block, fp32; 0 where not ok."""
    out = tl.load(out_ptr + at, mask=ok, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
    # `<=` is False for NaN, which then passes, as in PyTorch
    return tl.where(out <= 0, 0.0, d_out), tl.where(ok, (x - mean[None, :]) * inv_std[None, :], 0.0)


@jit(varying=("N", "R"))
def _norm_relu_sums_kernel(
    d_out_ptr, out_ptr, x_ptr, statistics_ptr, sums_ptr,  # [N, C] each, [2, C], [P, 2, C]
    N, C, R,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum g and sum g x^ of each part of the rows."""
    part = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = tl.load(statistics_ptr + c, mask=c < C, other=0.0)
    inv_std = tl.load(statistics_ptr + C + c, mask=c < C, other=0.0)
    end = tl.minimum((part + 1) * R, N)
    n = part * R + tl.arange(0, BLOCK_N)
    sum_g, sum_gx = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for _ in range(R // BLOCK_N):
        ok = (n < end)[:, None] & (c < C)[None, :]
        at = n[:, None] * C + c[None, :]
        d_out = tl.load(d_out_ptr + at, mask=ok, other=0.0).to(tl.float32)
        g, x = masked_gradient(d_out, out_ptr, x_ptr, at, ok, mean, inv_std)
        sum_g += tl.sum(g, axis=0)
        sum_gx += tl.sum(g * x, axis=0)
        n += BLOCK_N
    at = part * 2 * C + c
    tl.store(sums_ptr + at, sum_g, mask=c < C)
    tl.store(sums_ptr + at + C, sum_gx, mask=c < C)


@jit(varying=("N", "P"))
def _norm_relu_bwd_kernel(
    d_out_ptr, out_ptr, x_ptr, weight_ptr, statistics_ptr, sums_ptr,  # [N, C] three times, [C], [2, C], [P, 2, C]
    d_x_ptr, d_residual_ptr, d_weight_ptr, d_bias_ptr,  # [N, C], [N, C] or None, [C], [C]
    N, C, P,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    d_bias, d_weight = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    p = tl.arange(0, BLOCK_P).to(tl.int64)
    for _ in range(tl.cdiv(P, BLOCK_P)):
        at, ok = p[:, None] * 2 * C + c[None, :], (p < P)[:, None] & (c < C)[None, :]
        d_bias += tl.sum(tl.load(sums_ptr + at, mask=ok, other=0.0), axis=0)
        d_weight += tl.sum(tl.load(sums_ptr + at + C, mask=ok, other=0.0), axis=0)
        p += BLOCK_P
    of_first = c < tl.where(tl.program_id(0) == 0, C, 0)
    tl.store(d_bias_ptr + c, d_bias.to(d_bias_ptr.dtype.element_ty), mask=of_first)
    tl.store(d_weight_ptr + c, d_weight.to(d_weight_ptr.dtype.element_ty), mask=of_first)

    mean = tl.load(statistics_ptr + c, mask=c < C, other=0.0)
    inv_std = tl.load(statistics_ptr + C + c, mask=c < C, other=0.0)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    at, ok = n[:, None] * C + c[None, :], (n < N)[:, None] & (c < C)[None, :]
    d_out = tl.load(d_out_ptr + at, mask=ok, other=0.0).to(tl.float32)
    g, x = masked_gradient(d_out, out_ptr, x_ptr, at, ok, mean, inv_std)
    if d_residual_ptr is not None:
        tl.store(d_residual_ptr + at, g.to(d_residual_ptr.dtype.element_ty), mask=ok)
    d_x = (g - (d_bias / N)[None, :] - x * (d_weight / N)[None, :]) * (inv_std * weight)[None, :]
    tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=ok)
