"""Convolutions and poolings of random geometries compared with PyTorch's dense ones: outputs and all gradients."""

import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import unipad.spconv as spconv

POOLINGS = ("max", "mean", "submanifold max")
KINDS = ("submanifold", "strided", "transposed", "inverse", *POOLINGS)
CASES, PER_TEST = 500, 25
CONV = F.conv1d, F.conv2d, F.conv3d
CONV_TRANSPOSE = F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d
MAX_POOL = F.max_pool1d, F.max_pool2d, F.max_pool3d


class Case:
    """A random geometry, and a sparse tensor of random voxels: samples may be empty, also all."""

    def __init__(self, seed):
        rng, self.seed = random.Random(seed), seed
        self.kind = KINDS[seed % len(KINDS)]
        self.ndim = n = rng.choice([1, 2, 3])
        self.kernel = [rng.choice([1, 1, 2, 3, 3, 4]) for _ in range(n)] if seed % 10 else [1] * n
        self.stride = [rng.choice([1, 1, 2, 3]) for _ in range(n)] if seed % 20 else [1] * n
        self.dilation = [rng.choice([1, 1, 2, 3]) for _ in range(n)]
        self.padding = [rng.choice([0, 0, 1, 2]) for _ in range(n)] if seed % 20 else [0] * n
        # large enough for at least one output
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        self.shape = [max(1, r - 2 * p) + rng.randrange(6) for r, p in zip(reach, self.padding, strict=True)]
        if self.kind == "transposed":  # whose output also shrinks by the padding
            self.shape = [s + 2 * p for s, p in zip(self.shape, self.padding, strict=True)]
        self.batch_size, self.channels = rng.choice([1, 2, 3]), (rng.choice([1, 2, 5]), rng.choice([1, 3, 4]))
        generator = torch.Generator().manual_seed(seed)
        occupied = torch.rand(self.batch_size, *self.shape, generator=generator) < rng.choice([0.1, 0.3, 0.7])
        for sample in range(self.batch_size):
            occupied[sample] &= rng.random() < 0.8
        indices = occupied.nonzero().int()
        self.indices = indices[torch.randperm(len(indices), generator=generator)]
        features = torch.randn(len(indices), self.channels[0], generator=generator, dtype=torch.float64)
        self.features = features.requires_grad_()

    def __str__(self):
        names = "kind", "kernel", "stride", "padding", "dilation", "shape", "batch_size", "channels"
        return f"case {self.seed}: " + ", ".join(f"{name} {getattr(self, name)}" for name in names)

    def tensor(self, features):
        return spconv.SparseConvTensor(features, self.indices, self.shape, self.batch_size)

    def layer(self, name, *args, **kwargs):
        return getattr(spconv, f"{name}{self.ndim}d")(*args, **kwargs).double()

    def window(self):
        return dict(stride=self.stride, padding=self.padding, dilation=self.dilation)


def cells(features, indices, shape, batch_size, empty=0.0):
    """[B, C, ...] with `empty` in cells without a voxel."""
    dense = features.new_full((batch_size, *shape, features.shape[1]), empty)
    return dense.index_put(tuple(indices.long().unbind(1)), features).movedim(-1, 1)


def dense_weight(conv, pointwise):
    """(Cout, Cin, *kernel), as PyTorch has it. A pointwise weight's memory is a matrix (Cin, Cout), as in spconv."""
    if pointwise:
        matrix = conv.weight.reshape(conv.in_channels, conv.out_channels).t()
        return matrix.reshape(conv.out_channels, conv.in_channels, *conv.kernel_size)
    return conv.weight.movedim(-1, 1)


def reached(convolve, case, occupied):
    """Which cells of the output at least one voxel reaches."""
    return convolve(occupied, occupied.new_ones(1, 1, *case.kernel), **case.window()) > 0.5


