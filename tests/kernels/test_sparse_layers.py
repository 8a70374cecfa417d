"""Layers of convolution, batch norm, residual and ReLU in one op, compared with the references of the separate ops."""

from collections import Counter

import pytest
import torch

from tests.check import check_against_ref, launches
from tests.kernels.test_sparse_conv import CASES, ONE, STRIDE, THREE, grads, make_inputs, voxels
from unipad.kernels import sparse_gemm
from unipad.kernels import sparse_layers as module
from unipad.kernels.sparse_conv import sparse_conv, sparse_conv_ref
from unipad.kernels.sparse_gemm import gather_gemm
from unipad.kernels.sparse_layers import Layer, sparse_layers, sparse_layers_ref
from unipad.kernels.sparse_map import strided_tables_ref, submanifold_map_ref
from unipad.kernels.sparse_tiles import NeighborTable
from unipad.kernels.voxel_keys import sort_voxels_ref

SHAPE = (4, 6, 9)
# (output channels, whether the layer has a stride of 2, whether it skips) of each layer
STAGE = [(16, False, False), (16, False, False), (16, False, True), (16, False, False), (16, False, True)]
DOWN = [(18, False, False), (32, True, False), (32, False, False), (32, False, True)]


def make_net(plan, N, device, c_in=5, bias=None):
    """(op with the signature of its inputs, reference, inputs in fp64) of layers as planned on N voxels.

    bias: of the norms: in half precision far from 0 in both directions, so that rounding does not decide on a ReLU's
        gradient; None: random.
    """
    gen = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(size, generator=gen, dtype=torch.float64).to(device)

    coords, shape, tables, same, channels = voxels(1, SHAPE, N, device, gen).int(), SHAPE, [], None, [c_in]
    for c_out, strided, _ in plan:
        channels.append(c_out)
        if strided:
            coords, _, *both = strided_tables_ref(coords, shape, THREE, STRIDE, ONE, ONE)
            shape, same = tuple((size + 1) // 2 for size in shape), None
            tables.append([NeighborTable(table) for table in both])
            continue
        if same is None:
            keys, order = sort_voxels_ref(coords, shape)
            same = [NeighborTable(submanifold_map_ref(coords, keys, order, shape, THREE, ONE)), None]
        tables.append(same)

    def run(op):
        def run_op(features, weights, norm_weights, norm_biases, residual=None, dtype=None):
            parameters = zip(weights, norm_weights, norm_biases, tables, plan, strict=True)
            layers = [Layer(w, nw, nb, *both, eps=1e-3, skips=skips) for w, nw, nb, both, (*_, skips) in parameters]
            return op(features, layers, residual, dtype)

        return run_op

    sizes = list(zip(channels[1:], channels, strict=False))
    signs = [torch.where(torch.arange(o, device=device) % 3 > 0, 1.0, -1.0).double() for o, _ in sizes]
    biases = [0.5 * random(o) if bias is None else bias * sign for (o, _), sign in zip(sizes, signs, strict=True)]
    inputs = dict(
        features=random(N, c_in),
        weights=[random(o, *THREE, i) / (14 * i) ** 0.5 for o, i in sizes],
        norm_weights=[1 + 0.2 * random(o) for o, _ in sizes],
        norm_biases=biases,
    )
    return run(sparse_layers), run(sparse_layers_ref), inputs


def in_type(dtype, inputs):
    return {k: [t.to(dtype) for t in v] if isinstance(v, list) else v.to(dtype) for k, v in inputs.items()}


@pytest.mark.parametrize("dtype, bias", [(torch.float32, None), (torch.float16, 8), (torch.bfloat16, 8)], ids=str)
@pytest.mark.parametrize("plan", [STAGE, DOWN, STAGE[:1]], ids=["stage", "down", "one"])
@pytest.mark.parametrize("N", [37, 64, 65, 150])  # odd, exactly a tile, one more, several tiles
def test_matches_reference(N, plan, dtype, bias, device):
    op, ref, inputs = make_net(plan, N, device, bias=bias)
    check_against_ref(op, ref, inputs, dtype)


@pytest.mark.parametrize("N", [0, 1])
def test_no_voxel_or_one_matches_reference(N, device):
    op, ref, inputs = make_net(STAGE, N, device)
    check_against_ref(op, ref, inputs, torch.float32)


def test_a_residual_of_the_last_layer_matches_reference(device):
    op, ref, inputs = make_net(STAGE[:2], 65, device)
    inputs["residual"] = torch.arange(65 * 16, device=device).view(65, 16).double().sin()
    check_against_ref(op, ref, inputs, torch.float32)


def test_too_many_tiles_match_reference(monkeypatch, device):
    """The norms then read the rows for their sums."""
    monkeypatch.setattr(sparse_gemm, "MAX_TILES", 1)
    op, ref, inputs = make_net(STAGE, 65, device)
    with launches() as launched:
        check_against_ref(op, ref, inputs, torch.float32)
    assert launched.count("_moments_kernel") == launched.count("_norm_relu_sums_kernel") == 5


def test_only_gradients_that_are_needed_are_computed(device):
    """Of the weights of layers 1 and 3, and of no features."""
    op, ref, inputs = make_net(STAGE, 37, device)
    inputs = in_type(torch.float32, inputs)
    leaves = [inputs["weights"][l].requires_grad_() for l in (1, 3)]
    results = []
    for fn in (op, ref):
        with launches() as launched:
            results.append(grads(fn(**inputs), *leaves))
        if fn is op:
            assert launched.count("_gather_gemm_kernel") == 5 + 3 and launched.count("_d_weight_kernel") == 1
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


def test_launches(device):
    """Two a layer in the forward and two in the backward, one for the sums of the last norm; two for the gradients of
    the weights of consecutive layers that are alike."""
    op, _, inputs = make_net(STAGE + [(32, True, False)], 37, device)
    inputs = in_type(torch.float16, inputs)
    leaves = [inputs["features"].requires_grad_(), *(w.requires_grad_() for w in inputs["weights"])]
    with launches() as forward:
        out = op(**inputs)
    with launches() as backward:
        grads(out, *leaves)
    assert Counter(forward) == dict(_gather_gemm_kernel=6, _norm_relu_fwd_kernel=6, _tiles_kernel=2)
    expected = dict(_gather_gemm_kernel=6, _norm_relu_bwd_kernel=6, _norm_relu_sums_kernel=1, _tiles_kernel=1)
    # four layers of 16 channels, whose sum is an operator; one of 5, one with a stride
    expected |= dict(_d_weight_of_groups_kernel=1, _d_weight_kernel=2, _sum_chunks_kernel=2, _pairs_kernel=2)
    assert Counter(backward) == expected


def test_more_layers_alike_than_a_launch_takes_match_reference(monkeypatch, device):
    """Four with 16 input channels, three and one."""
    monkeypatch.setattr(module, "MAX_ALIKE", 3)
    op, ref, inputs = make_net(STAGE, 37, device, bias=8)
    with launches() as launched:
        check_against_ref(op, ref, inputs, torch.float16)
    assert launched.count("_d_weight_of_groups_kernel") == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5], CASES[9]], ids=str)  # odd, one tile and one row, wide
