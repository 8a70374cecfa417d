"""Sparse voxel convolution: gather, GEMM and sum over a neighbor table.

    out[m] = sum_k W_k x[i(k, m)]              over the offsets k at which m has a neighbor, i = neighbor_idx
    dL/dx[n] = sum_k W_k^T g[j(k, n)]          g = dL/dout, j = inverse_idx: the same sum over the inverse table
    dL/dW_k = sum_m g[m] x[i(k, m)]^T

Submanifold, strided, inverse and transposed convolutions differ only in their tables (kernels/sparse_map.py). The GEMMs
are in kernels/sparse_gemm.py, for a CPU in kernels/sparse_reference.py.
"""

import torch
from torch import Tensor

from unipad.kernels.backend import on_triton
from unipad.kernels.sparse_gemm import d_weight_of, gather_gemm
from unipad.kernels.sparse_reference import backward_ref, gather_gemm_ref
from unipad.kernels.sparse_tiles import NeighborTable


def sparse_conv(
    features: Tensor, weight: Tensor, neighbor_idx: Tensor | NeighborTable, inverse_idx: Tensor | NeighborTable | None,
    allow_tf32: bool = False, rounded: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Convolve the features of N voxels to those of M voxels.

    Args:
        features:     [N, Cin] fp16, bf16 or fp32; fp64 runs the reference.
        weight:       [Cout, kz, ky, kx, Cin] any floating type, rounded to the features' type; K = kz * ky * kx.
        neighbor_idx: [K, M] int32, the row of `features` that an output reads at an offset, -1 for none. At one
                      offset, no row may be read by two outputs. Entries are not checked. Or a `NeighborTable`, which
                      caches the tiles and pairs that kernels derive from it for all convolutions and gradients; for a
                      tensor they are computed on every call, unless there is a `NeighborTable` of this tensor.
        inverse_idx:  [K, N] int32, the inverse: m where neighbor_idx[k, m] = n, else -1. Entries are not checked. Or
                      its `NeighborTable`. None: the inverse is neighbor_idx.flip(0), as for a submanifold convolution
                      with an odd kernel; gradients then use the cache of `neighbor_idx`.
        allow_tf32:   multiply fp32 features in tf32 (10-bit mantissa).
        rounded:      `weight` in the features' type (under autocast: in autocast's) and without gradient, if the caller
                      has it, e.g. because it casts all weights of a net at once. The forward and the backward then cast
                      nothing.

    Returns:
        [M, Cout] in the features' type; 0 for an output without neighbors.

    Differentiable once w.r.t. `features` and `weight`. Accumulates in fp32 (fp64 for fp64 features); the gradient of
    `weight` is fp32 until it is cast to the type of `weight`, also for fp16 features. Autocast casts the features.
    Deterministic. Raises AssertionError if shapes or types do not match.
    """
    _check_inverse(features, neighbor_idx, inverse_idx)
    features = _check(features, weight, neighbor_idx, rounded)
    return _run(features, weight, neighbor_idx, inverse_idx, allow_tf32, rounded, _on_reference(features))


def sparse_conv_ref(features, weight, neighbor_idx, inverse_idx, allow_tf32=False, rounded=None):
    """`sparse_conv` in plain PyTorch; multiplies in the accumulation type."""
    _check_inverse(features, neighbor_idx, inverse_idx)
    features = _check(features, weight, neighbor_idx, rounded)
    return _run(features, weight, neighbor_idx, inverse_idx, allow_tf32, rounded, reference=True)


def sparse_conv_act(
    features: Tensor, weight: Tensor, neighbor_idx: Tensor | NeighborTable, scale: Tensor | None = None,
    shift: Tensor | None = None, residual: Tensor | None = None, relu: bool = False, allow_tf32: bool = False,
) -> Tensor:  # fmt: skip
    """A convolution with its epilogue, for inference: relu(sparse_conv(...) * scale + shift + residual).

    Args:
        features, weight, neighbor_idx, allow_tf32: as for `sparse_conv`.
        scale, shift: [Cout] fp32 (fp64 for fp64 features) or None: a bias, or a batch normalization in evaluation mode.
        residual:     [M, Cout] or None, cast to the features' type.
        relu:         apply a ReLU.

    Returns:
        [M, Cout] in the features' type, computed in fp32 (fp64 for fp64 features) and rounded once.

    Not differentiable: raises AssertionError if a gradient is needed, or if shapes or types do not match.
    """
    features, *rest = _check_act(features, weight, neighbor_idx, scale, shift, residual)
    return _run_act(features, *rest, relu, allow_tf32, _on_reference(features))


def sparse_conv_act_ref(
    features, weight, neighbor_idx, scale=None, shift=None, residual=None, relu=False, allow_tf32=False
):  # fmt: skip
    """`sparse_conv_act` in plain PyTorch."""
    return _run_act(
        *_check_act(features, weight, neighbor_idx, scale, shift, residual), relu, allow_tf32, reference=True
    )  # fmt: skip


def _on_reference(features):
    return features.dtype == torch.float64 or not on_triton(features)


def _check(features, weight, neighbor_idx, rounded=None):
    """Check shapes and types; returns the features, cast under autocast."""
    fits = features.dim() == 2 and weight.dim() == 5 and features.shape[1] == weight.shape[4]
    assert fits, f"{tuple(features.shape)=} and {tuple(weight.shape)=} do not match"
    K, neighbor_idx = weight.shape[1:4].numel(), _tensor(neighbor_idx)
    fits = neighbor_idx.dim() == 2 and neighbor_idx.shape[0] == K
    assert fits, f"{tuple(neighbor_idx.shape)=} is not a table of {K} offsets"
    assert neighbor_idx.dtype == torch.int32, f"tables are int32, not {neighbor_idx.dtype}"
    assert features.is_floating_point() and weight.is_floating_point(), f"{features.dtype=}, {weight.dtype=}"
    if features.dtype != torch.float64 and torch.is_autocast_enabled(features.device.type):
        features = features.to(torch.get_autocast_dtype(features.device.type))
    if rounded is not None:
        fits = rounded.shape == weight.shape and rounded.dtype == features.dtype and not rounded.requires_grad
        assert fits, f"`rounded` is {tuple(rounded.shape)} {rounded.dtype}, not `weight` as {features.dtype}, detached"
    return features


def _check_inverse(features, neighbor_idx, inverse_idx):
    K, M, N = *_tensor(neighbor_idx).shape, len(features)
    if inverse_idx is None:
        assert M == N, f"a table of {M} outputs and {N} inputs needs inverse_idx"
    else:
        inverse_idx = _tensor(inverse_idx)
        assert inverse_idx.shape == (K, N), f"{tuple(inverse_idx.shape)=} is not a table of {K} offsets, {N} rows"
        assert inverse_idx.dtype == torch.int32, f"tables are int32, not {inverse_idx.dtype}"


def _check_act(features, weight, neighbor_idx, scale, shift, residual):
    features, shape = _check(features, weight, neighbor_idx), (_tensor(neighbor_idx).shape[1], weight.shape[0])
    assert all(v is None or v.shape == shape[1:] for v in (scale, shift)), f"scale and shift are [{shape[1]}] each"
    assert residual is None or residual.shape == shape, f"{tuple(residual.shape)=}, not {shape}"
    if torch.is_grad_enabled():
        tracked = any(t is not None and t.requires_grad for t in (features, weight, scale, shift, residual))
        assert not tracked, "sparse_conv_act has no gradient: use sparse_conv, or torch.no_grad()"
    return features, weight, neighbor_idx, scale, shift, None if residual is None else residual.to(features.dtype)


def _tensor(table):
    return table.idx if isinstance(table, NeighborTable) else table


def _run(features, weight, neighbor_idx, inverse_idx, allow_tf32, rounded, reference):
    options = allow_tf32, reference
    if torch.compiler.is_compiling():
        return _sparse_conv_op(features, weight, _tensor(neighbor_idx), _tensor(inverse_idx), *options)
    table = NeighborTable.of(neighbor_idx)
    rounded = weight.detach().to(features.dtype) if rounded is None else rounded
    if not torch.is_grad_enabled():
        return _forward(features, rounded, table, None, *options)
    inverse = None if inverse_idx is None else NeighborTable.of(inverse_idx)
    return SparseConv.apply(features, weight, rounded, table, inverse, *options)


def _run_act(features, weight, neighbor_idx, scale, shift, residual, relu, allow_tf32, reference):
    rest = scale, shift, residual, relu, allow_tf32, reference
    if torch.compiler.is_compiling():
        return _sparse_conv_act_op(features, weight, _tensor(neighbor_idx), *rest)
    return _forward_act(features, weight, neighbor_idx, *rest)


# Compiled code calls these three functions with tensors, through the `torch.library` ops below; eager mode calls them
# with `NeighborTable`s too


def _forward(
    features: Tensor, weight: Tensor, neighbor_idx: Tensor, inverse_idx: Tensor | None, allow_tf32: bool,
    reference: bool,
) -> Tensor:  # fmt: skip
    """`sparse_conv`; `inverse_idx` is not read: it is an argument so that autograd saves it for the backward."""
    table = NeighborTable.of(neighbor_idx)
    flat = weight.to(features.dtype).flatten(1, 3)  # [Cout, K, Cin]
    if reference:
        return gather_gemm_ref(features, flat.permute(1, 2, 0), table).to(features.dtype)
    return gather_gemm(features, flat, table, allow_tf32)


def _forward_act(
    features: Tensor, weight: Tensor, neighbor_idx: Tensor, scale: Tensor | None, shift: Tensor | None,
    residual: Tensor | None, relu: bool, allow_tf32: bool, reference: bool,
) -> Tensor:  # fmt: skip
    """`sparse_conv_act`."""
    table = NeighborTable.of(neighbor_idx)
    flat = weight.to(features.dtype).flatten(1, 3)  # [Cout, K, Cin]
    # if anything is empty, the reference runs: `gather_gemm` would return zeros, without shift and residual
    if not reference and min(*features.shape, *flat.shape, table.idx.shape[1]):
        given = (None if t is None else t.contiguous() for t in (scale, shift, residual))
        return gather_gemm(features, flat, table, allow_tf32, act=(*given, relu))

    def finish(out, rows):
        if scale is not None:
            out *= scale
        if shift is not None:
            out += shift
        if residual is not None:
            out += residual[rows]
        if relu:
            out.relu_()

    return gather_gemm_ref(features, flat.permute(1, 2, 0), table, finish).to(features.dtype)


def _backward(
    features: Tensor, weight: Tensor, neighbor_idx: Tensor, inverse_idx: Tensor | None, d_out: Tensor,
    for_features: bool, for_weight: bool, allow_tf32: bool, reference: bool, weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients w.r.t. the features and the weights; empty where not needed.

    weight_dtype: of the gradient; `weight` may be rounded.
    """
    mirrored = inverse_idx is None  # the inverse is neighbor_idx.flip(0): the same table, its offsets reversed
    table = NeighborTable.of(neighbor_idx)
    inverse = table if mirrored else NeighborTable.of(inverse_idx)
    flat = weight.to(features.dtype).flatten(1, 3)  # [Cout, K, Cin]
    if reference:
        d_features, d_weight = backward_ref(features, flat, d_out, inverse, mirrored, for_features, for_weight)
    else:
        if for_features:
            d_features = gather_gemm(d_out, flat, inverse, allow_tf32, mirrored, transposed=True)
        if for_weight:
            d_weight = d_weight_of([(features, d_out)], table, allow_tf32, submanifold=mirrored)
    return (
        d_features.to(features.dtype) if for_features else features.new_empty(0),
        d_weight.to(weight_dtype).reshape(weight.shape).contiguous()
        if for_weight
        else weight.new_empty(0, dtype=weight_dtype),
    )


