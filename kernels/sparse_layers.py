"""Layers of sparse convolution, batch norm, residual and ReLU, one after the other, in one op for training.

    x_l = conv_l(y_{l-1}),  y_l = relu(norm_l(x_l) + residual)     l = 1 .. L, y_0 = features; residual: y_{l-2} or none

A convolution also computes the sums over its rows that the norm next to it needs: in the forward, the moments of x_l;
in the backward, from dL/dy_l before it is stored, the sums of the norm's gradient (kernels/norm_relu.py). So a layer
takes two launches forward and two backward; another two compute the gradients of the weights of all consecutive layers
with the same table and channels.

Sizes: N rows of the features, M of the result; for one layer, I and O channels, K offsets of its kernel.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from unipad.kernels.backend import on_triton
from unipad.kernels.norm_relu import check_running, norm_relu_bwd, norm_relu_fwd, norm_relu_ref
from unipad.kernels.sparse_conv import sparse_conv_ref
from unipad.kernels.sparse_gemm import d_weight_of, gather_gemm
from unipad.kernels.sparse_tiles import NeighborTable


class Layer(NamedTuple):
    """Arguments of a layer; unless stated otherwise as for `sparse_conv` and `norm_relu`."""

    weight: Tensor  # [O, kz, ky, kx, I]
    norm_weight: Tensor  # [O]
    norm_bias: Tensor  # [O]
    table: NeighborTable
    inverse: NeighborTable | None
    eps: float
    running: tuple[Tensor, Tensor, Tensor] | None = None
    momentum: float = 0.1
    skips: bool = False  # adds the input of the layer before it, which has the shape of this layer's output
    allow_tf32: bool = False
    rounded: Tensor | None = None  # `weight` in the features' type


def sparse_layers(
    features: Tensor, layers: list[Layer], residual: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Features of N voxels through at least one layer to those of M voxels.

    Args:
        features: [N, I of the first layer] fp16, bf16 or fp32; fp64 runs the reference.
        layers:   each takes what the one before it returns. The first cannot skip.
        residual: [M, O] or None, is cast to the features' type and added by the last layer, which then does not skip.
        dtype:    of the result; None: the features'.

    Returns:
        [M, O of the last layer]. Every convolution and every norm with its ReLU rounds to the features' type.

    Differentiable once w.r.t. features, residual, and the weights and biases of all layers. Accumulates in fp32.
    Autocast casts the features. Deterministic. Not for compiled code. Running statistics are updated in place; without
    rows they are unchanged. Until its backward, an op holds what the backward reads of all of its layers: the result of
    each convolution and of each norm. Raises AssertionError if shapes or types do not match.
    """
    features, residual = _check(features, layers, residual)
    on_reference = features.dtype == torch.float64 or not on_triton(features)
    if on_reference or not min(len(features), *(layer.table.idx.shape[1] for layer in layers)):
        return _reference(features, layers, residual, dtype)
    layers = [
        layer if layer.rounded is not None else layer._replace(rounded=layer.weight.detach().to(features.dtype))
        for layer in layers
    ]
    parameters = [t for layer in layers for t in (layer.weight, layer.norm_weight, layer.norm_bias)]
    return SparseLayers.apply(features, residual, layers, dtype, *parameters)


def sparse_layers_ref(features, layers, residual=None, dtype=None):
    """`sparse_layers` in plain PyTorch."""
    features, residual = _check(features, layers, residual)
    return _reference(features, layers, residual, dtype)


def _check(features, layers, residual):
    """Features and residual in the type that is computed in, after checks."""
    assert features.dim() == 2 and features.is_floating_point(), f"features {tuple(features.shape)} {features.dtype}"
    if features.dtype != torch.float64 and torch.is_autocast_enabled(features.device.type):
        features = features.to(torch.get_autocast_dtype(features.device.type))
    before, (N, I) = None, features.shape  # before: shape of the input of the layer before
    for layer in layers:
        assert layer.weight.dim() == 5 and layer.weight.is_floating_point(), (
            f"weights are [O, kz, ky, kx, I] of a floating type, not {tuple(layer.weight.shape)} {layer.weight.dtype}"
        )
        O, *_, C = layer.weight.shape
        K, M = layer.table.idx.shape
        assert C == I, f"a layer of {C} input channels follows {I} channels"
        assert K == layer.weight.shape[1:4].numel(), f"a table of {K} offsets for weights {tuple(layer.weight.shape)}"
        inverse = layer.table if layer.inverse is None else layer.inverse
        fits = inverse.idx.shape == (K, N)
        dtypes = layer.table.idx.dtype, inverse.idx.dtype
        assert dtypes == (torch.int32, torch.int32), f"tables are int32, not {dtypes}"
        assert fits, f"the inverse table is {tuple(inverse.idx.shape)}, not {(K, N)}, of {K} offsets and {N} rows"
        assert layer.norm_weight.shape == layer.norm_bias.shape == (O,), f"weight and bias of the norm are not [{O}]"
        check_running(layer.running, O)
        assert not layer.skips or before == (M, O), f"a layer of [{M}, {O}] cannot add {before}"
        rounded = layer.rounded
        fits = rounded is None or (rounded.shape == layer.weight.shape and rounded.dtype == features.dtype)
        assert fits and not getattr(rounded, "requires_grad", False), f"`rounded` is not {features.dtype}, detached"
        before, (N, I) = (N, I), (M, O)
    fits = residual is None or (residual.shape == (N, I) and not layers[-1].skips)
    assert fits, f"the last layer adds either a residual [{N}, {I}] or the input of a layer"
    return features, None if residual is None else residual.to(features.dtype)


