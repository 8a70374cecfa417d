"""Where the voxels of a sparse tensor are, and the neighbor tables of the convolutions on them.

Which rows a convolution gathers (its neighbor table) depends on where the voxels are, not on its weights: a `VoxelSet`
builds each table once per geometry (kernel, stride, padding, dilation) and keeps it. All triples are (z, y, x). Grids
of one and two dimensions are grids of three whose leading axes have one cell.
"""

import weakref
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from unipad.kernels import backend, sparse_map, sparse_outputs, voxel_keys
from unipad.kernels.backend import StreamCache, host_wait
from unipad.kernels.sparse_tiles import NeighborTable

Triple = tuple[int, int, int]


class Geometry(NamedTuple):
    """Of a convolution or a pooling, in cells (z, y, x)."""

    kernel: Triple
    stride: Triple
    padding: Triple
    dilation: Triple


class Table(NamedTuple):
    """Which rows a convolution from N to M voxels with K kernel offsets gathers; -1 where there is no voxel."""

    neighbors: NeighborTable  # [K, M], the input row that each output reads
    inverse: NeighborTable | None  # [K, N], the output row that reads each input; None: neighbors.idx.flip(0)

    @staticmethod
    def of(neighbor_idx, inverse_idx):
        return Table(NeighborTable(neighbor_idx), None if inverse_idx is None else NeighborTable(inverse_idx))

    def inverted(self) -> "Table":
        """The table of the inverse convolution, from M to N voxels, of a table that is not submanifold."""
        return Table(self.inverse, self.neighbors)


