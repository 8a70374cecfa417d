"""sparse_layers: the layers of two residual blocks at the stages of the LiDAR recipe: one op, its reference, and
`sparse_conv` and `norm_relu` one after the other.

    python -m benchmarks.bench_sparse_layers

Neighbor tables are built once (benchmarks/bench_sparse_conv.py times them).
"""

import torch

from benchmarks.bench_sparse_conv import AGREE_DEEP, DTYPE, KERNEL, WIDTHS, stages
from benchmarks.harness import DEVICE, Case, compare
from unipad.kernels.norm_relu import norm_relu
from unipad.kernels.sparse_conv import sparse_conv
from unipad.kernels.sparse_layers import Layer, sparse_layers, sparse_layers_ref

LAYERS = 4  # of two blocks: every second one adds the input of the layer before it
EPS = 1e-3  # of the encoder's norms


def case(level, width):
    N = len(level.coords)
    features = torch.randn(N, width, device=DEVICE).to(DTYPE).requires_grad_()
    # an output sums about 14 neighbors, so that convolutions keep the variance
    weights = [torch.randn(width, *KERNEL, width, device=DEVICE) / (14 * width) ** 0.5 for _ in range(LAYERS)]
    norm_weights = [torch.ones(width, device=DEVICE) for _ in range(LAYERS)]
    # keeps the ReLUs' inputs away from 0, where rounding decides whether a gradient passes
    norm_biases = [torch.full((width,), 8.0, device=DEVICE) for _ in range(LAYERS)]
    weights = [w.to(DTYPE).requires_grad_() for w in weights]  # the only parameters compared: see `Encoders`
    # of a layer: reads features and weights, writes x, reads it, writes y; every second one reads a residual
    moved = int(LAYERS * (4.5 * features.nbytes + weights[0].nbytes))
    return Case(f"{level.name} C={width} N={N}", (features, weights, norm_weights, norm_biases, level), moved)


def in_one(op):
    def run(features, weights, norm_weights, norm_biases, level):
        parameters = zip(weights, norm_weights, norm_biases, strict=True)
        layers = [Layer(*p, *level.tables(), eps=EPS, skips=l % 2 == 1) for l, p in enumerate(parameters)]
        return op(features, layers)

    return run


def one_by_one(features, weights, norm_weights, norm_biases, level):
    """As before the op existed, without the moments from the convolution."""
    before, y = None, features
    for l, (weight, *norm) in enumerate(zip(weights, norm_weights, norm_biases, strict=True)):
        x = sparse_conv(y, weight, *level.tables())
        before, y = y, norm_relu(x, *norm, EPS, before if l % 2 else None)
    return y


def main():
    for batch in [1, 4] if DEVICE == "cuda" else [1]:
        cases = [case(*sized) for sized in zip(stages(batch), WIDTHS, strict=True)]
        reference = in_one(sparse_layers_ref)  # with fp64 inputs also the true values
        peers = {"one by one": one_by_one}
        compare("sparse_layers", reference, in_one(sparse_layers), peers, cases, agree=AGREE_DEEP, exact=reference)


if __name__ == "__main__":
    main()
