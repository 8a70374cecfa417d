"""The tables of nuScenes: both folder layouts, the cached index, and messages about faulty datasets."""

import json
import shutil

import numpy as np
import pytest

from unipad.config import Data
from unipad.data import tables
from unipad.data.dataset import DataError
from unipad.data.nuscenes import NuScenesDataset

VERSION = "v1.0-mini"
pytestmark = pytest.mark.usefixtures("own_user_cache")


def test_both_layouts_read_the_same(city, city_copy, tmp_path):
    """Tables in <root>/<version>, and in <root>/<version>/<version> as in OpenPCDet."""
    (tmp_path / "nested").mkdir()
    city_copy.rename(tmp_path / "nested" / VERSION)
    nested = NuScenesDataset(tmp_path / "nested", VERSION, "mini_val", Data())[1]
    flat = NuScenesDataset(city, VERSION, "mini_val", Data())[1]
    assert nested.token == flat.token
    np.testing.assert_array_equal(nested.points, flat.points)
    np.testing.assert_array_equal(nested.images, flat.images)


def count_builds(monkeypatch):
    """A list that gets an entry each time the indices are built, which is for all splits at once."""
    builds, build = [], tables._build_all
    monkeypatch.setattr(tables, "_build_all", lambda *a, **k: builds.append(a) or build(*a, **k))
    return builds


def test_the_index_is_built_once_for_all_splits(city_copy, monkeypatch):
    builds = count_builds(monkeypatch)
    (city_copy / "unipad-index").mkdir()
    (city_copy / "unipad-index" / f".{VERSION}-mini_val.npz.99999999").touch()  # unfinished, of a killed process
    first = NuScenesDataset(city_copy, VERSION, "mini_val", Data())
    again = NuScenesDataset(city_copy, VERSION, "mini_val", Data())
    NuScenesDataset(city_copy, VERSION, "mini_train", Data())
    assert len(builds) == 1
    for name, array in vars(first.index).items():
        np.testing.assert_array_equal(array, getattr(again.index, name))
    files = {file.name for file in (city_copy / "unipad-index").iterdir()}
    assert files == {f"{VERSION}-mini_train.npz", f"{VERSION}-mini_val.npz"}


def test_the_index_is_rebuilt_when_the_tables_change(city_copy, monkeypatch):
    builds = count_builds(monkeypatch)
    before = NuScenesDataset(city_copy, VERSION, "mini_val", Data())[0]
    table = city_copy / VERSION / "sample_annotation.json"
    records = json.loads(table.read_text())
    for record in records:
        record["size"][2] += 1  # height
    table.write_text(json.dumps(records))
    after = NuScenesDataset(city_copy, VERSION, "mini_val", Data())[0]
    assert len(builds) == 2
    np.testing.assert_allclose(after.boxes[:, 5], before.boxes[:, 5] + 1, atol=1e-5)  # 5: height


def test_a_damaged_index_is_rebuilt(city_copy, monkeypatch):
    """A truncated or replaced file, or one flipped bit: there is never an error or a different index.

    A bit in the archive's metadata, such as a time, may be without effect: then the file stays.
    """
    builds = count_builds(monkeypatch)
    first = NuScenesDataset(city_copy, VERSION, "mini_val", Data()).index
    path, rng = city_copy / "unipad-index" / f"{VERSION}-mini_val.npz", np.random.default_rng(0)
    content, rebuilt = path.read_bytes(), 0

    def flipped():
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        return bytes(damaged)

    for damaged in (content[:1000], b"", b"PK" + bytes(900), *(flipped() for _ in range(30))):
        builds.clear()
        path.write_bytes(damaged)
        index = NuScenesDataset(city_copy, VERSION, "mini_val", Data()).index
        for name, array in vars(first).items():
            np.testing.assert_array_equal(array, getattr(index, name))
        assert len(builds) == (1 if path.read_bytes() != damaged else 0)  # rebuilt, and written again
        rebuilt += len(builds)
    assert rebuilt >= 15  # of 33; the other bits had no effect


def test_a_root_that_cannot_be_written_uses_the_users_cache(city_copy, tmp_path, monkeypatch):
    builds = count_builds(monkeypatch)
    (city_copy / "unipad-index").write_text("a file where the folder should be")
    for _ in range(2):
        NuScenesDataset(city_copy, VERSION, "mini_val", Data())
    assert len(builds) == 1
    assert list((tmp_path / "cache" / "unipad").rglob("*.npz"))


def test_a_full_disk_leaves_no_partial_index(city_copy, tmp_path, monkeypatch):
    def save(file, **arrays):
        file.write(b"part")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", save)
    assert len(NuScenesDataset(city_copy, VERSION, "mini_val", Data()))
    assert not [*(city_copy / "unipad-index").iterdir(), *(tmp_path / "cache").rglob("*.npz*")]


