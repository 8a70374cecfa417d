"""Cut-and-paste augmentation: which objects are cut out, where and in which order they are pasted, and their cache.

`Objects` are the database: boxes, points and pictures (parts of images) of annotated objects.
"""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from nuscenes.utils.data_classes import Box
from nuscenes.utils.geometry_utils import points_in_box
from pyquaternion import Quaternion
from shapely.geometry import MultiPoint

from unipad.boxes import points_in_boxes
from unipad.config import Augment, Data, Paste
from unipad.data import cutpaste
from unipad.data.cutpaste import Objects, cut_out, load_objects, visible_rectangles
from unipad.data.dataset import DataError, Sample
from unipad.data.loader import step_batches
from unipad.data.nuscenes import NuScenesDataset

VERSION = "v1.0-mini"
PASTE = Paste()


@pytest.fixture(scope="module")
def train(city):
    return NuScenesDataset(city, VERSION, "mini_train", Data(sweeps=2))


@pytest.fixture(scope="module")
def objects(train):
    return load_objects(train, PASTE)


@pytest.fixture(scope="module")
def sample(city):
    """A sample of a scene that none of `objects` is from."""
    return NuScenesDataset(city, VERSION, "mini_val", Data(sweeps=2))[1]


def devkit_box(box):
    return Box(box[:3], box[3:6], Quaternion(axis=[0, 0, 1], radians=float(box[6])))


def outline(box):
    """The box in bird's-eye view, a polygon."""
    return MultiPoint(devkit_box(box).bottom_corners()[:2].T).convex_hull


def without_boxes(sample):
    return replace(sample, boxes=sample.boxes[:0], labels=sample.labels[:0])


def test_points_in_boxes_match_the_devkit(sample):
    ours = points_in_boxes(sample.points, sample.boxes)
    theirs = np.array([points_in_box(devkit_box(b), sample.points[:, :3].T) for b in sample.boxes.astype(float)])
    assert ours.sum() > 100 and (ours != theirs).mean() < 1e-6  # except for rounding on a face
    assert points_in_boxes(sample.points, sample.boxes[:0]).shape == (0, len(sample.points))


def test_objects_match_the_boxes_points_and_images_of_the_frames(train, objects):
    """`objects` are all boxes with enough points, in the order of the frames, with their points and rectangles of the
    images."""
    k = 0
    for i in range(len(train)):
        sample = train[i]
        inside = points_in_boxes(sample.points, sample.boxes)
        for row in np.flatnonzero(inside.sum(axis=1) >= PASTE.min_points):
            np.testing.assert_array_equal(objects.boxes[k], sample.boxes[row])
            assert objects.labels[k] == sample.labels[row]
            np.testing.assert_allclose(objects._points(k), sample.points[inside[row]], atol=1e-5)
            for view, image in enumerate(sample.images):
                rows, rectangles = visible_rectangles(sample.boxes, sample.lidar2image[view], image.shape[:2])
                picture = objects._picture(k, view)
                assert (picture is not None) == (row in rows)
                if picture is not None:
                    left, top, right, bottom = rectangles[rows == row][0]
                    expected = image[top:bottom, left:right].astype(int)
                    assert picture.shape == expected.shape and np.abs(picture - expected).mean() < 12  # of 255: JPEG
            k += 1
    assert k == len(objects.labels) > 50 and len(objects.pictures) > 20


def test_boxes_with_too_few_points_are_not_cut_out(train):
    sample = train[0]
    counts = points_in_boxes(sample.points, sample.boxes).sum(axis=1)
    assert (counts < 50).any()
    for min_points in (1, 50):
        assert [len(cut.points) for cut in cut_out(sample, min_points)] == counts[counts >= min_points].tolist()


