"""Depth heads and their LiDAR supervision."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unipad.batch import Batch
from unipad.config import CameraConfig
from unipad.model.dropout import Dropout
from unipad.model.norm import SyncedBatchNorm
from unipad.model.rays import project_points

DILATIONS = (1, 6, 12, 18)  # of ASPP's convolutions, in cells of the feature map: the first is 1x1, the others 3x3
DROPOUT = 0.5  # of ASPP's output
NEAR_RADIUS = 3.0  # meters from the LiDAR's vertical axis; nearer points lie on the ego vehicle


def depth_head(cfg: CameraConfig) -> nn.Module:
    """The head that `cfg` names: features [B * N, C, h, w] and generators -> logits [B * N, bins, h, w]."""
    if cfg.depth == "simple":
        return SimpleDepth(cfg.channels, cfg.depth_bins, kernel_size=1)
    if cfg.depth == "complex":
        return ComplexDepth(cfg.channels, cfg.depth_bins, cfg.aspp_channels)
    raise ValueError(f"no depth head {cfg.depth!r}: choose simple or complex")


class SimpleDepth(nn.Conv2d):
    """Depth head of one 1x1 convolution."""

    def forward(self, x: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """As `ComplexDepth.forward`; without dropout, so `generators` are not used."""
        return super().forward(x)


class ComplexDepth(nn.Module):
    """The original's DepthNet, with its parameter names: 3x3 convolution, residual blocks, ASPP, 1x1 convolution."""

    def __init__(self, channels: int, bins: int, aspp_channels: int):
        super().__init__()
        self.reduce_conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), SyncedBatchNorm(channels), nn.ReLU(inplace=True)
        )
        self.depth_conv = nn.Sequential(
            *[ResidualBlock(channels) for _ in range(3)], ASPP(channels, aspp_channels), nn.Conv2d(channels, bins, 1)
        )

    def forward(self, x: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """x: [B * N, C, h, w]; generators: one `torch.Generator` per sample, for dropout in training; None: no dropout.
        Returns [B * N, bins, h, w]."""
        dropout = Dropout(DROPOUT, generators if self.training else None)
        *blocks, aspp, to_logits = self.depth_conv
        x = self.reduce_conv(x)
        for block in blocks:
            x = block(x)
        return to_logits(dropout(aspp(x)))


class ResidualBlock(nn.Module):
    """ResNet's basic block (arXiv 1512.03385)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = SyncedBatchNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = SyncedBatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[M, C, h, w] -> [M, C, h, w]."""
        y = self.bn1(self.conv1(x)).relu()
        return (x + self.bn2(self.conv2(y))).relu()


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (arXiv 1706.05587): dilated convolutions and the mean over each image."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        for i, dilation in enumerate(DILATIONS, start=1):
            self.add_module(f"aspp{i}", DilatedConv(channels, hidden, dilation))
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, hidden, 1, bias=False), SyncedBatchNorm(hidden), nn.ReLU()
        )
        self.conv1 = nn.Conv2d((len(DILATIONS) + 1) * hidden, channels, 1, bias=False)
        self.bn1 = SyncedBatchNorm(channels)
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[M, C, h, w] -> [M, C, h, w], after a ReLU."""
        branches = [getattr(self, f"aspp{i}")(x) for i in range(1, len(DILATIONS) + 1)]
        mean = self.global_avg_pool(x).expand_as(branches[0])
        # concatenated in channels-last order: the expanded mean would make torch.cat choose the other layout
        joined = torch.cat([branch.permute(0, 2, 3, 1) for branch in (*branches, mean)], dim=-1).permute(0, 3, 1, 2)
        return self.bn1(self.conv1(joined)).relu()


class DilatedConv(nn.Module):
    """A dilated 3x3 convolution; 1x1 for dilation 1."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int):
        super().__init__()
        kernel, padding = (1, 0) if dilation == 1 else (3, dilation)
        self.atrous_conv = nn.Conv2d(
            in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False
        )  # fmt: skip
        self.bn = SyncedBatchNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[M, in_channels, h, w] -> [M, out_channels, h, w], after a ReLU."""
        return self.bn(self.atrous_conv(x)).relu()


def depth_loss(depths: list[Tensor], batch: Batch, cfg: CameraConfig) -> Tensor:
    """Binary cross-entropy of each cell's depth bins; the target is 1 for the bin of the nearest LiDAR point seen in
    the cell, else 0.

    depths: per level [B, N, h, w, D] probabilities, from `Encoder.encode`.
    batch:  the batch they were computed from; all views and points of a sample are compared, also those of sweeps.

    Returns the sum over bins, mean over cells with a LiDAR point (0 without any) and sum over levels, times
    `cfg.depth_weight`. Computed in fp32 or better; log(0) is replaced by the log of the smallest normal number.
    Follows Uni3DVoxelPoolDepth.loss of the original.
    """
    total = 0
    for depth in depths:
        _, _, h, w, D = depth.shape
        target = depth_targets(batch, h, w, D, cfg.depth_range)
        depth = depth.to(torch.promote_types(depth.dtype, torch.float32))
        is_true = target[..., None] == torch.arange(D, device=depth.device)
        # not F.binary_cross_entropy, which aborts the process on a GPU where an overflow has made a NaN
        likelihood = torch.where(is_true, depth, 1 - depth).clamp(min=torch.finfo(depth.dtype).tiny)
        known = target >= 0
        total = total - (likelihood.log().sum(-1) * known).sum() / known.sum().clamp(min=1)
    return cfg.depth_weight * total


def depth_targets(batch: Batch, h: int, w: int, bins: int, depth_range: tuple[float, float]) -> Tensor:
    """The depth bin of the nearest LiDAR point that is projected into each cell of the feature map.

    h, w:        size of the feature map, which divides the padded image evenly.
    depth_range: (nearest, farthest) meters along the optical axis, divided into `bins`; only points between them count,
                 strictly inside the image and farther than NEAR_RADIUS from the LiDAR's vertical axis.

    Returns [B, N, h, w] int64; -1 without a point. The original sorts points by fp32 keys that do not resolve depths a
    few meters apart, so its target may be that of a farther point.
    """
    near, far = depth_range
    stride = batch.images.shape[-2] // h
    targets = []
    for b, points in enumerate(batch.points.split(batch.point_counts.tolist())):
        projected, visible = project_points(points[:, :3], batch.lidar2image[b], batch.image_sizes[b])
        u, v, z = projected.unbind(-1)  # [N, P] each
        visible &= (z > near) & (z < far) & (points[:, :2].norm(dim=1) > NEAR_RADIUS)
        cell = v.round().long() // stride * w + u.round().long() // stride
        nearest = z.new_full((len(z), h * w), torch.inf)  # inf: no point
        nearest = nearest.scatter_reduce(1, cell.where(visible, 0), z.where(visible, torch.inf), "amin")
        # divide by a tensor: a GPU multiplies by the reciprocal of a number instead, which moves points to other bins
        bin_ = (nearest - near) / nearest.new_full((), (far - near) / bins)
        targets.append(torch.where(bin_ < bins, bin_, -1).long().view(-1, h, w))
    return torch.stack(targets)
