"""Augmentation: points, cameras and boxes of a sample move together, so that they still agree."""

from dataclasses import replace

import numpy as np

from unipad.config import Augment


def augmented(sample, rng, cfg: Augment):
    """The sample turned about the LiDAR's vertical axis, scaled, its points in another order; as `cfg` allows.

    rng: `np.random.Generator`, the only source of chance.
    """
    angle = rng.uniform(-cfg.rotation, cfg.rotation)
    scale = rng.uniform(*cfg.scale)
    if cfg.shuffle:
        order = rng.permutation(len(sample.points))
        labels = sample.point_labels
        sample = replace(sample, points=sample.points[order], point_labels=None if labels is None else labels[order])
    return turned_and_scaled(sample, angle, scale)


def turned_and_scaled(sample, angle, scale):
    """The sample in a LiDAR frame whose lengths are `scale` times as long, turned by `angle` radians, x towards y.

    Pixels keep what they show: the projections take the new points to where the old ones were seen. Depths along the
    optical axis stay metres of the camera; distances between camera and points are the new frame's.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    move = np.eye(4)
    move[:3, :3] = scale * turn
    back = np.linalg.inv(move)

    points, boxes = sample.points.copy(), sample.boxes.copy()
    points[:, :3] = points[:, :3] @ move[:3, :3].T
    boxes[:, :3] = boxes[:, :3] @ move[:3, :3].T
    boxes[:, 3:6] *= scale
    boxes[:, 6] = (boxes[:, 6] + angle + np.pi) % (2 * np.pi) - np.pi
    boxes[:, 7:] = boxes[:, 7:] @ move[:2, :2].T
    return replace(
        sample,
        points=points,
        boxes=boxes,
        lidar2image=(sample.lidar2image.astype(np.float64) @ back).astype(np.float32),
        lidar2camera=(sample.lidar2camera.astype(np.float64) @ back).astype(np.float32),
    )
