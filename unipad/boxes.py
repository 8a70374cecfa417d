"""Box geometry, for data and model alike. All boxes are [..., 9] as in `Batch`, except these:

    code      what the head regresses: x, y, log w, log l, z center, log h, sin yaw', cos yaw', vx, vy
              yaw' is mmdet3d 0.17's, clockwise from -y: yaw' = -yaw - pi / 2, sin yaw' = -cos yaw, cos yaw' = -sin yaw
    nuScenes  center, (w, l, h), a quaternion and a velocity; center, rotation and velocity in the global frame

None of these is the format of mmdet3d 1.0 and later, which swaps w and l and rotates the other way.
"""

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

CODE_SIZE = 10


def encode_boxes(boxes: Tensor) -> Tensor:
    """Boxes [..., 9] -> codes [..., 10]; sizes of 0 give -inf. Differentiable."""
    x, y, z, w, l, h, yaw, vx, vy = boxes.unbind(-1)
    return torch.stack([x, y, w.log(), l.log(), z, h.log(), -yaw.cos(), -yaw.sin(), vx, vy], dim=-1)


def decode_boxes(codes: Tensor) -> Tensor:
    """Codes [..., 10] -> boxes [..., 9], yaw in [-pi, pi]; sin and cos of a code need not lie on the unit circle."""
    x, y, w, l, z, h, sin, cos, vx, vy = codes.unbind(-1)
    return torch.stack([x, y, z, w.exp(), l.exp(), h.exp(), torch.atan2(-cos, -sin), vx, vy], dim=-1)


def footprint(boxes: Tensor) -> Tensor:
    """Boxes [..., 9] -> [..., 5] x, y, w, l, yaw: the bird's-eye view boxes of `unipad.kernels.rotated_iou`."""
    return torch.cat([boxes[..., :2], boxes[..., 3:5], boxes[..., 6:7]], dim=-1)


def box_corners(boxes: np.ndarray) -> np.ndarray:
    """Boxes [M, 9] -> [M, 8, 3] float64 meters: front left, front right, back right, back left at the bottom, then the
    same at the top."""
    x, y, z, w, l, h, yaw = np.asarray(boxes, np.float64)[:, :7].T[..., None]  # [M, 1] each
    ahead = np.array([1, 1, -1, -1, 1, 1, -1, -1]) / 2
    left = np.array([1, -1, -1, 1, 1, -1, -1, 1]) / 2
    up = np.array([-1, -1, -1, -1, 1, 1, 1, 1]) / 2
    along, across, cos, sin = ahead * l, left * w, np.cos(yaw), np.sin(yaw)
    return np.stack([x + along * cos - across * sin, y + along * sin + across * cos, z + up * h], axis=-1)


def points_in_boxes(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """[M, P] bool: whether each point ([P, 3 or more] meters) lies in each box ([M, 9]) or on its faces."""
    inside = np.empty((len(boxes), len(points)), bool)
    for in_box, (x, y, z, w, l, h, yaw) in zip(inside, boxes[:, :7].tolist(), strict=True):
        dx, dy, dz = points[:, 0] - x, points[:, 1] - y, points[:, 2] - z
        cos, sin = np.cos(yaw), np.sin(yaw)
        in_box[:] = np.abs(dx * cos + dy * sin) <= l / 2
        in_box &= np.abs(dy * cos - dx * sin) <= w / 2
        in_box &= np.abs(dz) <= h / 2
    return inside


def transform_boxes(boxes: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """Boxes [M, 9] after `transform`: [4, 4], from `data.transforms.make_transform`, or an inverse of one."""
    boxes, linear = boxes.copy(), transform[:3, :3]
    boxes[:, :3] = boxes[:, :3] @ linear.T + transform[:3, 3]
    boxes[:, 3:6] *= np.linalg.norm(linear[:, 0])  # the scale
    heading = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], axis=1) @ linear[:2, :2].T
    boxes[:, 6] = np.arctan2(heading[:, 1], heading[:, 0])
    boxes[:, 7:] = boxes[:, 7:] @ linear[:2, :2].T
    return boxes


def boxes_from_global(
    box2global: np.ndarray, sizes: np.ndarray, velocities: np.ndarray, lidar2global: np.ndarray
) -> np.ndarray:
    """nuScenes annotations as boxes [M, 9] float32 in a LiDAR frame.

    box2global:   [M, 4, 4] rigid, from the box's frame: origin at its center, x along l, z up.
    sizes:        [M, 3] w, l, h meters.
    velocities:   [M, 2] m/s, global; NaN, where unknown, becomes 0.
    lidar2global: [M, 4, 4] rigid, from the LiDAR frame that each box is transformed into.
    """
    global2lidar = np.linalg.inv(lidar2global)
    box2lidar = global2lidar @ box2global
    boxes = np.zeros((len(sizes), 9), np.float32)
    boxes[:, :3] = box2lidar[:, :3, 3]
    boxes[:, 3:6] = sizes
    boxes[:, 6] = np.arctan2(box2lidar[:, 1, 0], box2lidar[:, 0, 0])
    boxes[:, 7:] = np.einsum("mij,mj->mi", global2lidar[:, :2, :2], np.nan_to_num(velocities))
    return boxes


def boxes_to_global(boxes: np.ndarray, lidar2global: np.ndarray) -> tuple[np.ndarray, ...]:
    """Boxes [K, 9] of a LiDAR frame in the global frame, in the format of nuScenes results; lidar2global: [4, 4] rigid.

    Returns fp64 arrays: translation [K, 3] meters, size [K, 3] w, l, h meters, rotation [K, 4] unit quaternion
    w, x, y, z, velocity [K, 2] m/s.
    """
    boxes, lidar_rotation = np.asarray(boxes, np.float64), lidar2global[:3, :3]
    if not len(boxes):  # scipy cannot make a `Rotation` of no angles
        return np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 4)), np.zeros((0, 2))
    rotation = Rotation.from_matrix(lidar_rotation) * Rotation.from_euler("z", boxes[:, 6:7])
    translation = boxes[:, :3] @ lidar_rotation.T + lidar2global[:3, 3]
    velocity = boxes[:, 7:] @ lidar_rotation[:2, :2].T  # boxes have no vertical velocity
    return translation, boxes[:, 3:6].copy(), rotation.as_quat()[:, [3, 0, 1, 2]], velocity  # from scipy's x, y, z, w
