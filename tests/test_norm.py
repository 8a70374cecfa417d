"""`SyncedBatchNorm` compared with PyTorch's batch norm, in one process and in two.

The kernels that several GPUs run exist for CUDA only. Their formulas, written here from PyTorch's source, stand in for
them (`stand_ins`): this checks what is passed to them and the collectives, not the kernels.
"""

import contextlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests import golden, scripts
from unipad.model import norm as norm_module
from unipad.model.norm import KernelBatchNorm, SyncedBatchNorm


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


ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def along(x, values):
    """[C] values, fp32 or better, in a shape that broadcasts to x."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def stats(x, eps):
    assert x.numel()
    x = x.float().transpose(0, 1).flatten(1)
    return x.mean(1), (x.var(1, correction=0) + eps).rsqrt()


def gather_stats(like, means, inv_stds, running_mean, running_var, momentum, eps, counts):
    assert running_mean is None and running_var is None
    assert like.dtype == means.dtype == inv_stds.dtype == counts.dtype == torch.float32
    n, mean, var_n = 0, torch.zeros_like(means[0]), torch.zeros_like(means[0])
    for m, inv_std, count in zip(means, inv_stds, counts, strict=True):
        v = (inv_std**-2 - eps) * count
        factor = 1 / (n + count)
        var_n = var_n + v + (mean - m) ** 2 * n * count * factor
        mean = n * factor * mean + count * factor * m
        n = (n + count).trunc()  # an integer there
    return mean, (var_n / n + eps).rsqrt()


def elemt(x, weight, bias, mean, inv_std, eps):
    assert x.numel() and weight.dtype == torch.float32
    return ((x - along(x, mean)) * along(x, inv_std * weight) + along(x, bias)).to(x.dtype)


def backward_reduce(d_out, x, mean, inv_std, weight, *needed):
    assert x.numel() and d_out.dtype == x.dtype and all(needed)
    dims = [d for d in range(x.dim()) if d != 1]
    sum_d, sum_d_centered = d_out.float().sum(dims), (d_out * (x - along(x, mean))).sum(dims)
    return sum_d, sum_d_centered, sum_d_centered * inv_std, sum_d


def backward_elemt(d_out, x, mean, inv_std, weight, sum_d, sum_d_centered, counts):
    assert x.numel() and counts.dtype == torch.int32
    norm = 1 / counts.sum().float()
    d_x = d_out - along(x, sum_d * norm) - (x - along(x, mean)) * along(x, inv_std**2 * sum_d_centered * norm)
    return (d_x * along(x, inv_std * weight)).to(x.dtype)


@contextlib.contextmanager
def stand_ins():
    """Replaces PyTorch's CUDA kernels and yields the names of the collectives that run inside."""
    collectives = []

    def counted(name):
        plain = getattr(dist, name)
        return lambda *args: (collectives.append(name), plain(*args))[1]

    with contextlib.ExitStack() as stack:
        for name, function in {
            "stats": stats,
            "gather_stats_with_counts": gather_stats,
            "elemt": elemt,
            "backward_reduce": backward_reduce,
            "backward_elemt": backward_elemt,
        }.items():
            stack.enter_context(mock.patch.object(torch, f"batch_norm_{name}", function))
        for name in (ALL_GATHER, "all_reduce"):
            stack.enter_context(mock.patch.object(dist, name, counted(name)))
        yield collectives


# numbers of samples of rank 0 and of rank 1
UNEVEN = [(2, 2), (1, 3), (4, 0), (0, 4), (0, 1), (0, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_match_the_composed_norm(dtype, tmp_path):
    """In two processes, also where the first, the second or both have no rows."""
    torch.multiprocessing.spawn(compare_kernels, args=(dtype, tmp_path), nprocs=2)
    for rank in range(2):
        for of_kernels, composed in torch.load(tmp_path / f"{rank}.pt"):
            assert of_kernels[0].dtype == dtype
            for a, b in zip(of_kernels, composed, strict=True):
                if b.numel():
                    # of a single row, variance and gradient are 0 up to rounding
                    atol = (1e-5 if dtype == torch.float32 else 1e-2) * max(b.abs().max().item(), 1e-3)
                    torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=atol)


def compare_kernels(rank, dtype, folder):
    """Output, statistics and gradients by `KernelBatchNorm` and by `BatchNorm`, for each of `UNEVEN`; saved."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = []
    for of_ranks in UNEVEN:
        of_both = []
        for kernels in (True, False):
            x, d_out = (t[: of_ranks[0]] if rank == 0 else t[of_ranks[0] : sum(of_ranks)] for t in batch(dtype))
            if of_ranks == (0, 1):  # a single row in both together
                x, d_out = (t[:, :, :1, :1, :1] for t in (x, d_out))
            x = x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
            weight, bias = (torch.tensor(values, requires_grad=True) for values in ([1.0, -0.5, 2], [0.5, 0, -1]))
            with stand_ins() as collectives:
                if kernels:
                    out, *statistics = KernelBatchNorm.apply(x, weight, bias, 1e-3)
                else:
                    out, *statistics = norm_module.BatchNorm.apply(x.float(), weight, bias, 1e-3, True)
                out.backward(d_out.to(out.dtype))
            assert not kernels or collectives == [ALL_GATHER, "all_reduce"]
            of_both.append([out.detach(), *statistics, x.grad, weight.grad, bias.grad])
        results.append(of_both)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


DRY = """
import torch
from unittest import mock
from benchmarks.dry_run import CUDA, DryRun, backward, to_gpu
from tests import test_norm
from unipad.model import norm
rows = {rows}
no_collectives = {{"all_reduce": lambda t: None, test_norm.ALL_GATHER: lambda out, own: None}}
with DryRun() as dry, mock.patch.object(norm, "is_alone", lambda: False), mock.patch.multiple(
    test_norm.dist, get_world_size=lambda: 2, **no_collectives
), test_norm.stand_ins() as collectives:
    with torch.device("meta"):
        layer = norm.SyncedBatchNorm(8)
    layer = to_gpu(layer)
    for shape, format in (((rows, 8), torch.contiguous_format), ((rows, 8, 4, 5), torch.channels_last)):
        x = torch.empty(shape, dtype=torch.bfloat16, device=CUDA, memory_format=format, requires_grad=True)
        out = layer(x)
        assert out.shape == x.shape and out.dtype == x.dtype and out.is_contiguous(memory_format=format)
        backward(out.float().sum())
        assert x.grad.shape == x.shape and layer.weight.grad.dtype == torch.float32
    assert collectives == 2 * [test_norm.ALL_GATHER, "all_reduce"]
"""


@pytest.mark.parametrize("rows", [5, 0])
def test_several_gpus_run_the_kernels(rows):
    """In a dry run, in which the host must not wait: types and shapes, and two collectives per layer and step."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    done = scripts.run("-c", DRY.format(rows=rows))
    assert done.returncode == 0, done.stderr[-4000:]
