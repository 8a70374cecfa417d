"""Sparse convolutions and norms compared with PyTorch's layers; caching, autocast and torch.compile."""

import copy
import gc
import math
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.check import launches
from unipad.kernels import backend
from unipad.model import sparse as sparse_module
from unipad.model.norm import SyncedBatchNorm
from unipad.model.sparse import (
    ConvNormReLU,
    SparseBatchNorm,
    SparseBlock,
    SparseStage,
    convolutions_with_tables,
    make_tables,
    rounded_weights,
)
from unipad.spconv.conv import SparseConv3d, SparseInverseConv3d, SubMConv3d
from unipad.spconv.tensor import SparseConvTensor
from unipad.spconv.voxels import VoxelSet

SHAPE = (6, 9, 7)  # Z, Y, X
KERNELS = [1, 2, 3, 5, (3, 1, 1)]
CHANNELS = [(1, 5), (5, 16), (16, 18), (18, 1)]  # (in, out): a test uses one pair per kernel or geometry, in turn


def coords_of(name, shape=SHAPE):
    """(voxels [N, 4]: grid, z, y, x; batch size) of a test case: "none", "one", "block" or "scattered" (shuffled)."""
    Z, Y, X = shape
    if name == "none":
        return torch.empty(0, 4, dtype=torch.int32), 2
    if name == "one":
        return torch.tensor([[0, 1, 2, 3]], dtype=torch.int32), 1
    if name == "block":
        block = torch.cartesian_prod(*[torch.arange(3)] * 3) + torch.tensor([2, 3, 1])
        return F.pad(block, (1, 0)).int(), 1
    # "scattered": random voxels and all corners of grids 0 and 2; grid 1 is empty
    occupied = torch.rand(3, *shape) < 0.2
    for z in (0, Z - 1):
        for y in (0, Y - 1):
            occupied[:, z, y, [0, X - 1]] = True
    occupied[1] = False
    coords = occupied.nonzero().int()
    return coords[torch.randperm(len(coords))], 3


def sparse(name, channels, shape=SHAPE, dtype=torch.float64, device="cpu"):
    """A SparseConvTensor of random features [N, channels] on the voxels of `coords_of(name)`."""
    coords, batch_size = coords_of(name, shape)
    features = torch.randn(len(coords), channels, dtype=dtype)
    return SparseConvTensor.of(features.to(device).requires_grad_(), VoxelSet(coords.to(device), shape, batch_size))


def occupancy(voxels):
    """[B, 1, Z, Y, X] fp64: 1 in occupied voxels."""
    cells = torch.zeros(voxels.batch_size, 1, *voxels.shape, dtype=torch.float64, device=voxels.coords.device)
    b, z, y, x = voxels.coords.long().unbind(1)
    cells[b, 0, z, y, x] = 1
    return cells


def dense_of(x):
    """[B, C, Z, Y, X], as `SparseConvTensor.dense()`, by indexing."""
    voxels = x.voxels
    cells = x.features.new_zeros(voxels.batch_size, *voxels.shape, x.features.shape[1])
    cells = cells.index_put(tuple(voxels.coords.long().unbind(1)), x.features)
    return cells.permute(0, 4, 1, 2, 3)


def assert_is_dense_convolution(conv, x, convolve, active):
    """Assert that `conv(x)` and its gradients are those of `convolve(cells, weight) * active`.

    active:   [B, 1, Z', Y', X'], 1 in the output voxels, which are checked too.
    convolve: takes [B, Cin, Z, Y, X] and a weight [Cout, Cin, kz, ky, kx], returns [B, Cout, Z', Y', X'].
    """
    out = conv(x)
    ours = out.dense(memory_format=torch.channels_last_3d)
    assert torch.equal(occupancy(out.voxels), active)
    leaves = [x.features, *conv.parameters()]
    # the expected values come from `dense_of`, not from `dense`, which is tested too
    expected = convolve(dense_of(x), conv.kernel_weight().permute(0, 4, 1, 2, 3))
    expected = (expected if conv.bias is None else expected + conv.bias.view(-1, 1, 1, 1)) * active
    assert ours.shape == expected.shape and ours.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    d_out = torch.randn_like(expected)
    gradients = (torch.autograd.grad(t, leaves, d_out) for t in (ours, expected))
    for a, b in zip(*gradients, strict=True):
        largest = b.abs().max().item() if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1.0, largest))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("name", ["none", "one", "block", "scattered"])
