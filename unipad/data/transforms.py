"""Augmentation: points, cameras and boxes of a sample are transformed together; images change colors.

Order and parameters are those of the original's UnifiedRotScaleTransFlip, PhotoMetricDistortionMultiViewImage and
GridMask, with two differences: images stay uint8, so colors are clipped to 0-255 (the original's floats may go beyond);
the grid of GridMask is random per sample (in the original, the same for all samples of a GPU). Augmentations that are
off draw no random numbers, except for rotation and scale.
"""

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np

from unipad.boxes import transform_boxes
from unipad.config import Augment

# Color of hidden pixels: ImageNet's mean, which the encoder normalizes to 0; the original sets normalized pixels to 0.
HIDDEN_COLOR = np.array([124, 116, 104], np.uint8)


def augment_sample(sample, rng: np.random.Generator, cfg: Augment):
    """The sample rotated about the LiDAR's vertical axis, scaled, shifted and flipped, its points shuffled and its
    images masked by a grid, as `cfg` says. Colors change in `photometric_distortion`.
    """
    angle = rng.uniform(-cfg.rotation, cfg.rotation)
    scale = rng.uniform(*cfg.scale)
    if cfg.shuffle:
        order = rng.permutation(len(sample.points))
        labels = sample.point_labels
        points = sample.points.take(order, axis=0)  # as points[order], in less than half the time
        sample = replace(sample, points=points, point_labels=None if labels is None else labels[order])
    shift = rng.normal(scale=cfg.translation) if any(cfg.translation) else np.zeros(3)
    flip_x = cfg.flip_x > 0 and rng.random() < cfg.flip_x
    flip_y = cfg.flip_y > 0 and rng.random() < cfg.flip_y
    sample = apply_transform(sample, make_transform(angle, scale, shift, flip_x, flip_y))
    if sample.images and cfg.grid_mask > 0 and rng.random() < cfg.grid_mask:
        sample = replace(sample, images=_masked_by_grid(sample.images, rng))
    return sample


