import pytest
import torch

from tests.ahead_of_time import Launch
from tests.check import check_against_ref, launches
from unipad.kernels.composite import composite
from unipad.kernels.ray_features import BLOCK_S, TILE, ray_features, ray_features_ref
from unipad.kernels.trilinear import trilinear_ref

LAUNCHES = [  # checked by tests/test_compiles.py
    Launch(
        kernel, dict(Z=5, Y=128, X=128, CHANNELS=channels, C=c, BLOCK_S=min(BLOCK_S, TILE // c)), {}, ("S",), ("fp32",),
        registers=registers, shared=shared, limits_on=("sm_80", "sm_90", "sm_120", "gfx942"),
    )
    # the backward needs the most registers on sm_80, whose assembler unrolls its loop; 88 on sm_90
    for kernel, channels, c, registers, shared in [
        ("_ray_features_fwd_kernel", 32, 32, 64, 512),
        ("_ray_features_fwd_kernel", 3, 4, 40, 64),
        ("_ray_features_fwd_kernel", 256, 256, 64, 4096),
        ("_ray_features_bwd_kernel", 32, 32, 168, 128),
        ("_ray_features_bwd_kernel", 3, 4, 40, 128),
        ("_ray_features_bwd_kernel", 256, 256, 128, 4096),
    ]
]  # fmt: skip

SHAPES = [  # B, Z, Y, X, C, R rays, S samples on each
    (1, 1, 1, 1, 1, 1, 1),
    (3, 3, 5, 7, 3, 5, 7),  # odd sizes
    (2, 2, 3, 4, 32, 3, 32),  # exactly one block of samples
    (2, 2, 3, 4, 32, 3, 33),  # one sample more than a block
    (1, 2, 3, 4, 65, 3, 9),  # many channels: blocks of 8 samples
    (1, 2, 3, 4, 3, 0, 5),  # no rays
    (1, 2, 3, 4, 3, 5, 0),  # no samples on the rays
    (1, 2, 3, 4, 0, 5, 5),  # no channels
]


def make_inputs(B, Z, Y, X, C, R, S, device):
    """Arguments of `ray_features`; rays cross the volume and leave it, a quarter of the weights are 0."""
    double = dict(device=device, dtype=torch.float64)
    size = torch.tensor([X, Y, Z], **double)
    weights = torch.rand(R, S, **double)
    return dict(
        volume=torch.randn(B, Z, Y, X, C, **double),
        rays=(
            torch.rand(R, 3, **double) - 0.5,
            torch.randn(R, 3, **double),
            torch.randint(B, (R,), device=device, dtype=torch.int32),
        ),
        edges=torch.rand(R, S + 1, **double).sort(dim=1).values,
        weights=weights * (torch.rand(R, S, device=device) > 0.25),
        cells=(size, (size - 1) / 2),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, device):
    check_against_ref(ray_features, ray_features_ref, make_inputs(*shape, device), torch.float32, ("volume", "weights"))


@pytest.mark.parametrize("fn", [ray_features, ray_features_ref])
def test_by_hand(fn, device):
    """V = 1 + x + 10 y + 100 z along the diagonal: the points are (0, 0, 0), (0.5, 0.5, 0.5) and (3, 3, 3), which is
    outside, so the features are 1, 56.5 and 0. The first ray has all three, the second looks the other way from a
    corner of the volume: half a cell outside on each axis, an eighth of 1.
    """
    z, y, x = torch.meshgrid(*(torch.arange(3.0, device=device) for _ in range(3)), indexing="ij")
    volume = (1 + x + 10 * y + 100 * z)[None, ..., None].requires_grad_()
    rays = (
        torch.zeros(2, 3, device=device),
        torch.tensor([[1.0, 1, 1], [-1, -1, -1]], device=device),
        torch.zeros(2, dtype=torch.int32, device=device),
    )
    edges = torch.tensor([[0, 1.0, 6, 7], [1, 2, 3, 4]], device=device)
    weights = torch.tensor([[0.25, 0.5, 9], [2, 0, 0]], device=device, requires_grad=True)
    cells = torch.full((3,), 0.5, device=device), torch.zeros(3, device=device)
    out = fn(volume, rays, edges, weights, cells)
    assert out.flatten().tolist() == [0.25 + 0.5 * 56.5, 2 / 8]
    d_volume, d_weights = torch.autograd.grad(out.sum(), (volume, weights))
    assert d_weights.tolist() == [[1, 56.5, 0], [1 / 8, 0, 0]]
    expected = torch.zeros(3, 3, 3)
    expected[:2, :2, :2] = 0.5 / 8  # the second sample: all its corners have the same share
    expected[0, 0, 0] += 0.25 + 2 / 8
    assert torch.equal(d_volume[0, ..., 0].cpu(), expected)


@pytest.mark.parametrize("fn", [ray_features, ray_features_ref])
def test_is_composite_of_interpolated_features(fn, device):
    """In fp64, with both gradients: what `composite` gives for the features of all samples, and the same with a linear
    layer on the samples as with one on the result."""
    inputs = make_inputs(2, 3, 4, 5, 6, 4, 40, device)
    volume, (origins, directions, volume_idx), edges = (inputs[name] for name in ("volume", "rays", "edges"))
    alpha = torch.rand(4, 40, device=device, dtype=torch.float64).requires_grad_()
    volume.requires_grad_()
    head = torch.randn(17, 6, device=device, dtype=torch.float64)
    points = origins[:, None] + directions[:, None] * edges[:, :-1, None]
    features, _ = trilinear_ref(volume, points * inputs["cells"][0] + inputs["cells"][1], volume_idx)
    of_samples, weights = composite(alpha, features @ head.T)
    ours = fn(**inputs | dict(weights=weights)) @ head.T
    torch.testing.assert_close(ours, of_samples, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(ours)
    truth, grads = (torch.autograd.grad(o, (volume, alpha), upstream, retain_graph=True) for o in (of_samples, ours))
    for expected, grad in zip(truth, grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fn", [ray_features, ray_features_ref])
def test_gradcheck(fn, device):
    inputs = make_inputs(2, 2, 2, 3, 2, 3, 4, device)

    def of(volume, weights):
        return fn(**inputs | dict(volume=volume, weights=weights))

    leaves = inputs["volume"].requires_grad_(), inputs["weights"].requires_grad_()
    torch.autograd.gradcheck(of, leaves, nondet_tol=1e-12)  # atomic adds: last bits vary


def test_samples_of_a_diverged_model_do_not_raise():
    """On a CPU, indexing with NaN would raise, which would hide the training loop's message: the loss is not finite."""
    inputs = make_inputs(1, 2, 3, 4, 5, 2, 3, "cpu")
    inputs["edges"][0, 1] = torch.nan
    out = ray_features_ref(**inputs)
    assert out[0].isnan().all() and out[1].isfinite().all()


def test_strict_determinism_runs_the_reference(device):
    inputs = make_inputs(1, 2, 3, 4, 5, 2, 3, device)
    torch.use_deterministic_algorithms(True)  # after the test, the fixture `poisoned_memory` turns it off
    with launches() as launched:
        ray_features(**inputs)
    assert not launched
