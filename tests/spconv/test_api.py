"""The interface of spconv: tensors, containers, shared tables and their errors, weights, pools."""

import copy
import gc
import weakref
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import unipad.spconv as spconv
from unipad.spconv import functional as Fsp

SHAPE = [5, 8, 7]


def tensor(channels=4, shape=SHAPE, batch_size=3, density=0.2, dtype=torch.float32, seed=0):
    """Random voxels, shuffled; sample 1 is empty."""
    generator = torch.Generator().manual_seed(seed)
    occupied = torch.rand(batch_size, *shape, generator=generator) < density
    occupied[1:2] = False
    indices = occupied.nonzero().int()
    indices = indices[torch.randperm(len(indices), generator=generator)]
    features = torch.randn(len(indices), channels, generator=generator).to(dtype)
    return spconv.SparseConvTensor(features, indices, shape, batch_size)


def test_a_tensor_keeps_what_it_was_given():
    x = tensor()
    given = spconv.SparseConvTensor(x.features, x.indices, np.array(SHAPE), 3, grid=None, benchmark=True)
    assert given.indices is x.indices and given.spatial_shape == SHAPE and given.batch_size == 3
    assert given.spatial_size == 280 and not given.is_quantized and given.find_indice_pair("a") is None
    y = given.replace_feature(x.features.relu())
    assert y.indices is x.indices and y.voxels is given.voxels and y.features.min() == 0
    assert "spatial_shape=[5, 8, 7], batch_size=3" in repr(given)
    assert torch.equal(given.minus().features, -x.features) and given.shadow_copy().voxels is given.voxels


@pytest.mark.parametrize("shape", [[30], [6, 7], SHAPE], ids=str)
def test_dense_and_back(shape):
    x = tensor(shape=shape)
    dense = x.dense()
    assert dense.shape == (3, 4, *shape) and dense.is_contiguous()
    for row, (b, *cell) in enumerate(x.indices.tolist()):
        assert torch.equal(dense[(b, slice(None), *cell)], x.features[row])
    assert dense.count_nonzero() == x.features.numel()
    last = x.dense(channels_first=False)
    assert torch.equal(last.movedim(-1, 1), dense) and last.is_contiguous()
    back = spconv.SparseConvTensor.from_dense(last)
    assert back.spatial_shape == shape and back.batch_size == 3 and torch.equal(back.dense(), dense)
    assert torch.equal(spconv.ToDense()(x), dense)


def test_arithmetic():
    x = tensor()
    assert torch.equal((x + x).features, 2 * x.features) and torch.equal((1 + x).features, x.features + 1)
    assert torch.equal(spconv.AddTable()([x, x, x]).features, 3 * x.features)
    assert spconv.JoinTable()([x, x]).features.shape[1] == 8
    with pytest.raises(ValueError, match="sparse_add"):
        x + tensor(seed=1)
    with pytest.raises(ValueError, match="different voxels"):
        spconv.JoinTable()([x, tensor(seed=1)])
    convs = spconv.ConcatTable().add(spconv.SubMConv3d(4, 2, 3)).add(spconv.SubMConv3d(4, 3, 1))
    assert [y.features.shape[1] for y in convs(x)] == [2, 3]


def test_a_selection_has_tables_of_its_own():
    x = spconv.SubMConv3d(4, 4, 3, indice_key="a")(tensor())
    y = x.select_by_index(x.indices[:, 3] > 2)
    assert 0 < len(y.indices) < len(x.indices) and (y.indices[:, 3] > 2).all()
    assert not y.indice_dict and x.indice_dict.keys() == {"a"}
    spconv.SubMConv3d(4, 4, 3, indice_key="a")(y)


