import math

import pytest
import torch

from tests.ahead_of_time import Launch
from tests.check import check_against_ref
from unipad.kernels.sdf_alpha import (
    interval_alpha,
    laplace_density,
    neus_alpha,
    neus_alpha_ref,
    unisurf_alpha,
    volsdf_alpha,
    volsdf_alpha_ref,
)

LAUNCHES = [  # checked by tests/test_compiles.py
    Launch("_neus_alpha_fwd_kernel", dict(BLOCK=512), registers=40),
    Launch("_neus_alpha_bwd_kernel", dict(BLOCK=512), types={"d_inv_s_ptr": "*fp32"}, registers=64, shared=2048),
    Launch("_volsdf_alpha_fwd_kernel", dict(BLOCK=512), registers=40),
    Launch("_volsdf_alpha_bwd_kernel", dict(BLOCK=512), types={"d_beta_ptr": "*fp32"}, registers=40, shared=16),
]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
SHAPES = pytest.mark.parametrize(
    "R, S",
    [
        (1, 1),
        (7, 5),  # odd sizes
        (16, 32),  # exactly one block
        (27, 19),  # one sample more than a block
        (0, 96),  # no rays
    ],
)
# An opacity is a difference of two numbers up to 1 (CDFs, or 1 and an exponential), whose rounding errors remain where
# it is small. If all opacities are below this, as may happen with one sample, the tolerance is a fraction of this.
MAGNITUDE = 0.1


def normal(*shape, device):
    """In fp64, which `check_against_ref` casts to each type."""
    return torch.randn(*shape, device=device, dtype=torch.float64)


def neus_inputs(R, S, device, inv_s=20.0):
    return dict(
        sdf=normal(R, S, device=device) / 10,
        gradient=normal(R, S, 3, device=device),
        directions=torch.nn.functional.normalize(normal(R, 3, device=device), dim=1),
        deltas=normal(R, S, device=device).abs() / 10,
        inv_s=torch.tensor([inv_s], device=device, dtype=torch.float64),
    )


def volsdf_inputs(R, S, device, beta=0.1):
    return dict(
        sdf=normal(R, S, device=device) / 10,
        deltas=normal(R, S, device=device).abs() / 10,
        beta=torch.tensor([beta], device=device, dtype=torch.float64),
    )


@DTYPES
@SHAPES
def test_neus_alpha_matches_reference(R, S, dtype, device):
    inputs, wrt = neus_inputs(R, S, device), ["sdf", "gradient", "inv_s"]
    check_against_ref(neus_alpha, neus_alpha_ref, inputs, dtype, wrt, magnitude=MAGNITUDE)


@DTYPES
@SHAPES
def test_volsdf_alpha_matches_reference(R, S, dtype, device):
    check_against_ref(
        volsdf_alpha, volsdf_alpha_ref, volsdf_inputs(R, S, device), dtype, wrt=["sdf", "beta"], magnitude=MAGNITUDE
    )


def test_rays_without_samples_match_reference(device):
    check_against_ref(neus_alpha, neus_alpha_ref, neus_inputs(5, 0, device), torch.float32, wrt=["sdf", "inv_s"])
    check_against_ref(volsdf_alpha, volsdf_alpha_ref, volsdf_inputs(5, 0, device), torch.float32, wrt=["sdf", "beta"])


