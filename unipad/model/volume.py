"""View transforms (image features lifted into a volume of voxels), frame fusion, and dense 3D convolutions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipad import config
from unipad.errors import UserError
from unipad.kernels.backend import StreamCache, capturing
from unipad.kernels.lift import lift
from unipad.kernels.voxel_pool import voxel_pool
from unipad.model.norm import SyncedBatchNorm


def view_transform(grid: config.Grid, camera: config.CameraConfig) -> nn.Module:
    """The module that `camera.view` names: features and depth probabilities of the views -> a volume."""
    near, far = camera.depth_range
    if not 0 <= near < far < math.inf:
        raise UserError(f"--camera.depth-range {near} {far} must be the nearest and the farthest depth, in meters.")
    if camera.view == "gather":
        return GatherLift(grid, camera)
    if camera.view == "pool":
        return VoxelPoolLift(grid, camera)
    raise ValueError(f"no view transform {camera.view!r}: choose gather or pool")


class GatherLift(nn.Module):
    """Each voxel gathers feature times depth probability from the views that see its lower corner (as in the original,
    not its center). No parameters."""

    def __init__(self, grid: config.Grid, camera: config.CameraConfig):
        super().__init__()
        self.grid, self.depth_range = grid, camera.depth_range

    def forward(
        self,
        features: list[Tensor],
        depths: list[Tensor],
        lidar2image: Tensor,
        image_size: tuple[int, int],
        calibration: bytes | None = None,
    ) -> Tensor:
        """Lift features into the grid.

        features:    per level [B, N, h, w, C].
        depths:      per level [B, N, h, w, D] probabilities.
        lidar2image: [B, N, 4, 4] LiDAR meters -> pixels of an image of `image_size` (H, W), padding included.
        calibration: identifies the values of `lidar2image`; None: unknown. Not used here.

        Returns [B, C, Z, Y, X] in memory format channels_last_3d.
        """
        grid = self.grid
        volume = lift(features, depths, lidar2image, grid.low, grid.cell, grid.shape, image_size, self.depth_range)
        return volume.permute(0, 4, 1, 2, 3)


class VoxelPoolLift(nn.Module):
    """Each pixel of the feature map adds feature times depth probability to the voxels along its ray. No parameters.

    Keeps which voxels these are for the last calibration. If it never changes, they are found once. In nuScenes it
    changes with every sample, since it follows from the times of the images: there they are found in every step.
    """

    def __init__(self, grid: config.Grid, camera: config.CameraConfig):
        super().__init__()
        if camera.fpn_levels != 1:
            raise UserError(
                f"--camera.view pool takes one level of features, not {camera.fpn_levels}; use --camera.fpn-levels 1 "
                f"and --camera.fpn-start {len(camera.widths) - 1}, the last stage."
            )
        self.grid, self.depth_range, self.truncate = grid, camera.depth_range, camera.truncate
        self._calibration, self._cache = None, None

    def forward(
        self,
        features: list[Tensor],
        depths: list[Tensor],
        lidar2image: Tensor,
        image_size: tuple[int, int],
        calibration: bytes | None = None,
    ) -> Tensor:
        """As `GatherLift.forward`, with one level."""
        (feature,), (depth,) = features, depths
        grid = self.grid
        stride = image_size[0] // feature.shape[2]  # image pixels per pixel of the feature map
        if calibration is None or calibration != self._calibration:
            self._calibration, self._cache = calibration, None if calibration is None else StreamCache()
        volume = voxel_pool(
            feature, depth, lidar2image, grid.low, grid.cell, grid.shape, stride, self.depth_range, self.truncate,
            # a CUDA graph would go on using the voxels of these cameras
            cache=None if capturing(feature.device) else self._cache,
        )  # fmt: skip
        return volume.permute(0, 4, 1, 2, 3)


class FrameFusion(nn.Module):
    """Fuse the volumes of a keyframe and its sweeps: each frame's lag is appended as a channel and mixed in by a
    1 x 1 x 1 convolution; another one mixes the channels of all frames.

    UVTR's `sweep_cat_with_time` (arXiv 2206.00630), with the names of its parameters.
    """

    def __init__(self, channels: int, frames: int):
        super().__init__()
        self.frames = frames
        self.time_conv, self.trans_conv = (
            nn.Sequential(nn.Conv3d(width, channels, kernel_size=1), SyncedBatchNorm(channels), nn.ReLU(inplace=True))
            for width in (channels + 1, channels * frames)
        )

    def forward(self, volumes: Tensor, lags: Tensor) -> Tensor:
        """volumes: [B * frames, C, Z, Y, X], sample after sample, each with the keyframe's first.
        lags:    [B, frames] age of each frame in seconds; 0 for the keyframe.

        Returns [B, C, Z, Y, X] in memory format channels_last_3d.
        """
        add_lag, mix = self.time_conv[0], self.trans_conv[0]  # the convolutions
        weight = add_lag.weight.flatten(1)
        # The lag is the same in all voxels: it is added to the bias, rather than to a copy of the volume as a channel.
        bias = add_lag.bias + lags.flatten()[:, None] * weight[:, -1]  # [B * frames, C]
        x = F.linear(volumes.permute(0, 2, 3, 4, 1), weight[:, :-1])  # [B * frames, Z, Y, X, C]
        x = x + bias[:, None, None, None].to(x.dtype)
        x = self.time_conv[1:](x.permute(0, 4, 1, 2, 3))
        x = x.unflatten(0, (-1, self.frames)).permute(0, 3, 4, 5, 1, 2).flatten(-2)  # [B, Z, Y, X, frames * C]
        x = F.linear(x, mix.weight.flatten(1), mix.bias)
        return self.trans_conv[1:](x.permute(0, 4, 1, 2, 3))


def volume_convs(channels: int, count: int, **settings) -> nn.Sequential:
    """`count` times `ConvNormReLU3d`; the identity for 0."""
    return nn.Sequential(*[ConvNormReLU3d(channels, channels, **settings) for _ in range(count)])


class ConvNormReLU3d(nn.Sequential):
    """3 x 3 x 3 convolution, batch norm, ReLU: [B, in_channels, Z, Y, X] -> [B, out_channels, Z, Y, X].

    The output of a channels_last_3d input is channels_last_3d.

    norm: eps and momentum of the batch norm, if not PyTorch's.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True, **norm: float):
        super().__init__(
            Conv3x3x3(in_channels, out_channels, bias),
            SyncedBatchNorm(out_channels, **norm),
            nn.ReLU(inplace=True),
        )


class Conv3x3x3(nn.Conv3d):
    """`nn.Conv3d` with kernel 3 and padding 1; on a CPU, a 2D convolution of three neighboring slices at a time.

    On CPUs only 2D convolutions have fast kernels: forward and backward of 32 channels in 5 x 64 x 64 voxels take 41 ms
    instead of 317 (torch 2.13, one thread, channels last).
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)
        self.to(memory_format=torch.channels_last_3d)  # as the volume is, else cuDNN converts the weight at every call

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return super().forward(x)
        B, _, Z, _, _ = x.shape
        slices = F.pad(x.permute(0, 2, 3, 4, 1), (0, 0, 0, 0, 0, 0, 1, 1))  # [B, Z + 2, Y, X, C]
        slices = torch.cat([slices[:, k : k + Z] for k in range(3)], dim=-1).flatten(0, 1)  # [B * Z, Y, X, 3 C]
        weight = self.weight.transpose(1, 2).flatten(1, 2)  # [out, 3 C, 3, 3]
        out = F.conv2d(slices.permute(0, 3, 1, 2), weight, self.bias, padding=1)  # [B * Z, out, Y, X]
        return out.unflatten(0, (B, Z)).transpose(1, 2)