def test_assigned_and_modified_indices_count():
    """As in VoxelNeXt, which scales coordinates in place and concatenates voxels of several stages."""
    x = tensor(shape=[8, 9])
    conv = spconv.SubMConv2d(4, 4, 3)
    before = conv(x).features
    x.indices[:, 1:] *= 2
    x.spatial_shape = [16, 18]
    fresh = spconv.SparseConvTensor(x.features, x.indices.clone(), [16, 18], 3)
    assert torch.equal(conv(x).features, conv(fresh).features) and not torch.equal(conv(x).features, before)
    shared = x.replace_feature(x.features)
    x.indices[:, 1] -= 1
    with pytest.raises(ValueError, match="outside"):
        conv(shared)
    y = tensor(shape=[8, 9])
    both = y.replace_feature(torch.cat([y.features, y.features]))
    both.indices = torch.cat([y.indices, y.indices])
    assert len(both.features) == len(both.indices)
    with pytest.raises(ValueError, match="twice"):
        conv(both)
    y.batch_size = 1
    with pytest.raises(ValueError, match="grid 2 of a batch of 1"):
        conv(y)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(indices=torch.zeros(2, 4)), "int32, not torch.float32"),
        (dict(indices=torch.zeros(2, 3, dtype=torch.int32)), r"\(2, 3\) for spatial_shape \[4, 4, 4\]"),
        (dict(indices=torch.zeros(2, 5, dtype=torch.int32), spatial_shape=[4] * 4), "1 to 3 of them"),
        (dict(features=torch.zeros(2)), r"features are \[N, C\]"),
        (dict(features=torch.zeros(2, 3, dtype=torch.int32)), "floating"),
    ],
)
def test_bad_tensors(change, message):
    indices = torch.tensor([[0, 1, 2, 3], [0, 3, 2, 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        spconv.SparseConvTensor(
            **dict(features=torch.zeros(2, 3), indices=indices, spatial_shape=[4] * 3, batch_size=1) | change
        )


@pytest.mark.parametrize(
    "voxel, message",
    [((0, 4, 0, 0), "outside"), ((0, 0, -1, 0), "outside"), ((0, 1, 2, 3), "twice"), ((1, 0, 0, 0), "batch of 1")],
)
def test_bad_voxels(voxel, message):
    indices = torch.tensor([(0, 1, 2, 3), voxel], dtype=torch.int32)
    x = spconv.SparseConvTensor(torch.zeros(2, 3), indices, [4, 4, 4], 1)
    for layer in (
        spconv.SubMConv3d(3, 3, 3),
        spconv.SparseMaxPool3d(2),
        spconv.ToDense(),
        spconv.SparseGlobalMaxPool(),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x)


def test_bad_inputs_of_layers():
    x, conv = tensor(), spconv.SubMConv3d(4, 2, 3)
    for layer, match in [
        (spconv.SubMConv3d(5, 2, 3), "takes 5 channels, not 4"),
        (spconv.SubMConv2d(4, 2, 3), "in 2D, not in 3D"),
    ]:
        with pytest.raises(ValueError, match=match):
            layer(x)
    with pytest.raises(ValueError, match="3 rows of features do not match"):
        conv(x.replace_feature(x.features[:3]))
    with pytest.raises(ValueError, match="rows of features do not match"):
        conv(spconv.SparseConvTensor(x.features[:3], x.indices, SHAPE, 3))
    with pytest.raises(TypeError, match="takes a SparseConvTensor, not Tensor"):
        conv(x.features)
    for name, given, match in [
        ("SubMConv3d", dict(groups=2), "one group"),
        ("SubMConv3d", dict(act_type="ReLU"), "append the activation"),
        ("SparseConv3d", dict(stride=(1, 2)), "stride"),
        ("SparseConv3d", dict(dilation=0), "dilation"),
    ]:
        with pytest.raises(ValueError, match=match):
            getattr(spconv, name)(4, 2, 3, **given)
    ignored = dict(algo=spconv.ConvAlgo.Native, fp32_accum=False, large_kernel_fast_algo=True, use_hash=True, name="a")
    assert spconv.SparseConv3d(4, 2, 3, **ignored)(x).features.shape[1] == 2


# Shared tables


def test_layers_with_one_key_share_a_table():
    x = tensor()
    first, second = (spconv.SubMConv3d(4, 4, 3, padding=1, indice_key="a") for _ in range(2))
    y = first(x)
    z = second(y)
    assert z.indice_dict is y.indice_dict and not x.indice_dict  # as in spconv, a branch has keys of its own
    assert z.find_indice_pair("a").table is x.voxels.submanifold((3, 3, 3), (1, 1, 1))
    # an equal tensor made anew may use the table too
    anew = spconv.SparseConvTensor(x.features, x.indices.clone(), SHAPE, 3, indice_dict=y.indice_dict)
    assert torch.equal(second(anew).features, second(x).features)


@pytest.mark.parametrize(
    "second, message",
    [
        (lambda: spconv.SubMConv3d(4, 4, 5, indice_key="a"), r"kernel \(3, 3, 3\).*this one is.*kernel \(5, 5, 5\)"),
        (lambda: spconv.SubMConv3d(4, 4, 3, dilation=2, indice_key="a"), r"dilation \(1, 1, 1\).*dilation \(2, 2, 2\)"),
        (lambda: spconv.SparseConv3d(4, 4, 3, indice_key="a"), "submanifold layer.*this one is strided"),
        (lambda: spconv.SparseMaxPool3d(3, indice_key="a"), "submanifold layer.*this one is strided"),
        (lambda: spconv.SparseInverseConv3d(4, 4, 3, indice_key="a"), "no strided convolution.*'a'; those with one"),
    ],
)
def test_another_geometry_under_the_same_key_raises(second, message):
    y = spconv.SubMConv3d(4, 4, 3, indice_key="a")(tensor())
    with pytest.raises(ValueError, match=message):
        second()(y)


def test_other_voxels_under_the_same_key_raise():
    """spconv compares only their number, and silently uses the wrong table."""
    x, other = tensor(), tensor(seed=1)
    n = min(len(x.features), len(other.features))
    y = spconv.SubMConv3d(4, 4, 3, indice_key="a")(x.select_by_index(slice(n)))
    z = spconv.SparseConvTensor(other.features[:n], other.indices[:n], SHAPE, 3, indice_dict=y.indice_dict)
    with pytest.raises(ValueError, match=f"other voxels \\({n} in a grid of"):
        spconv.SubMConv3d(4, 4, 3, indice_key="a")(z)
    down = spconv.SparseConv3d(4, 4, 3, 2, 1, indice_key="b")(y)
    with pytest.raises(ValueError, match="other voxels"):
        spconv.SparseConv3d(4, 4, 3, 2, 1, indice_key="b")(down)


def test_voxels_that_were_modified_have_no_table_to_share():
    x = tensor()
    y = spconv.SubMConv3d(4, 4, 3, indice_key="a")(x)
    y.indices[:, 3] = SHAPE[2] - 1 - y.indices[:, 3]
    with pytest.raises(ValueError, match="other voxels"):
        spconv.SubMConv3d(4, 4, 3, indice_key="a")(y)


def test_a_pointwise_convolution_has_no_table_to_share():
    """As in CenterPoint, whose 1 x 1 convolutions may have the key of others."""
    y = spconv.SubMConv3d(4, 4, 3, indice_key="a")(tensor())
    assert spconv.SubMConv3d(4, 2, 1, padding=1, indice_key="a")(y).indice_dict is y.indice_dict


def test_inverse_convolutions_go_back():
    x = tensor()
    down, up = spconv.SparseConv3d(4, 6, 3, 2, 1, indice_key="d"), spconv.SparseInverseConv3d(6, 4, 3, indice_key="d")
    between = spconv.SparseConv3d(6, 6, 3, 1, indice_key="e")
    back = spconv.SparseInverseConv3d(6, 6, 3, indice_key="e")
    coarse = down(x)
    assert up(coarse).voxels is x.voxels
    assert torch.equal(up(spconv.SubMConv3d(6, 6, 3, indice_key="s")(coarse)).indices, x.indices)
    with pytest.raises(ValueError, match="other voxels.*first invert the layers between"):
        up(between(coarse))
    assert up(back(between(coarse))).voxels is x.voxels
    with pytest.raises(ValueError, match=r"kernel \(3, 3, 3\), this one is \(2, 2, 2\)"):
        spconv.SparseInverseConv3d(6, 4, 2, indice_key="d")(coarse)
    pooled = spconv.SparseMaxPool3d(2, 2, indice_key="p")(x)
    assert spconv.SparseInverseConv3d(4, 4, 2, indice_key="p")(pooled).voxels is x.voxels
    spread = spconv.SparseConvTranspose3d(4, 4, 2, 2, indice_key="t")(x)
    assert spconv.SparseInverseConv3d(4, 4, 2, indice_key="t")(spread).voxels is x.voxels
    assert spconv.SparseInverseConv3d(6, 4, 3)(coarse).voxels is x.voxels  # without a key: the layer before


def test_two_branches_may_use_one_key():
    x = tensor()
    for kernel in (2, 3):
        y = spconv.SparseConv3d(4, 4, kernel, 2, indice_key="d")(x)
        assert spconv.SparseInverseConv3d(4, 4, kernel, indice_key="d")(y).voxels is x.voxels


def test_voxels_of_past_batches_are_freed():
    gc.disable()
    try:
        x = tensor()
        with torch.no_grad():
            y = spconv.SparseConv3d(4, 4, 3, 2, 1, indice_key="d")(spconv.SubMConv3d(4, 4, 3, indice_key="a")(x))
        refs = [weakref.ref(t.voxels) for t in (x, y)]
        del x, y
        assert all(ref() is None for ref in refs)
    finally:
        gc.enable()


# Containers


def test_sequential():
    layers = spconv.SubMConv3d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), spconv.SparseConv3d(6, 2, 2, 2)
    net = spconv.SparseSequential(*layers, spconv.ToDense(), nn.Conv3d(2, 3, 2))
    assert net(tensor()).shape == (3, 3, 1, 3, 2)
    named = spconv.SparseSequential(OrderedDict(conv=layers[0], norm=layers[1]), relu=layers[2])
    named.add(layers[3])
    named.add(nn.Identity(), "last")
    assert [name for name, _ in named.named_children()] == ["conv", "norm", "relu", "3", "last"]
    assert len(named) == 5 and named[0] is layers[0] and named[-2] is layers[3] and isinstance(named, nn.Module)
    with pytest.raises(KeyError, match="last"):
        named.add(nn.Identity(), "last")
    assert [spconv.is_spconv_module(m) for m in named] == [True, False, False, True, False]
    x = tensor()
    for layer in (spconv.SparseBatchNorm(4), spconv.SparseReLU(), spconv.SparseIdentity()):
        assert spconv.is_spconv_module(layer)
        assert torch.equal(layer(x).features, layer(x.features)) and layer(x).voxels is x.voxels
    spconv.assign_name_for_sparse_modules(named)
    assert named.conv.name == "conv"


def test_a_module_of_ones_own_gets_the_tensor():
    class Doubled(spconv.SparseModule):
        def forward(self, x):
            return x.replace_feature(2 * x.features)

    x = tensor()
    assert torch.equal(spconv.SparseSequential(Doubled())(x).features, 2 * x.features)


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_input(training):
    indices = torch.empty(0, 4, dtype=torch.int32)
    features = torch.empty(0, 4, requires_grad=True)
    net = spconv.SparseSequential(
        spconv.SubMConv3d(4, 6, 3, indice_key="a"),
        nn.BatchNorm1d(6),
        nn.Sequential(nn.Linear(6, 5), nn.ReLU()),
        spconv.SparseConv3d(5, 6, 3, 2, 1, indice_key="b"),
        spconv.SparseInverseConv3d(6, 4, 3, indice_key="b"),
        spconv.SparseConvTranspose3d(4, 4, 2, 2),
        spconv.SparseMaxPool3d(2),
        spconv.SparseAvgPool3d(2),
    ).train(training)
    out = net(spconv.SparseConvTensor(features, indices, SHAPE, 2))
    assert out.features.shape == (0, 4) and not out.dense().any()
    out.features.sum().backward()
    assert features.grad.shape == (0, 4)
    for pool in (spconv.SparseGlobalMaxPool(), spconv.SparseGlobalAvgPool()):
        assert torch.equal(pool(out), torch.zeros(2, 4))
        assert pool(spconv.SparseConvTensor(features, indices, SHAPE, 0)).shape == (0, 4)


@pytest.mark.parametrize("training", [True, False])
def test_modules_run_on_an_empty_input(training):
    """They may change the width, and a norm over several processes waits for all of them."""
    ran = []

    class Norm(nn.SyncBatchNorm):
        def forward(self, x):
            ran.append(x.shape)
            return x

    net = spconv.SparseSequential(
        spconv.SubMConv3d(4, 6, 3), nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), Norm(5),
        spconv.SubMConv3d(5, 3, 3),
    ).train(training)  # fmt: skip
    out = net(spconv.SparseConvTensor(torch.empty(0, 4), torch.empty(0, 4, dtype=torch.int32), SHAPE, 2))
    assert out.features.shape == (0, 3) and ran == [(0, 5)]
    out.features.sum().backward()
    norm = net[1][1]
    assert not norm.running_mean.any() and norm.running_var.eq(1).all() and not norm.weight.grad.any()


# Precision, weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype):
    net = spconv.SparseSequential(
        spconv.SubMConv3d(4, 8, 3),
        spconv.SparseConv3d(8, 8, 3, 2, 1),
        spconv.SparseMaxPool3d(2, 1),
        spconv.SparseAvgPool3d((1, 2, 2)),
    )
    exact = copy.deepcopy(net).double()(tensor(dtype=torch.float64)).features
    out = net.to(dtype)(tensor(dtype=dtype)).features
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() < 8 * torch.finfo(dtype).eps * exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert net.float()(tensor()).features.dtype == torch.bfloat16


@pytest.mark.parametrize("kernel", [1, 3])
def test_weights_are_cast_to_the_type_of_features(kernel):
    conv, x = spconv.SubMConv3d(4, 2, kernel), tensor(dtype=torch.bfloat16)
    out = conv(x).features
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, conv.bfloat16()(x).features)


