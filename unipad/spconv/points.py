"""Points to voxels, with the points of each voxel: spconv's `PointToVoxel`, on any device."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unipad.kernels.backend import host_wait

OUTSIDE = 2**62  # key of a point that is outside of the grid, after those of all cells


class PointToVoxel:
    """Collects the points in each cell of a grid.

    vsize_xyz:       size of a cell, one number per dimension, x first.
    coors_range_xyz: low and high borders of the grid, (x, y, z, x, y, z) in 3D. A point on a high border is outside.
    num_point_features: values per point, the coordinates first.
    max_num_voxels:  cells beyond this number, in the order of their first points, are dropped.
    max_num_points_per_voxel: later points of a cell are dropped.
    device:          of the points.

    Calls wait for the device. Not differentiable.
    """

    def __init__(
        self, vsize_xyz: Sequence[float], coors_range_xyz: Sequence[float], num_point_features: int,
        max_num_voxels: int, max_num_points_per_voxel: int, device: torch.device | str = "cpu",
    ):  # fmt: skip
        self.ndim, self.coors_range = len(vsize_xyz), list(coors_range_xyz)
        if len(coors_range_xyz) != 2 * self.ndim or not min(vsize_xyz) > 0:
            raise ValueError(f"cells {vsize_xyz} of a size above 0 need a range of {2 * self.ndim} numbers")
        self.device = torch.device(device)
        given = coors_range_xyz[: self.ndim], coors_range_xyz[self.ndim :], vsize_xyz
        low, high, vsize = (torch.tensor(t, dtype=torch.float32) for t in given)
        # in fp32, half a cell up, as spconv; the sum in fp64, since 0.49999997 + 0.5 would be 1
        cells = (((high - low) / vsize).double() + 0.5).floor().long().flip(0)
        self.grid_size = cells.tolist()  # (z, y, x)
        if min(self.grid_size) < 1 or torch.Size(self.grid_size).numel() >= OUTSIDE:
            raise ValueError(f"a grid of {self.grid_size} cells (z, y, x) is empty or too large")
        self.low, self.vsize, self._cells = (t.to(self.device, non_blocking=True) for t in (low, vsize, cells))
        self.num_point_features = num_point_features
        self.max_num_voxels, self.max_num_points_per_voxel = max_num_voxels, max_num_points_per_voxel

    def __call__(self, pc: Tensor, clear_voxels=True, empty_mean: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """`generate_voxel_with_id` without its last result."""
        return self.generate_voxel_with_id(pc, clear_voxels, empty_mean)[:3]

    @torch.no_grad()
    def generate_voxel_with_id(
        self, pc: Tensor, clear_voxels=True, empty_mean: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            pc:         [P, num_point_features] points.
            clear_voxels: no effect: empty places are 0.
            empty_mean: fill empty places of a voxel with the mean of its points.

        Returns:
            voxels:  [V, max_num_points_per_voxel, num_point_features] fp32, points of each voxel in input order.
            indices: [V, ndim] int32 (z, y, x), in the order of the voxels' first points; no batch index.
            num_per_voxel: [V] int32, points in `voxels`.
            pc_voxel_id: [P] int64, each point's voxel; -1 outside of the grid and in dropped cells.
        """
        P, C = pc.shape
        if C != self.num_point_features:
            raise ValueError(f"points have {C} values, not num_point_features = {self.num_point_features}")
        if pc.device.type != self.device.type:
            raise ValueError(f"points are on {pc.device}, not on this generator's {self.device}")
        coord = ((pc[:, : self.ndim] - self.low) / self.vsize).floor().flip(1)  # (z, y, x)
        inside = ((coord >= 0) & (coord < self._cells)).all(dim=1)  # false for NaN
        coord = torch.where(inside[:, None], coord, 0).long()
        key = torch.zeros(P, dtype=torch.int64, device=pc.device)
        for axis, cells in enumerate(self.grid_size):
            key = key * cells + coord[:, axis]
        key, order = torch.where(inside, key, OUTSIDE).sort(stable=True)
        is_first = F.pad(key[1:] != key[:-1], (1, 0), value=True)[:P] & (key != OUTSIDE)
        with host_wait("number of occupied voxels"):
            starts = is_first.nonzero()[:, 0]  # of each cell's points in `order`
        size = self.max_num_points_per_voxel
        if not len(starts):
            none, nowhere = pc.new_zeros(0, size, C, dtype=torch.float32), torch.full_like(order, -1)
            return none, coord[:0].int(), nowhere[:0].int(), nowhere
        by_appearance = order[starts].argsort()  # cells in the order of their first points
        number = torch.empty_like(by_appearance)  # of each cell in that order
        number[by_appearance] = torch.arange(len(starts), device=pc.device)
        kept = by_appearance[: self.max_num_voxels]
        cell = is_first.cumsum(0) - 1  # of each point in `order`; of those outside, the last cell
        position = torch.arange(P, device=pc.device) - starts[cell]  # among the cell's points
        voxel = torch.where((key != OUTSIDE) & (number[cell] < self.max_num_voxels), number[cell], -1)
        pc_voxel_id = torch.empty_like(voxel)
        pc_voxel_id[order] = voxel

        voxels = pc.new_zeros(len(kept), size, C, dtype=torch.float32)
        with host_wait("points that are kept"):
            used = ((voxel >= 0) & (position < size)).nonzero()[:, 0]
        voxels[voxel[used], position[used]] = pc[order[used]].float()
        count = starts.diff(append=inside.sum()[None])[kept].clamp(max=size)
        if empty_mean:
            mean = voxels.sum(dim=1) / count.clamp(min=1)[:, None]
            empty = torch.arange(size, device=pc.device) >= count[:, None]
            voxels = torch.where(empty[..., None], mean[:, None], voxels)
        return voxels, coord[order[starts[kept]]].int(), count.int(), pc_voxel_id


def gather_features_by_pc_voxel_id(features: Tensor, pc_voxel_id: Tensor, invalid_value: float = 0) -> Tensor:
    """[P, ...] features of each point's voxel; `invalid_value` where pc_voxel_id [P] is -1. Differentiable."""
    rows = pc_voxel_id.to(features.device)
    if not len(features):
        return features.new_full((len(rows), *features.shape[1:]), invalid_value)
    valid = (rows >= 0).view(-1, *[1] * (features.dim() - 1))
    return torch.where(valid, features[rows.clamp(min=0)], invalid_value)
