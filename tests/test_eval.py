"""Evaluation: what is found, as nuScenes' devkit judges it, and the script as a user runs it."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from unipad.data.nuscenes import NuScenesDataset
from unipad.data.tables import CLASSES
from unipad.errors import UserError
from unipad.evaluate import detect_all, evaluate_detections
from unipad.model.boxes import decode_boxes, encode_boxes
from unipad.model.detect import Detections, Detector
from unipad.recipes import DETECT
from unipad.runtime import World
from unipad.submission import MOST, table, write_submission

ALONE = World(0, 1, torch.device("cpu"))
RECIPE = DETECT["lidar"]["tiny"]
NOTHING = Detections(torch.zeros(0, 9), torch.zeros(0), torch.zeros(0, dtype=torch.int64))


def tiny_detector():
    """An untrained model, small enough for a test."""
    head = replace(RECIPE.detect, queries=20, layers=1)
    return Detector(replace(RECIPE, detect=head))


def validation(root, **settings):
    return NuScenesDataset(root, "v1.0-mini", "mini_val", replace(RECIPE.data, **settings))


def truth_of(batch):
    """A batch's own boxes through the head's code and back, as a perfect detector would find them."""
    labels = batch.labels.split(batch.box_counts.tolist())
    boxes = decode_boxes(encode_boxes(batch.boxes)).split(batch.box_counts.tolist())
    return [Detections(b, torch.ones(len(b)), l) for b, l in zip(boxes, labels, strict=True)]


def test_the_truth_through_code_json_and_devkit_scores_one(city, tmp_path):
    model = tiny_detector().train()
    metrics = evaluate_detections(model, validation(city), tmp_path / "eval", ALONE, truth_of)
    assert model.training
    summary = json.loads((tmp_path / "eval" / "metrics_summary.json").read_text())
    print(table(summary))
    assert metrics["NDS"] == summary["nd_score"] >= 0.99 and metrics["mAP"] > 0.999
    assert max(metrics[name] for name in ("mATE", "mASE", "mAOE")) < 1e-3
    assert metrics["mAVE"] < 0.05


def test_a_model_that_finds_nothing_scores_zero(city, tmp_path):
    metrics = evaluate_detections(tiny_detector(), validation(city), tmp_path, ALONE, lambda batch: [NOTHING])
    assert metrics == {"NDS": 0, "mAP": 0, "mATE": 1, "mASE": 1, "mAOE": 1, "mAVE": 1, "mAAE": 1}
    written = json.loads((tmp_path / "results_nusc.json").read_text())
    assert set(written["results"]) == set(tokens(validation(city))) and not any(written["results"].values())
    words = table(json.loads((tmp_path / "metrics_summary.json").read_text()))
    assert "mAP: 0.0000" in words and "NDS: 0.0000" in words
    lines = {line.split()[0]: line.split()[1:] for line in words.splitlines()[-10:]}
    assert lines.keys() == set(CLASSES)
    assert lines["car"] == ["0.000"] + 5 * ["1.000"]
    assert lines["traffic_cone"] == ["0.000", "1.000", "1.000", "nan", "nan", "nan"]  # it has no front


def tokens(dataset):
    return [token.decode() for token in dataset.index.tokens]


def test_unreadable_frames_are_named_and_empty(city, tmp_path, capsys):
    root = shutil.copytree(city, tmp_path / "city")
    dataset = validation(root)
    lidar = [root / dataset.index.lidar_files[row].decode() for row in dataset.index.frame_lidar]
    lidar[1].write_bytes(lidar[1].read_bytes()[:-7])
    model = tiny_detector()
    found = detect_all(model, dataset, ALONE, truth_of, size=2)
    assert list(found) == [tokens(dataset)[i] for i in (0, 2)]
    assert f"skipped {lidar[1]}: is truncated" in capsys.readouterr().err
    metrics = evaluate_detections(model, dataset, tmp_path / "eval", ALONE, truth_of)
    assert 0.3 < metrics["mAP"] < 0.9
    for file in lidar:
        file.unlink()
    with pytest.raises(UserError, match="none of the 3 frames can be read .*is missing"):
        detect_all(model, dataset, ALONE)


def test_a_submission_by_hand(city, tmp_path):
    """Attributes by class and speed; the best 500; nothing that the devkit stops at."""
    dataset = validation(city)
    index = replace(dataset.index, lidar2global=np.tile(np.eye(4), (len(dataset.index.lidar2global), 1, 1)))
    boxes = torch.tensor([[1.0, 2, 3, 2, 4, 1.5, 0, 0, 0]]).repeat(7, 1)
    boxes[1, 7] = boxes[3, 8] = 0.21
    boxes[4, 3], boxes[5, 0] = 0, math.nan
    names = ["car", "car", "pedestrian", "bicycle", "car", "car", "barrier"]
    labels = torch.tensor([CLASSES.index(name) for name in names])
    few = Detections(boxes, torch.linspace(0.1, 0.7, 7), labels)
    many = Detections(boxes[:1].expand(600, 9), torch.arange(600) / 600, labels[:1].expand(600))
    file = tmp_path / "results_nusc.json"
    first, second, third = tokens(dataset)
    write_submission({first: few, second: many}, index, file, use_camera=False, use_lidar=True)
    written = json.loads(file.read_text())
    assert written["meta"] == {
        "use_camera": False, "use_lidar": True, "use_radar": False, "use_map": False, "use_external": False,
    }  # fmt: skip
    records = written["results"][first]
    assert [(r["detection_name"], r["attribute_name"]) for r in records] == [
        ("barrier", ""),
        ("bicycle", "cycle.with_rider"),
        ("pedestrian", "pedestrian.standing"),
        ("car", "vehicle.moving"),
        ("car", "vehicle.parked"),
    ]
    assert records[-1] == {
        "sample_token": first,
        "translation": [1, 2, 3],
        "size": [2, 4, 1.5],
        "rotation": [1, 0, 0, 0],
        "velocity": [0, 0],
        "detection_name": "car",
        "detection_score": pytest.approx(0.1),
        "attribute_name": "vehicle.parked",
    }
    scores = [r["detection_score"] for r in written["results"][second]]
    assert len(scores) == MOST and min(scores) == pytest.approx(100 / 600)
    assert written["results"][third] == []