def test_weights_of_spconv_1():
    """Its kernels are (*kernel_size, Cin, Cout), also a 1 x 1 x 1 kernel, and are applied as PyTorch's."""
    net = spconv.SparseSequential(
        OrderedDict(
            first=spconv.SubMConv3d(4, 6, 3),
            point=spconv.SubMConv3d(6, 3, 1, bias=False),
            second=spconv.SparseConv3d(3, 5, (1, 2, 3), 2),
            norm=nn.BatchNorm1d(5),
        )
    )
    old = {k: v for k, v in net.state_dict().items()} | {
        "first.weight": torch.randn(3, 3, 3, 4, 6), "point.weight": torch.randn(1, 1, 1, 6, 3),
        "second.weight": torch.randn(1, 2, 3, 3, 5),
    }  # fmt: skip
    net.load_state_dict(spconv.from_spconv1(old, net))
    for name in ("first", "second"):
        assert torch.equal(net.get_submodule(name).weight, old[f"{name}.weight"].permute(4, 0, 1, 2, 3))
    x = tensor(6)
    torch.testing.assert_close(net.point(x).features, x.features @ old["point.weight"].view(6, 3))
    with pytest.raises(ValueError, match=r"first.weight is \(6, 3, 3, 3, 4\), in spconv 1 it is \(3, 3, 3, 4, 6\)"):
        spconv.from_spconv1(net.state_dict(), net)
    conv = spconv.SubMConv2d(4, 6, 3)
    weight = torch.randn(3, 3, 4, 6)
    assert torch.equal(spconv.from_spconv1({"weight": weight}, conv)["weight"], weight.permute(3, 0, 1, 2))