@pytest.mark.parametrize("dilation", [1, (1, 2, 3)], ids=str)
def test_submanifold_matches_masked_conv3d(name, kernel, dilation, device):
    channels = CHANNELS[KERNELS.index(kernel) % len(CHANNELS)]
    conv = SubMConv3d(*channels, kernel, dilation=dilation).double().to(device)
    x = sparse(name, channels[0], device=device)

    def convolve(cells, weight):
        pad = []  # so that offset k // 2 of the kernel is at the output voxel
        for k, d in zip(reversed(conv.kernel_size), reversed(conv.dilation), strict=True):
            pad += [k // 2 * d, (k - 1 - k // 2) * d]
        return F.conv3d(F.pad(cells, pad), weight, dilation=conv.dilation)

    assert_is_dense_convolution(conv, x, convolve, occupancy(x.voxels))
    assert conv(x).voxels is x.voxels


# kernel, stride, padding, dilation
POINTWISE = (1, 1, 0, 1)  # keeps the voxels and their order
GEOMETRIES = [
    (3, 2, 1, 1),
    (3, 2, (0, 1, 1), 1),
    (2, 2, 0, 1),
    (1, 2, 0, 1),
    POINTWISE,
    (3, 1, 1, 1),
    (5, 3, 2, 1),
    ((3, 1, 1), (2, 1, 1), 0, 1),
    (3, 1, 2, 2),
    (2, 3, 1, (1, 2, 1)),  # windows with gaps between them
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("name", ["none", "one", "block", "scattered"])
def test_strided_matches_conv3d(name, geometry, device):
    channels = CHANNELS[GEOMETRIES.index(geometry) % len(CHANNELS)]
    conv = SparseConv3d(*channels, *geometry, bias=name != "block").double().to(device)
    x = sparse(name, channels[0], device=device)

    def convolve(cells, weight):
        return F.conv3d(cells, weight, None, conv.stride, conv.padding, conv.dilation)

    ones = x.features.new_ones(1, 1, *conv.kernel_size)
    assert_is_dense_convolution(conv, x, convolve, (convolve(occupancy(x.voxels), ones) > 0.5).double())
    if geometry != POINTWISE:
        assert (conv(x).voxels.keys().diff() > 0).all()  # in ascending order


@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES if g != POINTWISE], ids=str)
@pytest.mark.parametrize("name", ["none", "one", "scattered"])
def test_inverse_matches_conv_transpose3d_at_the_voxels_before_the_convolution(name, geometry, device):
    channels = CHANNELS[GEOMETRIES.index(geometry) % len(CHANNELS)]
    down = SparseConv3d(2, channels[0], *geometry).double().to(device)
    up = SparseInverseConv3d(*channels, geometry[0]).double().to(device)
    fine = sparse(name, 2, device=device)
    coarse = down(fine)
    x = coarse.replace_feature(coarse.features.detach().requires_grad_())

    def transposed(cells, weight, output_padding=0):
        window = dict(stride=down.stride, padding=down.padding, dilation=down.dilation)
        return F.conv_transpose3d(cells, weight.transpose(0, 1), output_padding=output_padding, **window)

    # Output padding adds the last cells, which no window of `down` covers and conv_transpose3d would leave out.
    # `unpadded` is computed only for its shape.
    unpadded = transposed(x.dense()[:, :1], x.features.new_ones(1, 1, *down.kernel_size))
    output_padding = [size - covered for size, covered in zip(SHAPE, unpadded.shape[2:], strict=True)]
    convolve = partial(transposed, output_padding=output_padding)
    assert_is_dense_convolution(up, x, convolve, occupancy(fine.voxels))
    assert up(x).voxels is fine.voxels


