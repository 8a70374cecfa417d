"""Sparse voxel convolution: a gather, a GEMM and a sum over a neighbour table.

    out[m] = sum_k W_k @ x[i(k, m)]            over the offsets k at which a voxel lies, i = neighbor_idx >= 0
    dL/dx[n] = sum_k W_k^T @ g[j(k, n)]        j = inverse_idx, g = dL/dout: the same sum over the inverse table
    dL/dW_k = sum_m g[m] x[i(k, m)]^T

Submanifold, strided, inverse and transposed convolution differ in their tables alone (kernels/sparse_map.py).
"""

import torch

from kernels.backend import on_triton


def sparse_conv(features, weight, neighbor_idx, inverse_idx, allow_tf32=False):
    """Convolve the features of N voxels to those of M voxels.

    Args:
        features:     [N, Cin] fp16, bf16, fp32; fp64 takes the reference.
        weight:       [Cout, kz, ky, kx, Cin] any floating type, taken in the features' type; K = kz * ky * kx offsets.
        neighbor_idx: [K, M] int32, the row of `features` that an output reads at an offset; -1 where no voxel is.
                      Rows are not checked. No row twice at one offset.
        inverse_idx:  [K, N] int32, its inverse: m where neighbor_idx[k, m] = n, else -1.
        allow_tf32:   for fp32 features: multiply in tf32 (10 bits of mantissa); otherwise in full fp32.

    Returns:
        [M, Cout] in the features' type; 0 for an output without neighbours.

    Differentiable once in `features` and `weight`. Accumulates in fp32 (fp64 for fp64 features), the gradient of the
    weights too, which is rounded once, to the weights' type. Bit-equal from run to run. Under autocast the features are
    taken in its type. Raises AssertionError if shapes or types do not fit.
    """
    features = _check(features, weight, neighbor_idx, inverse_idx)
    plain = features.dtype == torch.float64 or not on_triton(features)
    return _gather_gemm(features, weight, neighbor_idx, inverse_idx, allow_tf32, plain)


def sparse_conv_ref(features, weight, neighbor_idx, inverse_idx, allow_tf32=False):
    """`sparse_conv` in plain PyTorch; always multiplies in the type it accumulates in."""
    features = _check(features, weight, neighbor_idx, inverse_idx)
    return _gather_gemm(features, weight, neighbor_idx, inverse_idx, allow_tf32, True)


def _check(features, weight, neighbor_idx, inverse_idx):
    """The features, in autocast's type where that is on."""
    fits = features.dim() == 2 and weight.dim() == 5 and features.shape[1] == weight.shape[4]
    assert fits, f"{tuple(features.shape)=} and {tuple(weight.shape)=} do not fit"
    K, N = weight.shape[1:4].numel(), features.shape[0]
    fits = neighbor_idx.dim() == 2 and neighbor_idx.shape[0] == K and inverse_idx.shape == (K, N)
    assert fits, f"{tuple(neighbor_idx.shape)=} and {tuple(inverse_idx.shape)=} are no tables of {K} x {N}"
    assert neighbor_idx.dtype == inverse_idx.dtype == torch.int32, "tables are int32"
    assert features.is_floating_point() and weight.is_floating_point(), f"{features.dtype=}, {weight.dtype=}"
    if torch.is_autocast_enabled(features.device.type) and features.dtype != torch.float64:
        return features.to(torch.get_autocast_dtype(features.device.type))
    return features


@torch.library.custom_op("unipad::gather_gemm", mutates_args=())
def _gather_gemm(
    features: torch.Tensor,
    weight: torch.Tensor,
    neighbor_idx: torch.Tensor,
    inverse_idx: torch.Tensor,
    allow_tf32: bool,
    plain: bool,
) -> torch.Tensor:
    return _gather_gemm_ref(features, weight.to(features.dtype).flatten(1, 3), neighbor_idx)


@_gather_gemm.register_fake
def _(features, weight, neighbor_idx, inverse_idx, allow_tf32, plain):
    return features.new_empty(neighbor_idx.shape[1], weight.shape[0])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.allow_tf32, ctx.plain = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, d_out):
    d_features, d_weight = _gather_gemm_bwd(
        *ctx.saved_tensors, d_out, *ctx.needs_input_grad[:2], ctx.allow_tf32, ctx.plain
    )
    for_features, for_weight = ctx.needs_input_grad[:2]
    return d_features if for_features else None, d_weight if for_weight else None, None, None, None, None


_gather_gemm.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("unipad::gather_gemm_bwd", mutates_args=())
def _gather_gemm_bwd(
    features: torch.Tensor,
    weight: torch.Tensor,
    neighbor_idx: torch.Tensor,
    inverse_idx: torch.Tensor,
    d_out: torch.Tensor,
    for_features: bool,
    for_weight: bool,
    allow_tf32: bool,
    plain: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the features and of the weights; empty where not asked for."""
    d_features, d_weight = features.new_empty(0), weight.new_empty(0)
    if for_features:
        kernel = weight.to(features.dtype).flatten(1, 3).transpose(0, 2)
        d_features = _gather_gemm_ref(d_out, kernel, inverse_idx)
    if for_weight:
        d_weight = _d_weight_ref(features, d_out, neighbor_idx).to(weight.dtype).view_as(weight)
    return d_features, d_weight


@_gather_gemm_bwd.register_fake
def _(features, weight, neighbor_idx, inverse_idx, d_out, for_features, for_weight, allow_tf32, plain):
    d_features = torch.empty_like(features) if for_features else features.new_empty(0)
    return d_features, torch.empty_like(weight) if for_weight else weight.new_empty(0)


def _gather_gemm_ref(features, weight, neighbor_idx):
    """[M, Cout] of features [N, Cin], weight [Cout, K, Cin] and a table [K, M]."""
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    x, w = features.to(dtype), weight.to(dtype).permute(1, 2, 0)  # w: [K, Cin, Cout]
    out = x.new_zeros(neighbor_idx.shape[1], weight.shape[0])
    with torch.autocast(x.device.type, enabled=False):
        for k in range(len(neighbor_idx)):
            m = (neighbor_idx[k] >= 0).nonzero()[:, 0]
            n = neighbor_idx[k].index_select(0, m)
            out.index_add_(0, m, x.index_select(0, n) @ w[k])  # no m twice: no order to depend on
    return out.to(features.dtype)


def _d_weight_ref(features, d_out, neighbor_idx):
    """[Cout, K, Cin] fp32 (fp64 for fp64 features) of features [N, Cin], d_out [M, Cout] and a table [K, M]."""
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    x, g = features.to(dtype), d_out.to(dtype)
    d_weight = x.new_zeros(g.shape[1], len(neighbor_idx), x.shape[1])
    for k in range(len(neighbor_idx)):  # the backward runs outside autocast
        m = (neighbor_idx[k] >= 0).nonzero()[:, 0]
        n = neighbor_idx[k].index_select(0, m)
        d_weight[:, k] = g.index_select(0, m).T @ x.index_select(0, n)
    return d_weight
