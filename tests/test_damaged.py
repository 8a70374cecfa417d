"""Damaged files of every kind are refused in one sentence, skipped with a message, or read with the same result; with
another result only where no check can detect the damage (see tests/damage.py).

Two random cases of each kind; `python -m tests.damage --cases N` runs more. `EXAMPLES` are cases that once gave a
traceback or a wrong result without a message.
"""

import io
import json
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import damage, scripts
from tests.readers import KINDS, Kind, Readout
from unipad.checkpoint import read_training
from unipad.errors import UserError
from unipad.names import CODE_WEIGHTS

pytestmark = pytest.mark.slow
CASES = 2  # of each kind


@pytest.fixture(scope="module")
def result_of(city):
    """name -> `Result` of every case. Run in a process without threads, since each case is read in a fork of it."""
    code = "import sys, tests.test_damaged as t; t.run_all_cases(sys.argv[1])"
    done = scripts.run("-c", code, city)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: damage.Result(*result) for name, result in json.loads(done.stdout.splitlines()[-1]).items()}


def run_all_cases(city):
    """Print {name: [outcome, reason]} of all cases."""
    with tempfile.TemporaryDirectory() as folder:
        harness = damage.Harness(Path(folder), city=Path(city))
        results = {}
        for kind in KINDS:
            for number in range(CASES):
                result = harness.read_damaged(*harness.case(seed=0, number=number, kind=kind))
                results[f"{kind} {number}"] = result.outcome, result.reason
        for name, (kind, pattern, change) in EXAMPLES.items():
            file = sorted(harness.intact.glob(pattern))[0].relative_to(harness.intact)
            # "wrong type" is one of `damage.DETECTABLE`: another result than the intact file's is a fault
            result = harness.read_damaged(kind, file, "wrong type", lambda path, change=change: rewrite(path, change))
            results[name] = result.outcome, result.reason
    print(json.dumps(results))


def rewrite(path, change):
    """Replace a file by one with the bytes `change(data)`, or by a folder if that is None."""
    data = path.read_bytes()
    path.unlink()  # it may be a hard link to the intact file, which must not change
    changed = change(data)
    if changed is None:
        path.mkdir()
    else:
        path.write_bytes(changed)


def in_json(change):
    """bytes -> changed bytes of a JSON file: `change` modifies the parsed tree or returns another one."""

    def rewritten(data):
        tree = json.loads(data)
        return json.dumps(change(tree) or tree).encode()

    return rewritten


def in_checkpoint(change):
    """As `in_json`, for a checkpoint."""

    def rewritten(data):
        tree, file = torch.load(io.BytesIO(data), weights_only=True), io.BytesIO()
        torch.save(change(tree) or tree, file)
        return file.getvalue()

    return rewritten


# `put`, `remove` and `fill` return a `change` for `in_json` and `in_checkpoint`; path: keys into nested dicts and lists


def put(*path_and_value):
    """Set the entry at a path; `put("a", 0, 3)` sets tree["a"][0] = 3."""

    def change(tree):
        *path, key, value = path_and_value
        for outer_key in path:
            tree = tree[outer_key]
        tree[key] = value

    return change


def remove(*path):
    """Delete the entry at a path."""

    def change(tree):
        *outer_keys, key = path
        for outer_key in outer_keys:
            tree = tree[outer_key]
        del tree[key]

    return change


def fill(*path):
    """Fill the tensor at a path with NaN."""

    def change(tree):
        for key in path:
            tree = tree[key]
        tree.fill_(torch.nan)

    return change


# These two return a change of a file's bytes


def put_float(index, value):
    """Set number `index` of a file of float32, of which a LiDAR point has five."""

    def change(data):
        numbers = np.frombuffer(data, np.float32).copy()
        numbers[index] = value
        return numbers.tobytes()

    return change


def overwrite(fraction, size, byte):
    """Overwrite `size` bytes by `byte`, beginning at this fraction of the file."""

    def change(data):
        first = int(fraction * len(data))
        return data[:first] + bytes([byte]) * size + data[first + size :]

    return change