def test_record_voxel_count():
    conv = spconv.SparseConv3d(4, 2, 3, 2, record_voxel_count=True)
    assert conv.get_max_num_voxels() == 0 and "max_num_voxels_during_training" in conv.state_dict()
    counts = [len(conv(tensor(density=d)).indices) for d in (0.4, 0.1)]
    assert conv.get_max_num_voxels() == max(counts) == counts[0]
    assert spconv.SubMConv3d(4, 2, 3, record_voxel_count=True).get_max_num_voxels() is None


def test_add_input():
    x, conv = tensor(), spconv.SubMConv3d(4, 4, 3)
    assert torch.equal(conv(x, add_input=x).features, conv(x).features + x.features)


def test_compiles():
    """With breaks where tables are built."""
    net = spconv.SparseSequential(
        spconv.SubMConv3d(4, 8, 3, indice_key="a"), nn.BatchNorm1d(8), nn.ReLU(),
        spconv.SparseConv3d(8, 8, 3, 2, 1, indice_key="b"), spconv.SparseMaxPool3d(2),
    )  # fmt: skip
    twin = copy.deepcopy(net)
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager")
    for seed in range(2):
        x, y = tensor(seed=seed), tensor(seed=seed)
        results = []
        for run, module, t in ((net, net, x), (compiled, twin, y)):
            out = run(t.replace_feature(t.features.requires_grad_()))
            results.append((out.features, *torch.autograd.grad(out.features.square().sum(), [*module.parameters()])))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


