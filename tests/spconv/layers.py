"""Single layers as small networks for `networks.py`, and points for `PointToVoxel`, to be compared with spconv.

Without what differs on purpose (docs/sparse.md): maxima are of values above 0, transposed convolutions have no
dilation, kernels of inverse convolutions are above 1.
"""

import numpy as np
import torch
from torch import nn


class Branches(nn.Module):
    """The results of several modules on the same tensor."""

    def __init__(self, sp, shape, **modules):
        super().__init__()
        self.sp, self.shape = sp, shape
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, features, indices, batch_size):
        x = self.sp.SparseConvTensor(features, indices.int(), list(self.shape), batch_size)
        return {name: module(x) for name, module in self.named_children()}


def convolutions(sp, ndim, shape):
    """All convolutions but networks' usual ones, of `ndim` dimensions."""

    def layer(name, *args, **kwargs):
        return getattr(sp, f"{name}{ndim}d")(*args, **kwargs)

    last = (1,) * (ndim - 1)
    return Branches(
        sp, shape,
        transposed=layer("SparseConvTranspose", 4, 3, 2, 2, bias=False),
        transposed_overlapping=layer("SparseConvTranspose", 4, 3, 3, 2, 1),
        strided_dilated=layer("SparseConv", 4, 3, 3, 1, 2, dilation=2),
        strided_uneven=layer("SparseConv", 4, 3, (*last, 3), (*last, 2), (0,) * (ndim - 1) + (1,)),
        submanifold_dilated=layer("SubMConv", 4, 3, 3, dilation=2),
        pointwise=layer("SubMConv", 4, 3, 1),
        pointwise_strided=layer("SparseConv", 4, 3, 1),
        back=sp.SparseSequential(
            layer("SparseConv", 4, 5, 3, 2, 1, indice_key="d"), layer("SubMConv", 5, 5, 3, indice_key="s"),
            layer("SparseInverseConv", 5, 3, 3, indice_key="d"),
        ),
        spread_and_back=sp.SparseSequential(
            layer("SparseConvTranspose", 4, 5, 2, 2, indice_key="t"),
            layer("SparseInverseConv", 5, 3, 2, indice_key="t", bias=False),
        ),
        maximum=sp.SparseSequential(nn.Linear(4, 3), nn.Sigmoid(), layer("SparseMaxPool", 2, 2)),
        maximum_overlapping=sp.SparseSequential(nn.Linear(4, 3), nn.Sigmoid(), layer("SparseMaxPool", 3, 2, 1)),
    )  # fmt: skip


class Sum(nn.Module):
    """`functional.sparse_add` of tensors with different voxels, and of which one has all."""

    def __init__(self, sp):
        super().__init__()
        self.wide, self.narrow = sp.SparseConv3d(4, 4, 3, 1, 1), sp.SparseConv3d(4, 4, (1, 1, 3), 1, (0, 0, 1))
        self.other = sp.SparseConv3d(4, 4, (3, 1, 1), 1, (1, 0, 0))
        self.sp = sp

    def forward(self, features, indices, batch_size):
        x = self.sp.SparseConvTensor(features, indices.int(), [9, 10, 11], batch_size)
        wide, narrow, other = self.wide(x), self.narrow(x), self.other(x)
        add = self.sp.functional.sparse_add
        return dict(union=add(narrow, other), contained=add(narrow, wide, other))


def sums(sp):
    return Sum(sp)


RANGES = {  # cells, borders, voxels, points per voxel
    "3D": ([0.5, 0.25, 0.5], [-2.0, -1.0, 0.0, 2.0, 1.5, 1.0], 100, 3),
    "3D, few voxels": ([0.5, 0.25, 0.5], [-2.0, -1.0, 0.0, 2.0, 1.5, 1.0], 7, 3),
    "half a cell": ([0.2, 0.4, 1.0], [-1.0, -1.0, -1.0, 1.5, 1.0, 1.5], 100, 2),
    "2D, half a cell": ([0.2, 0.5], [0.0, -1.0, 0.5, 1.25], 30, 2),
    "1D": ([0.3], [-1.0, 2.0], 20, 5),
}


def points_to_voxels(make):
    """{name: array} of `make` = PointToVoxel."""
    rng, found = np.random.RandomState(0), {}
    for name, (vsize, borders, voxels, size) in RANGES.items():
        generator = make(vsize, borders, len(vsize) + 1, voxels, size)
        points = torch.from_numpy(rng.uniform(-2.5, 2.5, size=(200, len(vsize) + 1)).astype(np.float32))
        # some on the borders of cells
        points[::4, 0] = borders[0] + vsize[0] * torch.from_numpy(rng.randint(0, 8, 50)).float()
        results = generator.generate_voxel_with_id(points)
        for kind, value in zip(("voxels", "indices", "count", "id"), results, strict=True):
            found[f"{name}/{kind}"] = value.numpy().copy()  # spconv overwrites them
        found[f"{name}/grid"] = np.array(generator.grid_size)
    return found