def test_moments_are_those_of_the_tiles(case, dtype, device):
    """Merged, they are the mean and the variance of the output as it was rounded."""
    inputs, *_ = make_inputs(*case, device, dtype)
    features, weight, idx, _ = inputs.values()
    out, (moments, R) = gather_gemm(features, weight.flatten(1, 3), NeighborTable(idx), False, with_moments=True)
    assert torch.equal(out, sparse_conv(**inputs))
    sizes = (len(out) - R * torch.arange(len(moments), device=device)).clamp(0, R)[:, None].double()
    mean, squares = moments.double().unbind(1)
    of_all = (sizes * mean).sum(dim=0) / len(out)
    variance = (squares + sizes * (mean - of_all).square()).sum(dim=0) / len(out)
    torch.testing.assert_close(of_all, out.double().mean(dim=0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(variance, out.double().var(dim=0, correction=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5], CASES[9]], ids=str)  # as above
def test_sums_are_those_of_the_norm_before(case, dtype, device):
    """sum g and sum g x^, where g is the gradient as it was rounded, with a residual's, behind the ReLU's mask."""
    inputs, *_ = make_inputs(*case, device, dtype)
    features, weight, idx, _ = inputs.values()
    gen, size = torch.Generator().manual_seed(1), (idx.shape[1], len(weight))
    x, y, residual = (torch.randn(size, generator=gen).to(device, dtype) for _ in range(3))
    statistics = torch.rand(2, size[1], generator=gen).to(device)
    out, sums = gather_gemm(
        features, weight.flatten(1, 3), NeighborTable(idx), False, act=(None, None, residual, False),
        norm=(x, statistics, y),
    )  # fmt: skip
    g, x_hat = torch.where(y > 0, out, 0).double(), (x.double() - statistics[0]) * statistics[1]
    expected = torch.stack([g.sum(dim=0), (g * x_hat).sum(dim=0)])
    error = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(sums.double().sum(dim=0), expected, rtol=0, atol=error)
    truth = sparse_conv_ref(**inputs) + residual
    error = 8 * torch.finfo(dtype).eps * max(1, truth.abs().max().item())
    torch.testing.assert_close(out, truth, rtol=0, atol=error)


@pytest.mark.parametrize("fn", [sparse_layers, sparse_layers_ref])
def test_by_hand(fn, device):
    """Two voxels without neighbors. Layer 1: x = -2, 2, of variance 4; y = 0.5 x^ + 1 = 0.5, 1.5. Layer 2: x = -0.5,
    -1.5, x^ = 1, -1; y = x^ + 0.5 + features = 0.5, 0.5. Two rows fit any norm exactly, so that no gradient passes
    through it."""
    features = torch.tensor([[-1.0], [1]], device=device, requires_grad=True)
    table = NeighborTable(torch.arange(2, dtype=torch.int32, device=device)[None])
    parameters = [torch.tensor([v], device=device).requires_grad_() for v in (2.0, 0.5, 1.0, -1.0, 1.0, 0.5)]
    first, second = (
        Layer(w.view(1, 1, 1, 1, 1), nw, nb, table, None, eps=1e-30) for w, nw, nb in (parameters[:3], parameters[3:])
    )
    running = torch.zeros(1, device=device), torch.ones(1, device=device), torch.zeros((), dtype=torch.int64).to(device)
    out = fn(features, [first._replace(running=running, momentum=0.5), second._replace(skips=True)])
    assert out.flatten().tolist() == [0.5, 0.5]
    # a mean of 0; a variance of 8 without bias, half of it and of 1
    assert [t.flatten().tolist() for t in running] == [[0], [4.5], [1]]
    d_out = torch.tensor([[1.0], [3]], device=device)
    d_features, *others = torch.autograd.grad(out, (features, *parameters), d_out)
    assert d_features.flatten().tolist() == [1, 3]  # of the residual
    assert [g.item() for g in others] == [0, 0, 0, 0, -2, 4]


def test_autocast_and_the_type_of_the_result(device):
    """Features and residual are cast, once; the result of fp32 layers can be half, and its gradient too."""
    op, _, inputs = make_net(STAGE[:2], 65, device, bias=8)
    inputs = in_type(torch.float32, inputs) | dict(residual=torch.ones(65, 16, device=device))
    leaves = [t.requires_grad_() for t in (inputs["features"], inputs["residual"], inputs["weights"][0])]
    with torch.autocast(device, torch.bfloat16):
        out = op(**inputs)
    assert out.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads(out, *leaves))
    exact, cast = op(**inputs), op(**inputs, dtype=torch.float16)  # the interpreter truncates bf16
    assert exact.dtype == torch.float32 and torch.equal(cast, exact.half())
    up = torch.ones_like(cast).cumsum(0).sin()
    results = torch.autograd.grad(cast, leaves, up), torch.autograd.grad(exact, leaves, up.float())
    assert all(ours.dtype == torch.float32 and torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_bit_equal_from_run_to_run(device):
    op, _, inputs = make_net(DOWN, 150, device)
    inputs = in_type(torch.bfloat16, inputs)
    leaves = [inputs["features"], *inputs["weights"], *inputs["norm_weights"]]
    leaves = [t.requires_grad_() for t in leaves]
    first, second = ((out, *grads(out, *leaves)) for out in (op(**inputs), op(**inputs)))
    assert all(map(torch.equal, first, second))


def test_weights_changed_before_the_backward_are_noticed(device):
    op, _, inputs = make_net(STAGE[:1], 37, device)
    inputs = in_type(torch.float32, inputs)
    out = op(**inputs | dict(features=inputs["features"].requires_grad_()))
    inputs["norm_weights"][0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradcheck_of_the_reference(device):
    """fp64, which gradcheck needs, runs the reference."""
    op, _, inputs = make_net([(2, False, False), (2, False, False), (2, False, True)], 6, device, c_in=2, bias=1)
    flat = [inputs["features"], *inputs["weights"], *inputs["norm_weights"]]
    torch.autograd.gradcheck(
        lambda x, *p: op(x, p[:3], p[3:], inputs["norm_biases"]), tuple(t.requires_grad_() for t in flat)
    )


def test_rejects_invalid_arguments(device):
    features, table = torch.ones(4, 5, device=device), torch.zeros(27, 4, dtype=torch.int32, device=device)
    c = torch.ones(5, device=device)
    layer = Layer(torch.ones(5, *THREE, 5, device=device), c, c, NeighborTable(table), None, eps=1e-3)
    for layers, residual, message in [
        ([layer._replace(weight=layer.weight[..., 1:])], None, "4 input channels follows 5"),
        ([layer._replace(table=NeighborTable(table[1:]))], None, "26 offsets"),
        ([layer._replace(inverse=NeighborTable(table[:, 1:]))], None, "inverse table is"),
        ([layer._replace(table=NeighborTable(table.long()))], None, "tables are int32"),
        ([layer._replace(weight=layer.weight[0])], None, "weights are"),
        ([layer._replace(norm_bias=c[1:])], None, r"norm are not \[5\]"),
        ([layer._replace(running=(c, c[1:], c))], None, "running statistics"),
        ([layer._replace(skips=True)], None, "cannot add None"),
        ([layer._replace(rounded=layer.weight.half())], None, "`rounded` is not torch.float32"),
        ([layer], features[1:], "last layer adds"),
        ([layer, layer._replace(skips=True)], features, "last layer adds"),
    ]:
        for fn in (sparse_layers, sparse_layers_ref):
            with pytest.raises(AssertionError, match=message):
                fn(features, layers, residual)
