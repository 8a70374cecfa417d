"""Voxels that are modified in place, or copied: layers use those that `indices` has when they run."""

import copy
import io
from functools import partial

import pytest
import torch

import unipad.spconv as spconv
from tests.spconv.test_api import SHAPE, tensor

SHAPES = [[11], [8, 7], SHAPE]


def fresh(x):
    """The same tensor, made anew."""
    return spconv.SparseConvTensor(x.features, x.indices.clone(), list(x.spatial_shape), x.batch_size)


def layers(ndim):
    conv, window = partial(getattr(spconv, f"SparseConv{ndim}d"), 4, 4), dict(stride=2, padding=1)
    return dict(
        submanifold=getattr(spconv, f"SubMConv{ndim}d")(4, 4, 3),
        strided=conv(3, **window),
        strided_with_key=conv(3, **window, indice_key="d"),
        transposed=getattr(spconv, f"SparseConvTranspose{ndim}d")(4, 4, 2, 2),
        pool=getattr(spconv, f"SparseMaxPool{ndim}d")(3, 2, 1),
        average=getattr(spconv, f"SparseAvgPool{ndim}d")(3, 2, 1),
    )


def assert_same(a, b):
    assert torch.equal(a.indices, b.indices) and a.spatial_shape == b.spatial_shape
    assert torch.equal(a.features, b.features) and torch.equal(a.dense(), b.dense())


def mirror(x):
    """In place: voxels of the same grid, at other places."""
    x.indices[:, 1] = x.spatial_shape[0] - 1 - x.indices[:, 1]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layers_use_modified_voxels(shape, inference):
    with torch.inference_mode(inference):
        x = tensor(shape=shape)
        for name, layer in layers(len(shape)).items():
            before = layer(x).dense()
            mirror(x)
            assert_same(layer(x), layer(fresh(x)))
            assert not torch.equal(layer(x).dense(), before), name


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_modified_outputs_are_not_used_again(shape, inference):
    """As of VoxelNeXt's coarse stages, whose coordinates it scales in place."""
    with torch.inference_mode(inference):
        x = tensor(shape=shape)
        for layer in layers(len(shape)).values():
            if getattr(layer, "subm", False):
                continue  # whose outputs are the voxels of x
            expected = layer(fresh(x))
            y = layer(x)
            mirror(y)
            assert_same(layer(x), expected)
            # the same layer behind one with its key
            keyed = x.replace_feature(x.features)
            keyed.indice_dict = y.indice_dict
            again = layer(keyed)
            assert_same(again, expected)
            if layer.indice_key:
                up = getattr(spconv, f"SparseInverseConv{len(shape)}d")(4, 4, 3, indice_key="d")
                assert torch.equal(up(again).indices, x.indices)


def test_in_inference_mode_indices_are_copied():
    with torch.inference_mode():
        given = tensor().indices.clone()
        x = spconv.SparseConvTensor(torch.zeros(len(given), 4), given, SHAPE, 3)
        given += 1
        assert torch.equal(x.indices, given - 1) and x.indices is x.indices
        x.indices = given - 1
        given -= 1
        spconv.SubMConv3d(4, 4, 3)(x)
        assert torch.equal(x.indices, given)


def test_sums_of_modified_voxels():
    x = tensor()
    y = x.replace_feature(2 * x.features)
    mirror(x)
    assert_same(x + y, fresh(x) + fresh(y))
    assert_same(spconv.JoinTable()([x, y]), spconv.JoinTable()([fresh(x), fresh(y)]))
    assert_same(spconv.functional.sparse_add(x, y), spconv.functional.sparse_add(fresh(x), fresh(y)))


def test_voxels_may_leave_the_grid_before_it_is_enlarged():
    x, conv = tensor(), spconv.SubMConv3d(4, 4, 3)
    conv(x)
    x.indices[:, 1:] *= 2
    y = x.replace_feature(x.features)
    y.spatial_shape = [2 * size for size in y.spatial_shape]
    assert_same(conv(y), conv(fresh(y)))


def test_a_modified_grid_counts():
    x, conv = tensor(), spconv.SparseConv3d(4, 4, 3, 2)
    conv(x)
    x.spatial_shape[0] += 4
    assert x.spatial_shape == [9, 8, 7] and conv(x).spatial_shape == [4, 3, 3]
    assert_same(conv(x), conv(fresh(x)))
    assert_same(conv(x.replace_feature(x.features)), conv(x))
    y = conv(x)
    y.spatial_shape[1] = 30
    assert y.dense().shape == (3, 4, 4, 30, 3) and conv(x).spatial_shape == [4, 3, 3]
    y.spatial_shape[1] = 1
    with pytest.raises(ValueError, match="outside"):
        y.dense()


def saved_and_loaded(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, saved_and_loaded])
def test_a_copy_goes_back(copied, shape, inference):
    """VoxelNeXt copies tensors to draw them."""
    down, ndim = layers(len(shape))["strided_with_key"], len(shape)
    ups = [getattr(spconv, f"SparseInverseConv{ndim}d")(4, 4, 3, indice_key=key) for key in ("d", None)]
    with torch.inference_mode(inference), torch.no_grad():
        x = tensor(shape=shape)
        y = down(x)
        z = copied(y)
        for up in ups:
            assert_same(up(z), up(y))
            assert torch.equal(up(z).indices, x.indices)
        if copied is not copy.copy:  # which shares the indices
            mirror(z)
            for up in ups:
                assert torch.equal(up(y).indices, x.indices)
                with pytest.raises(ValueError, match="other voxels|no strided convolution"):
                    up(z)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_copy_of_modified_voxels_is_modified(copied):
    conv = spconv.SubMConv3d(4, 4, 3)
    with torch.no_grad():
        x = spconv.SparseConv3d(4, 4, 3, 2, 1)(tensor())
        mirror(x)
        assert_same(conv(copied(x)), conv(fresh(x)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compiled_code_returns_indices(mode):
    conv, down = spconv.SubMConv2d(4, 4, 3), spconv.SparseConv2d(4, 4, 3, 2, 1)

    def run(features, indices):
        y = down(conv(spconv.SparseConvTensor(features, indices, [8, 7], 3)))
        return y.features, y.indices, y.dense()

    torch._dynamo.reset()
    with mode():
        x = tensor(shape=[8, 7])
        for a, b in zip(
            torch.compile(run, backend="eager")(x.features, x.indices), run(x.features, x.indices), strict=True
        ):
            assert torch.equal(a, b)