# Pools and sums


def test_pools_by_hand():
    indices = torch.tensor([[0, 0], [0, 1], [0, 4], [1, 2]], dtype=torch.int32)
    features = torch.tensor([[-3.0], [-1.0], [5.0], [2.0]], requires_grad=True)
    x = spconv.SparseConvTensor(features, indices, [6], 2)
    out = spconv.SparseMaxPool1d(2)(x)  # the stride is the kernel's size
    assert out.indices.tolist() == [[0, 0], [0, 2], [1, 1]] and out.spatial_shape == [3]
    assert out.features.tolist() == [[-1.0], [5.0], [2.0]]  # cells without a voxel do not count
    (d,) = torch.autograd.grad(out.features, features, torch.tensor([[1.0], [2.0], [3.0]]))
    assert d.tolist() == [[0.0], [1.0], [2.0], [3.0]]
    out = spconv.SparseAvgPool1d(2)(x)
    assert out.features.tolist() == [[-2.0], [5.0], [2.0]]
    (d,) = torch.autograd.grad(out.features, features, torch.tensor([[1.0], [2.0], [3.0]]))
    assert d.tolist() == [[0.5], [0.5], [2.0], [3.0]]
    assert spconv.SparseGlobalMaxPool()(x).tolist() == [[5.0], [2.0]]
    mean = spconv.SparseGlobalAvgPool()(x)
    assert mean.tolist() == [[pytest.approx(1 / 3)], [2.0]]
    (d,) = torch.autograd.grad(mean, features, torch.ones(2, 1))
    assert d.flatten().tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])


