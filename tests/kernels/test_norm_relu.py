"""relu(batch norm + residual): kernels compared with the reference, both with PyTorch's modules and by hand."""

import pytest
import torch
from torch import nn

from tests.ahead_of_time import ASSEMBLED_TARGETS, Launch
from tests.check import check_against_ref, launches
from unipad.kernels import norm_relu as module
from unipad.kernels.norm_relu import BLOCK_P, WARPS, _blocks, norm_relu, norm_relu_bwd, norm_relu_fwd, norm_relu_ref

FP32_POINTERS = ("weight_ptr", "bias_ptr", "moments_ptr", "statistics_ptr", "running_mean_ptr", "running_var_ptr",
                 "sums_ptr", "d_weight_ptr", "d_bias_ptr")  # fmt: skip
TYPES = dict.fromkeys(FP32_POINTERS, "*fp32") | dict(batches_ptr="*i64", EPS="fp32", MOMENTUM="fp32")
BLOCKS = {C: dict(zip(("BLOCK_N", "BLOCK_C"), _blocks(C), strict=True)) for C in (16, 128)}
PARTS = dict(BLOCK_P=BLOCK_P)
NOTHING_ELSE = dict.fromkeys(["residual_ptr", "running_mean_ptr", "running_var_ptr", "batches_ptr"])  # all None
LAUNCHES = [
    Launch(
        kernel, flags | BLOCKS[C], TYPES, ("C",), num_warps=WARPS, registers=registers, shared=shared,
        limits_on=ASSEMBLED_TARGETS if C == 128 else ("sm_90",),
    )
    for C in (128, 16)
    for kernel, flags, registers, shared in [
        ("_moments_kernel", {}, 96, 1024),
        ("_norm_relu_fwd_kernel", PARTS, 120, 1024),
        ("_norm_relu_fwd_kernel", PARTS | NOTHING_ELSE, 120, 1024),
        ("_norm_relu_sums_kernel", {}, 128, 1024),
        ("_norm_relu_bwd_kernel", PARTS, 128, 1024),
        ("_norm_relu_bwd_kernel", PARTS | dict(d_residual_ptr=None), 128, 1024),
    ]
] + [
    Launch(  # after a convolution in fp32, whose norm's result is half
        kernel, flags | BLOCKS[16], TYPES | dict(out_ptr="*bf16", d_out_ptr="*bf16"), ("C",), ("fp32",),
        num_warps=WARPS, registers=registers, shared=shared,
    )
    for kernel, flags, registers, shared in [
        ("_norm_relu_fwd_kernel", PARTS | dict(residual_ptr=None), 96, 1024),
        ("_norm_relu_sums_kernel", {}, 128, 1024),
        ("_norm_relu_bwd_kernel", PARTS | dict(d_residual_ptr=None), 152, 4096),
    ]
]  # fmt: skip

# rows, channels: a block has 4096 / 16 = 256 rows of 16 channels, 64 of 64 or more
SIZES = [(1, 1), (2, 3), (37, 5), (64, 64), (65, 64), (256, 16), (257, 16), (300, 96), (130, 130), (0, 5), (5, 0)]


def make_inputs(N, C, residual=True, mean=3.0):
    """Arguments of `norm_relu`, fp64; the rows are `mean` on average."""
    gen = torch.Generator().manual_seed(0)
    x, given, weight, bias = (
        torch.randn(size, generator=gen, dtype=torch.float64) for size in ((N, C), (N, C), (C,), (C,))
    )
    return dict(x=2 * x + mean, weight=weight, bias=bias, eps=1e-3, residual=given if residual else None)


def on(device, inputs):
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize("N, C", SIZES)
def test_matches_reference(N, C, residual, dtype, device):
    check_against_ref(norm_relu, norm_relu_ref, on(device, make_inputs(N, C, residual)), dtype)


def test_many_parts_match_reference(monkeypatch, device):
    """More parts than a program merges at once, the last of them shorter."""
    monkeypatch.setattr(module, "_blocks", lambda C: (4, 16))  # rows, channels
    monkeypatch.setattr(module, "BLOCK_P", 4)
    check_against_ref(norm_relu, norm_relu_ref, on(device, make_inputs(150, 16)), torch.float32)
    with launches() as launched:
        norm_relu(**on(device, {k: v.float() if torch.is_tensor(v) else v for k, v in make_inputs(150, 16).items()}))
    assert launched == ["_moments_kernel", "_norm_relu_fwd_kernel"]


