"""Points to a volume: voxelization, block mask, residual sparse encoder, dense neck.

Module and parameter names inside the encoder and the neck are mmdet3d's; `unipad.names` maps the rest. In configs and
comments, the neck is both dense parts, the modules `backbone` (`Second`) and `neck` (`SecondFPN`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unipad import config
from unipad.errors import UserError
from unipad.kernels.backend import host_wait
from unipad.kernels.voxel_keys import sort_voxels
from unipad.kernels.voxelize import voxelize
from unipad.model.mask import draw_voxel_mask
from unipad.model.norm import SyncedBatchNorm
from unipad.model.sparse import (
    NORM,
    ConvNormReLU,
    SparseBlock,
    SparseLinear,
    SparseStage,
    convolutions_with_tables,
    in_fp32,
    make_tables,
    rounded_weights,
)
from unipad.spconv.conv import SparseConv3d, SubMConv3d
from unipad.spconv.tensor import SparseConvTensor
from unipad.spconv.voxels import VoxelSet


class LidarEncoder(nn.Module):
    """Point clouds to a volume.

    The host waits for the device where a size depends on the points: for the number of occupied voxels, the indices of
    the visible ones, and the number of output voxels of each strided convolution.
    """

    def __init__(self, cfg: config.LidarConfig, grid: config.Grid, point_channels: int = 5):
        """point_channels: of `Batch.points`: x, y, z, intensity, time lag."""
        super().__init__()
        self.cfg, self.low = cfg, grid.low
        stride = 2 ** (len(cfg.widths) - 1)
        cells = config.cells_of_range(grid.low, grid.high, cfg.cell, "--lidar.cell")
        required = tuple(stride * size for size in grid.shape)
        if cells != required:
            raise UserError(
                f"--lidar.cell {cfg.cell} makes {cells} voxels (x, y, z) of the range, but an encoder of stride "
                f"{stride} needs {required} for a volume of {grid.shape}; use voxels of "
                f"{tuple(c / stride for c in grid.cell)} m."
            )
        coarse = max(cfg.neck_strides)  # a branch of this stride must upsample to the volume's size again
        if any(size % coarse for size in grid.shape[:2]):
            raise UserError(
                f"--lidar.neck-strides {cfg.neck_strides} needs a volume whose sides in x and y are multiples of "
                f"{coarse}, not {grid.shape[:2]}; change it or --grid.cell."
            )
        self.voxel_counts = cells[::-1]  # of the range, (z, y, x)
        self.mask_shape = tuple(-(-size // cfg.mask_block) for size in self.voxel_counts)  # blocks (z, y, x)
        self.encoder = SparseEncoder(point_channels, cfg.widths, cfg.blocks, cfg.sparse_channels)
        self.backbone = Second(cfg.sparse_channels, cfg.neck_widths, cfg.neck_strides, cfg.neck_layers)
        self.neck = SecondFPN(cfg.neck_widths, cfg.neck_strides, cfg.channels)
        self.mask_token = None
        if cfg.learnable_token:
            self.mask_token = nn.Parameter(torch.empty(1, point_channels))
            nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        # Weights in the memory format of the activations: else cuDNN converts them at every call.
        self.backbone.to(memory_format=torch.channels_last)
        self.neck.to(memory_format=torch.channels_last)

    def forward(self, points: Tensor, point_counts: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode the points of a batch.

        Args:
            points:       [P, point_channels] fp32, the first three x, y, z meters in the LiDAR frame, sample after
                          sample.
            point_counts: [B] points of each sample, on the host.
            noise:        [B, *mask_shape] uniform in [0, 1), from which the hidden blocks of voxels are chosen, also in
                          eval mode; None: no block is hidden.

        Returns:
            volume:         [B, C, Z, Y, X] in memory format channels_last_3d.
            visible_coords: [M, 4] int32 (b, z, y, x), the visible voxels.
        """
        cfg = self.cfg
        max_voxels = cfg.max_voxels[0 if self.training else 1]
        features, coords = voxelize(
            points, point_counts, self.low, cfg.cell, self.voxel_counts, cfg.max_points, max_voxels
        )
        # One more slice in z, always empty, as in SECOND (40 -> 41). With L slices in the volume and 4 stages, 8 L + 1
        # slices become 4 L + 1, 2 L + 1, L.
        shape = (self.voxel_counts[0] + 1, *self.voxel_counts[1:])
        # Sorted (`in_order` below), so that voxels near each other in the grid, which are read together, are near each
        # other in memory.
        _, order = sort_voxels(coords, shape, check=False)
        features, coords = features[order].to(self.encoder.conv_input[0].weight.dtype), coords[order]
        visible_coords = coords
        if noise is not None and cfg.mask_ratio > 0:
            visible = draw_voxel_mask(coords, noise, cfg.mask_block, cfg.mask_ratio)
            with host_wait("indices of the visible voxels"):
                rows = visible.nonzero()[:, 0]
            visible_coords = coords[rows]
            if self.mask_token is None:
                features, coords = features[rows], visible_coords
            else:
                features = torch.where(visible[:, None], features, self.mask_token)
        voxels = VoxelSet(coords, shape, len(point_counts), in_order=True, check=False)
        voxel_sets = make_tables(self.encoder, voxels)  # neighbor tables (spconv: indice pairs) of all convolutions
        x = self.encoder(SparseConvTensor.of(features, voxels)).dense(memory_format=torch.channels_last_3d)
        del voxel_sets  # held until here: only weak references keep the output sets, whose tables the encoder needs
        return self.neck(self.backbone(x)), visible_coords