def make_transform(
    angle: float = 0.0,
    scale: float = 1.0,
    shift: Sequence[float] = (0.0, 0.0, 0.0),
    flip_x: bool = False,
    flip_y: bool = False,
) -> np.ndarray:
    """[4, 4] old LiDAR frame -> new one: rotate by `angle` radians, x towards y; scale all lengths; shift by meters
    x, y, z; then change the sign of x, y or both; one flip alone makes the frame left-handed.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    transform = np.eye(4)
    transform[:3, :3] = scale * np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    transform[:3, 3] = shift
    return np.diag([-1.0 if flip_x else 1.0, -1.0 if flip_y else 1.0, 1.0, 1.0]) @ transform


def apply_transform(sample, transform: np.ndarray):
    """The sample transformed by `transform`, [4, 4] from `make_transform`.

    Images do not change: the new projections map the new points to the same pixels and the same depths along the
    optical axis, in meters that are not scaled. Lengths in the new LiDAR frame are scaled, also those along rays.
    Occupancy labels do not change either: the new `ego2lidar` leads from them to the new LiDAR frame.
    """
    points, inverse = sample.points.copy(), np.linalg.inv(transform)
    points[:, :3] = points[:, :3] @ transform[:3, :3].T + transform[:3, 3]
    if sample.lidar2source is not None:
        sample = replace(sample, lidar2source=(sample.lidar2source.astype(np.float64) @ inverse).astype(np.float32))
    origins = sample.sweep_origins
    if origins is not None:
        moved = origins[:, :3] @ transform[:3, :3].T + transform[:3, 3]
        origins = np.concatenate([moved, origins[:, 3:]], axis=1, dtype=np.float32)
    return replace(
        sample,
        points=points,
        sweep_origins=origins,
        boxes=transform_boxes(sample.boxes, transform),
        lidar2image=(sample.lidar2image.astype(np.float64) @ inverse).astype(np.float32),
        lidar2camera=(sample.lidar2camera.astype(np.float64) @ inverse).astype(np.float32),
        ego2lidar=None if sample.ego2lidar is None else (transform @ sample.ego2lidar).astype(np.float32),
    )


def photometric_distortion(sample, rng: np.random.Generator):
    """The sample with each image's brightness, contrast, saturation, hue and order of channels changed.

    Each change has probability 1/2 and is drawn per image.
    """
    return replace(sample, images=[_distort(image, rng) for image in sample.images])


def _distort(image, rng):
    """[h, w, 3] uint8 RGB, the original's steps in its order: contrast comes before or after saturation and hue.

    An image without pixels, [h, w, 0], draws the same random numbers."""
    brightness = rng.uniform(-32, 32) if _coin(rng) else 0.0  # of 0-255
    contrast_first = _coin(rng)
    contrast = rng.uniform(0.5, 1.5) if _coin(rng) else 1.0
    saturation = rng.uniform(0.5, 1.5) if _coin(rng) else 1.0
    hue = rng.uniform(-18, 18) if _coin(rng) else 0.0  # degrees
    order = rng.permutation(3) if _coin(rng) else None  # of the channels
    if not image.size:
        return image
    pixels = image.astype(np.float32, order="C")  # OpenCV writes to it below
    pixels += brightness
    if contrast_first:
        pixels *= contrast
    if saturation != 1 or hue != 0:
        hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)  # H in degrees, S in [0, 1], V in 0-255
        if hue != 0:
            turned = hsv[..., 0] + hue
            # the bits of `turned % 360`, but faster; in this order, since -1e-6 + 360 is 360 in fp32, there as well
            turned[turned >= 360] -= 360
            turned[turned < 0] += 360
            hsv[..., 0] = turned
        hsv[..., 1] *= saturation
        pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB, pixels)
    if not contrast_first:
        pixels *= contrast
    image = cv2.add(pixels, 0, dtype=cv2.CV_8U)  # rounds to even and clips, in one pass
    return image if order is None else cv2.merge([image[..., channel] for channel in order])


def _coin(rng):
    return rng.random() < 0.5


def _masked_by_grid(images, rng):
    """The images, [h, w, 3] uint8 each (or without pixels, [h, w, 0]), all masked by the same grid."""
    height = min(_padded(image.shape[0]) for image in images)  # a longer period could hide all of the smallest image
    period = rng.integers(2, height)
    top, left = rng.integers(period, size=2)
    return [_masked(image, _grid_of(image, period, top, left)) if image.size else image for image in images]


def _masked(image, visible):
    """The image, [h, w, 3] uint8, with `HIDDEN_COLOR` where `visible`, [h, w] bool, is False."""
    masked = np.empty(image.shape, np.uint8)  # contiguous, whatever the image's layout
    masked.reshape(len(image), -1)[:] = np.tile(HIDDEN_COLOR, image.shape[1])  # whole rows, faster than pixels
    return cv2.copyTo(image, visible.astype(np.uint8), masked)


def _grid_of(image, period, top, left):
    """[h, w] bool: the grid of the padded image, cropped to the image."""
    h, w = image.shape[:2]
    return grid_mask(_padded(h), _padded(w), period, top, left)[:h, :w]


def _padded(length):
    """Height or width as a batch pads it: to a multiple of 32."""
    return -(-length // 32) * 32


def grid_mask(height: int, width: int, period: int, top: int, left: int) -> np.ndarray:
    """[height, width] bool, True = visible: rows and columns of bars, half as wide as the `period`; the squares between
    them are hidden.

    The grid covers an area 1.5 times as high and wide as the image, which lies in its middle; the first bars start
    `top` and `left` pixels from the area's corner. As in the original, there are only as many bars in each direction as
    whole periods fit into the area, even if one more would start in it.
    """
    bar = min(max(int(period * 0.5 + 0.5), 1), period - 1)
    rows, columns = _bars(height, period, top, bar), _bars(width, period, left, bar)
    return rows[:, None] | columns[None, :]


def _bars(length, period, first, bar):
    """[length] bool, True on a bar: bars `bar` pixels wide, the first one `first` pixels from the start of the area."""
    area = int(1.5 * length)
    # which bar each pixel follows or lies on, and how many pixels from the bar's start
    index, offset = np.divmod(np.arange(length) + (area - length) // 2 - first, period)
    return (offset < bar) & (index >= 0) & (index < area // period)
