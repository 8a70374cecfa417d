"""SpUNet: points -> one point per voxel -> a sparse U-Net -> features of every point, or a volume of them.

`Unet` has the structure and parameter names of the original's SpUNetBase, which follows Pointcept: 5 x 5 x 5 stem,
strided convolutions down, their inverses up, skip connections. Unlike in Pointcept, the voxel grid is aligned with the
LiDAR's origin, not with each sample's smallest coordinates: features depend neither on a sample's farthest point nor on
the rest of the batch.

"Voxel" means a voxel of the U-Net, of edge `UnetConfig.cell`; "cell" means a cell of the volume, in `Grid`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipad import config
from unipad.errors import UserError
from unipad.kernels.backend import host_wait
from unipad.kernels.voxelize import grid_subsample
from unipad.model.mask import draw_voxel_mask
from unipad.model.sparse import (
    ConvNormReLU,
    SparseBlock,
    SparseStage,
    convolutions_with_tables,
    in_fp32,
    make_tables,
    rounded_weights,
)
from unipad.spconv.conv import SparseConv3d, SparseInverseConv3d, SubMConv3d
from unipad.spconv.tensor import SparseConvTensor
from unipad.spconv.voxels import VoxelSet

MAX_INTENSITY = 255.0  # of a LiDAR point in nuScenes


class UnetEncoder(nn.Module):
    """Point clouds to features of their points, or to a volume."""

    def __init__(self, cfg: config.UnetConfig, grid: config.Grid, point_channels: int = 5):
        super().__init__()
        if not cfg.cell > 0:
            raise UserError(f"--lidar.cell {cfg.cell} must be above 0.")
        self.cfg, self.grid = cfg, grid
        self.encoder = Unet(point_channels, cfg.stem, cfg.widths, cfg.blocks)
        ranges = list(zip(grid.low, grid.high, strict=True))[::-1]  # z, y, x
        # (z, y, x): the first voxel inside the grid, counted from the LiDAR, and how many are inside
        self.first_voxel = [round(low / cfg.cell) for low, _ in ranges]
        self.voxel_counts = [round((high - low) / cfg.cell) for low, high in ranges]
        self.mask_shape = tuple(-(-count // cfg.mask_block) for count in self.voxel_counts)  # blocks (z, y, x)

    def forward(self, points: Tensor, point_counts: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode the points of a batch, all inside the grid.

        points, point_counts, noise: as for `LidarEncoder.forward`.

        Returns:
            volume:      [B, C, Z, Y, X] in memory format channels_last_3d: the mean feature of the visible voxels whose
                         points are in each cell, 0 where there is none.
            grid_coords: [M, 4] int32 (b, z, y, x) of the visible voxels, counted from the grid's lower corner.
        """
        rows, coords, _, extent = grid_subsample(points, point_counts, self.cfg.cell)
        sample, *zyx = coords.unbind(1)
        # a point just below the grid's upper border may be rounded up to it
        axes = zip(zyx, self.first_voxel, self.voxel_counts, strict=True)
        grid_coords = torch.stack([sample, *((v - first).clamp(0, count - 1) for v, first, count in axes)], dim=1)
        if noise is not None and self.cfg.mask_ratio > 0:
            visible = draw_voxel_mask(grid_coords, noise, self.cfg.mask_block, self.cfg.mask_ratio)
            with host_wait("indices of the visible voxels"):
                visible = visible.nonzero()[:, 0]
            rows, coords, grid_coords = rows[visible], coords[visible], grid_coords[visible]
        features = self._encode(points[rows], coords, extent, len(point_counts))
        return self._volume(features, points[rows, :3], coords[:, 0], len(point_counts)), grid_coords

    def voxel_features(self, points: Tensor, point_counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of one point per voxel, for segmentation. Points may be anywhere.

        Returns:
            features: [V, C].
            rows:     [V] int64, the row in `points` of the point that stands for each voxel.
            voxel_of: [P] int64, the row in `features` of each point's voxel.
        """
        rows, coords, voxel_of, extent = grid_subsample(points, point_counts, self.cfg.cell)
        return self._encode(points[rows], coords, extent, len(point_counts)), rows, voxel_of

    def _encode(self, points, coords, extent, B):
        """[V, C] features of the voxels `coords` [V, 4], all within `extent`, each with one point, [V, 5].

        Also runs without points, since other processes wait in their synchronized batch norms.
        """
        features = points.to(self.encoder.conv_input[0].weight.dtype, copy=True)
        features[:, 3] *= 1 / MAX_INTENSITY
        step = 2 ** len(self.encoder.down)
        # The U-Net's grid (`shape` voxels from `low` on) starts and ends at multiples of the coarsest stage's stride:
        # which voxels have the same parent does not depend on the batch, and the last voxel has a parent.
        low = [first // step * step for first in extent[0]]
        shape = [-(-(last + 1 - l) // step) * step for last, l in zip(extent[1], low, strict=True)]
        sample, *zyx = coords.unbind(1)
        coords = torch.stack([sample, *(v - l for v, l in zip(zyx, low, strict=True))], dim=1)
        voxels = VoxelSet(coords, shape, B, in_order=True, check=False)
        voxel_sets = self.encoder.make_tables(voxels)
        features = self.encoder(SparseConvTensor.of(features, voxels)).features
        del voxel_sets  # held until here: only weak references keep the sets of the coarser stages
        return features

    def _volume(self, features, xyz, sample, B):
        """[B, C, Z, Y, X]: mean of the features [V, C] of the points `xyz` [V, 3] in each cell; sample: [V]."""
        X, Y, Z = self.grid.shape
        axes = zip(xyz.unbind(1), self.grid.low, self.grid.cell, self.grid.shape, strict=True)
        # divide by a tensor: a GPU multiplies by the reciprocal of a number instead, which moves points to other cells
        x, y, z = (((p - low) / p.new_full((), cell)).long().clamp(max=size - 1) for p, low, cell, size in axes)
        key, order = (((sample.long() * Z + z) * Y + y) * X + x).sort(stable=True)
        begin = torch.searchsorted(key, torch.arange(B * Z * Y * X, device=key.device))  # of each cell, in `order`
        # means over many points, so not in half precision, even under autocast; 0 in cells without points
        volume = F.embedding_bag(order, features.to(xyz.dtype), begin, mode="mean")
        return volume.view(B, Z, Y, X, -1).permute(0, 4, 1, 2, 3)


class Unet(nn.Module):
    """Sparse tensor -> sparse tensor with the same voxels. The sides of their grid are multiples of 2^(stages down).

    stem:   channels of the first convolution.
    widths: channels per stage, those on the way down first; blocks: residual blocks per stage.
    """

    def __init__(self, in_channels: int, stem: int, widths: Sequence[int], blocks: Sequence[int]):
        super().__init__()
        stages = len(widths) // 2
        if not len(widths) == len(blocks) == 2 * stages:
            raise UserError(
                f"--lidar.widths {widths} and --lidar.blocks {blocks} need one number per stage: as many up as down."
            )
        self.conv_input = ConvNormReLU(SubMConv3d(in_channels, stem, 5, bias=False))
        self.down, self.up, self.enc, self.dec = (nn.ModuleList() for _ in range(4))
        above = stem  # channels of the next finer stage, on the way down
        for s in range(stages):
            down, up = widths[s], widths[-1 - s]
            below = widths[-2 - s]  # of the next coarser stage, on the way up; for the coarsest, `down`
            self.down.append(ConvNormReLU(SparseConv3d(above, down, 2, 2, bias=False)))
            self.enc.append(_blocks(down, down, blocks[s]))
            self.up.append(ConvNormReLU(SparseInverseConv3d(below, up, 2, bias=False)))
            self.dec.append(_blocks(up + above, up, blocks[-1 - s]))
            above = down
        # a list: not registered a second time
        self.convs = convolutions_with_tables(self.down, self.up, self.enc, self.dec)

    def make_tables(self, voxels: VoxelSet) -> list[VoxelSet]:
        """`sparse.make_tables` of this net, whose modules run in another order than they are registered in."""
        sets = make_tables(self.conv_input, voxels)
        levels = [*zip(self.down, self.enc, strict=True), *zip(reversed(self.up), reversed(self.dec), strict=True)]
        for module in (module for level in levels for module in level):
            sets += make_tables(module, sets[-1])
        return sets

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        x = in_fp32(self.conv_input, x)  # its input channels include the points' coordinates
        skips = []
        with rounded_weights(self.convs):
            for down, enc in zip(self.down, self.enc, strict=True):
                skips.append(x)
                x = enc(down(x))
            for up, dec in zip(reversed(self.up), reversed(self.dec), strict=True):
                x = up(x)
                x = dec(x.replace_feature(torch.cat([x.features, skips.pop().features], dim=1)))
        return x


def _blocks(in_channels, width, count):
    stage = SparseStage()
    for i in range(count):
        stage.add_module(f"block{i}", SparseBlock(width, in_channels if i == 0 else width))
    return stage
