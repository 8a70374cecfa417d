"""Launching kernels, choosing references, and marking host waits."""

from contextlib import nullcontext

import pytest
import torch

from tests.conftest import HAS_GPU
from tests.kernels.conftest import reversed_programs
from unipad.kernels import backend
from unipad.kernels.backend import host_wait, jit, on_triton, references, tl, to_host, triton


@jit(varying=("N",))
def _double_kernel(x_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, 2 * tl.load(x_ptr + i, mask=i < N, other=0.0), mask=i < N)


class FakeTensor:
    """Stands for a tensor on GPU 3."""

    def get_device(self):
        return 3


@pytest.mark.parametrize(
    "x, N",
    [
        (FakeTensor(), 5),
        ((FakeTensor(), FakeTensor()), 5),  # a tuple of tensors
        (None, FakeTensor()),  # the first tensor is the second argument
    ],
)
def test_a_kernel_runs_on_the_gpu_of_its_first_tensor_with_fp_fusion(monkeypatch, x, N):
    gpus, launches = [], []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: gpus.append(tensor.get_device()) or nullcontext())
    monkeypatch.setattr(type(_double_kernel), "run", lambda kernel, **given: launches.append(given))
    _double_kernel[(1,)](x_ptr=x, N=N, BLOCK=8)
    assert gpus == [3]
    assert launches == [dict(grid=(1,), warmup=False, x_ptr=x, N=N, BLOCK=8, enable_fp_fusion=True)]
    _double_kernel[(1,)](x_ptr=x, N=N, BLOCK=8, enable_fp_fusion=False)
    assert not launches[1]["enable_fp_fusion"]


def test_positional_arguments_of_a_launch_are_rejected():
    with pytest.raises(TypeError, match="positional"):
        _double_kernel[(1,)](torch.arange(8.0), 5, BLOCK=8)


def test_a_launched_kernel_writes_its_result(device):
    x = torch.arange(8.0, device=device)
    _double_kernel[(1,)](x_ptr=x, N=5, BLOCK=8)
    assert x.tolist() == [0, 2, 4, 6, 8, 5, 6, 7]


def test_varying_sizes_are_not_specialized(monkeypatch):
    options_of_jit = []
    monkeypatch.setattr(triton, "jit", lambda kernel, **options: options_of_jit.append(options) or kernel)
    jit(varying=("N",))(lambda x_ptr, N: None)
    jit(lambda x_ptr, N: None)
    assert options_of_jit == [{"do_not_specialize": ("N",)}, {"do_not_specialize": ()}]


def test_references_replace_kernels_inside_the_context(monkeypatch):
    monkeypatch.setattr(backend, "interpret", True)
    x = torch.zeros(1)
    assert on_triton(x)
    with pytest.raises(ZeroDivisionError), references():
        assert not on_triton(x)
        raise ZeroDivisionError  # kernels run again after an exception too
    assert on_triton(x)


def test_waiting_for_is_the_reason_of_the_innermost_host_wait(device):
    class RecordsReason(torch.Tensor):
        def tolist(self):
            return backend.waiting_for, super().tolist()

    number = torch.tensor(7, device=device).as_subclass(RecordsReason)
    assert to_host(number, "a number") == ("a number", 7) and backend.waiting_for is None
    with pytest.raises(ZeroDivisionError), host_wait("outer"):
        assert to_host(number, "inner") == ("inner", 7) and backend.waiting_for == "outer"
        raise ZeroDivisionError
    assert backend.waiting_for is None


@jit
def _racing_kernel(x_ptr):
    """Each program reads what the previous one writes."""
    i = tl.program_id(0)
    tl.store(x_ptr + i + 1, tl.load(x_ptr + i) + 1)


@pytest.mark.skipif(HAS_GPU, reason="on a GPU programs have no order")
def test_reversed_programs_reveal_a_race(monkeypatch):
    in_order, reversed_order = torch.zeros(5), torch.zeros(5)
    monkeypatch.undo()  # what the fixtures patched, such as the order of programs with --reverse-programs
    _racing_kernel[(4,)](x_ptr=in_order)
    monkeypatch.setattr(*reversed_programs())
    _racing_kernel[(4,)](x_ptr=reversed_order)
    assert in_order.tolist() == [0, 1, 2, 3, 4] and reversed_order.tolist() == [0, 1, 1, 1, 1]
