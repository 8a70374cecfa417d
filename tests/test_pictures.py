"""Depth errors; pictures of boxes, points and their classes; a run with damaged frames."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.test_train import run_train
from unipad.batch import CLASSES
from unipad.boxes import box_corners
from unipad.config import Data
from unipad.data.loader import held_out_batches
from unipad.data.nuscenes import NuScenesDataset
from unipad.draw.boxes import COLORS, detection_views, edges
from unipad.draw.segments import COLORS as SEGMENT_COLORS
from unipad.draw.segments import segment_views
from unipad.draw.views import onto_views
from unipad.evaluate.rendering import depth_sums
from unipad.model.detect import Detections


def test_depth_sums_by_hand():
    """Sums over three rays: one exact, one 50 % too far, and one without ground truth, which does not count."""
    rendered, measured = torch.tensor([4.0, 6.0, 9.0]), torch.tensor([4.0, 4.0, -1.0])
    abs_rel, squared, within_factor, count = depth_sums(rendered, measured).tolist()
    assert (abs_rel, squared, within_factor, count) == pytest.approx((0.5, 4.0, 1, 2))


def test_points_have_the_colors_of_their_classes():
    """Cars (class 4) on the right, buses (3) predicted as trucks (10) on the left; the last point has no label."""
    points = torch.zeros(201, 5)
    points[:, 0], points[:, 1] = 20.0, torch.arange(201) * 0.1 - 10
    points[100:200, 0] = -20.0
    labels = torch.tensor([4] * 100 + [3] * 100 + [0], dtype=torch.uint8)
    batch = SimpleNamespace(
        points=points,
        point_counts=torch.tensor([201]),
        point_labels=labels,
        images=torch.zeros(1, 0, 3, 32, 32),
        cameras=(),
    )
    batch.keyframe = lambda: batch
    predicted = torch.where(labels == 3, 10, 4).byte()
    picture = segment_views(batch, predicted)
    # two views of 600 pixels above a legend of 70: a view has 47 % of the height
    ground_truth, prediction = np.split(picture[: 2 * (len(picture) * 47 // 100)], 2)
    for label, view, on_the_left in ((4, ground_truth, False), (3, ground_truth, True), (10, prediction, True)):
        has_color = np.abs(view.astype(int) - 255 * SEGMENT_COLORS[label]).max(axis=-1) < 3
        columns = np.flatnonzero(has_color.any(axis=0))
        assert has_color.sum() > 50 and (columns < picture.shape[1] / 2).all() == on_the_left, label
    batch.point_labels = None  # one view less: 670 of 1270 pixels
    assert len(segment_views(batch, predicted)) < 0.7 * len(picture)


def test_the_nearer_of_two_lidar_points_is_drawn_on_top():
    pinhole = torch.tensor([[10.0, 0, 8, 0], [0, 10, 6, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    batch = SimpleNamespace(
        lidar2image=pinhole.expand(1, 1, 4, 4),
        lidar2camera=torch.eye(4).expand(1, 1, 4, 4),
        image_sizes=torch.tensor([[[12, 16]]]),
    )
    points = torch.tensor([[0.0, 0, 5], [0, 0, 9], [0, 0, -3]])  # two in front of the camera, one behind it
    canvas = onto_views(batch, points)
    assert canvas[0, 6, 8] == 5
    assert canvas.isfinite().sum() == 9  # 3 x 3 pixels; the point behind is not drawn
    right = torch.tensor([[0.9, 0, 9]])  # one pixel to the right of the near point, which hides two of its columns
    assert (onto_views(batch, torch.cat([points, right]))[0, 5:8, 7:10] == 5).all()


def test_edges_of_a_box_around_the_camera_end_in_front_of_it():
    """A pinhole camera at the origin that looks along y, with principal point (8, 6) and a focal length of 10 pixels,
    is in a box 2 m wide and high from y = -1 to y = 4."""
    pinhole = torch.tensor([[10.0, 8, 0, 0], [0, 6, -10, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    box = torch.tensor([[0, 1.5, 0, 2, 5, 2, torch.pi / 2, 0, 0]])
    lines, owner = edges(box_corners(box), pinhole.numpy())
    assert len(lines) == 8 and (owner == 0).all()  # the four edges of the rear face are behind the camera
    front = lines[(abs(lines - [8, 6]) < 3).all(axis=(1, 2))]
    assert len(front) == 4
    assert abs(front - [8, 6]) == pytest.approx(2.5, abs=1e-4)  # pixels: 10 * 1 m / 4 m
    long = lines[(abs(lines - [8, 6]) > 3).any(axis=(1, 2))]
    assert abs(long - [8, 6]).max(axis=1) == pytest.approx(100, rel=1e-3)  # 10 * 1 m / 0.1 m, where edges are clipped


@pytest.mark.parametrize("cameras", [True, False], ids=["cameras", "LiDAR only"])
def test_detections_are_drawn_in_the_colors_of_their_classes(cameras, city):
    """Unless their score is below `min_score`, which is 0.3 by default."""
    dataset = NuScenesDataset(city, "v1.0-mini", "mini_val", Data(cameras=cameras))
    _, batch = next(held_out_batches(dataset, 1))
    batch = batch.to("cpu")
    scores = torch.full((len(batch.boxes),), 0.2)
    without = detection_views(batch, Detections(batch.boxes, scores, batch.labels))
    with_boxes = detection_views(batch, Detections(batch.boxes, scores, batch.labels), min_score=0.1)
    assert without.dtype == np.uint8 and without.shape == with_boxes.shape
    assert without.shape[1] > (2000 if cameras else 600)  # pixels: the bird's-eye view, and three columns of cameras
    names = {CLASSES[label] for label in batch.labels.tolist()}
    for name, color in zip(CLASSES, COLORS, strict=True):
        # number of pixels of this color below row 100; the legend and other objects may have some in both pictures
        count, count_without = (
            (abs(image.astype(int) - np.round(255 * np.array(color))) < 8).all(axis=2)[100:].sum()
            for image in (with_boxes, without)
        )
        assert (count > count_without + 5) == (name in names), name


def test_a_run_skips_a_damaged_frame_and_one_with_a_missing_file_and_names_them(city, tmp_path):
    """A truncated LiDAR file and a missing image, both of mini_train: its files are the first when sorted by name."""
    root = shutil.copytree(city, tmp_path / "city")
    broken = sorted(root.glob("samples/LIDAR_TOP/*.pcd.bin"))[0]
    broken.write_bytes(broken.read_bytes()[:-7])
    missing = sorted(root.glob("samples/CAM_BACK/*.jpg"))[1]
    missing.unlink()
    done = run_train("--data-root", root, "--preset", "tiny", "--steps", 4, "--out", tmp_path / "run", cwd=tmp_path)
    assert f"skipped {broken}: is truncated" in done.stderr, done.stderr
    assert f"missing: {missing.relative_to(root)}" in done.stderr, done.stderr
