"""The sparse tensor: features of the occupied voxels of a batch of grids."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from unipad.kernels.backend import host_wait
from unipad.spconv.voxels import Geometry, Table, VoxelSet, with_version


class Shared(NamedTuple):
    """What the layers with one `indice_key` share: an entry of `SparseConvTensor.indice_dict`."""

    kind: str  # "submanifold", "strided" or "transposed"; a pooling is "strided"
    geometry: Geometry
    voxels: VoxelSet
    outputs: VoxelSet
    table: Table
    ndim: int

    # names of spconv

    @property
    def indices(self) -> Tensor:
        return self.voxels.indices(self.ndim)

    @property
    def out_indices(self) -> Tensor:
        return self.outputs.indices(self.ndim)

    @property
    def spatial_shape(self) -> list[int]:
        return list(self.voxels.shape[3 - self.ndim :])

    @property
    def out_spatial_shape(self) -> list[int]:
        return list(self.outputs.shape[3 - self.ndim :])

    @property
    def ksize(self) -> list[int]:
        return list(self.geometry.kernel[3 - self.ndim :])


class SparseConvTensor:
    """Features of the occupied voxels of a batch of grids of one to three dimensions.

    features:      [N, C], one row per voxel.
    indices:       [N, 1 + dimensions] int32 (b, z, y, x), each voxel once, in any order.
    spatial_shape: cells of a grid, as many numbers as dimensions.
    batch_size:    number of grids; some may be empty, also all.
    indice_dict:   tables shared by `indice_key`; each layer that adds one does so in a copy.

    `indices`, `spatial_shape` and `batch_size` can be assigned, and the first two modified in place, which code under
    `torch.compile` does not notice. Indices made in inference mode are copied. The first layer that needs the voxels
    checks them (the host waits for the device): ValueError for a voxel that is outside of the grid or occurs twice.
    Other arguments of spconv's class are accepted and have no effect.
    """

    # spconv's attributes for its grid buffer, TensorRT and profiling, without a meaning here
    grid = voxel_num = force_algo = None
    benchmark = is_quantized = False
    _shape = None  # what `spatial_shape` returned, which may have been modified since

    def __init__(
        self, features: Tensor, indices: Tensor, spatial_shape: Sequence[int], batch_size: int, grid=None,
        voxel_num=None, indice_dict: dict | None = None, benchmark=False, permanent_thrust_allocator=False,
        enable_timer=False, force_algo=None,
    ):  # fmt: skip
        shape = [int(size) for size in spatial_shape]
        if indices.dim() != 2 or indices.shape[1] != 1 + len(shape) or not 1 <= len(shape) <= 3:
            raise ValueError(
                f"indices are [N, 1 + dimensions of the grid], 1 to 3 of them, not {tuple(indices.shape)} for "
                f"spatial_shape {shape}"
            )
        if indices.dtype != torch.int32:
            raise ValueError(f"indices are int32, not {indices.dtype}: pass indices.int()")
        if features.dim() != 2 or not features.is_floating_point():
            raise ValueError(f"features are [N, C] of a floating type, not {tuple(features.shape)} {features.dtype}")
        if features.device != indices.device:
            raise ValueError(f"features are on {features.device}, indices on {indices.device}")
        self.features, self.ndim = features, len(shape)
        self.indice_dict = {} if indice_dict is None else indice_dict
        self._give(with_version(indices), shape, int(batch_size))

    @classmethod
    def of(
        cls, features: Tensor, voxels: VoxelSet, indice_dict: dict | None = None, ndim: int = 3
    ) -> "SparseConvTensor":
        """A tensor on a `VoxelSet`, with its tables."""
        x = cls.__new__(cls)
        x.features, x.ndim, x.voxels = features, ndim, voxels
        x.indice_dict = {} if indice_dict is None else indice_dict
        return x

    def __repr__(self):
        size = f"spatial_shape={self.spatial_shape}, batch_size={self.batch_size}"
        return f"SparseConvTensor(features={tuple(self.features.shape)} {self.features.dtype}, {size})"

    # An attribute of the instance once it is there: blocks that the model fuses read it for every layer
    @cached_property
    def voxels(self) -> VoxelSet:
        """The voxels, each at the row of its features; made and checked when first needed."""
        return self._make_voxels()

    def current_voxels(self) -> VoxelSet:
        """`voxels`, made anew if they or their grid were modified in place."""
        if not torch.compiler.is_compiling() and (self.voxels.was_modified() or self._has_another_shape()):
            self._give(self.indices, self.spatial_shape, self.batch_size)
        return self.voxels

    def _has_another_shape(self):
        return self._shape is not None and tuple(self._shape) != self.voxels.shape[3 - self.ndim :]

    @torch.compiler.disable
    def _make_voxels(self):
        indices, batch_size = self._given
        if len(indices) != len(self.features):
            raise ValueError(f"{len(self.features)} rows of features do not match {len(indices)} voxels")
        return VoxelSet.of_indices(indices, self._shape, batch_size)

    @property
    def indices(self) -> Tensor:
        voxels = self.__dict__.get("voxels")
        return self._given[0] if voxels is None else voxels.indices(self.ndim)

    @indices.setter
    def indices(self, indices):
        self._give(with_version(indices), self.spatial_shape, self.batch_size)

    @property
    def spatial_shape(self) -> list[int]:
        if self._shape is None:
            self._shape = list(self.voxels.shape[3 - self.ndim :])
        return self._shape

    @spatial_shape.setter
    def spatial_shape(self, shape):
        self._give(self.indices, [int(size) for size in shape], self.batch_size)

    @property
    def batch_size(self) -> int:
        voxels = self.__dict__.get("voxels")
        return self._given[1] if voxels is None else voxels.batch_size

    @batch_size.setter
    def batch_size(self, batch_size):
        self._give(self.indices, self.spatial_shape, int(batch_size))

    def _give(self, indices, shape, batch_size):
        self._given, self._shape = (indices, batch_size), shape
        self.__dict__.pop("voxels", None)

    @property
    def spatial_size(self) -> int:
        """Cells of a grid."""
        return torch.Size(self.spatial_shape).numel()

    def replace_feature(self, features: Tensor) -> "SparseConvTensor":
        """The same voxels with other features."""
        x = SparseConvTensor.of(features, self.voxels, self.indice_dict, self.ndim)
        if self._shape is not None:
            x._shape = list(self._shape)
        return x

    def shadow_copy(self) -> "SparseConvTensor":
        return self.replace_feature(self.features)

    def minus(self) -> "SparseConvTensor":
        return self.replace_feature(-self.features)

    def find_indice_pair(self, key: str | None) -> Shared | None:
        """What layers with this `indice_key` share; None if there was none."""
        return self.indice_dict.get(key)

    def select_by_index(self, valid_indices: Tensor) -> "SparseConvTensor":
        """The voxels that an index or a mask selects, without tables."""
        with host_wait("voxels that a mask selects"):
            selected = self.features[valid_indices], self.indices[valid_indices]
        return SparseConvTensor(*selected, self.spatial_shape, self.batch_size)

    @classmethod
    def from_dense(cls, x: Tensor) -> "SparseConvTensor":
        """The cells with any channel other than 0 of x [B, (Z, (Y,)) X, C]. Differentiable. Waits for the device."""
        with host_wait("cells that are not 0"):
            indices = (x != 0).any(dim=-1).nonzero()
        return cls(x[indices.unbind(1)], indices.int(), x.shape[1:-1], x.shape[0])

    def dense(
        self, channels_first: bool = True, memory_format: torch.memory_format = torch.contiguous_format
    ) -> Tensor:
        """[B, C, (Z, (Y,)) X], or channels last; 0 in empty voxels.

        memory_format: of a tensor with channels first; `torch.channels_last_3d` (in 2D `channels_last`) saves a copy.
        """
        voxels, C = self.current_voxels(), self.features.shape[1]
        cells = self.features.new_zeros(voxels.batch_size * torch.Size(voxels.shape).numel(), C)
        cells.index_copy_(0, voxels.keys(), self.features)
        cells = cells.view(voxels.batch_size, *voxels.shape[3 - self.ndim :], C)
        return cells.movedim(-1, 1).contiguous(memory_format=memory_format) if channels_first else cells

    def __add__(self, other: "SparseConvTensor | Tensor") -> "SparseConvTensor":
        """Adds features, voxel by voxel."""
        if isinstance(other, SparseConvTensor):
            if not self.current_voxels().same_as(other.current_voxels()):
                raise ValueError("sparse tensors with different voxels are added with `functional.sparse_add`")
            other = other.features
        return self.replace_feature(self.features + other)

    __radd__ = __add__
