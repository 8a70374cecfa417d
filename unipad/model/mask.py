"""Random masks: which patches of images and which blocks of LiDAR voxels are hidden from the encoders."""

import torch
from torch import Tensor

MASK_PATCH = 32  # pixels: the image encoder's total stride, so one patch is one cell of its last stage


def draw_mask(noise: Tensor, h: int, w: int, ratio: float) -> Tensor:
    """Which patches of each image stay visible: those with the smallest noise.

    noise: [M, h * w] uniform in [0, 1), one number per patch.
    ratio: fraction of patches masked, in [0, 1); the number of visible ones is rounded half to even.

    Returns [M, 1, h, w] bool, True = visible.
    """
    visible = noise.argsort(dim=1)[:, : round(h * w * (1 - ratio))]
    return torch.zeros_like(noise, dtype=torch.bool).scatter(1, visible, True).view(-1, 1, h, w)


def draw_voxel_mask(coords: Tensor, noise: Tensor, block: int, ratio: float) -> Tensor:
    """Which voxels stay visible: of the occupied blocks, those with the smallest noise.

    coords: [N, 4] int32 (b, z, y, x).
    noise:  [B, Z, Y, X] uniform in [0, 1), one number per block; the grid of blocks starts at voxel 0.
    block:  voxels along the edge of a block.
    ratio:  fraction of each sample's occupied blocks masked, in [0, 1); the number of visible ones is rounded half to
            even.

    Returns [N] bool, True = visible.
    """
    _, Z, Y, X = noise.shape
    b, z, y, x = torch.cat([coords[:, :1], coords[:, 1:] // block], dim=1).long().unbind(1)
    block_of = ((b * Z + z) * Y + y) * X + x  # [N] linear index of each voxel's block in `noise`
    occupied = torch.zeros(noise.numel(), dtype=torch.bool, device=noise.device)
    occupied = occupied.index_fill(0, block_of, True).view(len(noise), -1)
    # [B, 1] number of visible blocks; in double, to round as `draw_mask` does in Python
    count = (occupied.sum(1, keepdim=True).double() * (1 - ratio)).round()
    order = noise.flatten(1).masked_fill(~occupied, 2).argsort(dim=1, stable=True)  # empty blocks last: noise is < 1
    is_visible = torch.arange(order.shape[1], device=order.device) < count  # [B, blocks], in this order
    return torch.zeros_like(occupied).scatter(1, order, is_visible).flatten()[block_of]