def submanifold_padding(case):
    """Arguments of `F.pad` with which offset k // 2 is at the output voxel."""
    pairs = [(k // 2 * d, (k - 1 - k // 2) * d) for k, d in zip(case.kernel, case.dilation, strict=True)]
    return [n for pair in reversed(pairs) for n in pair]


def convolution(case, x):
    """(sparse result, dense result, which cells are voxels, parameters)"""
    n, channels, window = case.ndim - 1, case.channels, case.window()
    conv, conv_transpose = CONV[n], CONV_TRANSPOSE[n]
    dense = cells(x.features, case.indices, case.shape, case.batch_size)
    occupied = cells(torch.ones_like(x.features[:, :1]), case.indices, case.shape, case.batch_size)
    ones = all(k == 1 for k in case.kernel)
    if case.kind == "submanifold":
        layer = case.layer("SubMConv", *channels, case.kernel, dilation=case.dilation)
        padded = F.pad(dense, submanifold_padding(case))
        expected = conv(padded, dense_weight(layer, ones), layer.bias, dilation=case.dilation)
        return layer(x), expected, occupied > 0, list(layer.parameters())
    if case.kind == "inverse":
        down = case.layer("SparseConv", channels[0], 2, case.kernel, **window, indice_key="down")
        up = case.layer("SparseInverseConv", 2, channels[1], case.kernel, indice_key="down")
        pointwise = ones and set(case.stride) == {1} and set(case.padding) == {0}
        coarse = conv(dense, dense_weight(down, pointwise), down.bias, **window) * reached(conv, case, occupied)
        weight = dense_weight(up, ones).transpose(0, 1)
        expected = conv_transpose(coarse, weight, stride=case.stride, dilation=case.dilation)
        # now cell p is cell 0 of the input, and the last cells may be missing, which no window covers
        for axis, (p, size) in enumerate(zip(case.padding, case.shape, strict=True), 2):
            missing = expected.new_zeros(size + p, *expected.transpose(0, axis).shape[1:]).transpose(0, axis)
            expected = torch.cat([expected, missing], dim=axis).narrow(axis, p, size)
        expected = expected + up.bias.view(-1, *[1] * case.ndim)
        return up(down(x)), expected, occupied > 0, [*down.parameters(), *up.parameters()]
    name, dense_conv = {"strided": ("SparseConv", conv), "transposed": ("SparseConvTranspose", conv_transpose)}[
        case.kind
    ]
    layer = case.layer(name, *channels, case.kernel, **window)
    weight = dense_weight(layer, ones and set(case.stride) == {1} and set(case.padding) == {0})
    weight = weight.transpose(0, 1) if case.kind == "transposed" else weight
    expected = dense_conv(dense, weight, layer.bias, **window)
    return layer(x), expected, reached(dense_conv, case, occupied), list(layer.parameters())


def pooling(case, x):
    """As `convolution`."""
    n, window, submanifold = case.ndim - 1, case.window(), case.kind == "submanifold max"
    occupied = cells(torch.ones_like(x.features[:, :1]), case.indices, case.shape, case.batch_size)
    if case.kind == "mean":
        layer, C = case.layer("SparseAvgPool", case.kernel, **window), x.features.shape[1]
        dense = cells(x.features, case.indices, case.shape, case.batch_size)
        ones = dense.new_ones(C, 1, *case.kernel)
        count = CONV[n](occupied, ones[:1], **window)
        return layer(x), CONV[n](dense, ones, groups=C, **window) / count.clamp(min=1), count > 0.5, []
    layer = case.layer("SparseMaxPool", case.kernel, **window, subm=submanifold)
    dense = cells(x.features, case.indices, case.shape, case.batch_size, empty=-torch.inf)
    pads = [p for p in reversed(case.padding) for _ in range(2)]
    padded = F.pad(dense, submanifold_padding(case) if submanifold else pads, value=-torch.inf)
    expected = MAX_POOL[n](padded, case.kernel, 1 if submanifold else case.stride, dilation=case.dilation)
    return layer(x), expected, occupied > 0 if submanifold else reached(CONV[n], case, occupied), []


def check(case):
    x = case.tensor(case.features)
    out, expected, active, parameters = (pooling if case.kind in POOLINGS else convolution)(case, x)
    ours = out.dense()
    assert ours.shape == expected.shape and out.indices.shape[1] == 1 + case.ndim
    voxels = {tuple(v) for v in active[:, 0].nonzero().tolist()}
    assert {tuple(v) for v in out.indices.tolist()} == voxels and len(out.indices) == len(voxels)
    expected = torch.where(active, expected, 0)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    d_out = torch.randn_like(expected)
    grad = partial(torch.autograd.grad, inputs=[case.features, *parameters], grad_outputs=d_out)
    for a, b in zip(grad(ours), grad(expected), strict=True):
        largest = max([1.0, *b.abs().flatten().tolist()])
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * largest)


@pytest.mark.parametrize("first", range(0, CASES, PER_TEST))
def test_matches_dense_layers(first):
    for seed in range(first, first + PER_TEST):
        torch.manual_seed(seed)
        case = Case(seed)
        try:
            check(case)
        except Exception as error:
            raise AssertionError(str(case)) from error


def test_the_cases_have_all_kinds():
    cases = [Case(seed) for seed in range(CASES)]
    for kind in KINDS:
        for ndim in (1, 2, 3):
            of_kind = [c for c in cases if (c.kind, c.ndim) == (kind, ndim)]
            assert len(of_kind) > 5, (kind, ndim)
            assert any(len(c.indices) == 0 for c in of_kind) or ndim > 1
    samples = [set(c.indices[:, 0].tolist()) for c in cases]
    assert sum(0 < len(s) < c.batch_size for s, c in zip(samples, cases, strict=True)) > 50  # some samples are empty
    assert sum(not s for s in samples) > 10  # all are
    assert sum(set(c.kernel) == {1} for c in cases) > 50
    assert sum(max(c.dilation) > 1 for c in cases) > 200 and sum(max(c.padding) > 0 for c in cases) > 200