class SparseEncoder(nn.Module):
    """SECOND's sparse encoder with residual blocks; stride 2 between stages, on all axes.

    in_channels:  of the voxels' features.
    widths:       channels of each stage.
    blocks:       residual blocks of each stage.
    out_channels: after a last linear layer.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], blocks: int, out_channels: int):
        super().__init__()
        self.conv_input = ConvNormReLU(SubMConv3d(in_channels, widths[0], 3, bias=False))
        self.encoder_layers = nn.Sequential()
        for i, width in enumerate(widths):
            stage = SparseStage(*[SparseBlock(width) for _ in range(blocks)])
            if i < len(widths) - 1:
                # the last strided convolution is not padded in z: its 2 L + 1 slices become the L of the volume
                padding = (0, 1, 1) if i == len(widths) - 2 else 1
                stage.append(ConvNormReLU(SparseConv3d(width, widths[i + 1], 3, 2, padding, bias=False)))
            self.encoder_layers.add_module(f"encoder_layer{i + 1}", stage)
        self.conv_out = ConvNormReLU(SparseLinear(widths[-1], out_channels))
        self.convs = convolutions_with_tables(self.encoder_layers)  # a list: not registered a second time

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Returns a tensor at 1 / 2^(stages - 1) of the resolution."""
        x = in_fp32(self.conv_input, x)
        with rounded_weights(self.convs):
            return self.conv_out(self.encoder_layers(x))


class Second(nn.Module):
    """The original's SECOND3D: parallel branches, which read the same input, with strides of their own in x and y.

    (In SECOND, blocks follow each other; the original sets is_cascade=False.)

    The original's 1 x 3 x 3 kernels do not mix z levels: here they are 2D convolutions of all levels of all samples.

    widths, strides: per branch.
    layers:          of each branch, after the strided one.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], strides: Sequence[int], layers: int):
        super().__init__()
        self.blocks = nn.ModuleList()
        for width, stride in zip(widths, strides, strict=True):
            branch = []
            for i in range(layers + 1):
                inputs, step = (in_channels, stride) if i == 0 else (width, 1)
                conv = nn.Conv2d(inputs, width, 3, stride=step, padding=1, bias=False)
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                branch += [conv, SyncedBatchNorm(width, **NORM), nn.ReLU(inplace=True)]
            self.blocks.append(nn.Sequential(*branch))

    def forward(self, x: Tensor) -> list[Tensor]:
        """x: [B, C, Z, Y, X]; returns per branch [B, width, Z, Y / stride, X / stride]."""
        return [_as_volume(block(_as_images(x)), len(x)) for block in self.blocks]


class SecondFPN(nn.Module):
    """The original's SECOND3DFPN: the sum of the branches, each upsampled to [B, channels, Z, Y, X]."""

    def __init__(self, widths: Sequence[int], strides: Sequence[int], channels: int):
        super().__init__()
        self.deblocks = nn.ModuleList()
        for width, stride in zip(widths, strides, strict=True):
            if stride == 1:
                conv = nn.Conv2d(width, channels, 1, bias=False)
            else:
                conv = nn.ConvTranspose2d(width, channels, stride, stride=stride, bias=False)
            self.deblocks.append(nn.Sequential(conv, SyncedBatchNorm(channels, **NORM), nn.ReLU(inplace=True)))

    def forward(self, branches: list[Tensor]) -> Tensor:
        """branches: from `Second`; returns [B, channels, Z, Y, X]."""
        B = len(branches[0])
        ups = [up(_as_images(x)) for up, x in zip(self.deblocks, branches, strict=True)]
        return _as_volume(sum(ups[1:], ups[0]), B)


def _as_images(x):
    """[B, C, Z, Y, X] -> [B * Z, C, Y, X], channels last; no copy if x is channels_last_3d."""
    return x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)


def _as_volume(x, B):
    """[B * Z, C, Y, X] -> [B, C, Z, Y, X]; the inverse of `_as_images`."""
    return x.unflatten(0, (B, -1)).transpose(1, 2)
