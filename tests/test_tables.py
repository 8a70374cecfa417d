"""The tables of nuScenes: both layouts, the cached index, and what can be wrong with a dataset."""

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


def test_both_layouts_read_the_same(city, copy, tmp_path):
    (tmp_path / "nested").mkdir()
    copy.rename(tmp_path / "nested" / VERSION)
    nested = NuScenesDataset(tmp_path / "nested", VERSION, "mini_val", Data())[1]
    flat = NuScenesDataset(city, VERSION, "mini_val", Data())[1]
    assert nested.token == flat.token
    np.testing.assert_array_equal(nested.points, flat.points)
    np.testing.assert_array_equal(nested.images, flat.images)


def count_builds(monkeypatch):
    builds, build = [], tables._build
    monkeypatch.setattr(tables, "_build", lambda *a, **k: builds.append(a) or build(*a, **k))
    return builds


def test_the_index_is_built_once_for_all_splits(copy, monkeypatch):
    builds = count_builds(monkeypatch)
    first = NuScenesDataset(copy, VERSION, "mini_val", Data())
    again = NuScenesDataset(copy, VERSION, "mini_val", Data())
    NuScenesDataset(copy, VERSION, "mini_train", Data())
    assert len(builds) == 1
    for name, array in vars(first.index).items():
        np.testing.assert_array_equal(array, getattr(again.index, name))
    assert not list(copy.glob("unipad-index/*.part"))


def test_the_index_is_rebuilt_when_the_tables_change(copy, monkeypatch):
    builds = count_builds(monkeypatch)
    before = NuScenesDataset(copy, VERSION, "mini_val", Data())[0]
    table = copy / VERSION / "sample_annotation.json"
    records = json.loads(table.read_text())
    for record in records:
        record["size"][2] += 1
    table.write_text(json.dumps(records))
    after = NuScenesDataset(copy, VERSION, "mini_val", Data())[0]
    assert len(builds) == 2
    np.testing.assert_allclose(after.boxes[:, 5], before.boxes[:, 5] + 1, atol=1e-5)


def test_a_damaged_index_is_rebuilt(copy, monkeypatch):
    builds = count_builds(monkeypatch)
    NuScenesDataset(copy, VERSION, "mini_val", Data())
    path = copy / "unipad-index" / f"{VERSION}-mini_val.npz"
    path.write_bytes(path.read_bytes()[:1000])
    NuScenesDataset(copy, VERSION, "mini_val", Data())
    assert len(builds) == 2


def test_a_root_that_cannot_be_written_uses_the_users_cache(copy, tmp_path, monkeypatch):
    builds = count_builds(monkeypatch)
    (copy / "unipad-index").write_text("a file where the folder should be")
    for _ in range(2):
        NuScenesDataset(copy, VERSION, "mini_val", Data())
    assert len(builds) == 1
    assert list((tmp_path / "cache" / "unipad").rglob("*.npz"))


def refuse(words, root, version=VERSION, split="mini_val"):
    """The dataset is rejected with one sentence that contains all of `words`."""
    with pytest.raises(DataError) as refused:
        NuScenesDataset(root, version, split, Data())
    sentence = str(refused.value)
    assert all(str(w) in sentence for w in words), sentence
    assert "\n" not in sentence and sentence.endswith(".")


def test_each_fault_of_a_dataset_is_a_user_error(city, copy, tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(["--data-root", tmp_path / "nowhere"], tmp_path / "nowhere")
    refuse([tmp_path / "empty", "no nuScenes tables", f"{VERSION}/scene.json"], tmp_path / "empty")
    refuse([city / VERSION, "the one above"], city / VERSION)
    refuse([city, "--version v1.0-trainval", f"it has {VERSION}"], city, "v1.0-trainval", "train")
    refuse(["no split val", "mini_train and mini_val", "v1.0-trainval"], city, VERSION, "val")
    refuse(["no split nonsense", "mini_train and mini_val"], city, VERSION, "nonsense")

    shutil.rmtree(copy / "maps")
    refuse([copy / VERSION, "map mask"], copy)
    (copy / VERSION / "ego_pose.json").unlink()
    refuse([copy / VERSION, "lacks ego_pose.json"], copy)


def test_a_split_without_scenes_is_rejected(copy):
    table = copy / VERSION / "scene.json"
    table.write_text(table.read_text().replace("scene-0103", "scene-9103").replace("scene-0916", "scene-9916"))
    refuse(["no frame of split mini_val"], copy)
