import pytest
import torch

from tests.ahead_of_time import Launch
from tests.check import check_against_ref, launches
from unipad.kernels.ray_mean import MAX_VALUES, ray_mean, ray_mean_ref


def launch(B, counts, **limits):
    constexprs = dict(COUNTS=counts, BLOCK_B=B, BLOCK_R=2048 // B)
    types = {"count_ptr": "*i64" if counts else "*"}
    return Launch("_ray_mean_kernel", constexprs, types, elements=("fp32", "fp64"), num_warps=8, **limits)


LAUNCHES = [  # checked by tests/test_compiles.py; shared memory: sums over rays and over volumes; most of all in fp64
    launch(1, False, registers=66, shared=64),
    launch(1, True, registers=66, shared=64),
    launch(16, False, registers=104, shared=2048),
]


def inputs_of(R, B, counts, device):
    """Rays of all volumes in random order, a fifth of them misses."""
    volume = torch.where(torch.rand(R, device=device) < 0.8, torch.randint(B, (R,), device=device), -1)
    return dict(
        of_ray=torch.randn(R, device=device, dtype=torch.float64),
        of_volume=(volume == torch.arange(B, device=device)[:, None]).double(),
        count=torch.randint(4, (R,), device=device) if counts else 3,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize(
    "R, B",
    [(1, 1), (7, 3), (2048, 1), (2049, 1), (512, 4), (513, 3), (3, 9), (5000, 3), (3, 2500), (0, 2)],
)
def test_ray_mean_matches_reference(R, B, counts, dtype, device):
    """One, odd numbers, exactly a block and one more, many blocks; more volumes than a block; volumes without rays;
    none at all."""
    inputs = inputs_of(R, B, counts, device)
    with launches() as launched:
        # magnitude: positive and negative values nearly cancel in a mean
        check_against_ref(ray_mean, ray_mean_ref, inputs, dtype, wrt=["of_ray"], magnitude=0.1)
    assert bool(launched) == bool(R)


def test_more_than_one_program_should_add_up_runs_the_reference(device):
    inputs = inputs_of(MAX_VALUES // 4, 5, True, device)
    with launches() as launched:
        out = ray_mean(**inputs)
    assert not launched and torch.equal(out, ray_mean_ref(**inputs))


@pytest.mark.parametrize("fn", [ray_mean, ray_mean_ref])
def test_by_hand(fn, device):
    """Rays 0 and 1 of volume 0, ray 2 of volume 1; ray 3 misses; volume 2 has none."""
    of_ray = torch.tensor([1.0, 5, 4, 100], device=device, requires_grad=True)
    of_volume = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], device=device)
    for count, by_volume in ((1, (2, 1)), (2, (4, 2)), (torch.tensor([1, 2, 0, 9], device=device), (3, 1))):
        out = fn(of_ray, of_volume, count)
        n, m = by_volume
        torch.testing.assert_close(out.item(), (6 / n + 4 / m + 0) / 3)
        (d,) = torch.autograd.grad(out, of_ray)
        torch.testing.assert_close(d.tolist(), [1 / n / 3, 1 / n / 3, 1 / m / 3, 0.0])


@pytest.mark.parametrize("fn", [ray_mean, ray_mean_ref])
def test_a_nan_is_not_hidden(fn, device):
    inputs = inputs_of(5, 2, False, device)
    inputs["of_ray"][3] = torch.nan
    assert fn(**inputs).isnan()


def test_gradcheck(device):
    inputs = inputs_of(9, 2, True, device)
    inputs["of_ray"].requires_grad_()
    torch.autograd.gradcheck(ray_mean, tuple(inputs.values()))
