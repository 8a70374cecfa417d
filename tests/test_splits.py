"""splits.json: custom splits, in a dataset version of any name."""

import json

import pytest
import torch

from unipad.config import Data
from unipad.data.dataset import DataError
from unipad.data.nuscenes import NuScenesDataset
from unipad.evaluate.submission import score_submission, write_submission
from unipad.model.detect import Detections

pytestmark = pytest.mark.usefixtures("own_user_cache")


@pytest.fixture
def root(city_copy):
    """Root of a dataset with version rig-7 and scenes harbor and tunnel."""
    folder = (city_copy / "v1.0-mini").rename(city_copy / "rig-7")
    (folder / "lidarseg.json").unlink()  # the devkit would look for its labels in lidarseg/rig-7, which is missing
    table = folder / "scene.json"
    table.write_text(table.read_text().replace("scene-0061", "harbor").replace("scene-0103", "tunnel"))
    # the endings _train and _val say what a split is for; the name dark does not
    write_splits(city_copy, {"city_train": ["harbor"], "city_val": ["tunnel"], "dark": ["tunnel"]})
    return city_copy


def write_splits(root, splits):
    (root / "rig-7/splits.json").write_text(json.dumps(splits))


def scene_names(root, split):
    return list(NuScenesDataset(root, "rig-7", split, Data()).scenes())


def test_custom_splits_are_read_and_scored(root, tmp_path):
    """The devkit finds the scenes of city_val too: with their ground truth as detections, AP of cars is 1."""
    assert NuScenesDataset.splits(root, "rig-7") == {"train": "city_train", "val": "city_val", "dark": "dark"}
    assert NuScenesDataset.train_val_splits(root, "rig-7") == ("city_train", "city_val")
    assert scene_names(root, "city_train") == ["harbor"]
    assert scene_names(root, "city_val") == scene_names(root, "dark") == ["tunnel"]
    dataset, ground_truth = NuScenesDataset(root, "rig-7", "city_val", Data()), {}
    for sample in (dataset[i] for i in range(len(dataset))):
        boxes, labels = torch.from_numpy(sample.boxes), torch.from_numpy(sample.labels)
        ground_truth[sample.token] = Detections(boxes, scores=torch.ones(len(boxes)), labels=labels)
    file = tmp_path / "results_nusc.json"
    write_submission(ground_truth, dataset.index, file, use_camera=False, use_lidar=True)
    summary = score_submission(file, dataset.root, "rig-7", "city_val")
    assert summary["mean_dist_aps"]["car"] == pytest.approx(1)


def test_a_changed_splits_json_takes_effect(root):
    assert scene_names(root, "city_train") == ["harbor"]
    write_splits(root, {"city_train": ["tunnel"], "city_val": ["harbor"]})
    assert scene_names(root, "city_train") == ["tunnel"]


def test_splits_json_adds_to_the_splits_of_nuscenes(city_copy):
    (city_copy / "v1.0-mini/splits.json").write_text('{"dark": ["scene-0103"]}')
    assert NuScenesDataset.splits(city_copy, "v1.0-mini") == {"train": "mini_train", "val": "mini_val", "dark": "dark"}


def test_a_scene_of_nuscenes_own_split_for_the_other_purpose_is_refused(city_copy):
    """scene-0103 is in mini_val, which stays the split for validation."""
    (city_copy / "v1.0-mini/splits.json").write_text('{"my_train": ["scene-0103"]}')
    with pytest.raises(DataError, match=r"scene-0103 is both for training \(my_train\) and .* \(mini_val\)"):
        NuScenesDataset(city_copy, "v1.0-mini", "my_train", Data())


@pytest.mark.parametrize(
    "splits, words",
    [
        ('{"city_train": ', "not a JSON file"),
        ("[1]", "must map names of splits"),
        ('{"city_train": "harbor"}', "must map names of splits"),
        ('{"train": ["harbor"]}', "nuScenes' own; call it city_train"),
        ('{"city_train": []}', "no scene in its split city_train"),
        ('{"../city_train": ["harbor"]}', "use letters, digits"),
        ('{"": ["harbor"]}', "use letters, digits"),
        ('{"a_train": ["harbor"], "b_train": ["harbor"]}', "two splits for train"),
        ('{"city_train": ["harbour"]}', "the scene harbour"),  # misspelled, so not in scene.json
        ('{"city_train": ["harbor"], "city_val": ["harbor"]}', r"for training \(city_train\) and for validation"),
    ],
)
def test_a_wrong_splits_json_is_named_in_a_one_line_error(root, splits, words):
    (root / "rig-7/splits.json").write_text(splits)
    with pytest.raises(DataError, match=words) as refused:
        scene_names(root, "city_train")
    assert "rig-7/splits.json" in str(refused.value) and "\n" not in str(refused.value)