@pytest.mark.parametrize("empty", [False, True])
def test_a_sample_is_filled_up_without_overlaps(sample, objects, empty):
    """Each class is filled up to at most `PASTE.counts`. empty: the boxes of the sample are removed first."""
    sample = without_boxes(sample) if empty else sample
    before, counts = np.bincount(sample.labels, minlength=10), np.array(PASTE.counts)
    pasted_of_class = np.zeros(10, int)
    for seed in range(5):
        after = objects.paste_into(sample, np.random.default_rng(seed))
        n = len(sample.boxes)
        np.testing.assert_array_equal(after.boxes[:n], sample.boxes)
        np.testing.assert_array_equal(after.labels[:n], sample.labels)
        added = np.bincount(after.labels[n:], minlength=10)
        assert (added <= np.maximum(counts - before, 0)).all() and added.any()
        pasted_of_class += added
        outlines = [outline(box) for box in after.boxes.astype(float)]
        for i in range(n, len(outlines)):
            assert max(outlines[i].intersection(o).area for o in outlines[:i] + outlines[i + 1 :]) < 1e-4  # m^2

        # Points: first those of the sample outside of the pasted boxes, in order; then those of the objects.
        kept = ~points_in_boxes(sample.points, after.boxes[n:]).any(axis=0)
        np.testing.assert_array_equal(after.points[: kept.sum()], sample.points[kept])
        np.testing.assert_array_equal(after.point_labels[: kept.sum()], sample.point_labels[kept])
        assert len(after.point_labels) == len(after.points)
        assert not after.point_labels[kept.sum() :].any()  # pasted points have label 0, which is ignored
        rows = [np.flatnonzero((objects.boxes == box).all(axis=1)).item() for box in after.boxes[n:]]
        assert objects.labels[rows].tolist() == after.labels[n:].tolist()
        clouds = np.concatenate([objects._points(k) for k in rows])
        np.testing.assert_array_equal(after.points[kept.sum() :], clouds)
    # of 10 classes; of the others, the sample has enough already, or there is no object or no room
    assert (pasted_of_class > 0).sum() >= (9 if empty else 2)


def test_pasting_depends_only_on_the_generator(sample, objects):
    one, same, other = (objects.paste_into(sample, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.points, same.points)
    np.testing.assert_array_equal(one.images, same.images)
    assert one.boxes.tolist() != other.boxes.tolist()


def test_a_full_sample_is_not_changed(sample, objects):
    full = replace(objects, counts=tuple(np.bincount(sample.labels, minlength=10).tolist()))
    assert full.paste_into(sample, np.random.default_rng(0)) is sample


# A camera that looks along y: u = 50 x / y + 32, v = 32 - 50 z / y
LIDAR2IMAGE = np.array([[50, 32, 0, 0], [0, 32, -50, 0], [0, 1, 0, 0], [0, 0, 0, 1]], np.float32)


def cube(x, y, z=0.0, size=2.0):
    return np.array([x, y, z, size, size, size, 0, 0, 0], np.float32)


def test_rectangles_by_hand():
    """Cubes of 2 m whose near faces are 10, 5 and 20 m away, where a meter has 5, 10 and 2.5 pixels."""
    boxes = np.stack([cube(0, 11), cube(-4, 6), cube(0, -9), cube(0, 0.5), cube(0, 21), cube(90, 11)])
    rows, rectangles = visible_rectangles(boxes, LIDAR2IMAGE, (64, 64))
    assert rows.tolist() == [4, 0, 1]  # from far to near; not those behind or around the camera or outside the image
    expected = {0: [27, 27, 37, 37], 1: [0, 22, 10, 42], 4: [29, 29, 34, 34]}
    # left, top, right, bottom; cube 1 is cut off by the image's left edge, and its right end is that of the far face
    assert [expected[r] for r in rows] == rectangles.tolist()


def test_pictures_are_pasted_from_far_to_near(tmp_path):
    """From far to near: a pasted red object, the blue object of the sample and a pasted green one, on gray."""
    colors = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30)}
    boxes = {"red": cube(2.5, 21), "blue": cube(0.5, 13), "green": cube(-0.4, 8)}

    def sample_with(name, images):
        """A sample of two equal cameras with one object."""
        return Sample(
            images=images,
            lidar2image=np.stack([LIDAR2IMAGE] * 2),
            lidar2camera=np.stack([np.eye(4, dtype=np.float32)] * 2),
            # five points at the center of the box, with intensity and lag 0
            points=np.concatenate([boxes[name], [0, 0]])[None, [0, 1, 2, 9, 10]].repeat(5, axis=0).astype(np.float32),
            point_labels=None,
            boxes=boxes[name][None],
            labels=np.zeros(1, np.int64),
            token=name,
        )

    gray = np.full((64, 64, 3), 128, np.uint8)
    filled = {name: np.full((64, 64, 3), color, np.uint8) for name, color in colors.items()}
    columns = {"boxes": [], "labels": [], "points": [], "pictures": []}
    with open(tmp_path / "objects.bin", "wb") as file:
        for k, name in enumerate(("green", "red")):
            (cut,) = cut_out(sample_with(name, [filled[name]] * 2), min_points=5)
            columns["boxes"].append(cut.box)
            columns["labels"].append(cut.label)
            columns["points"].append((file.tell(), len(cut.points)))
            file.write(cut.points)
            for view, jpeg in cut.pictures[: 2 - k]:  # the red object has no picture for the second camera
                columns["pictures"].append((k, view, file.tell(), len(jpeg)))
                file.write(jpeg)
    arrays = {name: np.array(rows) for name, rows in columns.items()}
    objects = Objects(counts=(3,), file=tmp_path / "objects.bin", **arrays)

    image = gray.copy()
    expected = {}
    for view, order in enumerate((("red", "blue", "green"), ("blue", "green"))):
        expected[view] = gray.copy()
        for name in order:
            _, ((left, top, right, bottom),) = visible_rectangles(boxes[name][None], LIDAR2IMAGE, (64, 64))
            expected[view][top:bottom, left:right] = colors[name]
            if name == "blue":
                image[top:bottom, left:right] = colors[name]
    before = sample_with("blue", [image.copy(), image.copy()])
    after = objects.paste_into(before, np.random.default_rng(0))
    assert len(after.boxes) == 3 and len(after.points) == 15
    for view in range(2):
        np.testing.assert_allclose(after.images[view].astype(int), expected[view], atol=4)  # of 255: JPEG
        # number of colors: gray and one per object, without red in the second camera
        assert len(np.unique(expected[view].reshape(-1, 3), axis=0)) == 4 - view
    assert all((unchanged == image).all() for unchanged in before.images)


