"""Points, cameras and boxes still agree after they were moved."""

import numpy as np
import pytest
import torch

from unipad.batch import CAMERAS
from unipad.config import Augment, Data
from unipad.data.nuscenes import NuScenesDataset, collate, has_images
from unipad.data.transforms import augmented, turned_and_scaled
from unipad.model.rays import cast_rays, project_points


@pytest.fixture(scope="module")
def sample(city):
    return NuScenesDataset(city, "v1.0-mini", "mini_val", Data(sweeps=2))[0]


def test_a_quarter_turn_by_hand(sample):
    moved = turned_and_scaled(sample, np.pi / 2, 2.0)
    x, y, z = sample.points[:, :3].T
    np.testing.assert_allclose(moved.points[:, :3], np.stack([-2 * y, 2 * x, 2 * z], axis=1), rtol=1e-6, atol=1e-5)
    assert (moved.points[:, 3:] == sample.points[:, 3:]).all()
    before, after = sample.boxes, moved.boxes
    np.testing.assert_allclose(after[:, :2], 2 * np.stack([-before[:, 1], before[:, 0]], axis=1), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(after[:, 3:6], 2 * before[:, 3:6], rtol=1e-6)
    np.testing.assert_allclose(np.exp(1j * after[:, 6]), 1j * np.exp(1j * before[:, 6]), atol=1e-5)
    np.testing.assert_allclose(after[:, 7:], 2 * np.stack([-before[:, 8], before[:, 7]], axis=1), rtol=1e-5, atol=1e-5)
    assert (np.abs(after[:, 6]) <= np.pi + 1e-6).all()


def test_pixels_keep_what_they_show(sample):
    moved = turned_and_scaled(sample, 0.3, 1.05)
    seen = []
    for s in (sample, moved):
        batch = collate([s])
        pixels, visible = project_points(batch.points[:, :3], batch.lidar2image[0], batch.image_sizes[0])
        seen.append((pixels, visible))
    (before, visible), (after, also_visible) = seen
    assert (visible == also_visible).float().mean() > 0.9999 and visible.any()  # but for rounding at an image's edge
    both = visible & also_visible
    torch.testing.assert_close(after[both], before[both], rtol=1e-3, atol=0.02)


def test_rays_still_end_on_the_points(sample):
    batch = collate([turned_and_scaled(sample, -0.3, 0.95)])
    points = batch.points[:, :3]
    pixels, visible = project_points(points, batch.lidar2image[0], batch.image_sizes[0])
    rows = [view.nonzero()[:50, 0] for view in visible]
    count = min(len(row) for row in rows)
    chosen = torch.stack([view[row[:count]] for view, row in zip(pixels, rows, strict=True)])  # [N, count, 3]
    rays = cast_rays(batch, 0, chosen)
    ends = rays.origins + rays.directions * rays.depth[:, None]
    aims = torch.cat([points[row[:count]] for row in rows])
    assert count
    torch.testing.assert_close(ends, aims, rtol=1e-3, atol=1e-2)


def test_augmentation_stays_in_its_limits_and_keeps_labels_with_points(sample):
    cfg = Augment(rotation=0.4, scale=(0.9, 1.1), shuffle=True)
    length = np.linalg.norm(sample.points[:, :3], axis=1).sum()
    scales = set()
    for seed in range(5):
        moved = augmented(sample, np.random.default_rng(seed), cfg)
        scale = np.linalg.norm(moved.points[:, :3], axis=1).sum() / length
        assert 0.9 <= scale <= 1.1
        scales.add(round(float(scale), 3))
        # intensity and lag are not moved, so they tell where a point went
        key = [tuple(row) for row in np.column_stack([sample.points[:, 3:], sample.point_labels])]
        moved_key = [tuple(row) for row in np.column_stack([moved.points[:, 3:], moved.point_labels])]
        assert key != moved_key and sorted(key) == sorted(moved_key)
    assert len(scales) > 1
    again = augmented(sample, np.random.default_rng(0), cfg)
    assert (again.points == augmented(sample, np.random.default_rng(0), cfg).points).all()


def test_points_are_cropped_after_they_moved(city):
    box = ((-20.0, -20.0, -5.0), (20.0, 20.0, 3.0))
    dataset = NuScenesDataset(city, "v1.0-mini", "mini_train", Data(), 1.0, box, Augment(rotation=0.7))
    plain, moved = dataset[0].points, dataset.read(0, np.random.default_rng(0)).points
    assert len(plain) != len(moved)
    for points in (plain, moved):
        assert (np.abs(points[:, :2]) < 20).all()


def test_a_set_without_images(city, tmp_path):
    assert has_images(city, "v1.0-mini", "mini_train")
    (tmp_path / "set").mkdir()
    for part in ("v1.0-mini", "sweeps", "lidarseg", "maps"):
        (tmp_path / "set" / part).symlink_to(city / part)
    (tmp_path / "set" / "samples").mkdir()
    (tmp_path / "set" / "samples" / "LIDAR_TOP").symlink_to(city / "samples" / "LIDAR_TOP")
    assert not has_images(tmp_path / "set", "v1.0-mini", "mini_train")
    dataset = NuScenesDataset(tmp_path / "set", "v1.0-mini", "mini_train", Data(cameras=False))
    batch = collate([dataset[0], dataset[1]])
    assert batch.images.shape[:3] == (2, 0, 3) and batch.lidar2image.shape == (2, 0, 4, 4)
    assert batch.image_sizes.shape == (2, 0, 2) and len(batch.points) == batch.point_counts.sum()
    assert collate([NuScenesDataset(city, "v1.0-mini", "mini_train", Data())[0]]).images.shape[1] == len(CAMERAS)
