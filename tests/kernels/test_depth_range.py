import pytest
import torch

from tests.ahead_of_time import Launch
from tests.check import check_against_ref
from unipad.kernels.depth_range import depth_in_range, depth_in_range_ref


def launch(kernel, **limits):
    return Launch(kernel, types={"hit_ptr": "*i1"}, elements=("fp32", "fp64"), **limits)


LAUNCHES = [  # checked by tests/test_compiles.py; shared memory: masks and values are loaded in different layouts
    launch("_volume_range_kernel", constexprs=dict(BLOCK=2048), num_warps=8, registers=112, shared=16384),
    launch("_depth_in_range_kernel", constexprs=dict(BLOCK=512), registers=72, shared=4096),
]


def inputs_of(R, S, B, device, scale=0.5):
    """Rays of all volumes in random order, a fifth of them misses; half of the depths are out of range."""
    uniform = torch.rand(R, S + 1, device=device, dtype=torch.float64)
    return dict(
        depth=4 * torch.rand(R, device=device, dtype=torch.float64) - 1,
        edges=(0.5 + uniform.sort(dim=1).values),
        volume_idx=torch.randint(B, (R,), device=device, dtype=torch.int32),
        hit=torch.rand(R, device=device) < 0.8,
        B=B,
        scale=scale,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "R, S, B",
    [
        (1, 1, 1),
        (7, 5, 3),  # odd sizes
        (512, 2, 2),  # exactly one block of the second kernel
        (513, 3, 2),
        (2048, 2, 1),  # of the first
        (2049, 2, 2),
        (3, 4, 9),  # volumes without rays
        (0, 4, 2),  # no rays
    ],
)
def test_depth_in_range_matches_reference(R, S, B, dtype, device):
    check_against_ref(depth_in_range, depth_in_range_ref, inputs_of(R, S, B, device), dtype, wrt=["depth"])


@pytest.mark.parametrize("fn", [depth_in_range, depth_in_range_ref])
def test_by_hand(fn, device):
    """Rays 0 to 3 of volume 0, whose range is [1, 5]: below it, in it, above it, a miss. Ray 4 is alone in volume 1."""
    depth = torch.tensor([0.5, 3.0, 6.0, 3.0, 9.0], device=device, dtype=torch.float64, requires_grad=True)
    edges = torch.tensor([[1.0, 2, 3], [2, 5, 6], [3, 4, 9], [0, 8, 9], [7, 8, 9]], device=device, dtype=torch.float64)
    idx = torch.tensor([0, 0, 0, 0, 1], device=device, dtype=torch.int32)
    hit = torch.tensor([True, True, True, False, True], device=device)
    out, of_volume = fn(depth, edges, idx, hit, B=3, scale=0.5)
    assert out.tolist() == [2, 6, 10, 0, 16]
    assert of_volume.tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 0, 1], [0] * 5] and not of_volume.requires_grad
    assert torch.autograd.grad(out.sum(), depth)[0].tolist() == [0, 2, 0, 0, 0]


@pytest.mark.parametrize("fn", [depth_in_range, depth_in_range_ref])
def test_gradient_passes_at_the_ends_of_the_range(fn, device):
    edges = torch.tensor([[1.0, 2, 3], [1, 2, 3]], device=device)
    depth = torch.tensor([1.0, 2.0], device=device, requires_grad=True)
    idx, hit = torch.zeros(2, device=device, dtype=torch.int32), torch.ones(2, device=device, dtype=torch.bool)
    out, _ = fn(depth, edges, idx, hit, B=1, scale=1.0)
    assert out.tolist() == [1, 2] and torch.autograd.grad(out.sum(), depth)[0].tolist() == [1, 1]


def test_gradcheck(device):
    inputs = inputs_of(9, 4, 2, device)
    inputs["depth"].requires_grad_()
    torch.autograd.gradcheck(depth_in_range, tuple(inputs.values()))


@pytest.mark.parametrize("fn", [depth_in_range, depth_in_range_ref])
def test_nan_is_not_hidden_by_the_range(fn, device):
    inputs = inputs_of(9, 4, 2, device)
    inputs["hit"][3] = True
    inputs["depth"][3] = torch.nan
    inputs |= {name: inputs[name].float() for name in ("depth", "edges")}
    out, _ = fn(**inputs)
    assert out.isnan().tolist() == [i == 3 for i in range(9)]