def test_inverse_needs_a_convolution_to_invert():
    x = sparse("one", 2)
    with pytest.raises(ValueError, match="nothing to go back to"):
        SparseInverseConv3d(2, 2, 3).double()(x)
    with pytest.raises(ValueError, match=r"kernel \(2, 2, 2\), this one is \(3, 3, 3\)"):
        SparseInverseConv3d(2, 2, 3).double()(SparseConv3d(2, 2, 2, 2).double()(x))


def test_weight_layout_and_initialization():
    conv = SparseConv3d(16, 8, (3, 2, 1), 2)
    assert conv.weight.shape == (8, 3, 2, 1, 16) and conv.bias.shape == (8,)
    bound = 1 / math.sqrt(16 * 3 * 2 * 1)  # fan-in: channels * cells of the kernel
    assert 0.9 * bound < conv.weight.abs().max() <= bound
    assert SubMConv3d(1, 1, 3, bias=False).state_dict().keys() == {"weight"}
    text = "16, 8, kernel_size=(3, 2, 1), stride=(2, 2, 2), padding=(0, 0, 0), dilation=(1, 1, 1), bias=True"
    assert text in repr(conv)


def test_neighbor_tables_are_built_once_per_geometry():
    x = sparse("scattered", 2)
    assert x.voxels.submanifold((3, 3, 3), (1, 1, 1)) is x.voxels.submanifold((3, 3, 3), (1, 1, 1))
    assert x.voxels.submanifold((3, 3, 3), (1, 1, 1)) is not x.voxels.submanifold((3, 3, 3), (2, 2, 2))
    down = [SparseConv3d(2, 2, 3, stride=2, padding=1).double() for _ in range(2)]
    first, second = (conv(x) for conv in down)
    assert first.voxels is second.voxels
    assert SparseConv3d(2, 2, 3, stride=2, padding=0).double()(x).voxels is not first.voxels


def test_a_cuda_graph_reuses_tables_of_its_warm_up_and_caches_none(monkeypatch):
    """Simulated: warm-up on stream 1, capture on stream 2, before which `torch.cuda.graph` synchronizes the device.
    Stream 3 does not get tables that stream 1 may still compute."""
    voxels, kernel, one = sparse("scattered", 2).voxels, (3, 3, 3), (1, 1, 1)
    monkeypatch.setattr(backend, "stream", lambda device: 1)
    table, output = voxels.submanifold(kernel, one), voxels.strided(kernel, (2, 2, 2), one, one)
    monkeypatch.setattr(backend, "stream", lambda device: 2)
    monkeypatch.setattr(backend, "capturing", lambda device: True)
    assert voxels.submanifold(kernel, one) is table and voxels.strided(kernel, (2, 2, 2), one, one) is output
    in_graph = voxels.submanifold((1, 3, 3), one)
    monkeypatch.setattr(backend, "capturing", lambda device: False)
    assert voxels.submanifold((1, 3, 3), one) is not in_graph
    monkeypatch.setattr(backend, "stream", lambda device: 3)
    assert voxels.submanifold(kernel, one) is not table


