"""Pictures of the classes of LiDAR points: in bird's-eye view, and over the camera images; ground truth on top."""

from collections.abc import Callable

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from unipad.batch import LIDARSEG_CLASSES, Batch
from unipad.draw.boxes import MIN_SIDE, NEAR, camera_area, camera_axes
from unipad.draw.views import DPI, picture_of

BEV_LIMITS = (-40.0, 40.0)  # meters in x and y that the bird's-eye view shows
LEGEND_HEIGHT = 70  # pixels
# Classes 0 (no label) to 16. Based on the devkit's colors, whose vehicles, all shades of orange, are hard to tell apart
COLORS = (
    np.array(
        [
            (70, 70, 70), (150, 160, 175), (220, 20, 60), (255, 80, 40), (255, 225, 0), (140, 86, 255), (255, 61, 160),
            (60, 110, 255), (0, 255, 255), (255, 180, 200), (165, 95, 45), (0, 150, 136), (175, 0, 75), (150, 60, 150),
            (130, 200, 70), (222, 184, 135), (0, 140, 0),
        ]
    )
    / 255
)  # fmt: skip


def segment_views(batch: Batch, predicted: torch.Tensor, width: int = 300) -> np.ndarray:
    """The batch's first sample in bird's-eye view, and in its cameras if it has any: [H, W, 3] uint8.

    predicted: [K] classes of the keyframe's points, from `Segmenter.segment`.
    width:     of each camera's picture, in pixels.

    Points without a label are gray, in the ground truth and in the predictions. A batch without labels shows only the
    predictions.
    """
    batch = batch.keyframe()
    points = batch.points[: batch.point_counts[0]]
    is_keyframe = points[:, 4] == 0  # points of sweeps have a time lag
    points, predicted = points[is_keyframe, :3].cpu().numpy(), predicted.cpu().numpy()
    rows = {"predicted": predicted}
    if batch.point_labels is not None:
        truth = batch.point_labels[: batch.point_counts[0]][is_keyframe].cpu().numpy()
        rows = {"true": truth, "predicted": np.where(truth > 0, predicted, 0)}

    def from_above(axis, classes, name):
        _from_above(axis, points, classes, name)

    def in_camera(axis, image, lidar2image, classes):
        _in_camera(axis, image, lidar2image, points, classes)

    return rows_of_views(batch, rows, from_above, in_camera, width)


def rows_of_views(batch: Batch, rows: dict, from_above: Callable, in_camera: Callable, width: int) -> np.ndarray:
    """A picture [H, W, 3] uint8 of `rows`, name -> classes to draw: each in bird's-eye view and in the cameras, if any;
    with a legend of the colors below.

    batch:      from `Batch.keyframe()`. width: of each camera's picture, in pixels.
    from_above: draws the left view: called with an axis, the classes and the name.
    in_camera:  draws a camera: called with an axis, its image [h, w, 3], its lidar2image [4, 4] and the classes.
    """
    height, cameras_width = camera_area(batch, width)  # pixels, in each of `rows`
    height = max(height, MIN_SIDE) if cameras_width else 2 * width  # the bird's-eye view is a square
    size = height + cameras_width, len(rows) * height + LEGEND_HEIGHT
    figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.01, h_pad=0.04, wspace=0, hspace=0)
    figure.set_facecolor("0.1")
    *row_figures, foot = figure.subfigures(len(rows) + 1, 1, height_ratios=[height] * len(rows) + [LEGEND_HEIGHT])
    for row_figure, (name, classes) in zip(row_figures, rows.items(), strict=True):
        widths = [height, cameras_width] if cameras_width else [height]
        bev, *cameras = row_figure.subfigures(1, len(widths), width_ratios=widths, squeeze=False)[0]
        from_above(bev.subplots(), classes, name)
        for subfigure in cameras:  # one, or none
            for axis, image, lidar2image in camera_axes(subfigure, batch, fontsize=8):
                in_camera(axis, image, lidar2image, classes)
    handles = [
        Line2D([], [], color=color, label=label, marker="o", linestyle="")
        for color, label in zip(COLORS[1:], LIDARSEG_CLASSES, strict=True)
    ]
    colors = dict(facecolor="0.1", edgecolor="0.1", labelcolor="white")
    foot.legend(handles=handles, loc="center", ncols=8, fontsize=8, **colors)
    return picture_of(figure)


def _from_above(axis, points, classes, name):
    """Bird's-eye view of points [K, 3] in the colors of their `classes` [K], with the `name` of the row."""
    axis.set(xlim=BEV_LIMITS, ylim=BEV_LIMITS, xticks=[], yticks=[], aspect="equal", facecolor="black")
    order = np.argsort(points[:, 2], kind="stable")  # higher points hide lower ones
    axis.scatter(points[order, 0], points[order, 1], s=4, c=COLORS[classes[order]], linewidths=0)
    axis.plot(0, 0, "w+")
    axis.spines[:].set_color("0.4")
    axis.text(0.02, 0.96, name, color="white", transform=axis.transAxes, va="top")


def _in_camera(axis, image, lidar2image, points, classes):
    """One camera's `image` [h, w, 3], darkened, with the points in front of it, nearest on top; lidar2image [4, 4]."""
    height, width = image.shape[:2]
    axis.imshow(image * 0.4)
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
    projected = points @ lidar2image[:3, :3].T + lidar2image[:3, 3]  # [K, 3] u*d, v*d, d
    visible = np.flatnonzero(projected[:, 2] > NEAR)
    visible = visible[np.argsort(-projected[visible, 2], kind="stable")]
    u, v = (projected[visible, :2] / projected[visible, 2:]).T
    axis.scatter(u, v, s=10, c=COLORS[classes[visible]], linewidths=0)
