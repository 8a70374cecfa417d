"""Check the calibration of a dataset: LiDAR points and annotated boxes over its images, without a model.

    python -m unipad.draw.calibration --data-root /data/nuscenes --version v1.0-trainval --frames 3 --out calibration

In every camera, points must change color at the outlines of objects, and boxes must enclose their objects.
docs/data.md lists more signs of wrong calibration. Without --data-root, a synthetic city is drawn.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from unipad.boxes import box_corners, points_in_boxes
from unipad.config import Data
from unipad.data.dataset import DEFAULT_DATASET, BadFrame, Sample, dataset_class
from unipad.draw.boxes import BEV_LIMITS, COLORS, TITLE_HEIGHT, edges
from unipad.draw.views import DPI, FAR, picture_of
from unipad.errors import UserError, check_ranges
from unipad.exit import exit_on_user_error

VIEW_LINE = 15.0  # meters: length of the lines that bound a camera's field of view
DEPTH_COLORS = matplotlib.colormaps["turbo_r"]


@dataclass(frozen=True)
class Args:
    data_root: Path | None = None  # folder of the dataset; None: a synthetic city
    version: str | None = None  # version of the dataset; None: its default
    dataset: str = DEFAULT_DATASET  # package.module:Class of another dataset; see unipad/data/dataset.py
    split: str = "train"  # train, val or test; for v1.0-mini, train and val mean mini_train and mini_val
    frames: int = 3  # frames to draw, spread over the split
    out: Path = Path("calibration")  # folder of the pictures, whose files are overwritten
    width: int = 640  # width of each camera's picture, in pixels


def calibration_view(sample: Sample, width: int = 640) -> np.ndarray:
    """A sample from above and in each of its cameras, with LiDAR points and annotated boxes: [H, W, 3] uint8.

    From above, points have gray levels by height and every camera has two lines that bound its field of view. In the
    cameras, points have colors by depth. Boxes have the colors of their classes.
    width: of each camera's picture, in pixels.
    """
    points = sample.points[sample.points[:, 4] == 0, :3].astype(np.float64)  # of the keyframe, not of sweeps
    corners = box_corners(sample.boxes)
    colors = [COLORS[label] for label in sample.labels]
    cameras = len(sample.images)
    columns = min(cameras, 3 if cameras < 7 else 4)
    rows = -(-cameras // columns)
    tallest = max(image.shape[0] / image.shape[1] for image in sample.images)
    height = max(rows * (width * tallest + TITLE_HEIGHT), 480)  # pixels; the view from above is a square
    figure = Figure(figsize=((height + columns * width) / DPI, height / DPI), dpi=DPI, layout="constrained")
    figure.set_facecolor("0.1")
    left, right = figure.subfigures(1, 2, width_ratios=[height, columns * width])
    _from_above(left.subplots(), sample, points, corners, colors)
    axes = right.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[cameras:]:
        axis.set_axis_off()  # stays empty
    views = zip(axes.flat, sample.images, sample.lidar2image, _names(sample), strict=False)
    for axis, image, lidar2image, name in views:
        h, w = image.shape[:2]
        pixels, depth = _visible(points, lidar2image, h, w)
        lines, box = edges(corners, lidar2image.astype(np.float64))
        axis.imshow(image, interpolation="antialiased")
        axis.scatter(*pixels.T, c=depth, s=6, cmap=DEPTH_COLORS, vmin=0, vmax=FAR, linewidths=0)
        axis.add_collection(LineCollection(lines, colors=[colors[b] for b in box], linewidths=1.2))
        axis.set(xlim=(-0.5, w - 0.5), ylim=(h - 0.5, -0.5), xticks=[], yticks=[])
        axis.set_title(f"{name}, {w} x {h}", color="white")
    bar = right.colorbar(ScalarMappable(Normalize(0, FAR), DEPTH_COLORS), ax=axes, fraction=0.02, pad=0.01)
    bar.set_label("meters along the optical axis", color="white")
    bar.ax.tick_params(colors="white")
    return picture_of(figure)


def report(sample: Sample) -> str:
    """What a sample's calibration says, as a table: position, viewing direction ("looks", clockwise from ahead) and
    horizontal field of view ("sees") of each camera, the number of LiDAR points in its image, and how many boxes have
    LiDAR points inside."""
    points = sample.points[sample.points[:, 4] == 0, :3].astype(np.float64)
    lines = [f"{'camera':<18}{'pixels':>12}{'x, y, z meters':>24}{'looks':>8}{'sees':>8}{'points':>9}"]
    for name, image, lidar2image, lidar2camera in zip(
        _names(sample), sample.images, sample.lidar2image, sample.lidar2camera, strict=True
    ):
        h, w = image.shape[:2]
        center, (left, right) = _field_of_view(lidar2image, lidar2camera, h, w)
        directions = np.stack([left, right, lidar2camera[2, :3]])  # the last one is the optical axis
        azimuths = np.degrees(np.arctan2(*directions[:, :2].T))  # atan2(x, y): clockwise from ahead
        azimuths = np.round(azimuths) + 0.0  # + 0.0: no -0
        visible = len(_visible(points, lidar2image, h, w)[0])
        position = " ".join(f"{v:7.2f}" for v in np.round(center, 2) + 0.0)
        angle = (azimuths[1] - azimuths[0]) % 360
        lines.append(f"{name:<18}{f'{w} x {h}':>12}{position:>24}{azimuths[2]:>7.0f}°{angle:>7.0f}°{visible:>9}")
    filled = points_in_boxes(points, sample.boxes).any(axis=1).sum()
    return "\n".join([*lines, f"{filled} of {len(sample.boxes)} boxes have LiDAR points inside"])


def _names(sample):
    return sample.cameras or [f"camera {i}" for i in range(len(sample.images))]


def _visible(points, lidar2image, height, width):
    """Pixels [K, 2] and depths [K], along the optical axis, of those points that lie in the image."""
    projected = points @ lidar2image[:3, :3].T + lidar2image[:3, 3]
    projected = projected[projected[:, 2] > 0]
    pixels = projected[:, :2] / projected[:, 2:]
    inside = ((pixels >= 0) & (pixels < [width, height])).all(axis=1)
    return pixels[inside], projected[inside, 2]


def _field_of_view(lidar2image, lidar2camera, height, width):
    """In the LiDAR frame: center [3] of a camera, and unit directions [2, 3] through the middle of the left and of the
    right edge of its image."""
    borders = np.array([[0, height / 2, 1], [width, height / 2, 1]])
    directions = borders @ np.linalg.inv(lidar2image[:3, :3].astype(np.float64)).T
    return np.linalg.inv(lidar2camera)[:3, 3], directions / np.linalg.norm(directions, axis=1, keepdims=True)


def _from_above(axis, sample, points, corners, colors):
    """Bird's-eye view of points [K, 3], boxes [M, 8, 3] in `colors` and the fields of view of the cameras."""
    axis.set(xlim=BEV_LIMITS, ylim=BEV_LIMITS, xticks=[], yticks=[], aspect="equal", facecolor="black")
    axis.scatter(points[:, 0], points[:, 1], s=1.5, c=points[:, 2], cmap="gray", vmin=-5, vmax=3, linewidths=0)
    outlines = np.concatenate([corners[:, :4, :2], corners[:, :1, :2]], axis=1)
    fronts = np.stack([corners[:, :4, :2].mean(axis=1), corners[:, :2, :2].mean(axis=1)], axis=1)
    for lines in (outlines, fronts):
        axis.add_collection(LineCollection(lines, colors=colors, linewidths=1.2))
    for name, image, lidar2image, lidar2camera in zip(
        _names(sample), sample.images, sample.lidar2image, sample.lidar2camera, strict=True
    ):
        center, directions = _field_of_view(lidar2image, lidar2camera, *image.shape[:2])
        left, right = center + VIEW_LINE * directions
        axis.plot(*np.stack([left, center, right])[:, :2].T, color="white", linewidth=0.8)
        label = center + 1.4 * VIEW_LINE * lidar2camera[2, :3]  # on the optical axis, beyond the lines
        axis.text(*label[:2], name, color="white", fontsize=8, ha="center", va="center", clip_on=True)
    axis.set_title("from above: x to the right, y (ahead) up", color="white")


def main(args: Args):
    check_ranges(args, ("frames", "width"))
    dataset_type = dataset_class(args.dataset)
    version, data = args.version or dataset_type.default_version, Data()
    root = Path(os.path.expanduser(args.data_root or dataset_type.default_root(data)))
    split = dataset_type.splits(root, version).get(args.split, args.split)
    dataset = dataset_type(root, version, split, data)
    args.out.mkdir(parents=True, exist_ok=True)
    count = min(args.frames, len(dataset))
    drawn = 0
    for index in (i * len(dataset) // count for i in range(count)):
        try:
            sample = dataset[index]
        except BadFrame as bad:
            print(f"skipped {bad}")
            continue
        if not sample.images:
            raise UserError(f"{root} has no images: there is no camera to check.")
        number = dataset.frames[index]  # in the split; the dataset may have left out frames
        file = args.out / f"frame_{number:05d}.png"
        Image.fromarray(calibration_view(sample, args.width)).save(file)
        print(f"{file}, {sample.token}\n{report(sample)}")
        drawn += 1
    if not drawn:
        raise UserError(f"none of {count} frames of {split} can be read; the files at fault are named above.")


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(Args, description=__doc__))