def test_pasting_ends_at_paste_until(city, objects):
    augment = Augment(rotation=0.1, shuffle=True)
    plain = NuScenesDataset(city, VERSION, "mini_val", Data(sweeps=2), augment=augment)
    pasting = plain.with_objects(objects)

    def boxes(dataset, **stream):
        """The boxes of the first four samples of a stream."""
        batches = step_batches(dataset, micro_batch=1, **stream)
        return [next(batches)[0].boxes.tolist() for _ in range(4)]

    never, until_two, always = boxes(plain), boxes(pasting, paste_until=2), boxes(pasting)
    assert until_two == always[:2] + never[2:]
    assert all(len(a) > len(b) for a, b in zip(always, never, strict=True))
    assert boxes(pasting, paste_until=2, start=1)[:3] == until_two[1:]


def count_cuts(monkeypatch):
    """A list that gets the arguments of every call of `cut_out`."""
    cuts, cut = [], cutpaste.cut_out
    monkeypatch.setattr(cutpaste, "cut_out", lambda *a: cuts.append(a) or cut(*a))
    return cuts


def dataset_of(root, sweeps=1, split="mini_train", **settings):
    return NuScenesDataset(root, VERSION, split, Data(cameras=False, sweeps=sweeps), **settings)


def cache_files(root):
    """Names of the objects' caches, two files each: .npz and .bin."""
    return sorted(f.name for f in (root / "unipad-index").glob("*objects*"))


def test_objects_are_cut_out_once(city_copy, monkeypatch):
    cuts = count_cuts(monkeypatch)
    first, again = (load_objects(dataset_of(city_copy), PASTE) for _ in range(2))
    n = len(dataset_of(city_copy))  # frames
    assert len(cuts) == n and len(cache_files(city_copy)) == 2
    for name, value in vars(first).items():
        np.testing.assert_array_equal(value, getattr(again, name))
    load_objects(dataset_of(city_copy), replace(PASTE, counts=(1,) * 10))
    assert len(cuts) == n  # `counts` only matter for pasting
    load_objects(dataset_of(city_copy, sweeps=2), PASTE)
    load_objects(dataset_of(city_copy), replace(PASTE, min_points=9))
    load_objects(dataset_of(city_copy, label_fraction=0.5), PASTE)
    # with 2 sweeps or another minimum all frames again, with half of the labels every second one
    assert len(cuts) == 3 * n + (n + 1) // 2 and len(cache_files(city_copy)) == 8


