"""Data augmentation: points, cameras and boxes stay consistent; image augmentations match the original.

Also batches without images.

Columns of boxes: x, y, z, w, l, h, yaw, vx, vy. Columns of points: x, y, z, intensity, time lag.
"""

import colorsys
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.golden import load
from tests.original_boxes import boxes_from_original, boxes_to_original
from unipad.batch import CAMERAS
from unipad.boxes import points_in_boxes
from unipad.config import Augment, CameraConfig, Data
from unipad.data.collate import collate
from unipad.data.nuscenes import NuScenesDataset
from unipad.data.transforms import (
    HIDDEN_COLOR,
    apply_transform,
    augment_sample,
    grid_mask,
    make_transform,
    photometric_distortion,
)
from unipad.model.camera import CameraEncoder
from unipad.model.rays import cast_rays, project_points

# Those with one flip are from a right-handed frame to a left-handed one
TRANSFORMS = {
    "rotated and scaled": make_transform(angle=0.3, scale=1.05),
    "shifted": make_transform(shift=(0.7, -0.4, 0.2)),
    "left and right swapped": make_transform(flip_x=True),
    "front and back swapped": make_transform(flip_y=True),
    "all": make_transform(angle=-0.7, scale=0.9, shift=(-0.3, 0.5, 0.4), flip_x=True, flip_y=True),
    "all but flip_x": make_transform(angle=0.7, scale=1.1, shift=(-0.3, 0.5, 0.4), flip_y=True),
}
every_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())


@pytest.fixture(scope="module")
def sample(city):
    return NuScenesDataset(city, "v1.0-mini", "mini_val", Data(sweeps=2))[0]


