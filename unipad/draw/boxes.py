"""Pictures of boxes: in bird's-eye view over the LiDAR points, and in the camera images. Ground truth is white,
predictions have the colors of their classes."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from unipad.batch import CAMERAS, CLASSES, Batch
from unipad.boxes import box_corners
from unipad.draw.views import DPI, camera_names, picture_of
from unipad.model.detect import Detections

TITLE_HEIGHT = 24  # pixels above an image
MIN_SIDE = 380  # pixels: smallest side of a bird's-eye view next to camera images
BEV_LIMITS = (-52.0, 52.0)  # meters in x and y that the bird's-eye view shows; objects beyond 50 m are not evaluated
ROWS = (5, 0, 1), (4, 3, 2)  # indices into `CAMERAS`, as mounted: front left, front, front right; back ones below
# Polylines through the corners of `box_corners`, by index, that draw all edges of a box
SKELETON = (0, 1, 2, 3, 0, 4, 5, 6, 7, 4), (1, 5), (2, 6), (3, 7)
NEAR = 0.1  # meters in front of a camera: the plane at which edges are clipped
COLORS = matplotlib.colormaps["tab10"].colors  # of `CLASSES`


def detection_views(batch: Batch, detections: Detections, min_score: float = 0.3, width: int = 520) -> np.ndarray:
    """The batch's first sample in bird's-eye view, and in its cameras if it has any: [H, W, 3] uint8.

    detections: of that sample; those with a score below `min_score` are not drawn.
    width:      of each camera's picture, in pixels.
    """
    batch = batch.keyframe()
    truth = batch.boxes[: batch.box_counts[0]].cpu()
    shown = detections.scores >= min_score
    boxes, labels = detections.boxes[shown].float().cpu(), detections.labels[shown].cpu()
    height, cameras_width = camera_area(batch, width)
    height = max(height, MIN_SIDE) if cameras_width else 640  # pixels; the bird's-eye view is a square
    figure = Figure(figsize=((height + cameras_width) / DPI, height / DPI), dpi=DPI, layout="constrained")
    figure.set_facecolor("0.1")
    widths = [height, cameras_width] if cameras_width else [height]
    bev, *cameras = figure.subfigures(1, len(widths), width_ratios=widths, squeeze=False)[0]
    points = batch.points[: batch.point_counts[0]]
    keyframe_points = points[points[:, 4] == 0, :3].cpu().numpy()  # points of sweeps have a time lag
    _from_above(bev, keyframe_points, truth, boxes, labels)
    for subfigure in cameras:  # one, or none
        for axis, image, lidar2image in camera_axes(subfigure, batch):
            _in_camera(axis, image, lidar2image, truth, boxes, labels)
    return picture_of(figure)


def camera_rows(batch: Batch) -> list[Sequence[int]]:
    """The views of a `Batch.keyframe()` in the rows in which they are drawn: at most two, the second not longer."""
    if batch.cameras == CAMERAS:
        return list(ROWS)
    views = range(batch.images.shape[1])
    half = -(-len(views) // 2)
    return [row for row in (views[:half], views[half:]) if row]


def camera_area(batch: Batch, width: int) -> tuple[float, int]:
    """Height and width in pixels of the pictures of the cameras of a `Batch.keyframe()`, each of them `width` wide;
    (0, 0) without cameras."""
    rows = camera_rows(batch)
    if not rows:
        return 0, 0
    tallest = max(h / w for h, w in batch.image_sizes[0].tolist())
    return len(rows) * (width * tallest + TITLE_HEIGHT), len(rows[0]) * width


def camera_axes(subfigure, batch: Batch, fontsize: float = 12):
    """Yield (axis, image [h, w, 3], lidar2image [4, 4]) for each camera of the batch's first sample.

    subfigure: gets one axis per camera. batch: from `Batch.keyframe()`. fontsize: of the cameras' names, in points.
    """
    rows = camera_rows(batch)
    for axes, row in zip(subfigure.subplots(len(rows), len(rows[0]), squeeze=False), rows, strict=True):
        for axis in axes[len(row) :]:
            axis.set_axis_off()
        for axis, view in zip(axes, row, strict=False):
            H, W = batch.image_sizes[0, view].tolist()
            axis.set_title(camera_names(batch)[view], color="white", fontsize=fontsize)
            image = batch.images[0, view, :, :H, :W].permute(1, 2, 0).cpu().numpy()
            yield axis, image, batch.lidar2image[0, view].cpu().numpy()


def _from_above(subfigure, points, truth, boxes, labels):
    """Boxes over the keyframe's `points` [K, 3], gray by height, in bird's-eye view; in each box a line goes from the
    center to the front."""
    axis = subfigure.subplots()
    axis.set(xlim=BEV_LIMITS, ylim=BEV_LIMITS, xticks=[], yticks=[], aspect="equal", facecolor="black")
    axis.scatter(points[:, 0], points[:, 1], s=0.8, c=points[:, 2], cmap="gray", vmin=-5, vmax=3, linewidths=0)
    axis.plot(0, 0, "w+")
    for these, colors, thick in ((truth, "white", 2.5), (boxes, [COLORS[i] for i in labels], 1.2)):
        corners = box_corners(these)[:, :4, :2]  # x and y of the bottom's corners, the front ones first
        front = corners[:, :2].mean(axis=1, keepdims=True)
        middle = corners.mean(axis=1, keepdims=True)
        outlines = np.concatenate([corners, corners[:, :1]], axis=1)
        axis.add_collection(LineCollection(outlines, colors=colors, linewidths=thick))
        axis.add_collection(LineCollection(np.concatenate([middle, front], axis=1), colors=colors, linewidths=thick))
    names = [*CLASSES, "truth"]
    handles = [Line2D([], [], color=c, label=n) for c, n in zip([*COLORS, "white"], names, strict=True)]
    axis.legend(handles=handles, loc="upper left", fontsize=7, facecolor="0.1", edgecolor="0.1", labelcolor="white")


def _in_camera(axis, image, lidar2image, truth, boxes, labels):
    """One camera's `image` [h, w, 3] with the box edges that are in front of the camera; lidar2image [4, 4]."""
    height, width = image.shape[:2]
    axis.imshow(image)
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
    for these, colors, thick in ((truth, "white", 1.6), (boxes, [COLORS[i] for i in labels], 1.0)):
        lines, box = edges(box_corners(these), lidar2image)
        colors = colors if isinstance(colors, str) else [colors[b] for b in box]
        axis.add_collection(LineCollection(lines, colors=colors, linewidths=thick))


