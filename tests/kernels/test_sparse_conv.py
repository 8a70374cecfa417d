"""Sparse convolutions: kernels compared with references, references with dense convolutions and by hand."""

from collections import Counter
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.check import check_against_ref, launches
from unipad.kernels import sparse_gemm, sparse_reference
from unipad.kernels.sparse_conv import sparse_conv, sparse_conv_act, sparse_conv_act_ref, sparse_conv_ref

ONE, THREE = (1, 1, 1), (3, 3, 3)
# kind, kernel, batch size, grid (Z, Y, X), voxels, Cin, Cout; the grid and the voxels are the convolution's inputs
# ("inverse": its outputs). A tile has 64 rows. A step of the GEMM multiplies 64 channels in half precision, 32 in fp32
# (half as many if Cin or Cout is neither 8 nor a multiple of 16), of one offset or of several.
CASES = [
    ("submanifold", THREE, 3, (3, 4, 5), 37, 5, 18),  # odd sizes; the second sample is empty
    ("submanifold", THREE, 1, THREE, 27, 18, 5),  # every cell occupied
    ("submanifold", THREE, 2, (4, 5, 6), 64, 16, 16),  # exactly one tile
    ("submanifold", THREE, 2, (4, 5, 6), 65, 1, 16),  # one more than a tile; 16 or 32 offsets per step
    ("submanifold", THREE, 1, (3, 4, 5), 33, 32, 8),  # in half precision two offsets per step, eight in the backward
    ("submanifold", (3, 1, 1), 1, (4, 4, 9), 129, 128, 128),  # one more than two tiles; several steps per offset
    ("submanifold", ONE, 1, (2, 3, 4), 20, 5, 18),
    ("submanifold", THREE, 1, (4, 4, 4), 1, 5, 16),
    ("submanifold", THREE, 2, (4, 4, 4), 0, 5, 16),
    ("strided", THREE, 3, (5, 4, 7), 37, 16, 32),
    ("strided", (2, 2, 2), 2, (4, 5, 6), 40, 5, 16),
    ("strided", (3, 1, 1), 1, (5, 3, 4), 33, 18, 5),
    ("inverse", THREE, 2, (5, 4, 7), 37, 16, 5),
    ("transposed", (2, 2, 2), 2, (3, 3, 4), 20, 5, 16),
]  # fmt: skip
# 125 offsets: more than the bits of the sort key in sparse_tiles.py
FIVE = ("submanifold", (5, 5, 5), 1, (3, 3, 4), 30, 16, 1)
STRIDE = (2, 2, 2)  # of all kinds but submanifold
PADDING = {ONE: 0, (2, 2, 2): 0, THREE: 1, (3, 1, 1): (1, 0, 0), (5, 5, 5): 2}  # by kernel


def voxels(B, shape, N, device, generator):
    """[N, 4] distinct (b, z, y, x) in random order, corners of the grid among them; with B = 3, sample 1 is empty."""
    cells = torch.tensor([c for c in product(*map(range, (B, *shape))) if B < 3 or c[0] != 1])
    corner = ((cells[:, 1:] == 0) | (cells[:, 1:] == torch.tensor(shape) - 1)).all(dim=1)
    rank = torch.rand(len(cells), generator=generator) - corner.float()  # corners first
    chosen = cells[rank.argsort()[:N]]
    assert len(chosen) == N
    return chosen[torch.randperm(N, generator=generator)].to(device)