def test_sums_of_tiles_replace_a_launch_each_way(device):
    """Parts of 64 rows, the last of 22 and after it an empty one, as of a convolution's tiles."""
    inputs = {k: v.float() if torch.is_tensor(v) else v for k, v in on(device, make_inputs(150, 5)).items()}
    x, weight, bias, eps, residual = inputs.values()
    parts = [*x.split(64), x[:0]]
    moments = torch.stack([torch.stack([p.sum(0) / max(len(p), 1), (p - p.mean(0)).square().sum(0)]) for p in parts])
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    truth = norm_relu_ref(**inputs)
    d_out = torch.ones_like(truth).cumsum(0).sin()
    expected = torch.autograd.grad(truth, leaves, d_out)
    with torch.no_grad(), launches() as launched:
        out, statistics = norm_relu_fwd(x, weight, bias, eps, residual, None, 0.1, (moments, 64))
        g, x_hat = torch.where(out > 0, d_out, 0), (x - statistics[0]) * statistics[1]
        sums = torch.stack([t.sum(0) for t in torch.stack([g, g * x_hat], dim=1).split(64)])
        grads = norm_relu_bwd(d_out, x, out, weight, statistics, True, sums)
    assert launched == ["_norm_relu_fwd_kernel", "_norm_relu_bwd_kernel"]
    for ours, theirs in zip((out, *grads), (truth, *expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1, theirs.abs().max().item()))


def test_the_result_may_have_another_type(device):
    """As if it had been cast, but without a launch for it."""
    x, weight, bias, eps, residual = on(device, make_inputs(37, 5)).values()
    given = x.float(), weight.float(), bias.float(), eps, residual.float(), None, 0.1
    out, _ = norm_relu_fwd(*given, dtype=torch.float16)  # the interpreter truncates bf16
    assert out.dtype == torch.float16 and torch.equal(out, norm_relu_fwd(*given)[0].half())


@pytest.mark.parametrize("fn", [norm_relu, norm_relu_ref])
def test_is_batch_norm_residual_and_relu(fn, device):
    """PyTorch's modules in fp64, over two batches: outputs, gradients, and the running statistics, which one of several
    programs updates."""
    C = 130
    exact = nn.BatchNorm1d(C, eps=1e-3, momentum=0.01).double().to(device)
    running = (
        torch.zeros(C, device=device),
        torch.ones(C, device=device),
        torch.zeros((), dtype=torch.int64).to(device),
    )
    versions = [t._version for t in running]
    for N in (40, 300):
        inputs = on(device, make_inputs(N, C))
        nn.init.constant_(exact.weight, 0).data.add_(inputs["weight"])
        nn.init.constant_(exact.bias, 0).data.add_(inputs["bias"])
        names = "x", "weight", "bias", "residual"
        x, residual = (inputs[name].clone().requires_grad_() for name in ("x", "residual"))
        truth = (exact(x) + residual).relu()
        up = torch.randn_like(truth)
        expected = torch.autograd.grad(truth, (x, exact.weight, exact.bias, residual), up)
        leaves = [inputs[name].float().requires_grad_() for name in names]
        out = fn(*leaves[:3], 1e-3, leaves[3], running, 0.01)
        for ours, theirs in zip((out, *torch.autograd.grad(out, leaves, up.float())), (truth, *expected), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5 * max(1, theirs.abs().max().item()))
    for ours, theirs in zip(running, (exact.running_mean, exact.running_var, exact.num_batches_tracked), strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-6, atol=1e-7)
    assert all(t._version > version for t, version in zip(running, versions, strict=True))


