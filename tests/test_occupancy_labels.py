"""Occupancy labels: those that the city writes, and what reading them refuses."""

import shutil
from itertools import product

import numpy as np
import pytest

from unipad.batch import FREE, OCCUPANCY_CLASSES, OCCUPANCY_SHAPE
from unipad.data import synthetic
from unipad.data.city.occupancy import CLASS_OF, full_voxels
from unipad.data.city.solids import CATEGORIES, SOLID, solid
from unipad.data.dataset import BadFrame, DataError
from unipad.data.nuscenes import NuScenesDataset
from unipad.data.occupancy import read_occupancy
from unipad.errors import UserError
from unipad.recipes import OCCUPANCY

RECIPE = OCCUPANCY["lidar"]["tiny"]
VERSION = "v1.0-mini"
ROAD, CAR = (OCCUPANCY_CLASSES.index(name) for name in ("driveable_surface", "car"))


@pytest.fixture
def validation(labeled):
    return NuScenesDataset(labeled, VERSION, "mini_val", RECIPE.data).with_occupancy()


def contents(root):
    """{path below root: bytes} of all files."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_adding_labels_changes_no_other_file(city, labeled):
    """Of a city without labels, as its first run of the task completes it; caches aside."""
    before, after = (
        {name: data for name, data in contents(root).items() if not name.startswith("unipad-index")}
        for root in (city, labeled)
    )
    assert {name: data for name, data in after.items() if not name.startswith("gts/")} == {
        name: data for name, data in before.items() if not name.startswith("gts/")
    }
    assert sum(name.startswith("gts/") for name in after) == 6  # keyframes


def test_the_citys_labels_are_those_of_its_sensors(labeled, validation):
    """LiDAR points of the keyframe lie in voxels that are seen, and of the class of their lidarseg label; cameras see a
    part of what the LiDAR sees."""
    for i in range(len(validation)):
        sample = validation[i]
        classes, by_lidar, by_cameras = sample.occupancy
        assert not (by_cameras & ~by_lidar).any() and 0.02 < by_cameras.mean() < by_lidar.mean() < 0.6
        labels = sample.point_labels[: len(sample.points)]
        ego = np.linalg.inv(sample.ego2lidar) @ np.c_[sample.points[:, :3], np.ones(len(labels))].T
        cells = np.floor((ego[:3].T - (-40, -40, -1)) / 0.4).astype(int)
        known = ((cells >= 0) & (cells < OCCUPANCY_SHAPE)).all(axis=1) & (labels > 0)
        at = tuple(cells[known].T)
        assert known.sum() > 1000 and by_lidar[at].mean() > 0.97  # range noise moves some points into other voxels
        assert (classes[at] == labels[known]).mean() > 0.9  # some share their voxel with another class
        assert (classes[at] != FREE).mean() > 0.99


def test_a_city_generated_with_labels_has_the_same(labeled, tmp_path):
    """And the labels do not depend on whether the city is new, nor on the number of processes."""
    tiny = {"scenes": 2, "keyframes": 2, "image_size": (32, 48), "columns": 60, "progress": False}
    with_labels = synthetic.generate(tmp_path / "with", workers=2, occupancy=True, **tiny)
    without = synthetic.generate(tmp_path / "without", workers=1, **tiny)
    assert not (without / "gts").exists()
    synthetic.add_occupancy(without, workers=1)
    assert contents(with_labels) == contents(without)
    assert sum(name.startswith("gts/") for name in contents(without)) == 4  # keyframes


def test_classes_are_those_that_the_devkit_merges(city):
    from nuscenes import NuScenes
    from nuscenes.eval.lidarseg.utils import LidarsegClassMapper

    merged = LidarsegClassMapper(NuScenes(VERSION, str(city), verbose=False)).fine_idx_2_coarse_idx_mapping
    assert CLASS_OF.tolist() == [merged[index] for index in range(len(CATEGORIES))]


class EmptyStreet:
    """Stands in for a `Scene`: road everywhere, the ego vehicle at (3, 2), heading 30 degrees from x towards y."""

    class city:
        @staticmethod
        def ground(x, y):
            road = np.full(len(x), CATEGORIES.index("flat.driveable_surface"), np.uint8)
            return road, None, None

    class ego:
        @staticmethod
        def pose(t):
            return np.array([3.0, 2.0, np.pi / 6])


@pytest.mark.parametrize(
    "size, taper, is_round, yaw",
    [
        ((3.0, 1.4, 2.0), (0, 0, 0), False, 0.7),
        ((3.0, 1.4, 2.0), (0.4, 0.2, 0.3), False, 0.7),
        ((0.14, 0.14, 3.0), (0, 0, 0), False, 1.0),
        ((3.0, 1.0, 2.5), (0, 0, 0), True, 0.3),
    ],
    ids=["box", "tapered", "pole", "ellipsoid"],
)
def test_a_voxel_is_full_where_a_solid_overlaps_it(size, taper, is_round, yaw):
    """Compared with 17 x 17 x 17 points of each voxel: one inside proves an overlap; an overlap without one is thin, or
    at an edge of the tapered box."""
    one = np.array([solid((9.0, 8.0, 0.5), yaw, size, "plain", (1, 1, 1), "vehicle.car", taper, is_round)], dtype=SOLID)
    classes = full_voxels(EmptyStreet, 0.0, one)
    full = classes == CAR
    assert (classes[:, :, 2][~full[:, :, 2]] == ROAD).all() and (classes[~full][..., None] != CAR).all()
    cells = np.argwhere(np.ones((16, 16, 16), bool)) + (112, 97, 0)  # around the solid, 8.2 m ahead, 2.2 m to the left
    steps = (np.arange(17) / 16 - 0.5) * 0.4 * 0.9999
    offsets = np.array(list(product(steps, repeat=3)))
    assert full.any() and full.sum() == full[112:128, 97:113].sum()
    sampled = np.zeros(len(cells), bool)
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    for part in np.array_split(np.arange(len(cells)), 50):
        centers = np.array((-40, -40, -1)) + 0.4 * (cells[part] + 0.5)
        p = (centers[:, None] + offsets).reshape(-1, 3)
        world = np.stack([3 + c * p[:, 0] - s * p[:, 1], 2 + s * p[:, 0] + c * p[:, 1], p[:, 2]], axis=1)
        x, y, z = (world - one["center"][0]).T
        x, y = np.cos(yaw) * x + np.sin(yaw) * y, np.cos(yaw) * y - np.sin(yaw) * x
        length, width, height = np.array(size) / 2
        front, back, side = taper
        up = z + height
        if is_round:
            inside = (x / length) ** 2 + (y / width) ** 2 + (z / height) ** 2 < 1
        else:
            inside = (x < length - front * up) & (-x < length - back * up) & (np.abs(y) < width - side * up)
            inside &= np.abs(z) < height
        sampled[part] = inside.reshape(len(part), -1).any(axis=1)
    found = full[tuple(cells.T)]
    assert not (sampled & ~found).any()
    assert (found & ~sampled).sum() <= 0.06 * found.sum() + (6 if size[0] < 1 else 0)


def test_existing_labels_are_kept_and_missing_ones_are_added(labeled, tmp_path):
    root = shutil.copytree(labeled, tmp_path / "city")
    first, second, third, *_ = sorted(root.glob("gts/*/*/labels.npz"))
    before, expected = second.read_bytes(), [first.read_bytes(), third.read_bytes()]
    shutil.rmtree(first.parent)
    third.unlink()  # its folder stays
    second.write_bytes(b"of the user")
    assert len(NuScenesDataset(root, VERSION, "mini_train", RECIPE.data).with_occupancy()) == 3
    assert len(NuScenesDataset(root, VERSION, "mini_val", RECIPE.data).with_occupancy()) == 3
    assert [first.read_bytes(), third.read_bytes()] == expected
    assert second.read_bytes() == b"of the user" != before


def damaged(change):
    """A function that rewrites a labels.npz with `change`d arrays."""

    def rewrite(file):
        arrays = dict(np.load(file))
        np.savez_compressed(file, **change(arrays))

    return rewrite


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-99]), "is damaged, or not an .npz file"),
        (lambda file: file.write_bytes(b""), "is damaged, or not an .npz file"),
        (damaged(lambda a: {k: v for k, v in a.items() if k != "mask_camera"}), "has no array mask_camera"),
        (
            damaged(lambda a: {k: v[:100] for k, v in a.items()}),
            r"has semantics of shape \(100, 200, 16\), but Occ3D-nuScenes' grid has 200 x 200 x 16 voxels",
        ),
        (
            damaged(lambda a: {k: np.zeros((512, 512, 40), np.uint8) for k in a}),
            "has arrays of more than 200 x 200 x 16 voxels",
        ),
        (
            damaged(lambda a: a | {"semantics": a["semantics"] + 1}),
            "has semantics that are not whole numbers from 0 to 17",
        ),
        (damaged(lambda a: a | {"mask_lidar": a["mask_lidar"] + 0.5}), "has mask_lidar that are not whole numbers"),
        (damaged(lambda a: a | {"semantics": np.array([{}])}), "is damaged, or not an .npz file"),
    ],
    ids=["missing", "cut", "empty", "no mask", "shape", "grid", "class", "mask", "objects"],
)
def test_a_wrong_labels_file_is_a_bad_frame_of_one_sentence(damage, words, labeled, tmp_path):
    file = tmp_path / "labels.npz"
    shutil.copy(sorted(labeled.glob("gts/*/*/labels.npz"))[0], file)
    intact = read_occupancy(file)
    assert intact.shape == (3, *OCCUPANCY_SHAPE) and intact.dtype == np.uint8
    damage(file)
    with pytest.raises(BadFrame, match=words) as error:
        read_occupancy(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_masks_of_type_bool_are_read_too(labeled, tmp_path):
    source, file = sorted(labeled.glob("gts/*/*/labels.npz"))[0], tmp_path / "labels.npz"
    arrays = dict(np.load(source))
    np.savez(file, **{k: v.astype(bool) if "mask" in k else v.astype(np.int64) for k, v in arrays.items()})
    assert np.array_equal(read_occupancy(file), read_occupancy(source))


def test_a_dataset_without_labels_is_a_user_error(city_copy, capsys):
    """That is not a synthetic city, whose labels would be made; with some, only frames that have them remain."""
    log = city_copy / VERSION / "log.json"
    log.write_text(log.read_text().replace('"synthetic"', '"n008"'))
    dataset = NuScenesDataset(city_copy, VERSION, "mini_val", RECIPE.data)
    with pytest.raises(DataError, match="has no occupancy labels, such as gts/.*; unpack gts of Occ3D-nuScenes there"):
        dataset.with_occupancy()
    unlabeled = dataset.with_occupancy(labels=False)[0]
    assert unlabeled.occupancy is None and unlabeled.ego2lidar.shape == (4, 4)
    folder = city_copy / "gts" / "scene-0103" / dataset.index.tokens[1].decode()
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match="has no occupancy labels"):  # the folder is empty
        dataset.with_occupancy()
    (folder / "labels.npz").touch()
    assert dataset.with_occupancy(verbose=False).frames.tolist() == [1]
    assert "left out" not in capsys.readouterr().err
    assert dataset.with_occupancy().frames.tolist() == [1]
    assert "2 frames are left out; without labels, such as gts/scene-0103/" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, flags",
    [
        ("", "--scenes SCENES --keyframes KEYFRAMES --seed SEED"),
        ("my notes", "--scenes SCENES --keyframes KEYFRAMES --seed SEED"),
        ("scenes: many", "--scenes SCENES --keyframes KEYFRAMES --seed SEED"),
        (
            "scenes: 128\nkeyframes: 4\nimage_size: (32, 48)",
            "--scenes 128 --keyframes 4 --seed SEED --image-size 32 48",
        ),
    ],
    ids=["empty", "notes", "not a number", "no seed"],
)
def test_labels_cannot_be_added_to_a_city_of_unknown_settings(text, flags, labeled, tmp_path):
    """They would be another city's; and so would the city of the command that is proposed, if it lacked settings."""
    root = shutil.copytree(labeled, tmp_path / "city", ignore=shutil.ignore_patterns("gts"))
    (root / "README.txt").write_text(text)
    with pytest.raises(UserError, match=f"cannot be added to the synthetic city in .* --occupancy {flags}.$"):
        synthetic.add_occupancy(root)
    assert not (root / "gts").exists()


def test_origins_of_rays_are_the_lidar_at_keyframes_nearby(validation):
    origins = validation.lidar_origins()
    for i in range(len(validation)):
        at = origins[validation[i].token]
        lidar = np.linalg.inv(validation[i].ego2lidar)[:3, 3]  # the LiDAR's own position
        assert at.shape == (3, 3) and np.abs(at - lidar).sum(axis=1).min() < 1e-5
    first, last = (origins[validation[i].token] for i in (0, 2))
    assert (np.diff(first[:, 0]) > 1).all()  # the vehicle drives ahead
    assert first[0, 0] == pytest.approx(last[2, 0], abs=1e-4)
