"""Sparse convolutions in the place of spconv: `import unipad.spconv as spconv` instead of `spconv.pytorch`.

tensor.py      SparseConvTensor: features of the occupied voxels of a batch of grids
voxels.py      where these voxels are, and the neighbor tables of layers
conv.py        submanifold, strided, transposed and inverse convolutions of one to three dimensions
pool.py        maximum and average over windows and over samples
modules.py     containers, and layers of torch.nn on the features
functional.py  sums of tensors with different voxels; weights of spconv 1
points.py      points -> voxels
core.py, constants.py, ops.py   modules of spconv that other code imports

Needs torch, Triton (without it only the CPU works) and numpy, nothing else of this project but `unipad.kernels`.
docs/sparse.md compares it with spconv and others.
"""

from unipad.spconv import constants, conv, core, functional, modules, ops, points, pool, tensor
from unipad.spconv.conv import (
    ConvAlgo,
    SparseConv1d,
    SparseConv2d,
    SparseConv3d,
    SparseConvTranspose1d,
    SparseConvTranspose2d,
    SparseConvTranspose3d,
    SparseInverseConv1d,
    SparseInverseConv2d,
    SparseInverseConv3d,
    SubMConv1d,
    SubMConv2d,
    SubMConv3d,
)
from unipad.spconv.functional import from_spconv1
from unipad.spconv.modules import (
    AddTable,
    ConcatTable,
    Identity,
    JoinTable,
    RemoveGrid,
    SparseBatchNorm,
    SparseIdentity,
    SparseModule,
    SparseReLU,
    SparseSequential,
    SparseSyncBatchNorm,
    ToDense,
    assign_name_for_sparse_modules,
    is_spconv_module,
)
from unipad.spconv.points import PointToVoxel, gather_features_by_pc_voxel_id
from unipad.spconv.pool import (
    SparseAvgPool1d,
    SparseAvgPool2d,
    SparseAvgPool3d,
    SparseGlobalAvgPool,
    SparseGlobalMaxPool,
    SparseMaxPool1d,
    SparseMaxPool2d,
    SparseMaxPool3d,
)
from unipad.spconv.tensor import SparseConvTensor

__version__ = "2.3.8"  # of spconv's interface, for code that asks which one it has

__all__ = [
    "AddTable",
    "ConcatTable",
    "ConvAlgo",
    "Identity",
    "JoinTable",
    "PointToVoxel",
    "RemoveGrid",
    "SparseAvgPool1d",
    "SparseAvgPool2d",
    "SparseAvgPool3d",
    "SparseBatchNorm",
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseConvTensor",
    "SparseConvTranspose1d",
    "SparseConvTranspose2d",
    "SparseConvTranspose3d",
    "SparseGlobalAvgPool",
    "SparseGlobalMaxPool",
    "SparseIdentity",
    "SparseInverseConv1d",
    "SparseInverseConv2d",
    "SparseInverseConv3d",
    "SparseMaxPool1d",
    "SparseMaxPool2d",
    "SparseMaxPool3d",
    "SparseModule",
    "SparseReLU",
    "SparseSequential",
    "SparseSyncBatchNorm",
    "SubMConv1d",
    "SubMConv2d",
    "SubMConv3d",
    "ToDense",
    "assign_name_for_sparse_modules",
    "constants",
    "conv",
    "core",
    "from_spconv1",
    "functional",
    "gather_features_by_pc_voxel_id",
    "is_spconv_module",
    "modules",
    "ops",
    "points",
    "pool",
    "tensor",
]
