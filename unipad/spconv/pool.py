"""Poolings of sparse tensors: over the voxels in a window, and over all voxels of a sample.

    maximum    out[m] = max over the offsets k with a voxel of x[i(k, m)]
    average    out[m] = mean over the offsets k with a voxel of x[i(k, m)]

i(k, m) is the input voxel that output m reads at offset k, as for a convolution (kernels/sparse_map.py). Cells without
a voxel do not count. All sums run over the offsets in their order and nothing is added atomically, so results are the
same from run to run. Vectorized PyTorch, one offset at a time: memory is that of the result, not K times as much.
"""

import torch
from torch import Tensor

from unipad.kernels.backend import to_host
from unipad.spconv.conv import SparseLayer
from unipad.spconv.modules import SparseModule
from unipad.spconv.tensor import SparseConvTensor
from unipad.spconv.voxels import Table


class MaxRows(torch.autograd.Function):
    """[N, C] -> [M, C], the maximum of the rows that each output of a table [K, M] reads; at least one.

    Of equal values, the first offset's gets the gradient, as in PyTorch's poolings; NaN is larger than any number.
    """

    @staticmethod
    def forward(ctx, x, neighbor_idx, inverse_idx):
        M = neighbor_idx.shape[1]
        out = x.new_full((M, x.shape[1]), -torch.inf)
        row = neighbor_idx.new_full(out.shape, -1)  # [M, C], where each maximum comes from
        for idx in neighbor_idx.unbind():
            value = x.index_select(0, idx.clamp(min=0))
            larger = (idx >= 0)[:, None] & ((value > out) | value.isnan() | (row < 0))
            out, row = torch.where(larger, value, out), torch.where(larger, idx[:, None], row)
        ctx.save_for_backward(row, inverse_idx)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        row, inverse_idx = ctx.saved_tensors
        N = inverse_idx.shape[1]
        own = torch.arange(N, dtype=row.dtype, device=row.device)[:, None]
        d_x = d_out.new_zeros(N, d_out.shape[1], dtype=_wide(d_out))
        for idx in inverse_idx.unbind() if len(row) else ():
            m = idx.clamp(min=0)
            chosen = (idx >= 0)[:, None] & (row.index_select(0, m) == own)
            d_x += torch.where(chosen, d_out.index_select(0, m), 0)
        return d_x.to(d_out.dtype), None, None


class SumRows(torch.autograd.Function):
    """[N, C] -> [M, C], the sum of the rows that each output of a table [K, M] reads, in fp32 or better."""

    @staticmethod
    def forward(ctx, x, neighbor_idx, inverse_idx):
        ctx.save_for_backward(neighbor_idx, inverse_idx)
        out = x.new_zeros(neighbor_idx.shape[1], x.shape[1], dtype=_wide(x))
        for idx in neighbor_idx.unbind() if len(x) else ():
            out += torch.where((idx >= 0)[:, None], x.index_select(0, idx.clamp(min=0)), 0)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx, d_out):
        neighbor_idx, inverse_idx = ctx.saved_tensors
        return SumRows.apply(d_out, inverse_idx, neighbor_idx), None, None


def _wide(tensor):
    return torch.promote_types(tensor.dtype, torch.float32)


def max_rows(x: Tensor, table: Table) -> Tensor:
    return MaxRows.apply(x, *_tensors(table)) if len(x) else x


def mean_rows(x: Tensor, table: Table) -> Tensor:
    count = (table.neighbors.idx >= 0).sum(dim=0)[:, None]
    # divided first, so that a sum of many fp16 numbers does not overflow; not in `x`'s type, which may round the sum
    return (SumRows.apply(x.to(_wide(x)), *_tensors(table)) / count).to(x.dtype)


def _tensors(table):
    neighbor_idx = table.neighbors.idx
    return neighbor_idx, neighbor_idx.flip(0) if table.inverse is None else table.inverse.idx


class SparsePool(SparseLayer):
    """A pooling over the voxels in a window; the output voxels are those of a `SparseConv` of the same geometry.

    stride: None: the size of the kernel.
    subm:   the output has the voxels of the input, and offsets are centered at kernel // 2, as of a `SubMConv`.
    indice_key: name of its table, for an inverse convolution.
    """

    def __init__(
        self, kernel_size, stride=None, padding=0, dilation=1, indice_key: str | None = None, algo=None,
        record_voxel_count: bool = False, name: str | None = None, *, subm: bool = False,
    ):  # fmt: skip
        super().__init__(name)
        self.kind = "submanifold" if subm else "strided"
        stride = kernel_size if stride is None else stride
        self.algo = algo
        self.set_geometry(kernel_size, stride, padding, dilation, indice_key, record_voxel_count and not subm)
        if subm:
            self.geometry = self.geometry._replace(stride=(1, 1, 1), padding=(0, 0, 0))

    def output_voxels_and_table(self, voxels):
        if self.kind == "submanifold":
            return voxels, voxels.submanifold(self.geometry.kernel, self.geometry.dilation)
        outputs = voxels.strided(*self.geometry)
        _, _, table = outputs.source
        return outputs, table

    def pool(self, features: Tensor, table: Table) -> Tensor:
        """[N, C] -> [M, C]."""
        raise NotImplementedError

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        self.check_input(x)
        outputs, table, indice_dict = self.find_table(x)
        self.count(outputs)
        return SparseConvTensor.of(self.pool(x.features, table), outputs, indice_dict, self.ndim)


class SparseMaxPool(SparsePool):
    """The maximum over the voxels in a window. spconv's is never below 0: append a ReLU for the same."""

    def pool(self, features, table):
        return max_rows(features, table)


class SparseAvgPool(SparsePool):
    """The mean over the voxels in a window, not over its cells."""

    def pool(self, features, table):
        return mean_rows(features, table)


class SparseMaxPool1d(SparseMaxPool):
    ndim = 1


class SparseMaxPool2d(SparseMaxPool):
    ndim = 2


class SparseMaxPool3d(SparseMaxPool):
    ndim = 3


class SparseAvgPool1d(SparseAvgPool):
    ndim = 1


class SparseAvgPool2d(SparseAvgPool):
    ndim = 2


class SparseAvgPool3d(SparseAvgPool):
    ndim = 3


class SparseGlobalPool(SparseModule):
    """[B, C] features of each sample, pooled over its voxels; 0 for a sample without voxels. Waits for the device."""

    def pool(self, rows: Tensor) -> Tensor:
        """[n, C] -> [C], n > 0."""
        raise NotImplementedError

    def forward(self, x: SparseConvTensor) -> Tensor:
        sample, order = x.current_voxels().coords[:, 0].sort(stable=True)
        ends = torch.searchsorted(
            sample, torch.arange(x.batch_size, dtype=sample.dtype, device=sample.device), right=True
        )
        counts = to_host(ends.diff(prepend=ends.new_zeros(1)), "number of voxels of each sample")
        rows = x.features.index_select(0, order).split(counts)
        pooled = [self.pool(r) if len(r) else r.sum(dim=0) for r in rows]
        return torch.stack(pooled) if pooled else x.features.new_zeros(0, x.features.shape[1])


class SparseGlobalMaxPool(SparseGlobalPool):
    def pool(self, rows):
        return rows.max(dim=0).values


class SparseGlobalAvgPool(SparseGlobalPool):
    def pool(self, rows):
        return rows.mean(dim=0)
