"""What others' code imports, passes and reads, beyond calling layers."""

import numpy as np
import pytest
import torch

import unipad.spconv as spconv
from tests.spconv.test_api import SHAPE, tensor

# Arguments of spconv 2.3.8 in its order, as far as code gives them by position, with values that differ
WINDOW = dict(kernel_size=3, stride=2, padding=1, dilation=1)
CONV = dict(in_channels=4, out_channels=6, **WINDOW, groups=1, bias=False, indice_key="k", algo="a", fp32_accum=True)
INVERSE = dict(in_channels=4, out_channels=6, kernel_size=3, indice_key="k", bias=False, algo="a", fp32_accum=True)
POOL = dict(**WINDOW, indice_key="k", algo="a", record_voxel_count=True, name="n")
ARGUMENTS = dict(
    SubMConv=CONV, SparseConv=CONV, SparseConvTranspose=CONV, SparseInverseConv=INVERSE, SparseMaxPool=POOL,
    SparseAvgPool=POOL,
)  # fmt: skip


@pytest.mark.parametrize("layer", ARGUMENTS)
def test_arguments_by_position(layer):
    for ndim in (1, 2, 3):
        made = getattr(spconv, f"{layer}{ndim}d")(*ARGUMENTS[layer].values())
        for name, value in ARGUMENTS[layer].items():
            value = [value] * ndim if name in WINDOW else value
            assert (getattr(made, name) is None) if name == "bias" else getattr(made, name) == value, name


def test_attributes():
    algo = spconv.core.ConvAlgo.Native
    conv = spconv.SparseConv2d(2, 3, 3, 1, 0, 1, 1, True, "k", algo)
    assert (conv.ndim, conv.groups, conv.algo, conv.indice_key) == (2, 1, algo, "k") and conv.bias is not None
    assert conv.kernel_size == [3, 3] and conv.stride == conv.dilation == [1, 1] and conv.padding == [0, 0]
    assert conv.output_padding == [0, 0] and not conv.conv1x1 and spconv.SubMConv2d(2, 3, 1).conv1x1
    for name, kind in dict(
        SubMConv3d="subm", SparseConvTranspose3d="transposed", SparseInverseConv3d="inverse"
    ).items():
        found = {k for k in ("subm", "transposed", "inverse") if getattr(getattr(spconv, name)(2, 3, 3), k)}
        assert found == {kind}
    pool = spconv.SparseMaxPool2d(3, 2, 1, 1, "k", algo)
    assert pool.stride == [2, 2] and pool.algo is algo and not pool.subm and spconv.SparseMaxPool2d(3, subm=True).subm


@pytest.mark.parametrize(
    "kernel", [3, np.int64(3), torch.tensor(3), [3, 3], (3, 3), np.array([3, 3]), torch.Size([3, 3])]
)
def test_sizes_may_be_of_any_type(kernel):
    assert spconv.SubMConv2d(2, 2, kernel).kernel_size == [3, 3]


@pytest.mark.parametrize("shape", [[11], [8, 7], SHAPE], ids=str)
def test_entries_of_the_indice_dict(shape):
    ndim, x = len(shape), tensor(shape=shape)
    y = getattr(spconv, f"SparseConv{ndim}d")(4, 4, 3, 2, 1, indice_key="d")(x)
    entry = y.find_indice_pair("d")
    assert torch.equal(entry.indices, x.indices) and entry.out_indices is y.indices
    assert (entry.spatial_shape, entry.out_spatial_shape, entry.ksize) == (shape, y.spatial_shape, [3] * ndim)


def test_names_of_modules():
    assert spconv.__version__ >= "2.0.0" and float(spconv.__version__[2:]) >= 2.2  # mmdet3d and OpenPCDet ask this
    spconv.constants.SPCONV_USE_DIRECT_TABLE = False
    assert spconv.core.ConvAlgo is spconv.ConvAlgo and spconv.core.SparseConvTensor is spconv.SparseConvTensor
    with pytest.raises(AttributeError, match="no `ops.get_indice_pairs`"):
        spconv.ops.get_indice_pairs  # noqa: B018
    assert not hasattr(spconv, "SubMConv4d")  # so that mmdet3d does not register half of the layers


@pytest.mark.parametrize("make", [
    lambda **given: spconv.SparseConv3d(4, 2, 3, 2, **given), lambda **given: spconv.SparseMaxPool3d(3, 2, **given),
    lambda **given: spconv.SparseSequential(spconv.SparseConv3d(4, 2, 3, 2, **given)),
])  # fmt: skip
def test_state_dicts_with_and_without_the_counter(make):
    with_counter, without = make(record_voxel_count=True), make()
    with_counter(tensor())
    kept = with_counter.state_dict()
    assert len(kept) == len(without.state_dict()) + 1
    without.load_state_dict(kept)
    with_counter.load_state_dict(without.state_dict())
    again = make(record_voxel_count=True)
    again.load_state_dict(kept)
    for key, value in kept.items():
        assert torch.equal(again.state_dict()[key], value) and value.any()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        without.load_state_dict(kept | {"other": torch.zeros(1)})