def assert_refused(words, root, version=VERSION, split="mini_val"):
    """Assert that the dataset is rejected with one sentence that contains all of `words`."""
    with pytest.raises(DataError) as refused:
        NuScenesDataset(root, version, split, Data())
    sentence = str(refused.value)
    assert all(str(w) in sentence for w in words), sentence
    assert "\n" not in sentence and sentence.endswith(".")


def test_a_missing_dataset_version_split_or_table_is_a_user_error(city, city_copy, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(["--data-root", tmp_path / "nowhere"], tmp_path / "nowhere")
    assert_refused([tmp_path / "empty", "no nuScenes tables", f"{VERSION}/scene.json"], tmp_path / "empty")
    assert_refused([city / VERSION, "the one above"], city / VERSION)
    assert_refused([city, "--version v1.0-trainval", f"it has {VERSION}"], city, "v1.0-trainval", "train")
    assert_refused(["no split val", "mini_train and mini_val", "v1.0-trainval"], city, VERSION, "val")
    assert_refused(["no split nonsense", "mini_train and mini_val"], city, VERSION, "nonsense")

    shutil.rmtree(city_copy / "maps")
    assert_refused([city_copy / VERSION, "map mask"], city_copy)
    (city_copy / VERSION / "ego_pose.json").unlink()
    assert_refused([city_copy / VERSION, "lacks ego_pose.json"], city_copy)


def test_a_split_without_scenes_is_rejected(city_copy):
    table = city_copy / VERSION / "scene.json"
    table.write_text(table.read_text().replace("scene-0103", "scene-9103").replace("scene-0916", "scene-9916"))
    assert_refused(["no frame of split mini_val"], city_copy)


def change_row(root, table, change):
    """Apply `change` to row 1 of a table, or to row 0 if it is the only one."""
    file = root / VERSION / f"{table}.json"
    rows = json.loads(file.read_text())
    change(rows[min(1, len(rows) - 1)])
    file.write_text(json.dumps(rows))


def nested_lists(depth):
    """JSON of `depth` lists, one inside the other."""
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "table, field, value, words",
    [
        ("scene", "name", None, "name is not text of at most 1000 characters: None"),
        ("scene", "name", "x" * 10**6, "name is not text"),
        ("sample", "timestamp", "1532402927000000", "timestamp is not a time in microseconds"),
        ("sample", "timestamp", 10**400, "timestamp is not a time"),
        ("sample_data", "timestamp", float("nan"), "timestamp is not a time"),
        ("sample_data", "is_key_frame", "true", "is_key_frame is not true or false"),
        ("sample_data", "filename", "../../etc/passwd", "filename is not the path of a file below the root"),
        ("sample_data", "filename", "/etc/passwd", "filename is not the path"),
        ("sample_data", "filename", "C:\\x.jpg", "filename is not the path"),
        ("sample_data", "filename", "samples/a\0b.jpg", "filename is not the path"),
        ("sample_data", "filename", "samples/\ud800.jpg", "filename is not the path"),
        ("sample_data", "sample_token", ["a"], "sample_token is not text"),
        ("sample_data", "ego_pose_token", "nowhere", "ego_pose_token nowhere is not in any row of ego_pose.json"),
        ("sample_data", "prev", "nowhere", "prev nowhere is not in any row of sample_data.json"),
        ("ego_pose", "rotation", [1, 0, 0], "rotation is not a unit quaternion"),
        ("ego_pose", "rotation", [0, 0, 0, 0], "rotation is not a unit quaternion"),
        ("ego_pose", "rotation", [1e300, 0, 0, 1e10], "rotation is not a unit quaternion"),
        (
            "ego_pose",
            "translation",
            [float("nan"), 0, 0],
            "translation is not three numbers of at most 100000000 meters",
        ),
        ("calibrated_sensor", "translation", [1e5, 0, 0], "translation is not three numbers of at most 100 meters"),
        ("calibrated_sensor", "camera_intrinsic", [[0, 0, 9], [0, 9, 9], [0, 0, 1]], "camera_intrinsic is not"),
        (
            "calibrated_sensor",
            "camera_intrinsic",
            [[9, 0, 9], [0, float("nan"), 9], [0, 0, 1]],
            "camera_intrinsic is not",
        ),
        ("calibrated_sensor", "camera_intrinsic", [], "camera_intrinsic of a camera is empty"),
        ("sample_annotation", "size", "4 2 1", "size is not three numbers"),
        ("sample_annotation", "num_lidar_pts", None, "num_lidar_pts is not a number that is 0 or more"),
        ("sample_annotation", "next", {}, "next is not text"),
        ("instance", "category_token", "nowhere", "category_token nowhere is not in any row of category.json"),
        ("category", "index", 256, "index is not a number from 0 to 255"),
        ("map", "log_tokens", [], "is not in the log_tokens of any row of map.json"),
        ("visibility", "token", "1", "has the token of an earlier row, 1"),
    ],
)
def test_a_wrong_value_is_named_with_its_table(city_copy, table, field, value, words):
    change_row(city_copy, table, lambda row: row.update({field: value}))
    # where no map has a log, the fault is reported for the log
    where = "log.json, row 0" if field == "log_tokens" else f"{table}.json, row "
    assert_refused([city_copy / VERSION, where, words], city_copy)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is not valid JSON"),
        (b"[{]", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (nested_lists(100_000).encode(), "is not valid JSON"),
        (b"{}", "is not a list of rows"),
        (b"[[]]", "row 0: is not an object"),
        (b"[null]", "row 0: is not an object"),
    ],
)
def test_a_file_that_is_no_table_is_named(city_copy, content, words):
    (city_copy / VERSION / "sensor.json").write_bytes(content)
    assert_refused([city_copy / VERSION / "sensor.json", words], city_copy)