def edges(corners, lidar2image):
    """Pixels [E, 2, 2] of both ends of every edge in front of the camera, clipped at the near plane, and the index [E]
    of its box.

    corners: [K, 8, 3] as `box_corners` gives them. lidar2image: [4, 4] of the camera.
    """
    projected = corners @ lidar2image[:3, :3].T + lidar2image[:3, 3]  # [K, 8, 3] u*d, v*d, d
    pairs = [pair for path in SKELETON for pair in zip(path, path[1:], strict=False)]
    a, b = (projected[:, [pair[end] for pair in pairs]].reshape(-1, 3) for end in (0, 1))  # [K * 12, 3]
    in_front = np.maximum(a[:, 2], b[:, 2]) > NEAR
    box = np.repeat(np.arange(len(corners)), len(pairs))[in_front]
    a, b = a[in_front], b[in_front]
    ends = []
    for end, other in ((a, b), (b, a)):
        step = np.where(other == end, 1, other - end)[:, 2:]  # 1: no division by 0
        t = np.clip((NEAR - end[:, 2:]) / step, 0, 1)  # where the edge, from `end` to `other`, crosses the near plane
        end = np.where(end[:, 2:] < NEAR, end + t * (other - end), end)
        ends.append(end[:, :2] / end[:, 2:])
    return np.stack(ends, axis=1), box
