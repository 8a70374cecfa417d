"""The order of the weights in `sdf_weights`; test_sdf_render.py tests the products that read it."""

import pytest
import torch

from tests.kernels.test_sdf_pack import inputs_of
from unipad.kernels.sdf_pack import pack, pack_ref


def bits(value, positions):
    """The number whose bits, the highest first, are the bits of `value` at these positions."""
    return sum((value >> p & 1) << i for i, p in enumerate(reversed(positions)))


@pytest.mark.parametrize("hidden", [16, 32])
@pytest.mark.parametrize("fn", [pack, pack_ref])
def test_orders_are_those_of_the_header(fn, hidden, device):
    """The distance MLP, of which the matrix by rows is packed too."""
    inputs = inputs_of(device, hidden=hidden, sdf_layers=2, rgb_layers=0)
    inputs["sdf_mlp"] = [t.float() for t in inputs["sdf_mlp"]]
    packed = fn(**inputs, exact=True)
    rows, (first, second) = packed.sdf.cpu(), packed.sdf_w.cpu().flatten(1)
    stride = rows.shape[1]
    assert rows.unique().numel() > 0.7 * (hidden * (32 + 4) + (hidden + 1) * (hidden + 32 + 1))  # hardly any are equal
    groups = hidden // 16  # of rows
    for l in range(2):
        for i in range(hidden * stride):
            where, low = l * hidden * stride + i, i % 128
            k_high, n_high = i // 128 // groups * 8, l * hidden + l + i // 128 % groups * 16  # l: the distance's row
            # of the first order: n2 n1 n0 k2 k1 n3 k0
            assert first[where] == rows[n_high + bits(low, [1, 6, 5, 4]), k_high + bits(low, [3, 2, 0])]
            # of the second: k2 k1 k0 n2 n1 n3 n0
            assert second[where] == rows[n_high + bits(low, [1, 3, 2, 0]), k_high + bits(low, [6, 5, 4])]
    assert torch.equal(first[-stride:], rows[hidden]) and torch.equal(second[-stride:], rows[hidden])
