"""Deliberate faults, which `python -m tests.as_on_a_gpu` must find: a check that cannot fail proves nothing.

Run by that command only.
"""

import pytest
import torch
from ttsem.sanitize import KernelFault

from tests.check import check_against_ref
from unipad.kernels.backend import jit, tl

BLOCK = 8


@jit
def _double_kernel(
    x_ptr, out_ptr,  # [N] each
    N,
    FAULT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < N
    if FAULT == "load past end":
        ok = i < N + 1
    x = tl.load(x_ptr + i, mask=ok, other=0.0)
    ok = i < N
    if FAULT == "store past end":
        ok = i < N + 1
    if FAULT == "race":  # also writes the element after its own, the last of which is another program's
        tl.store(out_ptr + (i + 1) % N, x, mask=ok)
    if FAULT == "unwritten":
        ok = i < N - 1
    if FAULT == "two values":  # for one element
        i = i // 2
    tl.store(out_ptr + i, 2 * x, mask=ok)


def double(x, fault=""):
    out = torch.empty_like(x)
    _double_kernel[(-(-len(x) // BLOCK),)](x_ptr=x, out_ptr=out, N=len(x), FAULT=fault, BLOCK=BLOCK)
    return out


def check_double(fault):
    x = torch.rand(2 * BLOCK - 3, device="cuda", dtype=torch.float64)  # two programs, the last one partly masked
    check_against_ref(lambda x: double(x, fault), lambda x: 2 * x, {"x": x}, torch.float32, wrt=())


def test_a_kernel_without_a_fault_passes():
    check_double("")


@pytest.mark.parametrize(
    "fault, message",
    [
        ("load past end", r"tl.load\(x_ptr.*reads 1 element\(s\) past the end of the tensor passed as `x_ptr`"),
        ("store past end", r"tl.store\(out_ptr.*writes 1 element\(s\) past the end of the tensor passed as `out_ptr`"),
        ("race", r"program instances .* both touch element .* of `out_ptr`"),
        ("two values", "two lanes of one store"),
    ],
)
def test_a_fault_is_reported_with_its_file(fault, message):
    with pytest.raises(KernelFault, match=message) as raised:
        check_double(fault)
    assert __file__.endswith(raised.value.fault.source_file.rpartition("/")[2])


def test_an_unwritten_output_is_detected():
    with pytest.raises(AssertionError, match="not finite"):
        check_double("unwritten")


def custom_gradient(gradient):
    """A tensor after a backward pass through an op that returns `gradient(d_out)` as its gradient."""

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, d_out):
            return gradient(d_out)

    x = torch.rand(5, device="cuda", requires_grad=True)
    Identity.apply(x).square().sum().backward()
    return x


def test_an_unwritten_gradient_is_nan():
    assert custom_gradient(torch.empty_like).grad.isnan().all()


def test_a_tensor_left_on_the_cpu_is_detected():
    with pytest.raises(ValueError, match="x_ptr cannot be accessed from Triton"):
        double(torch.rand(5))


def test_a_tensor_left_on_the_cpu_in_a_tuple_is_detected():
    with pytest.raises(ValueError, match="x_ptr cannot be accessed from Triton"):
        pair = torch.rand(5, device="cuda"), torch.rand(5)
        _double_kernel[(1,)](x_ptr=pair, out_ptr=None, N=5, FAULT="", BLOCK=BLOCK)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.rand(5),
        lambda x: torch.cat([x, x.cpu()]),
        lambda x: x.index_put_((torch.tensor([1, 2]),), torch.rand(2)),
        lambda x: x.cpu()[torch.tensor([0], device="cuda")],
        lambda x: torch.where(torch.ones(5, dtype=torch.bool), x, 0.0),
        lambda x: torch.nn.Linear(5, 2)(x),
        lambda x: custom_gradient(lambda d_out: d_out * torch.ones(5)),
    ],
)
def test_mixed_devices_are_rejected(mix):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mix(torch.rand(5, device="cuda"))


def test_mixed_devices_that_cuda_allows_are_allowed():
    x = torch.rand(5, device="cuda")
    assert (x * torch.tensor(2.0)).is_cuda and x[torch.tensor([1, 2])].is_cuda
    assert torch.equal(x.cpu().copy_(x), x.cpu())


def test_tensors_report_the_device_that_they_would_be_on():
    x = torch.rand(5, device="cuda")
    assert x.cpu().device.type == "cpu" and x.device.type == x.cpu().to("cuda").device.type == "cuda"
    assert not x.cpu().is_cuda and torch.zeros_like(x).is_cuda and not torch.zeros(2).is_cuda


def test_other_errors_of_cuda_are_raised():
    with pytest.raises(TypeError, match="numpy"):
        torch.rand(2, device="cuda").numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, device="cuda", generator=torch.Generator("cpu"))


@jit
def _count_kernel(cell_idx_ptr, count_ptr, before_ptr, N, BLOCK: tl.constexpr):  # [N], [cells], [N]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cell = tl.load(cell_idx_ptr + i, mask=i < N, other=0)
    tl.store(before_ptr + i, tl.atomic_add(count_ptr + cell, 1, mask=i < N), mask=i < N)


def test_atomic_adds_are_not_a_race():
    cell = torch.tensor([2, 0, 2, 2, 1, 0, 2, 0, 2, 1, 2], device="cuda", dtype=torch.int32)
    count, before = torch.zeros(3, device="cuda", dtype=torch.int32), torch.empty_like(cell)
    _count_kernel[(2,)](cell_idx_ptr=cell, count_ptr=count, before_ptr=before, N=len(cell), BLOCK=BLOCK)
    # unlike a GPU, the simulation adds in the order of programs and lanes
    assert count.tolist() == [3, 2, 6] and before.tolist() == [0, 0, 1, 2, 0, 1, 3, 2, 4, 1, 5]