@pytest.mark.parametrize("fn", [norm_relu, norm_relu_ref])
def test_by_hand(fn, device):
    """Rows -1 and 1 of channel 0: mean 0, variance 1, 0.5 x^ + 1 = 0.5 and 1.5; residual -0.25 and -2. Channel 1 is
    constant, so its x^ is 0, and the output its bias."""
    x = torch.tensor([[-1.0, 7], [1, 7]], device=device, requires_grad=True)
    weight = torch.tensor([0.5, 3], device=device, requires_grad=True)
    bias = torch.tensor([1.0, 2], device=device, requires_grad=True)
    residual = torch.tensor([[-0.25, 0], [-2, 1]], device=device, requires_grad=True)
    running = torch.zeros(2, device=device), torch.ones(2, device=device), torch.zeros((), dtype=torch.int64).to(device)
    out = fn(x, weight, bias, 1e-30, residual, running, 0.5)
    assert out.tolist() == [[0.25, 2], [0, 3]]
    # the mean of channel 0 stays 0, its unbiased variance is 2; that of channel 1 moves halfway to 7, variance to 0
    assert [t.tolist() for t in running] == [[0, 3.5], [1.5, 0.5], 1]
    grads = torch.autograd.grad(out, (weight, bias, residual), torch.tensor([[4.0, 1], [8, 1]], device=device))
    assert [g.tolist() for g in grads] == [[-4, 0], [4, 2], [[4, 1], [0, 1]]]


def test_a_large_mean_does_not_cancel(device):
    """Rows around 1000 with a deviation of 2: sums of squares in fp32 would have lost it."""
    inputs = on(device, make_inputs(300, 16, mean=1000.0))
    check_against_ref(norm_relu, norm_relu_ref, inputs, torch.float32, slack=1e-4)
    same = dict(inputs, x=torch.full_like(inputs["x"], 1000.5), residual=None)
    same = {k: v.float() if torch.is_tensor(v) else v for k, v in same.items()}
    assert torch.equal(norm_relu(**same), same["bias"].relu().expand(300, 16))


def test_nan_is_not_hidden_by_the_relu(device):
    inputs = {k: v.float() if torch.is_tensor(v) else v for k, v in on(device, make_inputs(40, 5)).items()}
    inputs["x"][3, 2] = torch.nan
    for fn in (norm_relu, norm_relu_ref):
        assert fn(**inputs)[:, 2].isnan().all() and fn(**inputs)[:, :2].isfinite().all()


def test_gradcheck_of_the_reference(device):
    inputs = on(device, make_inputs(7, 3))
    leaves = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
    residual = inputs["residual"].requires_grad_()
    torch.autograd.gradcheck(lambda *a: norm_relu(*a[:3], 1e-3, a[3]), (*leaves, residual))


def test_bit_equal_from_run_to_run(device):
    inputs = {k: v.bfloat16() if torch.is_tensor(v) else v for k, v in on(device, make_inputs(600, 16)).items()}
    leaves = [inputs[name].requires_grad_() for name in ("x", "weight", "bias", "residual")]

    def run():
        out = norm_relu(*leaves[:3], 1e-3, leaves[3])
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(0).sin())

    assert all(map(torch.equal, run(), run()))


def test_empty_rows_leave_the_running_statistics(device):
    running = torch.zeros(5, device=device), torch.ones(5, device=device), torch.zeros((), dtype=torch.int64).to(device)
    for fn in (norm_relu, norm_relu_ref):
        fn(
            torch.ones(0, 5, device=device),
            torch.ones(5, device=device),
            torch.ones(5, device=device),
            1e-3,
            None,
            running,
        )
    assert not running[0].any() and running[1].eq(1).all() and running[2] == 0


def test_rejects_invalid_arguments(device):
    x, c, running = torch.ones(4, 5, device=device), torch.ones(5, device=device), torch.ones((), device=device)
    for args, message in [
        ((x[0], c, c, 1e-3), r"x is \[N, C\]"),
        ((x.int(), c, c, 1e-3), r"x is \[N, C\]"),
        ((x, c[1:], c, 1e-3), r"weight and bias are \[5\]"),
        ((x, c, c, 1e-3, x[1:]), "the residual is"),
        ((x, c, c, 1e-3, x.double()), "the residual is"),
        ((x, c, c, 1e-3, None, (c, c[1:], running)), "running statistics"),
    ]:
        for fn in (norm_relu, norm_relu_ref):
            with pytest.raises(AssertionError, match=message):
                fn(*args)