def test_of_equal_values_one_gets_the_gradient():
    indices = torch.tensor([[0, 1], [0, 0]], dtype=torch.int32)
    features = torch.zeros(2, 1, requires_grad=True)
    x = spconv.SparseConvTensor(features, indices, [2], 1)
    for pool in (lambda x: spconv.SparseMaxPool1d(2)(x).features, spconv.SparseGlobalMaxPool()):
        (d,) = torch.autograd.grad(pool(x), features, torch.ones(1, 1))
        assert sorted(d.flatten().tolist()) == [0.0, 1.0]
    (d,) = torch.autograd.grad(spconv.SparseMaxPool1d(2)(x).features, features, torch.ones(1, 1))
    assert d.tolist() == [[0.0], [1.0]]  # the first offset's


def test_maximum_of_extremes():
    values = torch.tensor([[-torch.inf], [torch.nan], [-torch.inf]], requires_grad=True)
    indices = torch.tensor([[0, 0], [0, 2], [0, 4]], dtype=torch.int32)
    out = spconv.SparseMaxPool1d(2)(spconv.SparseConvTensor(values, indices, [6], 1)).features
    assert out.flatten().isnan().tolist() == [False, True, False] and out[0] == -torch.inf
    (d,) = torch.autograd.grad(out, values, torch.ones(3, 1))
    assert d.tolist() == [[1.0]] * 3


def test_sparse_add():
    x, y = tensor(), tensor(seed=1)
    both = Fsp.sparse_add(x, y)
    torch.testing.assert_close(both.dense(), x.dense() + y.dense())
    assert len(both.indices) < len(x.indices) + len(y.indices) and not both.indice_dict
    # the voxels of one contain the others': its order and its tables
    large = spconv.SparseConv3d(4, 4, 3, 1, 1, indice_key="3")(x)
    small = spconv.SparseConv3d(4, 4, (1, 1, 3), 1, (0, 0, 1))(x)
    total = Fsp.sparse_add(small, large, small)
    assert torch.equal(total.indices, large.indices) and total.indice_dict is large.indice_dict
    torch.testing.assert_close(total.dense(), large.dense() + 2 * small.dense())
    assert spconv.SparseInverseConv3d(4, 4, 3, indice_key="3")(total).voxels is x.voxels
    shuffled = x.select_by_index(torch.randperm(len(x.indices)))
    torch.testing.assert_close(Fsp.sparse_add(x, shuffled).features, 2 * x.features)
    flat = Fsp.sparse_add(tensor(shape=[6, 7]), tensor(shape=[6, 7], seed=1))
    assert flat.dense().shape == (3, 4, 6, 7)
    with pytest.raises(ValueError, match="cannot add"):
        Fsp.sparse_add(x, tensor(5))


def test_a_sum_has_the_widest_type():
    x, y = tensor(), tensor(seed=1)
    low = x.replace_feature(x.features.bfloat16())
    for given in ((low, y), (y, low), (low, y, low)):
        total = Fsp.sparse_add(*given)
        assert total.features.dtype == torch.float32
        assert torch.equal(total.dense(), sum(t.dense() for t in given))
    half = y.replace_feature(y.features.half())
    assert Fsp.sparse_add(low, half).features.dtype == torch.float32
    assert Fsp.sparse_add(low, low).features.dtype == torch.bfloat16
