import pytest
import torch

from tests.ahead_of_time import Launch
from tests.check import check_against_ref
from unipad.kernels.composite import composite, composite_ref

LAUNCHES = [
    Launch(kernel, blocks, dict(trans_ptr="*fp32"), divisible, num_warps=1, registers=registers, shared=128)
    for kernel, blocks, divisible, registers in [
        ("_composite_fwd_kernel", dict(BLOCK_C=4, BLOCK_R=32), (), 64),
        ("_composite_fwd_kernel", dict(BLOCK_C=32, BLOCK_R=16), ("S", "C"), 96),
        ("_composite_bwd_kernel", dict(BLOCK_C=4, BLOCK_R=32), (), 64),
        ("_composite_bwd_kernel", dict(BLOCK_C=32, BLOCK_R=16), ("S", "C"), 112),
    ]
]


def make_inputs(R, S, C, device):
    alpha = torch.rand(R, S, device=device, dtype=torch.float64)
    return dict(alpha=alpha, values=torch.randn(R, S, C, device=device, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "R, S, C",
    [
        (1, 1, 1),
        (7, 5, 3),  # odd sizes
        (32, 24, 3),  # exactly one block
        (33, 24, 32),  # one ray more than two blocks, of 16 rays with this many channels
        (5, 7, 65),  # blocks of 4 rays, so that the tile of rays x channels stays small
        (0, 24, 3),  # no rays
        (5, 0, 3),  # no samples
        (5, 24, 0),  # no channels
    ],
)
def test_matches_reference(R, S, C, dtype, device):
    check_against_ref(composite, composite_ref, make_inputs(R, S, C, device), dtype)


def test_by_hand(device):
    """Worked on paper, with the symbols of composite.py: T = 1, .5, 0; w = .5, .5, 0.

    Tolerances allow for the 1e-7 that an opaque sample transmits.
    """
    alpha = torch.tensor([[0.5, 1.0, 0.7]], device=device)
    values = torch.tensor([[[2.0], [4.0], [100.0]]], device=device)
    out, weights = composite(alpha, values)
    torch.testing.assert_close(out, torch.tensor([[3.0]], device=device), rtol=0, atol=1e-5)
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0.0]], device=device), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fn", [composite, composite_ref])
def test_opaque_samples_transmit_epsilon(fn, device):
    """Three opaque samples, worked on paper, e = 1e-7: w = 1, e, e^2 and d(sum w) / d alpha = -e, 0, e^2."""
    alpha = torch.ones(1, 3, device=device, dtype=torch.float64, requires_grad=True)
    out, weights = fn(alpha, torch.ones_like(alpha)[..., None])
    (d_alpha,) = torch.autograd.grad(out, alpha)
    torch.testing.assert_close(weights, alpha.new_tensor([[1, 1e-7, 1e-14]]), rtol=1e-7, atol=0)
    torch.testing.assert_close(d_alpha, alpha.new_tensor([[-1e-7, 0, 1e-14]]), rtol=1e-7, atol=1e-15)


def test_opaque_and_empty_samples_match_reference(device):
    """alpha == 1 and alpha == 0, where formulas that divide by 1 - alpha or by alpha break."""
    inputs = make_inputs(4, 6, 2, device)
    inputs["alpha"][:, 2] = 1.0
    inputs["alpha"][:, 4] = 0.0
    check_against_ref(composite, composite_ref, inputs, torch.float32)


def test_gradcheck(device):
    inputs = {k: v.requires_grad_() for k, v in make_inputs(3, 4, 2, device).items()}
    torch.autograd.gradcheck(composite, tuple(inputs.values()))


def test_rejects_mismatched_shapes(device):
    with pytest.raises(AssertionError, match="does not match"):
        composite(torch.rand(2, 3, device=device), torch.rand(2, 4, 3, device=device))