@pytest.mark.parametrize("fn", [neus_alpha, neus_alpha_ref])
def test_neus_alpha_by_hand(fn, device):
    """Three rays: towards the surface (slope -1), away from it and along it; intervals of length 2, sdf 0, inv_s ln 3.

    With the symbols of sdf_alpha.py, e = 1e-5. Towards: prev = 1, next = -1, P = 3/4, N = 1/4,
    alpha = (1/2 + e) / (3/4 + e). The others: P = N = 1/2, alpha = e / (1/2 + e).
    """
    gradient = torch.tensor([[[0.0, 0, -1]], [[0.0, 0, 1]], [[1.0, 0, 0]]], device=device, dtype=torch.float64)
    directions = torch.tensor([[0.0, 0, 1]] * 3, device=device, dtype=torch.float64)
    deltas = gradient.new_full((3, 1), 2.0)
    inv_s = gradient.new_tensor([3.0]).log()
    alpha = fn(gradient.new_zeros(3, 1), gradient, directions, deltas, inv_s)
    expected = gradient.new_tensor([[0.50001 / 0.75001], [1e-5 / 0.50001], [1e-5 / 0.50001]])
    torch.testing.assert_close(alpha, expected, rtol=1e-12, atol=0)


def test_interval_alpha_by_hand(device):
    """SDF 1, 0, 1, -3 at unit distances: slopes -1, 1, -4; the smaller of each and its predecessor: -1, -1, -4."""
    sdf = torch.tensor([[1.0, 0, 1, -3]], device=device, dtype=torch.float64)
    alpha = interval_alpha(sdf, torch.full_like(sdf, 1.0), inv_s=torch.tensor(3.0).log().item())

    # sigmoid of ln 3, 0 and -3 ln 3: 3/4, 1/2, 1/28
    by_hand = [0.25001 / 0.75001, 0.25001 / 0.75001, (3 / 4 - 1 / 28 + 1e-5) / 0.75001, 0]
    torch.testing.assert_close(alpha, sdf.new_tensor([by_hand]), rtol=2e-5, atol=0)  # slope = difference / (1 + 1e-5)


def test_interval_alpha_of_coincident_samples_is_finite(device):
    """The SDF jumps in an interval of length 0: the slope is clipped to -1000, and the next interval inherits it."""
    sdf = torch.tensor([[0.5, -0.5, -0.5, -0.5]], device=device)
    alpha = interval_alpha(sdf, torch.tensor([[0.0, 1.0, 1.0, 1.0]], device=device), inv_s=64.0)
    torch.testing.assert_close(alpha[0, 0].item(), 1e-5 / 0.50001, rtol=1e-5, atol=0)
    torch.testing.assert_close(alpha[0, 1].item(), 1.0, rtol=1e-5, atol=0)
    assert alpha[0, 3] == 0


@pytest.mark.parametrize("fn", [volsdf_alpha, volsdf_alpha_ref])
def test_volsdf_alpha_by_hand(fn, device):
    """beta = 1/2: density 2 (1 - e^-0.5 / 2) at sdf -1/4, inside; 1 at the surface; e^-1 at sdf 1/2, outside."""
    sdf = torch.tensor([[-0.25, 0.0, 0.5]], device=device, dtype=torch.float64)
    alpha = fn(sdf, deltas=torch.full_like(sdf, 2.0), beta=sdf.new_tensor([0.5]))
    densities = sdf.new_tensor([[2 * (1 - math.exp(-0.5) / 2), 1.0, math.exp(-1)]])
    torch.testing.assert_close(alpha, 1 - torch.exp(-2 * densities), rtol=1e-12, atol=0)


def test_laplace_density_broadcasts_beta(device):
    sdf = normal(3, 4, device=device)
    beta = torch.tensor([[0.1], [0.2], [0.3]], device=device, dtype=torch.float64)
    rows = [laplace_density(sdf[r], beta[r]) for r in range(3)]
    torch.testing.assert_close(laplace_density(sdf, beta), torch.stack(rows), rtol=0, atol=0)


def test_unisurf_alpha_at_and_far_from_the_surface_and_its_gradient(device):
    sdf = torch.tensor([[0.0, 1e6, -1e6]], device=device)
    assert unisurf_alpha(sdf).tolist() == [[0.5, 0.0, 1.0]]
    torch.autograd.gradcheck(unisurf_alpha, normal(3, 4, device=device).requires_grad_())