class VoxelSet:
    """The occupied voxels of a batch of grids, and a cache (per CUDA stream) of the tables of the convolutions on them.

    The output set of a strided or transposed convolution refers to its input set and to the table between them
    (`source`). The input set refers to the output set only weakly: the next convolution of that geometry finds it as
    long as it is in use, and the voxels of past batches do not stay on the device.
    """

    def __init__(
        self,
        coords: Tensor,
        shape: Sequence[int],
        batch_size: int,
        in_order: bool = False,
        check: bool = True,
        keys: Tensor | None = None,
    ):
        """
        coords:     [N, 4] int32 (b, z, y, x), each voxel once.
        shape:      cells (Z, Y, X).
        batch_size: number of grids; some may be empty.
        in_order:   the voxels are already in ascending order of (b, z, y, x), and need not be sorted.
        check:      raise ValueError for a voxel that is outside or occurs twice; waits for the device.
        keys:       [N] int64, of `voxel_keys`, if already computed.
        """
        assert coords.dim() == 2 and coords.shape[1] == 4, f"coordinates are [N, 4], not {tuple(coords.shape)}"
        assert coords.dtype == torch.int32, f"coordinates are int32, not {coords.dtype}"
        voxel_keys.check_grid(shape, batch_size)
        self.coords, self.shape, self.batch_size = coords.contiguous(), tuple(shape), batch_size
        self.source = None  # (VoxelSet, kernel, Table) of the convolution that made this set
        self._cache, self._is_in_order = StreamCache(), in_order
        if keys is not None:
            self._cache.put("keys", coords.device, keys)
        self.keys()  # fills the cache, which compiled code only reads
        if check:
            self._cache.put("sorted", coords.device, voxel_keys.sort_voxels(self.coords, self.shape))
            last = backend.to_host(self.coords[:, 0].max(), "largest batch index of a voxel") if len(coords) else -1
            if last >= batch_size:
                raise ValueError(f"a voxel is in grid {last} of a batch of {batch_size}")
        self._exposed = self._version = None  # what `indices` returns, once it is asked for in inference mode
        if not self.coords.is_inference():
            self._expose(self.coords)

    def __getstate__(self):
        return vars(self) | {"_version": "modified" if self.was_modified() else "as made"}

    def __setstate__(self, state):
        vars(self).update(state)
        if self._exposed is not None and self._version == "as made":
            self._expose(self._exposed)  # versions of copied tensors start anew

    def __len__(self):
        return len(self.coords)

    def keys(self):
        """[N] int64, the linear index of each voxel's cell in the dense batch."""
        return self._cache.get("keys", self.coords.device, lambda: voxel_keys.voxel_keys(self.coords, self.shape))

    def submanifold(self, kernel: Triple, dilation: Triple) -> Table:
        """The table of a convolution from these voxels to themselves."""
        table = self._cache.find((kernel, dilation), self.coords.device)
        return self._make_table(kernel, dilation) if table is None else table

    def strided(self, kernel: Triple, stride: Triple, padding: Triple, dilation: Triple) -> "VoxelSet":
        """The output voxels of a strided convolution: all whose window contains at least one of these voxels."""
        return self._outputs(False, kernel, stride, padding, dilation)

    def transposed(self, kernel: Triple, stride: Triple, padding: Triple, dilation: Triple) -> "VoxelSet":
        """The output voxels of a transposed convolution: all that at least one of these voxels spreads to."""
        return self._outputs(True, kernel, stride, padding, dilation)

    def same_as(self, other: "VoxelSet") -> bool:
        """Whether both have the same voxels in the same order; waits for the device if they are different objects.

        A set that was modified in place is like no other: its tables are of the voxels that it had.
        """
        if self is other:
            return True
        if self.was_modified() or other.was_modified():
            return False
        alike = (self.shape, self.batch_size, len(self)) == (other.shape, other.batch_size, len(other))
        with host_wait("whether two sets of voxels are equal"):
            return alike and torch.equal(self.coords, other.coords)

    def indices(self, ndim: int) -> Tensor:
        """[N, 1 + ndim] int32, the last `ndim` coordinates of the voxels behind b; the same tensor at every call."""
        if self._exposed is None or self._exposed.shape[1] != 1 + ndim:
            self._expose_coords(ndim)
        return self._exposed

    @torch.compiler.disable
    def _expose_coords(self, ndim):
        missing = 3 - ndim
        own = torch.cat([self.coords[:, :1], self.coords[:, 1 + missing :]], dim=1) if missing else self.coords
        self._expose(own)

    @staticmethod
    def of_indices(indices: Tensor, spatial_shape: Sequence[int], batch_size: int) -> "VoxelSet":
        """Voxels of a grid of 1 to 3 dimensions, checked; indices [N, 1 + dimensions] are those of `self.indices`."""
        missing = 3 - len(spatial_shape)
        coords = indices
        if missing:
            zeros = indices.new_zeros(len(indices), missing)
            coords = torch.cat([indices[:, :1], zeros, indices[:, 1:]], dim=1)
        voxels = VoxelSet(coords, (1,) * missing + tuple(spatial_shape), batch_size)
        voxels._expose(indices)
        return voxels

    def was_modified(self) -> bool:
        """Whether the voxels were modified in place since the set was made: then its tables are wrong.

        Compiled code does not look."""
        if self._exposed is None or torch.compiler.is_compiling():
            return False
        return self._version != self._exposed._version

    def _expose(self, indices):
        """Keep the tensor that users see as the voxels' indices, and its version."""
        self._exposed = with_version(indices)
        self._version = self._exposed._version

    def _outputs(self, is_transposed, *geometry):
        weak_outputs = self._cache.find((is_transposed, geometry), self.coords.device)
        outputs = None if weak_outputs is None else weak_outputs()
        return self._make_outputs(is_transposed, geometry) if outputs is None or outputs.was_modified() else outputs

    # Compiled code takes existing tables as inputs. It cannot build them, since their sizes depend on the data.
    @torch.compiler.disable
    def _make_table(self, kernel, dilation):
        neighbor_idx = sparse_map.submanifold_map(self.coords, *self._sorted_keys(), self.shape, kernel, dilation)
        # the offsets of an odd kernel are symmetric: its inverse table is the table flipped along K
        odd = all(k % 2 for k in kernel)
        table = Table.of(neighbor_idx, None if odd else sparse_map.inverse_map(neighbor_idx, len(self)))
        self._cache.put((kernel, dilation), self.coords.device, table)
        return table

    @torch.compiler.disable
    def _make_outputs(self, is_transposed, geometry):
        if is_transposed:
            shape = sparse_outputs.transposed_out_shape(self.shape, *geometry)
            coords, neighbor_idx = sparse_map.transposed_map(self.coords, self.shape, *geometry, self.batch_size)
            keys, tables = None, (neighbor_idx, sparse_map.inverse_map(neighbor_idx, len(self)))
        else:
            shape = sparse_outputs.out_shape(self.shape, *geometry)
            coords, keys, *tables = sparse_map.strided_tables(
                self.coords, self.shape, *geometry, self.batch_size, *self._sorted_keys()
            )
        outputs = VoxelSet(coords, shape, self.batch_size, in_order=True, check=False, keys=keys)
        kernel, *_ = geometry
        outputs.source = (self, kernel, Table.of(*tables))
        self._cache.put((is_transposed, geometry), self.coords.device, weakref.ref(outputs))
        return outputs

    def _sorted_keys(self):
        """(ascending keys, index of the voxel of each key); the second is None if the voxels are in order as given."""
        if self._is_in_order:
            return self.keys(), None
        make = partial(voxel_keys.sort_voxels, self.coords, self.shape, check=False)
        return self._cache.get("sorted", self.coords.device, make)


def with_version(indices: Tensor) -> Tensor:
    """The same tensor; of one made in inference mode a copy, since that mode does not count changes in place."""
    if torch.compiler.is_compiling() or not indices.is_inference():
        return indices
    with torch.inference_mode(False):
        return indices.clone()
