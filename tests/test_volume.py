import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests import golden
from unipad import config
from unipad.model.volume import Conv3x3x3, GatherLift, RenderProjection, SyncedBatchNorm3d

GRID = config.Grid(low=(-54.0, -54.0, -5.0), high=(54.0, 54.0, 3.0), cell=(5.4, 6.0, 1.6))  # of the record


def test_gather_lift_reproduces_the_original():
    arrays, _ = golden.load("view_trans_2lvl")
    features = [arrays[f"in/feat_{l}"].permute(0, 1, 3, 4, 2) for l in range(2)]
    depths = [arrays[f"in/depth_{l}"].unflatten(0, (2, 6)).permute(0, 1, 3, 4, 2) for l in range(2)]
    volume = GatherLift(GRID, config.Camera())(features, depths, arrays["in/lidar2img"][:, :, 0], (256, 448))
    golden.assert_close_to_max(volume, arrays["out/volume"], 1e-5)
    assert volume.is_contiguous(memory_format=torch.channels_last_3d)


def test_render_projection_reproduces_the_original():
    arrays, _ = golden.load("render_head_viewtrans_train")
    leaves = "pts_bbox_head.render_conv."
    project = RenderProjection(12, 32)
    project.load_state_dict(golden.under(arrays, f"state/{leaves}"))
    golden.assert_close_to_max(project(arrays["out/unified_volume"]), arrays["out/render_volume"], 1e-5)
    for name, after in golden.under(arrays, f"out/after/{leaves}").items():
        golden.assert_close_to_max(project.state_dict()[name], after, 1e-5, name)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("Z", [1, 4])
def test_sliced_convolution_is_conv3d(Z, memory_format):
    ours, plain = Conv3x3x3(3, 5).double(), nn.Conv3d(3, 5, kernel_size=3, padding=1).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, Z, 6, 7, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    d_out = torch.randn(2, 5, Z, 6, 7, dtype=torch.float64)
    a, b = ((out := conv(x), *torch.autograd.grad(out, [x, *conv.parameters()], d_out)) for conv in (ours, plain))
    for ours, truth in zip(a, b, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def batch(dtype):
    """Four samples far from mean 0, and an upstream gradient."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 2, 3, 5, generator=gen, dtype=torch.float64) * 2 + 30
    return x.to(dtype), torch.randn(x.shape, generator=gen, dtype=torch.float64).to(dtype)


def norm_step(norm, x, d_out):
    """One training step of `norm`: everything it computes."""
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    x = x.clone().requires_grad_()
    out = norm(x)
    out.backward(d_out)
    return dict(
        out=out.detach(), d_x=x.grad, d_weight=norm.weight.grad, d_bias=norm.bias.grad,
        mean=norm.running_mean, var=norm.running_var, steps=norm.num_batches_tracked,
    )  # fmt: skip


def test_one_process_is_plain_batch_norm():
    ours, plain = SyncedBatchNorm3d(3), nn.BatchNorm3d(3)
    a, b = (norm_step(norm, *batch(torch.float32)) for norm in (ours, plain))
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert ours.state_dict().keys() == plain.state_dict().keys()


SPLITS = [(torch.float32, 2, 1e-5), (torch.float32, 1, 1e-5), (torch.bfloat16, 2, 1e-2)]  # type, samples of rank 0, rel


def test_two_processes_are_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, args=(tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (dtype, _, rel), a, b in zip(SPLITS, first, second, strict=True):
        whole = norm_step(nn.BatchNorm3d(3), *batch(dtype))
        for name in ("out", "d_x"):
            assert a[name].dtype == dtype
            golden.assert_close_to_max(torch.cat([a[name], b[name]]), whole[name], rel, name)
        for name in ("d_weight", "d_bias"):  # of each process's own loss: DistributedDataParallel adds them up
            golden.assert_close_to_max(a[name] + b[name], whole[name], rel, name)
        for name in ("mean", "var", "steps"):
            assert torch.equal(a[name], b[name])
            golden.assert_close_to_max(a[name], whole[name], rel, name)


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = []
    for dtype, samples, _ in SPLITS:
        mine = slice(samples) if rank == 0 else slice(samples, None)
        results.append(norm_step(SyncedBatchNorm3d(3), *(t[mine] for t in batch(dtype))))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