def test_unused_voxels_are_freed():
    """At once, not by the garbage collector, since they take GPU memory."""
    gc.disable()
    try:
        x = sparse("scattered", 2)
        with torch.no_grad():
            out = SparseConv3d(2, 2, 3, 2, 1).double()(x)
        first, second = weakref.ref(x.voxels), weakref.ref(out.voxels)
        del x
        assert first() is not None  # `out.voxels` keeps it for an inverse convolution
        del out
        assert second() is None and first() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "voxel, message",
    [
        ((0, 6, 0, 0), "outside"),
        ((0, 0, -1, 0), "outside"),
        ((0, 1, 2, 3), "twice"),
        ((2, 0, 0, 0), "grid 2 of a batch of 2"),
    ],
)
def test_bad_voxels_are_rejected(voxel, message):
    coords = torch.tensor([(0, 1, 2, 3), voxel], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        VoxelSet(coords, SHAPE, 2)


def test_a_strided_convolution_without_output_names_axis_and_kernel():
    coords = torch.tensor([(0, 0, 1, 2)], dtype=torch.int32)
    with pytest.raises(ValueError, match="kernel 3, stride 2, .* no output along z, where the grid has 1 cells"):
        SparseConv3d(2, 3, 3, 2)(SparseConvTensor.of(torch.ones(1, 2), VoxelSet(coords, (1, 8, 8), 1)))


def test_batch_norm_is_over_the_voxels():
    x = sparse("scattered", 5, dtype=torch.float32)
    ours, plain = SparseBatchNorm(5, eps=1e-3, momentum=0.01), nn.BatchNorm1d(5, eps=1e-3, momentum=0.01)
    torch.testing.assert_close(ours(x).features, plain(x.features))
    assert ours(x).voxels is x.voxels
    ours.eval(), plain.eval()
    plain.load_state_dict(ours.state_dict())  # ours has updated its statistics twice, plain once
    torch.testing.assert_close(ours(x).features, plain(x.features))


class Small(nn.Module):
    """A net with every kind of sparse convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = SubMConv3d(3, 8, 3, bias=False), SparseBatchNorm(8)
        self.down, self.up = SparseConv3d(8, 16, 3, 2, 1), SparseInverseConv3d(16, 8, 3)
        self.point, self.halve = SparseConv3d(8, 4, 1), SparseConv3d(4, 5, 2, 2)

    def forward(self, x):
        x = self.norm(self.stem(x))
        y = self.up(self.down(x.replace_feature(x.features.relu())))
        y = y.replace_feature((x.features + y.features).relu())
        return self.halve(self.point(y)).dense()


def step(net, call, x):
    """Output, gradients and running mean of one training step of `net`; `call` runs its forward pass."""
    features = x.features.detach().requires_grad_()
    out = call(SparseConvTensor.of(features, x.voxels))
    out.float().square().mean().backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    return dict(out=out.detach(), features=features.grad, mean=net.norm.running_mean.clone(), **grads)


def assert_compiled_matches_eager(call, eager, compiled, names):
    """Assert that on the voxels of each of `names` (see `coords_of`) a `step` of `compiled`, whose forward pass `call`
    runs, equals one of `eager`."""
    for name in names:
        x = sparse(name, 3, dtype=torch.float32)
        a, b = step(eager, eager, x), step(compiled, call, x)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(b[key], a[key], rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")


def test_compiled_matches_eager():
    eager, compiled = Small(), Small()
    compiled.load_state_dict(eager.state_dict())
    torch._dynamo.reset()
    assert_compiled_matches_eager(torch.compile(compiled, backend="aot_eager"), eager, compiled, ["scattered"])


def test_with_prebuilt_tables_a_net_compiles_to_one_graph():
    eager, compiled = Small(), Small()
    compiled.load_state_dict(eager.state_dict())
    torch._dynamo.reset()
    graph = torch.compile(compiled, backend="aot_eager", fullgraph=True)

    def call(x):
        voxel_sets = make_tables(compiled, x.voxels)  # kept until the net has run
        return graph(SparseConvTensor.of(x.features, voxel_sets[0]))

    assert_compiled_matches_eager(call, eager, compiled, ["scattered", "none", "scattered"])


def test_autocast_runs_in_bf16():
    net, x = Small(), sparse("scattered", 3, dtype=torch.float32)
    in_fp32 = step(net, net, x)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    in_bf16 = step(net, call, x)
    assert in_bf16["out"].dtype == torch.bfloat16
    for key, value in in_bf16.items():
        assert value.isfinite().all(), key
        assert key == "out" or value.dtype == torch.float32, key
    assert (in_bf16["out"] - in_fp32["out"]).abs().max() < 0.05 * in_fp32["out"].abs().max()


def test_one_cast_of_all_weights_gives_the_same_bits():
    """In training and in inference; afterwards, and after an error, the convolutions cast their own again."""
    net, x = Small(), sparse("scattered", 3, dtype=torch.float32)

    convs = convolutions_with_tables(net)

    def call(x, context=rounded_weights):
        with torch.autocast("cpu", torch.bfloat16), context(convs):
            return net(x)

    own, shared = (step(net, partial(call, context=c), x) for c in (lambda convs: nullcontext(), rounded_weights))
    del own["mean"], shared["mean"]  # the second step's
    assert all(torch.equal(own[key], shared[key]) for key in own)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ZeroDivisionError), rounded_weights(convs):
        assert net.down.rounded.dtype == torch.bfloat16 and net.point.rounded is None  # 1 x 1 x 1: by autocast itself
        raise ZeroDivisionError
    assert all(m.rounded is None for m in (net.stem, net.down, net.up, net.point, net.halve))
    with rounded_weights(convs):
        assert net.down.rounded is None  # without autocast
    with torch.autocast("cpu", torch.bfloat16), rounded_weights(convs):
        # fp64 features are never cast, nor any features where autocast is off
        assert net.stem(SparseConvTensor.of(x.features.double(), x.voxels)).features.dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert net.stem(x).features.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), rounded_weights(convolutions_with_tables(net.point)):  # nothing to cast
        assert net.point.rounded is None


@torch.no_grad()
def test_a_norm_caches_scale_and_shift_until_its_weights_change(monkeypatch):
    norm = SparseBatchNorm(3).eval()
    first = norm.scale_and_shift()
    assert norm.scale_and_shift() is first
    norm.load_state_dict({name: value + 1 for name, value in norm.state_dict().items()})
    # weight and variance, 1 before, are 2
    assert norm.scale_and_shift()[0].tolist() == pytest.approx([2 / (2 + norm.eps) ** 0.5] * 3)
    before = norm.scale_and_shift()
    monkeypatch.setattr(backend, "capturing", lambda device: True)
    assert norm.scale_and_shift() is before
    norm.weight.zero_()
    in_graph = norm.scale_and_shift()
    assert not in_graph[0].any() and norm.scale_and_shift() is not in_graph
    monkeypatch.undo()
    kept = norm.scale_and_shift()
    assert kept is not in_graph and norm.scale_and_shift() is kept
    monkeypatch.setattr(backend, "stream", lambda device: 1)
    on_stream_1 = norm.scale_and_shift()
    assert on_stream_1 is not kept  # which the other stream may still compute
    assert copy.deepcopy(norm).scale_and_shift() is not on_stream_1  # a copy has its own weights


def block():
    return SparseBlock(16)


def stage():
    down = ConvNormReLU(SparseConv3d(16, 8, 3, 2, 1, bias=False))
    return SparseStage(SparseBlock(16), down, SparseBlock(8), SparseBlock(5, in_channels=8), SparseBlock(5))


# sums: launches for the gradient of a norm that no convolution of the same op follows. The stage is three ops, since a
# block projects its input
@pytest.mark.parametrize("make, norms, sums", [(block, 2, 1), (stage, 9, 3)])
def test_layers_in_one_op_train_alike(make, norms, sums, monkeypatch, device):
    """Kernels in the interpreter compared with PyTorch's operators: outputs, gradients and running statistics."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    torch.manual_seed(0)
    net, x = make().to(device), sparse("scattered", 16, dtype=torch.float32, device=device)
    for norm in (m for m in net.modules() if isinstance(m, SparseBatchNorm)):
        nn.init.constant_(norm.bias, 8)  # no ReLU's input is near 0, where rounding would decide on its gradient
    results = []
    monkeypatch.setattr(backend, "interpret", device == "cpu")
    for context, fused in [(backend.references, 0), (nullcontext, 1)]:
        twin, features = copy.deepcopy(net), x.features.detach().requires_grad_()
        voxels = VoxelSet(x.voxels.coords, x.voxels.shape, x.voxels.batch_size)
        with launches() as launched, context():
            out = twin(SparseConvTensor.of(features, voxels)).features
            grads = torch.autograd.grad(out.square().sum(), [features, *twin.parameters()])
        assert launched.count("_norm_relu_fwd_kernel") == norms * fused
        assert launched.count("_norm_relu_sums_kernel") == sums * fused
        results.append((out, *grads, *twin.buffers()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * max(1, a.abs().max().item()))


@pytest.mark.parametrize(
    "name, frozen, ops",
    [
        ("scattered", [], [5]),
        ("scattered", ["0.bn1"], [1, 3]),  # the second layer skips over the first, which is no part of an op
        ("scattered", ["0.bn2"], [1, 3]),
        ("scattered", ["1.1"], [2, 2]),
        ("scattered", ["2.bn2"], [3, 1]),  # it adds the input of the layer before it, which no op may keep to itself
        ("one", [], [3]),  # the strided convolution has several output voxels
        ("none", [], []),
    ],
)
def test_a_frozen_norm_takes_only_its_own_layer_from_an_op(name, frozen, ops, monkeypatch, device):
    """ops: layers of each op. Outputs, gradients and running statistics are those of PyTorch's operators."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    torch.manual_seed(0)
    net = SparseStage(SparseBlock(8), ConvNormReLU(SparseConv3d(8, 8, 3, 2, 1, bias=False)), SparseBlock(8)).to(device)
    x = sparse(name, 8, dtype=torch.float32, device=device)
    for norm in (m for m in net.modules() if isinstance(m, SparseBatchNorm)):
        nn.init.constant_(norm.bias, 8)  # as above
    for norm in frozen:
        net.get_submodule(norm).eval()
    monkeypatch.setattr(backend, "interpret", device == "cpu")
    op, seen, results = sparse_module.sparse_layers, [], []

    def recording(features, layers, *rest):
        seen.append(len(layers))
        return op(features, layers, *rest)

    monkeypatch.setattr(sparse_module, "sparse_layers", recording)
    for context, expected in [(backend.references, []), (nullcontext, ops)]:
        seen.clear()
        twin, features = copy.deepcopy(net), x.features.detach().requires_grad_()
        voxels = VoxelSet(x.voxels.coords, x.voxels.shape, x.voxels.batch_size)
        with context():
            out = twin(SparseConvTensor.of(features, voxels)).features
            grads = torch.autograd.grad(out.square().sum(), [features, *twin.parameters()])
        assert seen == expected
        results.append((out, *grads, *twin.buffers()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * max([1, *a.abs().flatten().tolist()]))


def test_modules_are_called_where_nothing_is_fused():
    """Hooks and wrappers work there."""
    net, called = stage(), []
    for name, module in net.named_children():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    net(sparse("scattered", 16, dtype=torch.float32))
    assert called == ["0", "1", "2", "3", "4"]


def test_norms_with_other_processes_rows_or_modes_are_not_fused(device, monkeypatch):
    """Only one process in training has all the rows of a norm; a single row, fp64 and evaluation go the general way."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    monkeypatch.setattr(backend, "interpret", device == "cpu")
    norm, called, general = SparseBatchNorm(8).to(device), [], SyncedBatchNorm.forward
    monkeypatch.setattr(SyncedBatchNorm, "forward", lambda self, x: called.append(len(x)) or general(self, x))
    x = torch.randn(30, 8, device=device)
    with launches() as launched:
        norm.relu(x, None)
    assert "_norm_relu_fwd_kernel" in launched and not called
    with launches() as launched:
        norm.relu(x[:1], None)
        norm.double().relu(x.double(), None)
        norm.float().eval().relu(x, None)
        norm.train()
        monkeypatch.setattr("unipad.model.sparse.is_alone", lambda: False)
        norm.relu(x, None)
    assert not launched and called == [1, 30, 30, 30]