def outputs_and_table(kind, kernel, coords, shape):
    """Output coordinates [M, 4], their grid, neighbor table [K, M], found cell by cell without sparse_map.py."""
    padding = torch.tensor(PADDING[kernel]).expand(3).tolist()
    stride = ONE if kind == "submanifold" else STRIDE
    row = {tuple(c): n for n, c in enumerate(coords.tolist())}
    offsets = list(product(*map(range, kernel)))

    def reads(o, k):
        """The input cell (b, z, y, x) that output cell o reads at offset k; None if it lies between two cells."""
        if kind != "transposed":
            return (o[0], *(a * s - p + d for a, s, p, d in zip(o[1:], stride, padding, k, strict=True)))
        at = [a + p - d for a, p, d in zip(o[1:], padding, k, strict=True)]
        return (
            None
            if any(a % s for a, s in zip(at, stride, strict=True))
            else (o[0], *(a // s for a, s in zip(at, stride, strict=True)))
        )

    if kind == "submanifold":
        out_shape, outs = shape, list(row)
    else:
        sizes = zip(shape, kernel, stride, padding, strict=True)
        if kind == "transposed":
            out_shape = tuple((n - 1) * s - 2 * p + k for n, k, s, p in sizes)
        else:
            out_shape = tuple((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)
        B = max((c[0] for c in row), default=-1) + 1
        outs = [o for o in product(*map(range, (B, *out_shape))) if any(reads(o, k) in row for k in offsets)]
    table = torch.tensor([[row.get(reads(o, k), -1) for o in outs] for k in offsets], dtype=torch.int32)
    return torch.tensor(outs).view(-1, 4).to(coords), out_shape, table.view(len(offsets), -1).to(coords.device)


def inverted(table, N):
    """The inverse table: [K, N], m at (k, n) where table[k, m] = n, otherwise -1."""
    inverse = torch.full((len(table), N), -1, dtype=torch.int32, device=table.device)
    k, m = (table >= 0).nonzero(as_tuple=True)
    inverse[k, table[k, m].long()] = m.int()
    return inverse


def make_inputs(kind, kernel, B, shape, N, Cin, Cout, device, dtype=torch.float64):
    """Arguments of `sparse_conv`, then its input voxels and its output voxels as (coords, grid)."""
    gen = torch.Generator().manual_seed(0)
    coords = voxels(B, shape, N, device, gen)
    out_coords, out_shape, table = outputs_and_table("strided" if kind == "inverse" else kind, kernel, coords, shape)
    sides = [(coords, shape), (out_coords, out_shape)]
    tables = [table, inverted(table, N)]
    if kind == "inverse":
        sides, tables = sides[::-1], tables[::-1]
    inputs = dict(
        features=torch.randn(len(sides[0][0]), Cin, generator=gen, dtype=dtype).to(device),
        weight=torch.randn(Cout, *kernel, Cin, generator=gen, dtype=dtype).to(device),
        neighbor_idx=tables[0].contiguous(),
        inverse_idx=tables[1].contiguous(),
    )
    return inputs, *sides


def grads(out, *leaves):
    """Gradients w.r.t. the leaves, for a fixed random gradient w.r.t. `out`."""
    gen = torch.Generator().manual_seed(1)
    up = torch.randn(out.shape, generator=gen, dtype=torch.float64).to(out)
    return torch.autograd.grad(out, leaves, up)


class Casts(TorchDispatchMode):
    """Counts casts and copies, by the shape of the tensor."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            self.of[args[0].shape] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, dtype, device):
    inputs, *_ = make_inputs(*case, device)
    check_against_ref(sparse_conv, sparse_conv_ref, inputs, dtype)


def test_more_offsets_than_bits_in_the_sort_key_match_reference(device):
    inputs, *_ = make_inputs(*FIVE, device)
    check_against_ref(sparse_conv, sparse_conv_ref, inputs, torch.float16)


@pytest.mark.parametrize("wrt", ["features", "weight"])
def test_gradient_of_only_one_input_matches_reference(wrt, device):
    inputs, *_ = make_inputs(*CASES[0], device)
    check_against_ref(sparse_conv, sparse_conv_ref, inputs, torch.float32, wrt=(wrt,))


def test_wide_tiles_match_reference(monkeypatch, device):
    """The block sizes chosen for many rows and channels."""
    monkeypatch.setattr(sparse_gemm, "FEW_ROWS", 1)  # 150 rows count as many
    inputs, *_ = make_inputs("submanifold", (3, 1, 1), B=1, shape=(4, 5, 9), N=150, Cin=144, Cout=272, device=device)
    check_against_ref(sparse_conv, sparse_conv_ref, inputs, torch.float16)


@pytest.mark.parametrize("fn", [sparse_conv, sparse_conv_ref])
def test_a_table_whose_inverse_is_its_flip_needs_no_inverse(fn, device):
    """The kernels then use one set of tiles for the forward and both gradients."""
    inputs, *_ = make_inputs("submanifold", THREE, 2, (4, 5, 6), 90, Cin=5, Cout=16, device=device, dtype=torch.float32)
    assert torch.equal(inputs["inverse_idx"], inputs["neighbor_idx"].flip(0))
    leaves = inputs["features"].requires_grad_(), inputs["weight"].requires_grad_()
    expected = fn(**inputs)
    expected = expected, *grads(expected, *leaves)
    with launches() as launched:
        # a copy of the table, for which no tiles are cached
        out = fn(**inputs | dict(inverse_idx=None, neighbor_idx=inputs["neighbor_idx"].clone()))
        out = out, *grads(out, *leaves)
    assert launched.count("_tiles_kernel") == (1 if fn is sparse_conv else 0)
    for without_inverse, with_inverse in zip(out, expected, strict=True):
        atol = 1e-5 * with_inverse.abs().max().item()
        torch.testing.assert_close(without_inverse, with_inverse, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel, c_in, c_out", [(THREE, 8, 5), (THREE, 32, 16), ((3, 1, 1), 64, 40)])
def test_weights_gradient_of_groups_of_offsets_matches_reference(kernel, c_in, c_out, dtype, device):
    """Where `inverse_idx` is None (the inverse is the table's flip) and channels are few; in three sums, each of up to
    64 rows."""
    inputs, *_ = make_inputs("submanifold", kernel, 1, (4, 5, 9), N=150, Cin=c_in, Cout=c_out, device=device)
    inputs["inverse_idx"] = None
    with launches() as launched:
        check_against_ref(sparse_conv, sparse_conv_ref, inputs, dtype)
    assert "_d_weight_of_groups_kernel" in launched


def test_weights_gradient_in_many_chunks_matches_reference(monkeypatch, device):
    """Three offsets with 93, 150 and 93 pairs, in three to five chunks each; then in one each, the minimum."""
    monkeypatch.setattr(sparse_gemm, "MIN_PAIRS", 8)
    monkeypatch.setattr(sparse_gemm, "BLOCK_R", 16)
    inputs, *_ = make_inputs("submanifold", (3, 1, 1), 1, (4, 5, 9), N=150, Cin=3, Cout=20, device=device)
    check_against_ref(sparse_conv, sparse_conv_ref, inputs, torch.float32, wrt=("weight",))
    monkeypatch.setattr(sparse_gemm, "PROGRAMS", 2)
    check_against_ref(sparse_conv, sparse_conv_ref, inputs, torch.float32, wrt=("weight",))


# scale, shift, residual, relu
ACTS = [(True, True, True, True), (True, True, False, False), (False, True, False, True), (False, False, True, False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[9]], ids=str)  # odd sizes, one tile, strided
def test_act_applies_the_epilogue_and_rounds_once(case, act, dtype, device):
    """The error w.r.t. fp64 is at most half a unit in the last place, of one rounding, plus that of fp32 sums."""
    inputs, *_ = make_inputs(*case, device)
    del inputs["inverse_idx"]
    gen = torch.Generator().manual_seed(2)
    M, O = inputs["neighbor_idx"].shape[1], len(inputs["weight"])
    scale, shift, residual = (torch.randn(size, generator=gen).to(device) for size in (O, O, (M, O)))
    *given, relu = act
    scale, shift, residual = (v if g else None for v, g in zip((scale, shift, residual), given, strict=True))

    ours = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    exact = {k: v.double() if v.is_floating_point() else v for k, v in ours.items()}
    truth = sparse_conv_ref(**exact, inverse_idx=inverted(inputs["neighbor_idx"], len(inputs["features"])))
    truth = truth if scale is None else truth * scale
    truth = truth if shift is None else truth + shift
    truth = truth if residual is None else truth + residual.to(dtype)
    truth = truth.relu() if relu else truth
    ulps = 0.51 if dtype != torch.bfloat16 or device != "cpu" else 1.01  # the interpreter truncates bf16
    bound = ulps * torch.finfo(dtype).eps * truth.abs() + 1e-6 * truth.abs().max()
    for fn in (sparse_conv_act, sparse_conv_act_ref):
        with launches() as launched:
            out = fn(**ours, scale=scale, shift=shift, residual=residual, relu=relu)
        assert bool(launched) == (fn is sparse_conv_act and dtype != torch.float64)
        assert out.dtype == dtype and ((out - truth).abs() <= bound).all()


@pytest.mark.parametrize("fn", [sparse_conv_act, sparse_conv_act_ref])
@pytest.mark.parametrize("N, M", [(0, 70), (3, 70), (3, 0)])
def test_act_of_outputs_without_neighbors_is_the_shift(fn, N, M, device):
    """The convolution is 0 there, so scale has no effect; the ReLU follows the shift."""
    features, weight = torch.ones(N, 5, device=device), torch.ones(7, *THREE, 5, device=device)
    nothing = torch.full((27, M), -1, dtype=torch.int32, device=device)
    shift = torch.arange(-3.0, 4, device=device)
    out = fn(features, weight, nothing, scale=2 * shift, shift=shift, relu=True)
    assert torch.equal(out, shift.relu().expand(M, 7))


def test_act_rejects_gradients_and_a_shift_of_wrong_size(device):
    inputs, *_ = make_inputs(*CASES[0], device, torch.float32)
    del inputs["inverse_idx"]
    inputs["weight"].requires_grad_()
    with pytest.raises(AssertionError, match="no gradient"):
        sparse_conv_act(**inputs)
    with torch.no_grad():
        sparse_conv_act(**inputs)
    with pytest.raises(AssertionError, match=r"are \[18\]"), torch.no_grad():
        sparse_conv_act(**inputs, shift=torch.ones(5, device=device))


def test_allow_tf32_multiplies_in_tf32(device):
    """On a GPU. The interpreter multiplies in fp32: there this shows only that the kernel takes the flag."""
    inputs, *_ = make_inputs("submanifold", ONE, 1, (2, 3, 4), 20, Cin=40, Cout=80, device=device, dtype=torch.float32)
    truth = sparse_conv_ref(**inputs)
    error = (sparse_conv(**inputs, allow_tf32=True) - truth).abs().max() / truth.abs().max()
    assert error < 2e-3
    assert error > 1e-5 or device == "cpu"


@pytest.mark.parametrize("case", [FIVE, *(c for c in CASES if c[4])], ids=str)  # all with voxels
def test_reference_matches_dense_convolution(case, device):
    """In fp64, which runs the reference: forward and both gradients, for every kind.

    The dense convolution is of features scattered into the grid, and is gathered at the output voxels.
    """
    kind, kernel, B = case[:3]
    inputs, (coords, shape), (out_coords, out_shape) = make_inputs(*case, device)
    features, weight = inputs["features"].requires_grad_(), inputs["weight"].requires_grad_()

    dense = features.new_zeros(B, *shape, features.shape[1])
    dense = dense.index_put(tuple(coords.T), features).permute(0, 4, 1, 2, 3)
    padding, stride = PADDING[kernel], ONE if kind == "submanifold" else STRIDE
    if kind in ("inverse", "transposed"):
        size = zip(out_shape, shape, kernel, stride, torch.tensor(padding).expand(3).tolist(), strict=True)
        # the upper cells of each axis that the strided convolution does not reach
        output_padding = [o - ((n - 1) * s - 2 * p + k) for o, n, k, s, p in size]
        truth = F.conv_transpose3d(dense, weight.permute(4, 0, 1, 2, 3), None, stride, padding, output_padding)
    else:
        truth = F.conv3d(dense, weight.permute(0, 4, 1, 2, 3), None, stride, padding)
    truth = truth.permute(0, 2, 3, 4, 1)[tuple(out_coords.T)]

    out = sparse_conv(**inputs)
    for ours, of_dense in zip(
        (out, *grads(out, features, weight)), (truth, *grads(truth, features, weight)), strict=True
    ):
        torch.testing.assert_close(ours, of_dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrt", [("features", "weight"), ("features",), ("weight",)], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[9]], ids=str)  # submanifold, strided
def test_reference_gathers_wide_rows_in_groups_of_offsets(case, wrt, monkeypatch, device):
    """Groups of at most 4 numbers and of 300, so of single offsets and of several, against one group per chunk."""

    def run():
        inputs, *_ = make_inputs(*case, device)
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        wanted = [inputs[name].requires_grad_() for name in wrt]
        out = sparse_conv_ref(**inputs)
        return out, *torch.autograd.grad(out.square().sum(), wanted)

    expected, groups, make = run(), [], sparse_reference._groups
    monkeypatch.setattr(sparse_reference, "_groups", lambda *args: groups.append(make(*args)) or groups[-1])
    monkeypatch.setattr(sparse_reference, "WIDE", 1)
    counts = []
    for numbers in (4, 300):
        monkeypatch.setattr(sparse_reference, "GROUP", numbers)
        for a, b in zip(run(), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        counts.append(sum(map(len, groups)))
        groups.clear()
    assert counts[0] > counts[1]


def test_groups_by_hand():
    """At most 5 pairs: offsets 0 to 2, offset 3 alone, since it has more, offsets 4 and 5."""
    groups = sparse_reference._groups([2, 0, 3, 7, 0, 5], 5)
    assert groups == [
        (slice(0, 3), slice(0, 5), [2, 0, 3]),
        (slice(3, 4), slice(5, 12), [7]),
        (slice(4, 6), slice(12, 17), [0, 5]),
    ]
    assert sparse_reference._groups([0], 0) == [(slice(0, 1), slice(0, 0), [0])]


@pytest.mark.parametrize("fn", [sparse_conv, sparse_conv_ref])
def test_by_hand(fn, device):
    """Three voxels side by side along x and a fourth alone; the weights of left, own and right voxel are 1, 10, 100."""
    features = torch.tensor([[1.0], [2], [3], [4]], device=device, requires_grad=True)
    weight = torch.tensor([1.0, 10, 100], device=device).view(1, 1, 1, 3, 1).requires_grad_()
    left, here, right = [-1, 0, 1, -1], [0, 1, 2, 3], [1, 2, -1, -1]
    table = torch.tensor([left, here, right], dtype=torch.int32, device=device)
    out = fn(features, weight, table, table.flip(0))
    assert out.flatten().tolist() == [210, 321, 32, 40]
    d_features, d_weight = torch.autograd.grad(out, (features, weight), torch.tensor([[1.0], [2], [4], [8]]).to(out))
    assert d_features.flatten().tolist() == [10 + 2, 100 + 20 + 4, 200 + 40, 80]
    assert d_weight.flatten().tolist() == [2 * 1 + 4 * 2, 1 + 4 + 12 + 32, 1 * 2 + 2 * 3]


@pytest.mark.parametrize("fn", [sparse_conv, sparse_conv_ref])
@pytest.mark.parametrize("N", [0, 3])
def test_outputs_without_neighbors_are_zero(fn, N, device):
    features = torch.ones(N, 5, device=device, requires_grad=True)
    weight = torch.ones(7, *THREE, 5, device=device, requires_grad=True)
    nothing = torch.full((27, 70), -1, dtype=torch.int32, device=device)
    out = fn(features, weight, nothing, nothing[:, :N])
    d_features, d_weight = grads(out, features, weight)
    assert out.shape == (70, 7) and d_features.shape == (N, 5) and d_weight.shape == weight.shape
    assert not out.any() and not d_features.any() and not d_weight.any()


def test_gradcheck_of_the_reference(device):
    """fp64, which gradcheck needs, runs the reference."""
    inputs, *_ = make_inputs("strided", THREE, 1, (3, 3, 3), N=6, Cin=2, Cout=3, device=device)
    inputs["features"].requires_grad_(), inputs["weight"].requires_grad_()
    torch.autograd.gradcheck(sparse_conv, tuple(inputs.values()))


@pytest.mark.parametrize("fn", [sparse_conv, sparse_conv_ref])
@pytest.mark.parametrize("dtype, mirrored", [(torch.float32, False), (torch.float16, True)], ids=str)
def test_bit_equal_from_run_to_run(dtype, mirrored, fn, device):
    """mirrored: without `inverse_idx`, so that the gradients read the table in reverse order of its offsets."""
    inputs, *_ = make_inputs("submanifold", THREE, 2, (4, 5, 6), N=130, Cin=8, Cout=16, device=device, dtype=dtype)
    inputs["inverse_idx"] = None if mirrored else inputs["inverse_idx"]
    leaves = inputs["features"].requires_grad_(), inputs["weight"].requires_grad_()
    first, second = ((out, *grads(out, *leaves)) for out in (fn(**inputs), fn(**inputs)))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("fn", [sparse_conv, sparse_conv_ref])
def test_compiled_matches_eager(fn, device):
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True, dynamic=True)
    for case in (CASES[0], ("submanifold", THREE, 2, (3, 4, 5), 40, 5, 18)):  # other batch size and voxels
        inputs, *_ = make_inputs(*case, device, torch.float32)
        leaves = inputs["features"].requires_grad_(), inputs["weight"].requires_grad_()
        for a, b in zip(*((out, *grads(out, *leaves)) for out in (fn(**inputs), compiled(**inputs))), strict=True):
            assert torch.equal(a, b)


@torch.no_grad()
def test_act_compiled_matches_eager(device):
    compiled = torch.compile(sparse_conv_act, backend="aot_eager", fullgraph=True)
    (inputs, *_), gen = make_inputs(*CASES[0], device, torch.float32), torch.Generator().manual_seed(2)
    del inputs["inverse_idx"]
    inputs |= dict(shift=torch.randn(18, generator=gen).to(device), relu=True)
    assert torch.equal(compiled(**inputs), sparse_conv_act(**inputs))


@pytest.mark.parametrize("reference", [False, True])
def test_custom_ops_pass_opcheck(reference, device):
    """Schema, fake results and gradients, as PyTorch itself checks them."""
    inputs, *_ = make_inputs("strided", (2, 2, 2), 2, (4, 4, 4), 9, Cin=5, Cout=3, device=device, dtype=torch.float32)
    inputs["features"].requires_grad_(), inputs["weight"].requires_grad_()
    allow_tf32, relu, scale, residual = False, True, None, None
    torch.library.opcheck(torch.ops.unipad.sparse_conv, (*inputs.values(), allow_tf32, reference))
    features, weight, table, _ = (t.detach() for t in inputs.values())
    shift = torch.ones(3, device=device)
    arguments = features, weight, table, scale, shift, residual, relu, allow_tf32, reference
    torch.library.opcheck(torch.ops.unipad.sparse_conv_act, arguments)


@pytest.mark.parametrize("fn", [sparse_conv, sparse_conv_ref])
def test_autocast_casts_features_but_not_the_weights_gradient(fn, device):
    inputs, *_ = make_inputs(*CASES[0], device, torch.float32)
    features, weight = inputs["features"].requires_grad_(), inputs["weight"].requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        out = fn(**inputs)
    of_bf16_features = fn(**inputs | dict(features=features.bfloat16()))
    assert out.dtype == torch.bfloat16 and torch.equal(out, of_bf16_features)
    d_features, d_weight = grads(out, features, weight)
    assert d_features.dtype == d_weight.dtype == torch.float32
    assert not torch.equal(d_weight, d_weight.bfloat16().float())  # never rounded


@pytest.mark.parametrize("fn", [sparse_conv, sparse_conv_ref])
def test_weights_that_the_caller_has_rounded_give_the_same_bits(fn, device):
    """The forward then has one cast less, that of the weights; the backward has the forward's."""
    inputs, *_ = make_inputs(*CASES[2], device, torch.float32)
    features, weight = inputs["features"].requires_grad_(), inputs["weight"].requires_grad_()
    results, casts = [], []
    for rounded in (None, weight.detach().bfloat16()):
        with Casts() as casts_made:
            with torch.autocast(device, torch.bfloat16):
                out = fn(**inputs, rounded=rounded)
            results.append((out, *grads(out, features, weight)))
        casts.append(casts_made.of[weight.shape])
    assert all(map(torch.equal, *results)) and casts[0] == casts[1] + 1
    # with a gradient, not rounded, of another shape
    for other in (weight.bfloat16(), weight.detach(), weight.detach().bfloat16()[1:]):
        with pytest.raises(AssertionError, match="`rounded` is"):
            fn(**inputs | dict(features=features.bfloat16()), rounded=other)


@pytest.mark.parametrize("fn", [sparse_conv, sparse_conv_ref])
def test_the_weights_gradient_may_exceed_the_largest_fp16(fn, device):
    features = torch.full((300, 1), 100.0, device=device, dtype=torch.float16)
    weight = torch.ones(1, 1, 1, 1, 1, device=device, requires_grad=True)
    table = torch.arange(300, dtype=torch.int32, device=device)[None]
    out = fn(features, weight, table, table)
    (d_weight,) = torch.autograd.grad(out, weight, torch.full_like(out, 100))
    assert d_weight.item() == 3e6


def test_a_table_modified_in_place_is_read_again(device):
    """Layouts cached for the old values are not used."""
    features, weight = torch.tensor([[1.0], [2]], device=device), torch.ones(1, 1, 1, 1, 1, device=device)
    weight.requires_grad_()
    for fn in (sparse_conv, sparse_conv_ref):
        table = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
        for expected in ([1, 2], [1, 0]):
            out = fn(features, weight, table, table)
            assert out.flatten().tolist() == expected
            assert torch.autograd.grad(out.sum(), weight)[0].item() == sum(expected)
            table[0, 1] = -1


def test_rejects_invalid_arguments(device):
    inputs, *_ = make_inputs("strided", THREE, 1, (3, 3, 3), 5, Cin=2, Cout=3, device=device, dtype=torch.float32)
    features, weight, table, inverse = inputs.values()
    for args, message in [
        ((features[:, :1], weight, table, inverse), "do not match"),
        ((features, weight.flatten(1, 3), table, inverse), "do not match"),
        ((features, weight, table[1:], inverse), "not a table"),
        ((features, weight, table, inverse[:, 1:]), "not a table"),
        ((features, weight, table.long(), inverse), "int32"),
        ((features.int(), weight, table, inverse), "torch.int32"),
    ]:
        for fn in (sparse_conv, sparse_conv_ref):
            with pytest.raises(AssertionError, match=message):
                fn(*args)
