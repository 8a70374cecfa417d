"""The volume: image features lifted into a grid of voxels, and its projection to the channels that are rendered."""

import torch
import torch.nn.functional as F
from torch import nn

from kernels.lift import lift
from unipad import config
from unipad.model.norm import SyncedBatchNorm


class GatherLift(nn.Module):
    """Every voxel gathers feature times depth probability from the views that see its lower corner. No parameters."""

    def __init__(self, grid: config.Grid, camera: config.Camera):
        super().__init__()
        self.grid, self.depth_range = grid, camera.depth_range

    def forward(self, features, depths, lidar2image, image_size):
        """features: per level [B, N, h, w, C]; depths: per level [B, N, h, w, D] probabilities;
        lidar2image: [B, N, 4, 4] LiDAR metres -> pixels of an image of `image_size` (H, W), padding included.

        Returns [B, C, Z, Y, X] in memory format channels_last_3d.
        """
        grid = self.grid
        volume = lift(features, depths, lidar2image, grid.low, grid.cell, grid.shape, image_size, self.depth_range)
        return volume.permute(0, 4, 1, 2, 3)


class ConvNormReLU3d(nn.Sequential):
    """[B, in_channels, Z, Y, X] -> [B, out_channels, Z, Y, X], at least 0; channels_last_3d stays channels_last_3d."""

    def __init__(self, in_channels, out_channels):
        super().__init__(
            Conv3x3x3(in_channels, out_channels),
            SyncedBatchNorm(out_channels),
            nn.ReLU(inplace=True),
        )


class Conv3x3x3(nn.Conv3d):
    """`nn.Conv3d` with kernel 3 and padding 1; on a CPU as a 2D convolution over three neighbouring slices at a time.

    There only 2D convolutions have fast kernels: forward and backward of 32 channels in 5 x 64 x 64 voxels take 41 ms
    instead of 317 (torch 2.13, one thread, channels last).
    """

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x):
        if x.is_cuda:
            return super().forward(x)
        B, _, Z, _, _ = x.shape
        slices = F.pad(x.permute(0, 2, 3, 4, 1), (0, 0, 0, 0, 0, 0, 1, 1))  # [B, Z + 2, Y, X, C]
        slices = torch.cat([slices[:, k : k + Z] for k in range(3)], dim=-1).flatten(0, 1)  # [B * Z, Y, X, 3 C]
        weight = self.weight.transpose(1, 2).flatten(1, 2)  # [out, 3 C, 3, 3]
        out = F.conv2d(slices.permute(0, 3, 1, 2), weight, self.bias, padding=1)  # [B * Z, out, Y, X]
        return out.unflatten(0, (B, Z)).transpose(1, 2)