def test_an_image_without_a_size_is_named(city_copy):
    file = city_copy / VERSION / "sample_data.json"
    rows = json.loads(file.read_text())
    number = next(i for i, row in enumerate(rows) if "CAM_BACK/" in row["filename"])
    rows[number]["width"] = 0
    file.write_text(json.dumps(rows))
    assert_refused([f"sample_data.json, row {number}: height and width of an image are 72 and 0"], city_copy)


@pytest.mark.parametrize(
    "channel, table, field, value, words",
    [
        ("LIDAR_TOP", "sample_data", "timestamp", 10**15, "its timestamp is -5324"),  # in 2001; all others are in 2018
        ("LIDAR_TOP", "sample_data", "timestamp", 1_532_402_926_000_000, "its timestamp is -"),  # 1 s before its scene
        ("LIDAR_TOP", "ego_pose", "translation", [9e3, 9e3, 0], "m from that of the LiDAR frame before"),
        ("CAM_BACK", "ego_pose", "translation", [9e3, 9e3, 0], "puts a camera "),
    ],
)
def test_a_jump_in_time_or_space_is_named(city_copy, channel, table, field, value, words):
    """The wrong value is in a channel's fourth sample_data record, or in its ego pose (which has the same token)."""
    frames = json.loads((city_copy / VERSION / "sample_data.json").read_text())
    token = [row["token"] for row in frames if f"/{channel}/" in row["filename"]][3]
    rows = json.loads((city_copy / VERSION / f"{table}.json").read_text())
    number = next(i for i, row in enumerate(rows) if row["token"] == token)
    rows[number][field] = value
    (city_copy / VERSION / f"{table}.json").write_text(json.dumps(rows))
    assert_refused([f"{table}.json, row ", words], city_copy)


def test_invalid_boxes_are_left_out_and_named(city_copy, capsys):
    before = NuScenesDataset(city_copy, VERSION, "mini_val", Data()).index
    assert not len(before.left_out)
    file = city_copy / VERSION / "sample_annotation.json"
    rows = json.loads(file.read_text())
    samples = {token.decode() for token in before.tokens}
    numbers = [i for i, r in enumerate(rows) if r["sample_token"] in samples and r["num_lidar_pts"] > 0][-4:]
    wrong = (
        {"size": [float("nan"), 2, 1]},
        {"size": [1e9, 2, 1]},
        {"rotation": [2, 0, 0, 0]},
        {"translation": [9e6, 0, 0]},
    )
    for number, change in zip(numbers, wrong, strict=True):
        rows[number].update(change)
    file.write_text(json.dumps(rows))
    dataset = NuScenesDataset(city_copy, VERSION, "mini_val", Data())
    messages = b" ".join(dataset.index.left_out).decode()
    assert all(f"row {number}: " in messages for number in numbers)
    assert len(dataset.index.labels) == len(before.labels) - 4 and np.isfinite(dataset.index.boxes).all()
    assert dataset.index.box_offsets[-1] == len(dataset.index.boxes)
    assert "4 boxes of sample_annotation.json are left out: row " in capsys.readouterr().err
    assert np.abs(dataset.index.boxes[:, 7:]).max() < 200  # m/s: none is computed from a wrong translation


def test_a_home_folder_is_expanded(city_copy, monkeypatch):
    monkeypatch.setenv("HOME", str(city_copy.parent))
    assert NuScenesDataset("~/city", VERSION, "mini_val", Data()).root == city_copy


def test_scenes_reports_a_damaged_scene_table(city_copy):
    dataset = NuScenesDataset(city_copy, VERSION, "mini_val", Data())
    (city_copy / VERSION / "scene.json").write_text("[3]")
    with pytest.raises(DataError, match="scene.json, row 0"):
        dataset.scenes()