def test_a_rotation_by_90_degrees_and_scaling_by_2_by_hand(sample):
    rotated = apply_transform(sample, make_transform(angle=np.pi / 2, scale=2.0))
    x, y, z = sample.points[:, :3].T
    np.testing.assert_allclose(rotated.points[:, :3], np.stack([-2 * y, 2 * x, 2 * z], axis=1), rtol=1e-6, atol=1e-5)
    assert (rotated.points[:, 3:] == sample.points[:, 3:]).all()
    before, after = sample.boxes, rotated.boxes
    np.testing.assert_allclose(after[:, :2], 2 * np.stack([-before[:, 1], before[:, 0]], axis=1), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(after[:, 3:6], 2 * before[:, 3:6], rtol=1e-6)
    # yaw, as a point on the unit circle: 2 pi make no difference
    np.testing.assert_allclose(np.exp(1j * after[:, 6]), 1j * np.exp(1j * before[:, 6]), atol=1e-5)
    np.testing.assert_allclose(after[:, 7:], 2 * np.stack([-before[:, 8], before[:, 7]], axis=1), rtol=1e-5, atol=1e-5)
    assert (np.abs(after[:, 6]) <= np.pi + 1e-6).all()


@every_transform
def test_origins_of_sweeps_move_with_the_points(sample, transform):
    """A point at the origin of each sweep ends where the sweep's origin does; times do not change."""
    sample = replace(sample, sweep_origins=np.float32([[0, 0, 0, 0], [0.1, -3.0, 0.02, 0.05]]))
    at_origins = np.insert(sample.sweep_origins, 3, 9.0, axis=1)  # with an intensity
    after = apply_transform(replace(sample, points=at_origins), transform)
    np.testing.assert_array_equal(after.sweep_origins, np.delete(after.points, 3, axis=1))
    assert after.sweep_origins.dtype == np.float32 and after.sweep_origins[1, 3] == np.float32(0.05)


def test_flips_by_hand(sample):
    """As in the original, with its yaw' = -yaw - pi / 2: flip_x negates x, vx and yaw'; flip_y negates y and vy, and
    yaw' becomes pi - yaw'."""
    x, y, z, w, l, h, yaw, vx, vy = boxes_to_original(torch.from_numpy(sample.boxes)).T
    flipped = {
        "x": torch.stack([-x, y, z, w, l, h, -yaw, -vx, vy], dim=1),
        "y": torch.stack([x, -y, z, w, l, h, np.pi - yaw, vx, -vy], dim=1),
    }
    for axis, boxes in flipped.items():
        after = apply_transform(sample, make_transform(**{f"flip_{axis}": True}))
        expected = boxes_from_original(boxes)
        torch.testing.assert_close(torch.from_numpy(after.boxes[:, :6]), expected[:, :6])
        torch.testing.assert_close(torch.from_numpy(after.boxes[:, 7:]), expected[:, 7:])
        np.testing.assert_allclose(np.exp(1j * after.boxes[:, 6]), np.exp(1j * expected[:, 6].numpy()), atol=1e-5)
        sign = np.where(np.arange(3) == "xyz".index(axis), -1, 1)
        np.testing.assert_array_equal(after.points[:, :3], sample.points[:, :3] * sign)


def test_transforms_are_in_the_originals_order():
    """Rotate, scale, shift, flip: (1, 0) -> (0, 1) -> (0, 2) -> (10, 22) -> (-10, 22)."""
    after = make_transform(np.pi / 2, 2.0, (10, 20, 30), flip_x=True) @ [1, 0, 0, 1]
    np.testing.assert_allclose(after, [-10, 22, 30, 1], atol=1e-12)


@every_transform
def test_points_stay_in_their_boxes(sample, transform):
    """Points inside a box 1 % smaller stay inside; points outside a box 1 % larger do not get inside."""
    after = apply_transform(sample, transform)
    grown = sample.boxes * np.float32([1, 1, 1, 1.01, 1.01, 1.01, 1, 1, 1])
    shrunk = sample.boxes * np.float32([1, 1, 1, 0.99, 0.99, 0.99, 1, 1, 1])
    inside = points_in_boxes(after.points, after.boxes)
    surely, at_most = points_in_boxes(sample.points, shrunk), points_in_boxes(sample.points, grown)
    assert surely.sum() > 100 and len(after.boxes)
    assert inside[surely].all() and at_most[inside].all()


@every_transform
def test_headings_and_velocities_are_transformed_as_points_are(sample, transform):
    """The center of a box's front, and its center a second later, are transformed like points."""
    boxes, after = sample.boxes.astype(float), apply_transform(sample, transform).boxes.astype(float)
    assert (np.hypot(*boxes[:, 7:].T) > 1).any()

    def front_and_next_center(b):
        heading = np.stack([np.cos(b[:, 6]), np.sin(b[:, 6])], axis=1)
        return b[:, :2] + heading * b[:, 4:5] / 2, b[:, :2] + b[:, 7:]

    for before, transformed in zip(front_and_next_center(boxes), front_and_next_center(after), strict=True):
        expected = np.c_[before, boxes[:, 2], np.ones(len(boxes))] @ transform.T
        np.testing.assert_allclose(transformed, expected[:, :2], atol=1e-3)
    assert (np.abs(after[:, 6]) <= np.pi + 1e-6).all()


@every_transform
def test_points_keep_their_pixels(sample, transform):
    projections = []
    for s in (sample, apply_transform(sample, transform)):
        batch = collate([s])
        pixels, visible = project_points(batch.points[:, :3], batch.lidar2image[0], batch.image_sizes[0])
        projections.append((pixels, visible))
    (before, visible_before), (after, visible_after) = projections
    assert visible_before.any()
    # except for rounding at an image's edge
    assert (visible_before == visible_after).float().mean() > 0.9999
    both = visible_before & visible_after
    torch.testing.assert_close(after[both], before[both], rtol=1e-3, atol=0.02)


@every_transform
def test_rays_end_on_the_transformed_points(sample, transform):
    batch = collate([apply_transform(sample, transform)]).to("cpu")
    points = batch.points[:, :3]
    pixels, visible = project_points(points, batch.lidar2image[0], batch.image_sizes[0])
    indices = [view.nonzero()[:50, 0] for view in visible]  # of at most 50 visible points, per view
    count = min(map(len, indices))  # every view casts equally many rays
    chosen = torch.stack([view[i[:count]] for view, i in zip(pixels, indices, strict=True)])  # [N, count, 3]
    rays = cast_rays(batch, 0, chosen)
    ends = rays.origins + rays.directions * rays.depth[:, None]
    targets = torch.cat([points[i[:count]] for i in indices])
    assert count
    torch.testing.assert_close(ends, targets, rtol=1e-3, atol=1e-2)


def test_scales_stay_in_their_limits_and_labels_stay_with_shuffled_points(sample):
    cfg = Augment(rotation=0.4, scale=(0.9, 1.1), shuffle=True)
    total = np.linalg.norm(sample.points[:, :3], axis=1).sum()  # of the points' distances from the origin
    scales = set()
    for seed in range(5):
        varied = augment_sample(sample, np.random.default_rng(seed), cfg)
        scale = np.linalg.norm(varied.points[:, :3], axis=1).sum() / total
        assert 0.9 <= scale <= 1.1
        scales.add(round(float(scale), 3))
        # intensity and lag do not change, so they identify a point
        key = [tuple(row) for row in np.column_stack([sample.points[:, 3:], sample.point_labels])]
        varied_key = [tuple(row) for row in np.column_stack([varied.points[:, 3:], varied.point_labels])]
        assert key != varied_key and sorted(key) == sorted(varied_key)
    assert len(scales) > 1
    again = augment_sample(sample, np.random.default_rng(0), cfg)
    assert (again.points == augment_sample(sample, np.random.default_rng(0), cfg).points).all()


def test_disabled_augmentations_draw_no_random_numbers(sample):
    """So that adding an augmentation does not change the random numbers of older recipes."""
    rng, expected_rng = np.random.default_rng(3), np.random.default_rng(3)
    varied = augment_sample(sample, rng, Augment(rotation=0.4, scale=(0.9, 1.1), shuffle=True))
    angle, scale = expected_rng.uniform(-0.4, 0.4), expected_rng.uniform(0.9, 1.1)
    order = expected_rng.permutation(len(sample.points))
    assert rng.bit_generator.state == expected_rng.bit_generator.state
    np.testing.assert_array_equal(varied.points, apply_transform(sample, make_transform(angle, scale)).points[order])


def test_shifts_and_flips_are_distributed_as_configured(sample):
    """The transform that was drawn is recovered from the first camera's matrix before and after."""
    # one point: points do not matter here
    small = replace(sample, points=sample.points[:1], point_labels=None)
    cfg = Augment(translation=(0.5, 1.0, 0.0), flip_x=0.5, flip_y=0.2)
    transforms = []
    for seed in range(400):
        varied = augment_sample(small, np.random.default_rng(seed), cfg)
        transforms.append(np.linalg.inv(varied.lidar2camera[0].astype(float)) @ sample.lidar2camera[0])
    transforms = np.array(transforms)  # LiDAR frame before -> after
    mirrored = transforms[:, [0, 1], [0, 1]] < 0  # without rotation, a flip makes its axis' diagonal entry negative
    np.testing.assert_allclose(mirrored.mean(axis=0), [0.5, 0.2], atol=0.08)
    shift = np.where(mirrored, -1, 1) * transforms[:, :2, 3]  # before the flip, which comes last
    np.testing.assert_allclose(shift.std(axis=0), [0.5, 1.0], rtol=0.15)
    assert np.abs(transforms[:, 2, 3]).max() < 1e-5


def test_points_and_boxes_are_cropped_after_the_transform(city):
    """Boxes are cropped only by `read` with a random generator, as in training."""
    point_range, cfg = ((-20.0, -20.0, -5.0), (20.0, 20.0, 3.0)), Augment(rotation=0.7)
    dataset = NuScenesDataset(city, "v1.0-mini", "mini_train", Data(), point_range=point_range, augment=cfg)
    plain, varied = dataset[0], dataset.read(0, np.random.default_rng(0))
    assert len(plain.points) != len(varied.points)  # after the rotation, other points are in the range
    for points in (plain.points, varied.points):
        assert (np.abs(points[:, :2]) < 20).all()
    assert (np.abs(plain.boxes[:, :2]) >= 20).any()
    assert (np.abs(varied.boxes[:, :2]) < 20).all() and 0 < len(varied.boxes) == len(varied.labels) < len(plain.boxes)


@pytest.mark.parametrize("seed", range(6))
def test_the_grid_matches_the_original(seed):
    """Seeds are of `np.random.RandomState`, from which the original draws whether there is a grid, then its period, top
    and left."""
    arrays, _ = load("grid_mask")
    expected = arrays[f"out/seed{seed}"].numpy()
    rng = np.random.RandomState(seed)
    if rng.rand() > 0.7:
        assert (expected == 1).all()
        return
    period = rng.randint(2, expected.shape[0])
    top, left = rng.randint(period), rng.randint(period)
    np.testing.assert_array_equal(grid_mask(*expected.shape, period, top, left), expected == 1)


def test_a_grid_by_hand():
    """The 4 x 6 image starts at (1, 1) of a 6 x 9 area, as do the first bars. With period 2, every other row and column
    is a bar. Bars are visible, all else is hidden."""
    rows, columns = "1010", "101010"
    expected = [[r == "1" or c == "1" for c in columns] for r in rows]
    assert grid_mask(4, 6, period=2, top=1, left=1).tolist() == expected


def test_grid_mask_is_the_same_in_all_images_and_zero_after_normalization(sample):
    hidden_fractions = []
    # one point: points do not matter here
    white = replace(
        sample, images=[np.full((40, 64, 3), 255, np.uint8)] * 6, points=sample.points[:1], point_labels=None
    )
    for seed in range(100):
        varied = augment_sample(white, np.random.default_rng(seed), Augment(grid_mask=0.7))
        hidden = (varied.images[0] == HIDDEN_COLOR).all(axis=2)
        assert all((image == varied.images[0]).all() for image in varied.images)
        assert (varied.images[0][~hidden] == 255).all()
        hidden_fractions.append(hidden.mean())
    hidden_fractions = np.array(hidden_fractions)
    # expected: a grid with probability 0.7, which hides about a quarter of the pixels
    assert 0.55 < (hidden_fractions > 0).mean() < 0.8 and 0.1 < hidden_fractions.mean() < 0.25, hidden_fractions
    assert (white.images[0] == 255).all()  # the original image is not modified
    encoder = CameraEncoder(CameraConfig(depths=(1,) * 4, widths=(4,) * 4, channels=4, depth_bins=2))
    pixel = torch.from_numpy(HIDDEN_COLOR).view(1, 1, 3, 1, 1) / 255
    normalized = encoder.normalize(pixel, image_sizes=torch.tensor([[[1, 1]]]))
    assert normalized.abs().max() < 0.01


class ScriptedRandom:
    """A fake random generator.

    coins:  `random` returns 0 for each "h" (heads, yes) and 0.9 for each "t" (tails, no).
    values: what the other calls return: (expected limits, value) for `uniform`, an array for `permutation`.
    """

    def __init__(self, coins, values):
        self.coins, self.values = [0.0 if c == "h" else 0.9 for c in coins], list(values)

    def random(self):
        return self.coins.pop(0)

    def uniform(self, low, high):
        limits, value = self.values.pop(0)
        assert (low, high) == limits
        return value

    def permutation(self, n):
        return self.values.pop(0)


# Limits of the uniform distributions of the original; hue in degrees
BRIGHTNESS, CONTRAST, SATURATION, HUE = (-32, 32), (0.5, 1.5), (0.5, 1.5), (-18, 18)
PIXEL = (200, 100, 50)


# coins: brightness? contrast before saturation and hue (else after)? contrast? saturation? hue? permuted channels?
@pytest.mark.parametrize(
    "coins, values, expected",
    [
        ("tttttt", [], PIXEL),
        ("httttt", [(BRIGHTNESS, 30)], (230, 130, 80)),
        ("hhhttt", [(BRIGHTNESS, 30), (CONTRAST, 0.5)], (115, 65, 40)),
        ("hthttt", [(BRIGHTNESS, -60), (CONTRAST, 1.5)], (210, 60, 0)),  # (50 - 60) * 1.5 is clipped
        ("tthttt", [(CONTRAST, 1.5)], (255, 150, 75)),  # 200 * 1.5 is clipped
        ("ttthtt", [(SATURATION, 0.5)], (200, 150, 125)),
        ("ttttht", [(HUE, 18)], "hue"),
        ("ttttth", [np.array([2, 0, 1])], (50, 200, 100)),
    ],
)
def test_colors_by_hand(sample, coins, values, expected):
    if expected == "hue":
        h, s, v = colorsys.rgb_to_hsv(*PIXEL)
        expected = colorsys.hsv_to_rgb(h + 18 / 360, s, v)
    image = np.full((2, 3, 3), PIXEL, np.uint8)
    rng = ScriptedRandom(coins * 2, values * 2)  # for two images
    after = photometric_distortion(replace(sample, images=[image, image]), rng).images
    assert not rng.coins and not rng.values and len(after) == 2
    for image in after:
        assert image.dtype == np.uint8
        np.testing.assert_allclose(image, np.broadcast_to(expected, image.shape), atol=0.51)  # rounded


def test_colors_are_drawn_per_image(city):
    plain = NuScenesDataset(city, "v1.0-mini", "mini_train", Data(), augment=Augment())
    colorful = NuScenesDataset(city, "v1.0-mini", "mini_train", Data(), augment=Augment(photometric=True))
    before, after, again = (d.read(0, np.random.default_rng(1)) for d in (plain, colorful, colorful))
    brightening = [a.mean() - b.mean() for a, b in zip(after.images, before.images, strict=True)]
    assert all(abs(a - b) > 0.1 for a, b in itertools.combinations(brightening, 2))
    np.testing.assert_array_equal(after.images, again.images)  # the same seed


def test_a_dataset_without_images_has_batches_of_no_views(city, tmp_path):
    assert NuScenesDataset.has_images(city, "v1.0-mini", "mini_train")
    (tmp_path / "set").mkdir()
    for name in ("v1.0-mini", "sweeps", "lidarseg", "maps"):
        (tmp_path / "set" / name).symlink_to(city / name)
    (tmp_path / "set" / "samples").mkdir()
    (tmp_path / "set" / "samples" / "LIDAR_TOP").symlink_to(city / "samples" / "LIDAR_TOP")
    assert not NuScenesDataset.has_images(tmp_path / "set", "v1.0-mini", "mini_train")
    dataset = NuScenesDataset(tmp_path / "set", "v1.0-mini", "mini_train", Data(cameras=False))
    batch = collate([dataset[0], dataset[1]])
    assert batch.images.shape[:3] == (2, 0, 3) and batch.lidar2image.shape == (2, 0, 4, 4)
    assert batch.image_sizes.shape == (2, 0, 2) and len(batch.points) == batch.point_counts.sum()
    assert collate([NuScenesDataset(city, "v1.0-mini", "mini_train", Data())[0]]).images.shape[1] == len(CAMERAS)
