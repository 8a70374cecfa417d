"""The order of the weights in `sdf_weights`; test_sdf_render.py tests the products that read it."""

import pytest
import torch

from tests.ahead_of_time import Launch
from unipad.kernels.sdf_weights import BLOCK, from_first_order, operands

H, LAYERS = 16, 3
# rows of the last layer, rows that are moved behind all others: of the distance MLP and the color MLP
KINDS = [(H, 1), (16, 0)]
STRIDE = 64  # of the distance MLP with 32 channels
SIZES = dict(ROWS=97, STRIDE=STRIDE, LAYERS=6, H=16, LAST=16, BLOCK=BLOCK)
LAUNCHES = [
    Launch("_reorder_kernel", SIZES | dict(ROUND=True, BACK=False), elements=("fp32",), registers=64),
    Launch("_reorder_kernel", SIZES | dict(ROUND=False, BACK=True), elements=("fp32",), registers=64, shared=4096),
]


def make_packed(last, extra, device):
    """A packed MLP whose entries are 1000 row + column, exact in tf32 up to 2047."""
    rows = (LAYERS - 1) * H + last + extra
    return (1000.0 * torch.arange(rows)[:, None] + torch.arange(STRIDE)).to(device)


def bits(value, positions):
    """The number whose bits, the highest first, are the bits of `value` at these positions."""
    return sum((value >> p & 1) << i for i, p in enumerate(reversed(positions)))


@pytest.mark.parametrize("last, extra", KINDS)
def test_orders_are_those_of_the_header(last, extra, device):
    packed = make_packed(last, extra, device)
    first, second = operands(packed, LAYERS, H, last, "tf32x3").cpu()
    for l in range(LAYERS):
        row0 = l * H + (extra if l == LAYERS - 1 else 0)
        for i in range(H * STRIDE):  # every layer has 16 rows here: no bits n4...
            where, low = l * H * STRIDE + i, i % 128
            k_high = i // 128 * 8
            # of the first order: n2 n1 n0 k2 k1 n3 k0
            n, k = bits(low, [1, 6, 5, 4]), k_high + bits(low, [3, 2, 0])
            assert first.flatten()[where] == 1000 * (row0 + n) + k
            # of the second: k2 k1 k0 n2 n1 n3 n0
            n, k = bits(low, [1, 3, 2, 0]), k_high + bits(low, [6, 5, 4])
            assert second.flatten()[where] == 1000 * (row0 + n) + k
    if extra:
        assert torch.equal(first[-1], packed[(LAYERS - 1) * H].cpu()) and torch.equal(second[-1], first[-1])


@pytest.mark.parametrize("last, extra", KINDS)
def test_a_gradient_in_the_first_order_is_packed_again(last, extra, device):
    packed = torch.randn_like(make_packed(last, extra, device))
    ordered = operands(packed, LAYERS, H, last, "tf32x3")[0]
    assert torch.equal(from_first_order(ordered.contiguous(), LAYERS, H, last), packed)


def test_weights_are_rounded_to_tf32(device):
    packed = torch.full((2 * H + 16, STRIDE), 1 + 2.0**-11, device=device)  # halfway: away from 0
    packed[:, 1::2] = -(1 + 2.0**-12)  # below half: towards 0
    values = operands(packed, 3, H, 16, "tf32").unique()
    assert values.tolist() == [-1.0, 1 + 2.0**-10]
