"""Boxes of the original (mmdet3d 0.17), as recorded in tests/golden: z of the bottom face, not of the center (except in
records of its box coder and assigner), and yaw' = -yaw - pi / 2, where yaw is that of our boxes (`Batch`).
"""

import math

import torch


def boxes_to_original(boxes):
    """[..., 9] as in `Batch` -> [..., 9] x, y, z of the bottom, w, l, h, yaw', vx, vy; yaw' in [-pi, pi]."""
    x, y, z, w, l, h, yaw, vx, vy = boxes.unbind(-1)
    return torch.stack([x, y, z - h / 2, w, l, h, _other_yaw(yaw), vx, vy], dim=-1)


def boxes_from_original(boxes):
    """The inverse of `boxes_to_original`."""
    x, y, z, w, l, h, yaw, vx, vy = boxes.unbind(-1)
    return torch.stack([x, y, z + h / 2, w, l, h, _other_yaw(yaw), vx, vy], dim=-1)


def _other_yaw(yaw):
    """-yaw - pi / 2 in [-pi, pi]: from our yaw to the original's and back."""
    return torch.remainder(math.pi / 2 - yaw, 2 * math.pi) - math.pi
