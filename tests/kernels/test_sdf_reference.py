"""`Softplus` of the reference; test_sdf_render.py checks the whole field."""

import torch
import torch.nn.functional as F

from unipad.kernels.sdf_reference import Softplus


def test_softplus_equals_torchs_and_is_linear_beyond_the_threshold():
    """Value, slope and curvature; the threshold, 100 z = 20, is at z = 0.2. Beyond it, they are exactly z, 1 and 0."""
    z = torch.tensor([-3.0, -0.2, -0.01, 0.0, 0.01, 0.199, 0.201, 0.3, 5.0], dtype=torch.float64, requires_grad=True)
    out, slope = Softplus.apply(z)
    expected = F.softplus(z, beta=100)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-16)
    (expected_slope,) = torch.autograd.grad(expected.sum(), z, create_graph=True)
    torch.testing.assert_close(slope, expected_slope, rtol=0, atol=1e-15)
    assert slope[-3:].tolist() == [1, 1, 1] and out[-3:].tolist() == z[-3:].tolist()
    (curvature,) = torch.autograd.grad(slope.sum(), z)
    (expected_curvature,) = torch.autograd.grad(expected_slope.sum(), z)
    torch.testing.assert_close(curvature, expected_curvature, rtol=0, atol=1e-13)
    assert curvature[-3:].tolist() == [0, 0, 0]