def test_objects_are_cut_out_again_when_the_tables_change(city_copy):
    before = load_objects(dataset_of(city_copy), PASTE)
    before.file.with_name(f".{before.file.name}.999999999").touch()  # what a killed process left
    table = city_copy / VERSION / "sample_annotation.json"
    records = json.loads(table.read_text())
    for record in records:
        record["size"][2] += 1  # the height, in meters
    table.write_text(json.dumps(records))
    after = load_objects(dataset_of(city_copy), PASTE)
    # not by exactly 1 m: higher boxes contain more points, so other objects may have enough
    assert after.boxes[:, 5].mean() > before.boxes[:, 5].mean() + 0.5
    assert len(cache_files(city_copy)) == 2 and after.file.exists() and not before.file.exists()


@pytest.mark.parametrize("kind", ["bin", "npz"])
def test_damaged_files_are_rebuilt(city_copy, monkeypatch, kind):
    objects = load_objects(dataset_of(city_copy), PASTE)
    path = objects.file.with_suffix(f".{kind}")
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 8]) + content[middle + 1 :]
    cuts = count_cuts(monkeypatch)
    for times, damaged in enumerate((content[:-100], flipped, b""), start=1):
        path.write_bytes(damaged)
        assert load_objects(dataset_of(city_copy), PASTE).boxes.tolist() == objects.boxes.tolist()
        assert len(cuts) == times * len(dataset_of(city_copy)) and path.read_bytes() == content


def test_the_cache_is_the_same_with_a_worker(city_copy):
    objects = load_objects(dataset_of(city_copy), PASTE)
    contents = objects.file.read_bytes()
    objects.file.unlink()
    assert load_objects(dataset_of(city_copy), PASTE, workers=1).file.read_bytes() == contents


def test_a_frame_that_cannot_be_read_is_named_and_left_out(city_copy, capsys):
    dataset = dataset_of(city_copy)
    before = load_objects(dataset, PASTE)
    lost = city_copy / dataset.index.lidar_files[dataset.index.frame_lidar[0]].decode()
    lost.unlink()
    before.file.unlink()
    after = load_objects(dataset, PASTE)
    assert f"skipped {lost}: is missing" in capsys.readouterr().err
    assert 0 < len(after.labels) < len(before.labels)


def test_objects_are_cached_elsewhere_if_there_is_no_folder_next_to_the_data(city_copy, tmp_path):
    (city_copy / "unipad-index").write_text("a file where the folder should be")
    objects = load_objects(dataset_of(city_copy), PASTE)
    assert objects.file.is_relative_to(tmp_path / "cache")  # the user's, by conftest's `own_user_cache`
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("another one")
    with pytest.raises(DataError, match=r"can be written neither to .*unipad-index nor to .*cache.*; make") as refused:
        load_objects(dataset_of(city_copy), PASTE)
    assert "\n" not in str(refused.value) and str(refused.value).endswith(".")


def test_a_dataset_without_objects_is_a_user_error(city_copy):
    with pytest.raises(DataError, match="no frame of .* mini_train has an object of 1000000 LiDAR points") as refused:
        load_objects(dataset_of(city_copy), replace(PASTE, min_points=10**6))
    assert "\n" not in str(refused.value) and str(refused.value).endswith(".")
    for table in ("sample_annotation", "instance"):  # no boxes at all
        (city_copy / VERSION / f"{table}.json").write_text("[]")
    with pytest.raises(DataError, match="has an object of 5 LiDAR points"):
        load_objects(dataset_of(city_copy), PASTE)


def test_no_partial_file_is_left(city_copy, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match="No space left"):
        load_objects(dataset_of(city_copy), PASTE)
    assert not cache_files(city_copy)
