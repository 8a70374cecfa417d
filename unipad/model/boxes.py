"""Boxes: ours, the ten numbers that the head regresses, those of the original and those of nuScenes.

    ours           x, y, z center, w, l, h meters, yaw, vx, vy m/s; LiDAR frame; yaw is the direction of the heading
                   (the box's length), counter-clockwise from x
    the original   mmdet3d 0.17's: z is the bottom's, and yaw' turns clockwise from -y,   yaw' = -yaw - pi / 2
    code           x, y, log w, log l, z center, log h, sin yaw', cos yaw', vx, vy;
                   sin yaw' = -cos yaw,   cos yaw' = -sin yaw
    nuScenes       center, (w, l, h), a quaternion and a velocity, each in the global frame

mmdet3d 1.0 and later swap w and l and turn the other way: boxes of such a version are none of these.
"""

import math

import numpy as np
import torch
from scipy.spatial.transform import Rotation

CODE_SIZE = 10


def encode_boxes(boxes):
    """[..., 9] ours -> [..., 10] codes; sizes of 0 give -inf. Differentiable."""
    x, y, z, w, l, h, yaw, vx, vy = boxes.unbind(-1)
    return torch.stack([x, y, w.log(), l.log(), z, h.log(), -yaw.cos(), -yaw.sin(), vx, vy], dim=-1)


def decode_boxes(codes):
    """[..., 10] codes -> [..., 9] ours, yaw in [-pi, pi]; sin and cos of a code need not lie on the unit circle."""
    x, y, w, l, z, h, sin, cos, vx, vy = codes.unbind(-1)
    return torch.stack([x, y, z, w.exp(), l.exp(), h.exp(), torch.atan2(-cos, -sin), vx, vy], dim=-1)


def footprint(boxes):
    """[..., 9] ours -> [..., 5] x, y, w, l, yaw: boxes as `unipad.kernels.rotated_iou` sees them from above."""
    return torch.cat([boxes[..., :2], boxes[..., 3:5], boxes[..., 6:7]], dim=-1)


def box_corners(boxes):
    """[..., 9] ours -> [..., 8, 3] meters: at the bottom front left, front right, back right, back left; at the top."""
    ahead = boxes.new_tensor([1, 1, -1, -1, 1, 1, -1, -1]) / 2
    left = boxes.new_tensor([1, -1, -1, 1, 1, -1, -1, 1]) / 2
    up = boxes.new_tensor([-1, -1, -1, -1, 1, 1, 1, 1]) / 2
    x, y, z, w, l, h, yaw = (boxes[..., i, None] for i in range(7))
    along, across = l * ahead, w * left
    px = x + along * yaw.cos() - across * yaw.sin()
    py = y + along * yaw.sin() + across * yaw.cos()
    return torch.stack([px, py, z + h * up], dim=-1)


def boxes_to_original(boxes):
    """[..., 9] ours -> [..., 9] x, y, z of the bottom, w, l, h, yaw', vx, vy; yaw' in [-pi, pi]."""
    x, y, z, w, l, h, yaw, vx, vy = boxes.unbind(-1)
    return torch.stack([x, y, z - h / 2, w, l, h, _turned_over(yaw), vx, vy], dim=-1)


def boxes_from_original(boxes):
    """The inverse of `boxes_to_original`."""
    x, y, z, w, l, h, yaw, vx, vy = boxes.unbind(-1)
    return torch.stack([x, y, z + h / 2, w, l, h, _turned_over(yaw), vx, vy], dim=-1)


def boxes_to_global(boxes, lidar2global):
    """Boxes as nuScenes' results have them.

    Args:
        boxes:        [K, 9] array, ours.
        lidar2global: [4, 4] rigid array, of the frame that the boxes are in.

    Returns arrays, fp64: translation [K, 3] meters, size [K, 3] w, l, h meters, rotation [K, 4] unit quaternion
    w, x, y, z, velocity [K, 2] m/s.
    """
    boxes, turn = np.asarray(boxes, np.float64), lidar2global[:3, :3]
    if not len(boxes):  # scipy makes no rotation of none
        return np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 4)), np.zeros((0, 2))
    rotation = Rotation.from_matrix(turn) * Rotation.from_euler("z", boxes[:, 6:7])
    translation = boxes[:, :3] @ turn.T + lidar2global[:3, 3]
    velocity = boxes[:, 7:] @ turn[:2, :2].T  # a box has none along the LiDAR's z
    return translation, boxes[:, 3:6].copy(), rotation.as_quat()[:, [3, 0, 1, 2]], velocity


def _turned_over(yaw):
    """-yaw - pi / 2 in [-pi, pi]: from our yaw to the original's and back."""
    return torch.remainder(math.pi / 2 - yaw, 2 * math.pi) - math.pi