TABLES, LAST = "city/v1.0-mini/", "run/checkpoints/last.pt"
WEIGHT = "model", "encoder.lidar.encoder.encoder_layers.encoder_layer1.0.bn1.bias"  # path in the checkpoint
# name -> (kind of `readers.KINDS`, pattern of the file, change of its bytes). Kinds of checkpoints are named after what
# is done with them ("resumed", "init", ...), except "original": one of UniPAD, to convert.
EXAMPLES = {
    # tables
    "deep nesting": ("tables", TABLES + "visibility.json", lambda data: b"[" * 100_000 + data + b"]" * 100_000),
    "a record is null": ("tables", TABLES + "scene.json", in_json(put(0, None))),
    "a record is a number": ("tables", TABLES + "sample_data.json", in_json(put(0, 7.5))),
    "a name is a dict": ("tables", TABLES + "scene.json", in_json(put(0, "name", {}))),
    "a size is NaN": ("tables", TABLES + "sample_annotation.json", in_json(put(0, "size", [float("nan")] * 3))),
    "a record of the log table is a text": ("tables", TABLES + "log.json", in_json(lambda tree: ["text"])),
    "a table is not UTF-8": ("tables", TABLES + "log.json", lambda data: b"\xb7" + data),
    "an intrinsic is empty": ("tables", TABLES + "calibrated_sensor.json", in_json(put(1, "camera_intrinsic", [[]]))),
    # LiDAR
    "a coordinate is 1e10": ("LiDAR keyframe", "city/samples/LIDAR_TOP/*", put_float(10, 1e10)),
    "points are zeros": ("LiDAR keyframe", "city/samples/LIDAR_TOP/*", lambda data: bytes(len(data))),
    "a coordinate is 3e38": ("LiDAR keyframe", "city/samples/LIDAR_TOP/*", put_float(0, 3e38)),
    # caches
    "objects with zeros": ("objects", "city/unipad-index/*-objects-*.bin", overwrite(0.5, size=4096, byte=0)),
    "objects with 0xff": ("objects", "city/unipad-index/*-objects-*.bin", overwrite(0.2, size=4096, byte=255)),
    "an index with zeros": ("index", "city/unipad-index/*mini_train.npz", overwrite(0.5, size=64, byte=0)),
    # checkpoints
    "weights with zeros": ("evaluated", "detector.pt", overwrite(0.5, size=8192, byte=0)),
    "weights with 0xff": ("init", LAST, overwrite(0.2, size=8192, byte=255)),
    "weights of an original with zeros": ("original", "original.pth", overwrite(0.5, size=8192, byte=0)),
    "a state with zeros": ("resumed", LAST, overwrite(0.7, size=8192, byte=0)),
    "a checkpoint has no known entry": ("resumed", LAST, in_checkpoint(lambda tree: {"": 0})),
    "a checkpoint is a list": ("resumed", LAST, in_checkpoint(lambda tree: [tree])),
    "a step is a list": ("resumed", LAST, in_checkpoint(put("step", []))),
    "no optimizer": ("resumed", LAST, in_checkpoint(lambda tree: {k: v for k, v in tree.items() if k != "optimizer"})),
    "an optimizer is a text": ("resumed", LAST, in_checkpoint(put("optimizer", "text"))),
    "an optimizer has no state of a weight": ("resumed", LAST, in_checkpoint(remove("optimizer", "state", 2))),
    "a mean gradient is NaN": ("resumed", LAST, in_checkpoint(fill("optimizer", "state", 2, "exp_avg"))),
    "an option of an optimizer is a list": (
        "resumed",
        LAST,
        in_checkpoint(put("optimizer", "param_groups", 1, "lr", [])),
    ),
    "a weight of a run is NaN": ("resumed", LAST, in_checkpoint(fill(*WEIGHT))),
    "a setting of a run is a tensor": ("resumed", LAST, in_checkpoint(put("config", "args", "seed", torch.zeros(2)))),
    "a weight to start from is NaN": ("init", LAST, in_checkpoint(fill(*WEIGHT))),
    "a weight to start from is a number": ("init", LAST, in_checkpoint(put(*WEIGHT, 3))),
    "a weight to start from is missing": ("pretrained", LAST, in_checkpoint(remove(*WEIGHT))),
    "a weight of a detector is null": ("evaluated", "detector.pt", in_checkpoint(put(*WEIGHT, None))),
    "a weight of a detector is complex": ("evaluated", "detector.pt", in_checkpoint(put(*WEIGHT, torch.zeros(8) * 1j))),
    "a version is a dict": ("evaluated", "detector.pt", in_checkpoint(put("config", "args", "version", {}))),
    "a weight to convert is NaN": ("converted", "detector.pt", in_checkpoint(fill(*WEIGHT))),
    "a weight of an original is NaN": (
        "original",
        "original.pth",
        in_checkpoint(fill("state_dict", "pts_backbone.blocks.0.0.weight")),
    ),
    "code weights of an original are NaN": (
        "original",
        "original.pth",
        in_checkpoint(fill("state_dict", CODE_WEIGHTS)),
    ),
    "flags are a number": ("resumed", LAST, in_checkpoint(put("config", "args", 3))),
    "a setting is a text": (
        "evaluated",
        "detector.pt",
        in_checkpoint(put("config", "recipe", "augment", "scale", ["text"])),
    ),
    "a setting is null": (
        "converted",
        "detector.pt",
        in_checkpoint(put("config", "recipe", "grid", "low", [None] * 3)),
    ),
    "a list of settings is short": (
        "converted",
        "detector.pt",
        in_checkpoint(put("config", "recipe", "grid", "low", [0.0])),
    ),
    # settings and logs
    "settings are nested": ("config", "run/config.json", lambda data: b"[" * 100_000 + data),
    "a flag is a list": ("config", "run/config.json", in_json(put("args", "seed", [1]))),
    "a number of processes is 1e308": ("config", "run/config.json", in_json(put("args", "workers", 1e308))),
    "a recipe is a number": ("config", "run/config.json", in_json(put("recipe", "optim", 3))),
    "a log line is a number": ("log", "run/log.jsonl", lambda data: b"3\n" + data),
    "a log line is not UTF-8": ("log", "run/log.jsonl", lambda data: b"\xff\n" + data),
    "a log is a folder": ("log", "run/log.jsonl", lambda data: None),
    "tuning results are nested": ("tuning", "run/tuning.json", lambda data: b"[" * 100_000 + data),
    "tuning results are a list": ("tuning", "run/tuning.json", lambda data: b"[]"),
    # results
    "results are cut": ("submission", "results_nusc.json", lambda data: data[: len(data) // 2]),
    "classes of points are a folder": ("segments", "segments/lidarseg/*/*.bin", lambda data: None),
    "results are a folder": ("submission", "results_nusc.json", lambda data: None),
    "a class of results is a dict": (
        "submission",
        "results_nusc.json",
        lambda data: re.sub(rb'"detection_name": "\w+"', b'"detection_name": {}', data),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_random_damage_causes_no_fault(kind, result_of):
    of_kind = {name: result for name, result in result_of.items() if re.fullmatch(rf"{kind} \d+", name)}
    assert len(of_kind) == CASES
    assert not {name: result for name, result in of_kind.items() if result.outcome in damage.FAULTS}


@pytest.mark.parametrize("name", EXAMPLES)
def test_damage_that_once_caused_a_fault_causes_none(name, result_of):
    assert result_of[name].outcome not in damage.FAULTS, result_of[name].reason


# What a fake reader does -> (the reader, expected outcome). Where SILENT is expected, the file counts as one with a
# checksum (`Kind.checked`): a changed result is then a fault, without a checksum only `other`.
FAKE_READERS = {
    "refuses": (lambda folder: _refuse(f"{folder}/file is damaged."), "refused"),
    "refuses without a name": (lambda folder: _refuse("it is damaged."), "TRACEBACK"),
    "raises": (lambda folder: {}["x"], "TRACEBACK"),
    "exits": (lambda folder: exit(2), "TRACEBACK"),
    "sleeps": (lambda folder: time.sleep(60), "HANG"),
    "reads what it must not": (lambda folder: Readout({"part": content_of(folder)}), "SILENT"),
    "reads what is possible": (lambda folder: Readout({"part": content_of(folder)}), "other"),
    "reads the impossible": (lambda folder: Readout({}, faults=["violated: a condition"]), "SILENT"),
    "computes it again": (lambda folder: Readout({"part": "1"}), "same"),
    "skips": (lambda folder: Readout({}, {"part": f"{folder}/file: is damaged"}), "skipped"),
    "skips without a name": (lambda folder: Readout({}, {"part": "is damaged"}), "TRACEBACK"),
    "loses a part": (lambda folder: Readout({}), "SILENT"),
}


def _refuse(sentence):
    raise UserError(sentence)


def content_of(folder):
    """The content of the changed file, in place of a digest."""
    return (folder / "file").read_text()


@pytest.mark.parametrize("name", FAKE_READERS)
def test_outcomes_are_classified(name, tmp_path):
    """`Harness.read_damaged` with fake readers, for a file that contains "1" and is changed to "2"."""
    read, outcome = FAKE_READERS[name]
    kind = Kind("file", read, checked=outcome == "SILENT")
    harness = damage.Harness.__new__(damage.Harness)  # without `__init__`, which makes files of all kinds
    harness.folder, harness.intact, harness.kinds = tmp_path, tmp_path / "intact", {"kind": kind}
    harness.expected = {"kind": Readout({"part": "1"})}
    harness.intact.mkdir()
    (harness.intact / "file").write_text("1")
    # "zeros" is not one of `damage.DETECTABLE`: for a changed result, `checked` decides between SILENT and other
    result = harness.read_damaged(
        "kind", Path("file"), "zeros", lambda path: rewrite(path, lambda data: b"2"), seconds=1
    )
    assert result.outcome == outcome, result


def test_a_case_is_determined_by_its_number(tmp_path):
    """So that `python -m tests.damage --only NUMBER` can run it again."""
    harness = damage.Harness.__new__(damage.Harness)  # without `__init__`, which makes files of all kinds
    harness.kinds, harness.intact, harness.others = KINDS, tmp_path / "intact", [tmp_path / "other"]
    harness.others[0].write_bytes(b"other")
    harness.files = {name: [harness.intact / "file", harness.intact / "another"] for name in KINDS}

    def damaged(number):
        kind, file, name, change = harness.case(seed=1, number=number, kind="image")
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        path.write_bytes(bytes(range(200)))
        change(path)
        return kind, file, name, path.read_bytes() if path.is_file() else path.exists()

    first = [damaged(number) for number in range(40)]
    assert first == [damaged(number) for number in range(40)]
    assert {name for _, _, name, _ in first} > {"cut", "missing", "zeros"} and len(set(first)) > 30


def test_metrics_of_a_checkpoint_are_all_numbers_or_all_dicts(tmp_path):
    saved = {"model": {}, "optimizer": {}, "scaler": {}, "step": 1, "validated": 0}
    saved["config"] = {"args": {}, "recipe": {}, "steps": 2}
    numbers = {"psnr": 1.0}
    for metrics in ({}, numbers, {"after": numbers}, {"before": numbers, "after": numbers}):
        torch.save(saved | {"metrics": metrics}, tmp_path / "last.pt")
        assert read_training(tmp_path / "last.pt")["metrics"] == metrics
    for metrics in ({"before": numbers, "after": 5}, {"before": numbers, "after": {"ssim": 1.0}}, {"psnr": "high"}):
        torch.save(saved | {"metrics": metrics}, tmp_path / "last.pt")
        with pytest.raises(UserError, match="its metrics"):
            read_training(tmp_path / "last.pt")
