import pytest
import torch
from torch.nn import functional as F

from tests.ahead_of_time import Launch
from tests.check import check_against_ref, launches
from unipad.kernels.trilinear import TILE, trilinear, trilinear_ref, trilinear_value, trilinear_value_ref

# types of all tensors but the volume (which has the element type) and `volume_idx`
FP32 = dict.fromkeys(
    ["points_ptr", "value_ptr", "gradient_ptr", "d_value_ptr", "d_gradient_ptr", "d_volume_ptr", "d_points_ptr"],
    "*fp32",
)
BOTH = ("fp32", "bf16")  # element types
LAUNCHES = [  # checked by tests/test_compiles.py
    Launch(
        kernel,
        flags | dict(BLOCK_C=c, BLOCK_N=TILE // c),
        FP32,
        divisible,
        elements,
        registers=registers,
        shared=shared,
    )
    for kernel, flags, c, divisible, elements, registers, shared in [
        ("_trilinear_fwd_kernel", dict(WITH_GRADIENT=True), 32, ("C",), BOTH, 128, 4096),
        ("_trilinear_fwd_kernel", dict(WITH_GRADIENT=False), 32, ("C",), BOTH, 88, 4096),
        ("_trilinear_fwd_kernel", dict(WITH_GRADIENT=True), 4, (), ("fp32",), 176, 2048),
        ("_trilinear_fwd_kernel", dict(WITH_GRADIENT=True), 256, ("C",), ("fp32",), 128, 0),
        ("_trilinear_bwd_kernel", dict(FOR_VOLUME=True, FOR_POINTS=False), 32, ("C",), BOTH, 80, 0),
        ("_trilinear_bwd_kernel", dict(FOR_VOLUME=True, FOR_POINTS=True), 32, ("C",), BOTH, 120, 4096),
        ("_trilinear_bwd_kernel", dict(FOR_VOLUME=True, FOR_POINTS=True), 4, (), ("fp32",), 240, 2048),
        ("_trilinear_bwd_kernel", dict(FOR_VOLUME=True, FOR_POINTS=True), 256, ("C",), ("fp32",), 120, 64),
    ]
]

SHAPES = [  # B, Z, Y, X, C, R rays, S points on each
    (1, 1, 1, 1, 1, 1, 1),
    (3, 3, 5, 7, 3, 5, 7),  # odd sizes
    (2, 2, 3, 4, 32, 8, 4),  # exactly one block of points
    (2, 2, 3, 4, 32, 11, 3),  # one point more than a block
    (1, 2, 3, 4, 65, 5, 3),  # many channels: fewer points per block
    (1, 2, 3, 4, 3, 0, 5),  # no rays
    (1, 2, 3, 4, 3, 5, 0),  # no points on the rays
    (1, 2, 3, 4, 0, 5, 5),  # no channels
]


def make_inputs(B, Z, Y, X, C, R, S, device):
    """Arguments of `trilinear`; on each axis, points from two voxels below the first center to two above the last."""
    size = torch.tensor([X, Y, Z], device=device)
    return dict(
        volume=torch.randn(B, Z, Y, X, C, device=device, dtype=torch.float64),
        points=torch.rand(R, S, 3, device=device) * (size + 3) - 2,
        volume_idx=torch.randint(B, (R,), device=device, dtype=torch.int32),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype, device):
    check_against_ref(trilinear, trilinear_ref, make_inputs(*shape, device), dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_value_matches_reference(shape, device):
    inputs = make_inputs(*shape, device)
    check_against_ref(trilinear_value, trilinear_value_ref, inputs, torch.float32)
    torch.testing.assert_close(trilinear_value_ref(**inputs), trilinear_ref(**inputs)[0])


@pytest.mark.parametrize("wrt", [("volume",), ("points",)])
def test_gradient_of_only_one_input_matches_reference(wrt, device):
    check_against_ref(trilinear, trilinear_ref, make_inputs(2, 3, 4, 5, 3, 4, 5, device), torch.float32, wrt=wrt)


@pytest.mark.parametrize("fn", [trilinear, trilinear_ref])
def test_by_hand(fn, device):
    """V = 1 + x + 10 y + 100 z, worked on paper."""
    z, y, x = torch.meshgrid(*(torch.arange(3.0, device=device) for _ in range(3)), indexing="ij")
    volume = (1 + x + 10 * y + 100 * z)[None, ..., None]
    points = torch.tensor(
        [
            [0.25, 0.5, 1.75],  # between voxel centers
            [1, 1, 1],  # on a center: slopes are those towards the next
            [2, 2, 2],  # on the last center: beyond it the value falls to 0
            [-0.5, 0, 0],  # half a voxel below the first center: half its value
            [-1, 0, 0],  # one voxel below the first center: 0, with a slope towards it
            [3, 0, 0],  # one voxel above the last center: 0, with slope 0
            [0, 0, -7],  # far outside
        ],
        device=device,
    )
    value, gradient = fn(volume, points[None], torch.zeros(1, dtype=torch.int32, device=device))
    assert value.flatten().tolist() == [181.25, 112, 223, 0.5, 0, 0, 0]
    assert gradient.squeeze().tolist() == [
        [1, 10, 100],
        [1, 10, 100],
        [-223, -223, -223],
        [1, 5, 50],
        [1, 0, 0],
        [0, 0, 0],
        [0, 0, 0],
    ]


@pytest.mark.parametrize("fn", [trilinear, trilinear_ref])
@pytest.mark.skipif(torch.__version__ < (2, 13), reason="grid_sample is twice differentiable from torch 2.13 on")
def test_matches_grid_sample_and_its_double_backward(fn, device):
    """Zero padding included; sizes of 2^n + 1 voxels, so that normalized coordinates of voxel centers are exact."""
    inputs = make_inputs(1, 3, 5, 9, 4, 6, 8, device)
    volume = inputs["volume"].requires_grad_()
    points = inputs["points"].double()
    points[:3] = points[:3].round()  # on voxel centers
    points.requires_grad_()
    d_value = torch.randn(6, 8, 4, device=device, dtype=torch.float64, requires_grad=True)  # dL/dvalue

    def sampled():
        """Value and dL/dpoints."""
        normalized = points / torch.tensor([4.0, 2.0, 1.0], device=device) - 1  # (size - 1) / 2 along x, y, z
        value = F.grid_sample(volume.permute(0, 4, 1, 2, 3), normalized[None, None], align_corners=True)
        value = value[0, :, 0].permute(1, 2, 0)
        return value, torch.autograd.grad(value, points, d_value, create_graph=True)[0]

    def ours():
        value, gradient = fn(volume, points, inputs["volume_idx"])
        return value, torch.einsum("rsdc,rsc->rsd", gradient, d_value)

    # upstream gradients of the value and of dL/dpoints
    ups = torch.randn(6, 8, 4, device=device).double(), torch.randn(6, 8, 3, device=device).double()
    grads = [torch.autograd.grad(f(), (volume, points, d_value), ups) for f in (sampled, ours)]
    for truth, out in [(sampled(), ours()), grads]:
        for t, o in zip(truth, out, strict=True):
            torch.testing.assert_close(o, t, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fn", [trilinear, trilinear_ref])
def test_gradcheck(fn, device):
    inputs = make_inputs(2, 2, 2, 2, 1, 2, 1, device)
    low = torch.tensor([[[0, 0, 0]], [[-1, 0, 1]]], device=device)
    points = low + 0.1 + 0.8 * torch.rand(2, 1, 3, device=device, dtype=torch.float64)  # not at integers: kinks
    leaves = inputs["volume"].requires_grad_(), points.requires_grad_()
    torch.autograd.gradcheck(fn, (*leaves, inputs["volume_idx"]), nondet_tol=1e-12)  # atomic adds: last bits vary


@pytest.mark.parametrize("fn", [trilinear_ref, trilinear_value_ref])
def test_points_of_a_diverged_model_do_not_raise(fn):
    """On a CPU, indexing with NaN would raise, which would hide the training loop's message: the loss is not finite."""
    points = torch.tensor([[[torch.nan] * 3, [torch.inf, 0, 0], [1.0, 1, 1]]])
    value = fn(torch.ones(1, 3, 3, 3, 2), points, torch.zeros(1, dtype=torch.int32))
    value = value[0] if isinstance(value, tuple) else value
    assert value[0].isnan().all(dim=1).tolist() == [True, True, False]


def test_strict_determinism_runs_the_reference(device):
    inputs = make_inputs(1, 2, 3, 4, 5, 2, 3, device)
    torch.use_deterministic_algorithms(True)  # after the test, the fixture `poisoned_memory` turns it off
    with launches() as launched:
        trilinear(**inputs)
        assert not launched
        trilinear_value(**inputs)  # has no atomic adds
        assert launched == ["_trilinear_fwd_kernel"]


def test_rejects_mismatched_arguments(device):
    inputs = make_inputs(1, 2, 3, 4, 5, 2, 3, device)
    with pytest.raises(AssertionError, match="do not match"):
        trilinear(inputs["volume"], inputs["points"], inputs["volume_idx"][:1])
    with pytest.raises(AssertionError, match="no voxel"):
        trilinear(inputs["volume"][:, :0], inputs["points"], inputs["volume_idx"])
    with pytest.raises(AssertionError, match="fp32 or fp64"):
        trilinear(inputs["volume"], inputs["points"].half(), inputs["volume_idx"])
