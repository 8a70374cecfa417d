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


def rig(sample, count):
    """The sample with `count` cameras, repeated if it has fewer; every second image has half the size."""
    views = [k % len(sample.images) for k in range(count)]
    scales = np.stack([np.diag([1 / (1 + k % 2), 1 / (1 + k % 2), 1, 1]) for k in range(count)])
    return replace(
        sample,
        images=[sample.images[v][:: 1 + k % 2, :: 1 + k % 2] for k, v in enumerate(views)],
        lidar2image=np.float32(scales @ sample.lidar2image[views]),
        lidar2camera=sample.lidar2camera[views],
        cameras=tuple(f"EYE_{k}" for k in range(count)),
    )


@pytest.mark.parametrize("count", [1, 5, 6, 8])
def test_pictures_and_reports_have_room_for_any_number_of_cameras(sample, count):
    picture = calibration_view(rig(sample, count), width=160)
    # columns of images 160 pixels wide, to the right of the bird's-eye view, a square of at least 480 x 480 pixels
    columns = min(count, 3 if count < 7 else 4)
    assert picture.dtype == np.uint8 and picture.shape[0] >= 480 and picture.shape[1] > columns * 160
    assert len(report(rig(sample, count)).splitlines()) == count + 2  # a header, the cameras, the number of boxes


def test_a_point_has_its_pixel_and_the_color_of_its_depth(sample):
    """One camera that looks along +y, and three points: 12 m ahead, in the middle of the image's left half; behind the
    camera; and one of an earlier sweep (lag 0.05 s), which the report does not count."""
    lidar2camera = np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], np.float32)
    intrinsics = np.array([[100, 0, 100, 0], [0, 100, 100, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.float32)
    one = replace(
        sample,
        images=[np.zeros((200, 200, 3), np.uint8)],
        lidar2image=(intrinsics @ lidar2camera)[None],
        lidar2camera=lidar2camera[None],
        points=np.array([[-6.0, 12, 0, 1, 0], [0, -12, 0, 1, 0], [0, 12, 0, 1, 0.05]], np.float32),
        boxes=sample.boxes[:0],
        labels=sample.labels[:0],
        cameras=(),
    )
    pixels, depths = calibration._visible(one.points[:, :3].astype(float), one.lidar2image[0], 200, 200)
    np.testing.assert_allclose(pixels[0], [50, 100])
    assert depths.tolist() == [12, 12]  # of the first and the last: `_visible` does not look at lags
    color = 255 * np.array(calibration.DEPTH_COLORS(12 / calibration.FAR)[:3])
    image = calibration_view(one, width=160)[:, 480:620]  # between the bird's-eye view and the color bar
    of_color = np.abs(image - color).max(axis=-1) < 20
    assert 0 < of_color.sum() < 100  # a small dot
    fields = report(one).splitlines()[1].split()  # name, size, position, direction, field of view, points
    assert fields[:5] == ["camera", "0", "200", "x", "200"] and fields[5:8] == ["0.00", "0.00", "0.00"]
    assert fields[8:] == ["0°", "90°", "1"]


def test_the_command_writes_pictures_and_prints_a_report(city, tmp_path, capsys):
    calibration.main(calibration.Args(data_root=city, frames=2, out=tmp_path, width=200))
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 2 and np.asarray(Image.open(pictures[0])).std() > 20
    printed = capsys.readouterr().out
    points = [line.split()[-1] for line in printed.splitlines() if "°" in line]  # in each camera of both frames
    assert len(points) == 2 * 6 and all(int(count) > 0 for count in points)
    words = next(line for line in printed.splitlines() if "boxes" in line).split()  # "3 of 7 boxes have"
    with_points, boxes = words[0], words[2]
    assert 0 < int(with_points) <= int(boxes)


def test_zero_frames_are_refused(city, tmp_path):
    with pytest.raises(UserError, match="--frames"):
        calibration.main(calibration.Args(data_root=city, frames=0, out=tmp_path))
