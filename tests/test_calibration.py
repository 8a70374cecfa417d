"""Calibration pictures: which points are drawn where, for rigs with any number of cameras."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from unipad.config import Data
from unipad.data.nuscenes import NuScenesDataset
from unipad.draw import calibration
from unipad.draw.calibration import calibration_view, report
from unipad.errors import UserError

pytestmark = pytest.mark.usefixtures("own_user_cache")


@pytest.fixture(scope="module")
def sample(city):
    return NuScenesDataset(city, "v1.0-mini", "mini_val", Data())[0]


def rig(sample, cameras):
    """The sample with another number of cameras; every second image has half the size."""
    views = [k % len(sample.images) for k in range(cameras)]
    scales = np.stack([np.diag([1 / (1 + k % 2), 1 / (1 + k % 2), 1, 1]) for k in range(cameras)])
    return replace(
        sample,
        images=[sample.images[v][:: 1 + k % 2, :: 1 + k % 2] for k, v in enumerate(views)],
        lidar2image=np.float32(scales @ sample.lidar2image[views]),
        lidar2camera=sample.lidar2camera[views],
        cameras=tuple(f"EYE_{k}" for k in range(cameras)),
    )


@pytest.mark.parametrize("cameras", [1, 5, 6, 8])
def test_any_number_of_cameras_is_drawn(sample, cameras):
    picture = calibration_view(rig(sample, cameras), width=160)
    columns = min(cameras, 3 if cameras < 7 else 4)  # of images, each 160 pixels wide
    assert picture.dtype == np.uint8 and picture.shape[0] >= 480 and picture.shape[1] > columns * 160
    assert len(report(rig(sample, cameras)).splitlines()) == cameras + 2


def test_a_point_is_drawn_at_its_pixel_in_the_color_of_its_depth(sample):
    """One camera that looks along +y, and a point at depth 12 m that projects to the middle of its left half."""
    ahead = np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], np.float32)
    pixels = np.array([[100, 0, 100, 0], [0, 100, 100, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.float32)
    one = replace(
        sample,
        images=[np.zeros((200, 200, 3), np.uint8)],
        lidar2image=(pixels @ ahead)[None],
        lidar2camera=ahead[None],
        points=np.array([[-6.0, 12, 0, 1, 0], [0, -12, 0, 1, 0], [0, 12, 0, 1, 0.05]], np.float32),
        boxes=sample.boxes[:0],
        labels=sample.labels[:0],
        cameras=(),
    )
    pixel, depth = calibration._visible(one.points[:, :3].astype(float), one.lidar2image[0], 200, 200)
    np.testing.assert_allclose(pixel[0], [50, 100])
    assert depth.tolist() == [12, 12]  # the point behind the camera is not visible
    color = 255 * np.array(calibration.DEPTH_COLORS(12 / calibration.FAR)[:3])
    near = np.abs(calibration_view(one, width=160)[:, 480:620] - color).max(axis=-1) < 20  # left of the color bar
    assert 0 < near.sum() < 100
    first = report(one).splitlines()[1].split()  # name, size, position, direction, field of view, points
    assert first[:5] == ["camera", "0", "200", "x", "200"] and first[5:8] == ["0.00", "0.00", "0.00"]
    assert first[8:] == ["0°", "90°", "1"]  # points of earlier sweeps are not counted


def test_the_command_writes_pictures_and_prints_a_report(city, tmp_path, capsys):
    calibration.main(calibration.Args(data_root=city, frames=2, out=tmp_path, width=200))
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 2 and np.asarray(Image.open(pictures[0])).std() > 20
    printed = capsys.readouterr().out
    counts = [line.split()[-1] for line in printed.splitlines() if "°" in line]
    assert len(counts) == 12 and all(int(count) > 0 for count in counts)
    inside, boxes = next(line for line in printed.splitlines() if "boxes" in line).split()[:3:2]
    assert 0 < int(inside) <= int(boxes)


def test_zero_frames_are_refused(city, tmp_path):
    with pytest.raises(UserError, match="--frames"):
        calibration.main(calibration.Args(data_root=city, frames=0, out=tmp_path))