def _reference(features, layers, residual, dtype):
    before, x = None, features
    for layer in layers:
        out = sparse_conv_ref(x, layer.weight, layer.table, layer.inverse, layer.allow_tf32, layer.rounded)
        added = before if layer.skips else residual if layer is layers[-1] else None
        norm = layer.norm_weight, layer.norm_bias, layer.eps
        before, x = x, norm_relu_ref(out, *norm, added, layer.running, layer.momentum)
    return x if dtype is None else x.to(dtype)


class SparseLayers(torch.autograd.Function):
    """`sparse_layers`; parameters: weight, norm_weight and norm_bias of each layer, as autograd has to see them."""

    @staticmethod
    def forward(ctx, features, residual, layers, dtype, *parameters):
        before, y = None, features.contiguous()
        saved = [y]
        for l, layer in enumerate(layers):
            is_last = l == len(layers) - 1
            x, moments = gather_gemm(y, layer.rounded.flatten(1, 3), layer.table, layer.allow_tf32, with_moments=True)
            added = before if layer.skips else residual if is_last else None
            before = y
            y, statistics = norm_relu_fwd(
                x, layer.norm_weight, layer.norm_bias, layer.eps, added, layer.running, layer.momentum, moments,
                dtype if is_last else None,
            )  # fmt: skip
            saved += [layer.rounded, layer.norm_weight, x, statistics, y]
        ctx.layers, ctx.has_residual = layers, residual is not None
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_y):
        layers, (features, *saved) = ctx.layers, ctx.saved_tensors
        saved = [saved[i : i + 5] for i in range(0, len(saved), 5)]  # of each layer
        needs_features, _, _, _, *needs_parameter = ctx.needs_input_grad
        d_parameters, d_features, d_residual = [None] * len(needs_parameter), None, None
        sums = None  # of the norm's gradient, see `norm_relu_bwd`
        d_skipped = None  # gradient of the layer's input from the layer after it, which adds that input
        pending = {}  # number of a layer -> (its input, dL/dx); their weights' gradients are computed together
        # the first layer with a gradient that is needed; a residual's is the last layer's
        needed = (i // 3 for i, needs in enumerate(needs_parameter) if needs)
        first = 0 if needs_features else min(needed, default=len(layers) - 1)
        for l, layer in reversed(list(enumerate(layers))[first:]):
            rounded, norm_weight, x, statistics, y = saved[l]
            mirrored = layer.inverse is None
            adds = layer.skips or (ctx.has_residual and l == len(layers) - 1)
            d_x, *d_norm, d_added = norm_relu_bwd(d_y, x, y, norm_weight, statistics, adds, sums)
            d_parameters[3 * l + 1 : 3 * l + 3] = d_norm
            if adds and not layer.skips:
                d_residual = d_added
            if needs_parameter[3 * l]:
                pending[l] = saved[l - 1][-1] if l else features, d_x
            if pending and not (l > first and len(pending) < MAX_ALIKE and _alike(layer, layers[l - 1])):
                d_weights = d_weight_of(list(pending.values()), layer.table, layer.allow_tf32, submanifold=mirrored)
                for i, d_weight in zip(pending, d_weights, strict=True):
                    # one of fp32 is a view: as long as it lives, so do those of the layers computed with it
                    d_parameters[3 * i] = d_weight.view_as(layer.weight).to(layer.weight.dtype)
                pending = {}
            inverse, act = layer.table if mirrored else layer.inverse, (None, None, d_skipped, False)
            gemm = partial(gather_gemm, d_x, rounded.flatten(1, 3), inverse, layer.allow_tf32, mirrored, True, act)
            if l > first:
                _, _, *norm = saved[l - 1]  # x, statistics and y, whose gradient is computed
                d_y, sums = gemm(norm=norm)
            elif needs_features:
                d_features = gemm()
            d_skipped = d_added if layer.skips else None
        return d_features, d_residual, None, None, *d_parameters


MAX_ALIKE = 4  # layers, as in a stage of two blocks: partial sums of more would not stay in the L2


def _alike(layer, other):
    """Whether the gradients of their weights are computed by one launch."""
    same = layer.table is other.table and layer.inverse is other.inverse and layer.allow_tf32 == other.allow_tf32
    return same and layer.weight.shape == other.weight.shape
