"""`SyncedBatchNorm` compared with PyTorch's batch norm, in one process and in two."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests import golden
from unipad.model.norm import SyncedBatchNorm


def batch(dtype):
    """Four samples, whose mean is far from 0, and the gradient of the loss w.r.t. the output."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 2, 3, 5, generator=gen, dtype=torch.float64) * 2 + 30
    return x.to(dtype), torch.randn(x.shape, generator=gen, dtype=torch.float64).to(dtype)


def norm_step(norm, x, d_out):
    """Output, gradients and buffers of `norm`, with a fixed random weight, after one forward and backward pass."""
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    x = x.clone().requires_grad_()
    out = norm(x)
    out.backward(d_out)
    return dict(
        out=out.detach(), d_x=x.grad, d_weight=norm.weight.grad, d_bias=norm.bias.grad,
        mean=norm.running_mean, var=norm.running_var, steps=norm.num_batches_tracked,
    )  # fmt: skip


@pytest.mark.parametrize(
    "shape, memory_format",
    [
        ((60, 3), torch.contiguous_format),
        ((20000, 3), torch.contiguous_format),
        ((4, 3, 5, 3, 1), torch.contiguous_format),
        ((2, 3, 100, 100), torch.channels_last),
        ((1, 3, 5, 60, 60), torch.channels_last_3d),
    ],
)
def test_one_process_is_accurate_to_fp32(shape, memory_format):
    """Compared with PyTorch's batch norm in fp64; in fp32 PyTorch sums rows one by one on a CPU, off by 1e-5."""
    settings = dict(eps=1e-3, momentum=0.01)
    ours, exact = SyncedBatchNorm(3, **settings), nn.modules.batchnorm._BatchNorm(3, **settings).double()
    exact._check_input_dim = lambda x: None  # any number of dimensions
    x, d_out = torch.randn(2, *shape)
    x = (x + 3).contiguous(memory_format=memory_format)
    for training in (True, False):
        a, b = norm_step(ours.train(training), x, d_out), norm_step(exact.train(training), x.double(), d_out.double())
        assert all(a[name].is_contiguous(memory_format=memory_format) for name in ("out", "d_x"))
        for name in b:
            golden.assert_close_to_max(a[name], b[name], 2e-6, name)
        ours.zero_grad(), exact.zero_grad()
    assert ours.state_dict().keys() == exact.state_dict().keys()


def test_gradients_of_one_process():
    norm = SyncedBatchNorm(3).double()
    x = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: norm(x), (x, norm.weight, norm.bias))


def test_a_single_row_becomes_the_bias():
    norm = SyncedBatchNorm(3)
    nn.init.normal_(norm.bias)
    x = torch.randn(1, 3, requires_grad=True)
    out = norm(x)
    out.sum().backward()
    assert torch.equal(out[0], norm.bias) and not x.grad.any()
    torch.testing.assert_close(norm.running_mean, 0.1 * x[0].detach())  # momentum 0.1, from 0
    torch.testing.assert_close(norm.running_var, torch.full((3,), 0.9))  # 0.9 * 1 + 0.1 * 0


def test_an_empty_input_does_not_change_the_running_statistics():
    norm = SyncedBatchNorm(3)
    x = torch.randn(0, 3, requires_grad=True)
    norm(x).sum().backward()
    assert norm.running_mean.eq(0).all() and norm.running_var.eq(1).all()
    assert norm.weight.grad.eq(0).all() and norm.bias.grad.eq(0).all()
    assert norm.eval()(x).shape == (0, 3)


# (dtype, number of samples of rank 0, allowed error); rank 1 has the rest of the 4 samples
SPLITS = [(torch.float32, 2, 1e-5), (torch.float32, 1, 1e-5), (torch.bfloat16, 2, 1e-2), (torch.float32, 4, 1e-5)]


def test_two_processes_match_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, args=(tmp_path,), nprocs=2)
    of_rank_0, of_rank_1 = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (dtype, _, rel), a, b in zip(SPLITS, of_rank_0, of_rank_1, strict=True):
        whole = norm_step(nn.BatchNorm3d(3), *batch(dtype))
        for name in ("out", "d_x"):
            assert a[name].dtype == dtype
            golden.assert_close_to_max(torch.cat([a[name], b[name]]), whole[name], rel, name)
        for name in ("d_weight", "d_bias"):  # of each process's samples, as DistributedDataParallel expects
            golden.assert_close_to_max(a[name] + b[name], whole[name], rel, name)
        for name in ("mean", "var", "steps"):
            assert torch.equal(a[name], b[name])
            golden.assert_close_to_max(a[name], whole[name], rel, name)


def one_of_two(rank, folder):
    """Run a step on the samples of process `rank` for each of `SPLITS`, and save the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = []
    for dtype, samples, _ in SPLITS:
        own = slice(samples) if rank == 0 else slice(samples, None)
        results.append(norm_step(SyncedBatchNorm(3), *(t[own] for t in batch(dtype))))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