# For torch.compile, which does not trace into these. Not used otherwise: a call costs tens of microseconds more than
# one of the function.
_sparse_conv_op = torch.library.custom_op("unipad::sparse_conv", _forward, mutates_args=())
_sparse_conv_act_op = torch.library.custom_op("unipad::sparse_conv_act", _forward_act, mutates_args=())
_sparse_conv_bwd_op = torch.library.custom_op("unipad::sparse_conv_bwd", _backward, mutates_args=())


@_sparse_conv_op.register_fake
def _(features, weight, neighbor_idx, inverse_idx, allow_tf32, reference):
    return features.new_empty(neighbor_idx.shape[1], weight.shape[0])


@_sparse_conv_act_op.register_fake
def _(features, weight, neighbor_idx, *_):
    return features.new_empty(neighbor_idx.shape[1], weight.shape[0])


@_sparse_conv_bwd_op.register_fake
def _(features, weight, neighbor_idx, inverse_idx, d_out, for_features, for_weight, allow_tf32, reference, dtype):
    d_features = features.new_empty(features.shape if for_features else 0)
    return d_features, weight.new_empty(weight.shape if for_weight else 0, dtype=dtype)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.allow_tf32, ctx.reference = inputs
    ctx.save_for_backward(*tensors)
    ctx.tables, ctx.weight_dtype = (), tensors[1].dtype  # the tables are among the tensors