@pytest.mark.parametrize("inv_s", [1e-6, 1.0, 1e6])
def test_neus_alpha_matches_reference_at_the_limits_of_inv_s(inv_s, device):
    """The field clips inv_s to [1e-6, 1e6]: no overflow and no NaN at the limits."""
    check_against_ref(
        neus_alpha, neus_alpha_ref, neus_inputs(4, 9, device, inv_s), torch.float32, wrt=["sdf", "gradient", "inv_s"]
    )


def test_neus_alpha_far_behind_the_surface_or_clipped_to_0_passes_no_gradient(device):
    """Far behind the surface P and N underflow to 0: alpha = e / e. Negative lengths give alphas clipped to 0."""
    inputs = neus_inputs(2, 3, device, inv_s=1e4)
    inputs["gradient"] = -inputs["directions"][:, None].expand(2, 3, 3).contiguous()  # slope -1
    inputs["sdf"][:] = torch.tensor([[-1.0, 0.0, 0.0], [0.0, 1.0, -1.0]])
    inputs["deltas"][:] = torch.tensor([[0.1, -0.1, 0.1], [-0.2, 0.1, 0.1]])
    check_against_ref(neus_alpha, neus_alpha_ref, inputs, torch.float32, wrt=["sdf", "gradient", "inv_s"])

    leaves = [t.detach().requires_grad_() for t in inputs.values()]
    alpha = neus_alpha(*leaves)
    torch.testing.assert_close(alpha[0], alpha.new_tensor([1.0, 0.0, 1.0]), rtol=0, atol=2e-5)
    assert alpha[1, 0] == 0
    d_sdf, d_gradient = torch.autograd.grad(alpha.sum(), leaves[:2])
    behind_or_clipped = ([0, 1, 0, 1], [0, 2, 1, 0])  # rays, samples: two behind the surface, two clipped to 0
    assert not d_sdf[behind_or_clipped].any() and not d_gradient[behind_or_clipped].any()
    assert d_sdf[0, 2] != 0  # at the surface: alpha rounds to 1, but has a (tiny) gradient


def test_volsdf_alpha_has_a_gradient_at_the_surface(device):
    """At sdf 0 the density has the same slope on both sides; autograd of its formula, with |sdf|, would give 0."""
    inputs = volsdf_inputs(3, 4, device)
    inputs["sdf"][1] = 0.0
    check_against_ref(volsdf_alpha, volsdf_alpha_ref, inputs, torch.float32, wrt=["sdf", "beta"])
    sdf = torch.zeros(1, 1, device=device, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(volsdf_alpha, (sdf, inputs["deltas"][:1, :1], inputs["beta"].requires_grad_()))


def test_volsdf_alpha_with_a_sharp_density_matches_reference(device):
    """beta at the field's minimum, 1e-4: samples far inside are opaque, far outside empty."""
    inputs = volsdf_inputs(4, 9, device, beta=1e-4)
    check_against_ref(volsdf_alpha, volsdf_alpha_ref, inputs, torch.float32, wrt=["sdf", "beta"])


def test_neus_alpha_gradcheck(device):
    inputs = neus_inputs(3, 4, device, inv_s=3.0)
    for name in ("sdf", "gradient", "inv_s"):
        inputs[name].requires_grad_()
    torch.autograd.gradcheck(neus_alpha, tuple(inputs.values()))


def test_volsdf_alpha_gradcheck(device):
    inputs = volsdf_inputs(3, 4, device)
    torch.autograd.gradcheck(
        volsdf_alpha, (inputs["sdf"].requires_grad_(), inputs["deltas"], inputs["beta"].requires_grad_())
    )


@pytest.mark.parametrize("name", ["gradient", "directions", "deltas"])
def test_neus_alpha_rejects_mismatched_shapes(name, device):
    inputs = neus_inputs(3, 4, device)
    inputs[name] = inputs[name][:2]
    with pytest.raises(AssertionError, match="match sdf"):
        neus_alpha(**inputs)
