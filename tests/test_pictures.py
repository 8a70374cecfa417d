"""What judges and shows the renderings: depth errors by hand, LiDAR points on a canvas, a damaged frame in a run."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from tests.test_train import train
from unipad.draw import _onto_views
from unipad.evaluate import _depth_sums


def test_depth_sums_by_hand():
    """One ray exact, one 50 % too far, one without truth."""
    depth, truth = torch.tensor([4.0, 6.0, 9.0]), torch.tensor([4.0, 4.0, -1.0])
    abs_rel, squared, close, count = _depth_sums(depth, truth).tolist()
    assert (abs_rel, squared, close, count) == pytest.approx((0.5, 4.0, 1, 2))


def test_the_nearer_of_two_lidar_points_is_drawn_on_top():
    pinhole = torch.tensor([[10.0, 0, 8, 0], [0, 10, 6, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    batch = SimpleNamespace(
        lidar2image=pinhole.expand(1, 1, 4, 4),
        lidar2camera=torch.eye(4).expand(1, 1, 4, 4),
        image_sizes=torch.tensor([[[12, 16]]]),
    )
    points = torch.tensor([[0.0, 0, 5], [0, 0, 9], [0, 0, -3]])  # two ahead of the camera, one behind it
    canvas = _onto_views(batch, points)
    assert canvas[0, 6, 8] == 5
    assert canvas.isfinite().sum() == 9  # three pixels wide, nothing of the point behind


def test_a_damaged_frame_is_skipped_and_named_in_a_run(city, tmp_path):
    root = shutil.copytree(city, tmp_path / "city")
    broken = sorted(root.glob("samples/LIDAR_TOP/*.pcd.bin"))[0]
    broken.write_bytes(broken.read_bytes()[:-7])
    missing = sorted(root.glob("samples/CAM_BACK/*.jpg"))[1]
    missing.unlink()
    done = train("--data-root", root, "--preset", "tiny", "--steps", 4, "--out", tmp_path / "run", cwd=tmp_path)
    named = [file.name for file in (broken, missing) if f"skipped {file}" in done.stderr]
    assert named, done.stderr