def _gradients(ctx, d_out, backward):
    needed = ctx.needs_input_grad[:2]
    options = ctx.allow_tf32, ctx.reference, ctx.weight_dtype
    grads = backward(*ctx.saved_tensors, *ctx.tables, d_out, *needed, *options)
    return tuple(grad if need else None for grad, need in zip(grads, needed, strict=True))


def _compiled_gradients(ctx, d_out):
    return *_gradients(ctx, d_out, _sparse_conv_bwd_op), None, None, None, None


_sparse_conv_op.register_autograd(_compiled_gradients, setup_context=_setup_context)


class SparseConv(torch.autograd.Function):
    """`sparse_conv` in eager mode: neighbor_idx is a `NeighborTable`, inverse_idx another or None.

    Multiplies by `rounded`, the weights in the features' type, and saves only these.
    """

    # not `setup_context`: it costs the host more than all else here, since PyTorch inspects the signature in every call
    @staticmethod
    def forward(ctx, features, weight, rounded, table, inverse, allow_tf32, reference):
        ctx.save_for_backward(features, rounded)
        ctx.tables, ctx.weight_dtype = (table, inverse), weight.dtype
        ctx.allow_tf32, ctx.reference = allow_tf32, reference
        return _forward(features, rounded, table, inverse, allow_tf32, reference)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        return *_gradients(ctx, d_out, _backward), None, None, None, None, None
