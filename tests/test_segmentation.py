"""Segmentation: evaluation with the devkit, and runs of the scripts."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
from tests.test_eval import ONE_PROCESS, evaluate, save_run
from tests.test_train import checkpoint, curve
from unipad.batch import LIDARSEG_CLASSES
from unipad.data.collate import collate
from unipad.data.nuscenes import NuScenesDataset
from unipad.errors import UserError
from unipad.evaluate.segmentation import (
    evaluate_segmentation,
    score_segmentation,
    segment_all,
    segmentation_table,
    write_segmentation,
)
from unipad.evaluate.tta import make_transforms, segment_tta
from unipad.model.pretrain import Pretrain
from unipad.model.segment import Segmenter, classes_of
from unipad.recipes import PRETRAIN, SEGMENT

RECIPE = SEGMENT["lidar"]["tiny"]
BUS, CAR = (1 + LIDARSEG_CLASSES.index(name) for name in ("bus", "car"))  # 0: no label


@pytest.fixture(scope="module")
def validation(city):
    return NuScenesDataset(city, "v1.0-mini", "mini_val", RECIPE.data)


def perfect_segmenter(batch):
    """The labels of a batch as predictions, class 1 where there is none: one-hot logits, through `classes_of`."""
    one_hot = torch.nn.functional.one_hot((batch.point_labels.long() - 1).clamp(min=0), len(LIDARSEG_CLASSES))
    return classes_of(batch, one_hot)


@pytest.mark.parametrize("split", ["mini_train", "mini_val"])
def test_the_synthetic_dataset_has_every_class_in_both_splits(split, city):
    dataset = NuScenesDataset(city, "v1.0-mini", split, RECIPE.data)
    labels = np.concatenate([dataset[i].point_labels for i in range(len(dataset))])
    assert np.bincount(labels, minlength=17).all()  # 16 classes, and 0 for points without a label


def files_of(validation, folder):
    """The files of predicted classes of mini_val, one per frame."""
    index = validation.index
    return [folder / "lidarseg" / "mini_val" / f"{token.decode()}_lidarseg.bin" for token in index.lidar_tokens]


@pytest.fixture(scope="module")
def perfect(validation, tmp_path_factory):
    """(folder, metrics) of the ground truth as predictions, written to files and scored."""
    folder, model = tmp_path_factory.mktemp("perfect"), Segmenter(RECIPE).train()
    metrics = evaluate_segmentation(model, validation, folder, ONE_PROCESS, perfect_segmenter, batch_size=2)
    assert model.training  # restored
    return folder, metrics


def test_ground_truth_scores_one(perfect, validation):
    folder, metrics = perfect
    assert metrics == {"mIoU": 1, "mAcc": 1, "allAcc": 1}
    summary = json.loads((folder / "segmentation_summary.json").read_text())
    assert list(summary["iou_per_class"]) == list(LIDARSEG_CLASSES) and set(summary["iou_per_class"].values()) == {1.0}
    words = segmentation_table(summary)
    assert "mIoU: 1.0000" in words and all(name in words for name in LIDARSEG_CLASSES)
    meta = json.loads((folder / "mini_val" / "submission.json").read_text())["meta"]
    assert meta["use_lidar"] and not any(used for name, used in meta.items() if name != "use_lidar")
    sizes = [len(validation[i].points) for i in range(len(validation))]
    assert [file.stat().st_size for file in files_of(validation, folder)] == sizes  # one byte per point


def test_the_devkits_check_accepts_the_folder(perfect, validation, city):
    from nuscenes import NuScenes
    from nuscenes.eval.lidarseg import validate_submission

    nusc = NuScenes("v1.0-mini", str(city), verbose=False)
    scenes = {"mini_val": ["scene-0103"]}  # the synthetic dataset has only one of the two scenes of mini_val
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nuscenes.eval.lidarseg.utils.create_splits_scenes", lambda verbose: scenes)
        validate_submission.validate_submission(nusc, str(perfect[0]), "mini_val")


def test_metrics_by_hand(validation, tmp_path):
    """Every second point on a car is predicted as bus: the devkit's metrics equal those computed from counts."""
    predicted = {}
    for i in range(len(validation)):
        sample = validation[i]
        classes = sample.point_labels.clip(1)
        points_on_cars = np.flatnonzero(sample.point_labels == CAR)
        classes[points_on_cars[::2]] = BUS
        predicted[sample.token] = torch.from_numpy(classes)
    labels = np.concatenate([validation[i].point_labels for i in range(len(validation))])
    classes = np.concatenate([c.numpy() for c in predicted.values()])
    write_segmentation(predicted, validation, tmp_path)
    summary = score_segmentation(tmp_path, validation)
    # numbers of points
    cars, buses, labeled = (labels == CAR).sum(), (labels == BUS).sum(), (labels > 0).sum()
    wrong = ((labels == CAR) & (classes == BUS)).sum()
    assert summary["iou_per_class"]["car"] == pytest.approx(1 - wrong / cars)
    assert summary["iou_per_class"]["bus"] == pytest.approx(buses / (buses + wrong))
    # 14 of the 16 classes are perfect, and the recall of bus is 1
    assert summary["miou"] == pytest.approx((14 + (cars - wrong) / cars + buses / (buses + wrong)) / 16)
    assert summary["macc"] == pytest.approx((15 + (cars - wrong) / cars) / 16)
    assert summary["allacc"] == pytest.approx(1 - wrong / labeled)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda classes: classes[:-3], r"has \d+ classes for \d+ points"),
        (lambda classes: np.append(classes, classes[:1]), r"has \d+ classes for \d+ points"),
        (lambda classes: np.where(np.arange(len(classes)) == 7, 0, classes), "holds class 0; the classes are 1 to 16"),
        (
            lambda classes: np.where(np.arange(len(classes)) == 7, 17, classes),
            "holds class 17; the classes are 1 to 16",
        ),
        (None, "is missing: every frame of the split needs one"),
    ],
    ids=["short", "long", "class 0", "class 17", "missing"],
)
def test_a_wrong_file_is_a_user_error(damage, words, perfect, validation, tmp_path):
    folder = shutil.copytree(perfect[0], tmp_path / "eval")
    file = files_of(validation, folder)[1]
    classes = np.fromfile(file, np.uint8)
    file.unlink()
    if damage is not None:
        damage(classes).astype(np.uint8).tofile(file)
    with pytest.raises(UserError, match=f"{file.name} {words}") as error:
        score_segmentation(folder, validation)
    assert "\n" not in str(error.value)


def test_unreadable_frames_are_named_and_do_not_count(city, tmp_path, capsys):
    root = shutil.copytree(city, tmp_path / "city")
    dataset = NuScenesDataset(root, "v1.0-mini", "mini_val", RECIPE.data)
    file = root / dataset.index.lidar_files[dataset.index.frame_lidar[1]].decode()
    file.write_bytes(file.read_bytes()[:-7])
    stale = files_of(dataset, tmp_path / "eval")[1]
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier model")
    metrics = evaluate_segmentation(Segmenter(RECIPE), dataset, tmp_path / "eval", ONE_PROCESS, perfect_segmenter)
    out, err = capsys.readouterr()
    assert metrics["mIoU"] == 1 and f"skipped {file}: is truncated" in err
    assert "incomplete: 1 of 3 frames of mini_val have no prediction" in out and "they are not scored" in out
    assert [f.exists() for f in files_of(dataset, tmp_path / "eval")] == [True, False, True]


def test_logits_of_views_are_summed_per_point(validation):
    """A view is a rotated and flipped copy of the points. Ground truth as logits stays perfect. Logits equal to x and y
    cancel in the sum over all eight views, not over seven."""
    eight = make_transforms(angles=np.radians([0, 90]))  # each angle with four flips
    linear_parts = {tuple(np.round(view[:2, :2], 6).flatten() + 0) for view in eight}  # + 0: no -0
    assert len(linear_parts) == 8  # no two views are the same

    def logits(batch):
        return torch.nn.functional.one_hot((batch.point_labels.long() - 1).clamp(min=0), 16)

    predicted = segment_all(Segmenter(RECIPE), validation, ONE_PROCESS, lambda b: segment_tta(logits, eight, b))
    for i in range(len(validation)):
        assert np.array_equal(predicted[validation[i].token], validation[i].point_labels.clip(1))

    def by_position(batch):
        x, y = batch.points[:, 0], batch.points[:, 1]
        return torch.stack([x, y, torch.full_like(x, 1e-4)], dim=1)  # the third is the largest where x and y cancel

    batch = collate([validation[0]])
    (of_seven,), (of_eight,) = (segment_tta(by_position, views, batch) for views in (eight[:7], eight))
    assert len(of_seven.unique()) > 1 and (of_eight == 3).all()  # classes count from 1


SMALL = ["--preset", "tiny", "--device", "cpu", "--workers", 0, "--log-every", 1]


@pytest.fixture(scope="module")
def runs(city, tmp_path_factory):
    """Parent of two run folders: `pre`, of pre-training but with random weights, and `run`, two steps of fine-tuning
    from it. The learning rate is so small that the encoder's weights stay those of `pre`."""
    folder = tmp_path_factory.mktemp("segment")
    save_run(folder / "pre", Pretrain(PRETRAIN["lidar"]["segment-tiny"]), city)
    finetune.main(parse(city, folder / "run", "--pretrained", folder / "pre", "--steps", 2, "--lr", 1e-12))
    return folder


def parse(city, out, *flags):
    """Arguments of finetune.py; of a flag that is given twice, the last one counts."""
    return finetune.parse([*SMALL, "--task", "segment", "--data-root", city, "--out", out, "--steps", 3, *flags])


def test_a_run_writes_its_log_picture_and_config(runs):
    run = runs / "run"
    assert sorted(curve(run)) == [1, 2] and 0 <= curve(run, "val/mIoU")[2] < 0.3  # the model is untrained
    assert curve(run, "train/lovasz")[1] > 0 and curve(run, "train/cross_entropy")[1] > 0
    assert (run / "images" / "val_000002.png").stat().st_size > 10_000
    assert json.loads((run / "config.json").read_text())["args"]["modality"] == "lidar"


def test_the_unet_is_taken_from_pre_training(runs):
    source, weights = (checkpoint(runs / name)["model"] for name in ("pre", "run"))
    # without the buffers of batch norms, which change at any learning rate
    taken = [name for name in weights if name.startswith("encoder.") and "running" not in name and "num" not in name]
    assert len(taken) > 50
    for name in taken:
        torch.testing.assert_close(weights[name], source[name], rtol=1e-5, atol=1e-9)


def test_a_stopped_and_resumed_run_is_bit_equal(city, tmp_path):
    finetune.main(parse(city, tmp_path / "uninterrupted"))
    finetune.main(parse(city, tmp_path / "parts", "--stop-at", 1))
    finetune.main(parse(city, tmp_path / "parts", "--resume", "auto"))
    whole, parts = (checkpoint(tmp_path / name)["model"] for name in ("uninterrupted", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert curve(tmp_path / "uninterrupted") == curve(tmp_path / "parts")


def test_a_run_is_evaluated_and_drawn(runs, capsys):
    evaluate(runs / "run", "--task", "segment", "--batch-size", 2, "--pictures", 1)
    output = capsys.readouterr().out
    assert "mIoU: 0." in output and "allAcc: 0." in output and "driveable_surface" in output
    picture = np.asarray(Image.open(runs / "run" / "eval" / "segments_0.png"))
    assert picture.shape[1] > 1000 and picture.std() > 20


def test_the_test_split_gives_only_a_submission(runs, city, tmp_path, capsys):
    """The dataset is made to look like nuScenes' test set: with other scene names and no labels."""
    root = shutil.copytree(city, tmp_path / "set", ignore=shutil.ignore_patterns("unipad-index", "lidarseg*"))
    tables = root / "v1.0-test"
    (root / "v1.0-mini").rename(tables)
    scenes = json.loads((tables / "scene.json").read_text())
    names = ("scene-0077", "scene-0078")  # of nuScenes' test split
    (tables / "scene.json").write_text(json.dumps([s | {"name": name} for s, name in zip(scenes, names, strict=True)]))
    flags = ["--data-root", root, "--version", "v1.0-test", "--split", "test", "--pictures", 1]
    evaluate(runs / "run", *flags, "--out", tmp_path / "eval")
    assert "no metrics" in capsys.readouterr().out
    assert len(list((tmp_path / "eval" / "lidarseg" / "test").glob("*_lidarseg.bin"))) == 6  # frames
    assert (tmp_path / "eval" / "test" / "submission.json").exists() and (tmp_path / "eval" / "segments_0.png").exists()


@pytest.mark.parametrize(
    "name, flags, words",
    [
        (
            "run",
            ["--task", "detect"],
            ["--task detect needs a run of finetune.py", "is from finetune.py --task"],
        ),
        ("run", ["--min-score", 0.5], ["--min-score", "finetune.py"]),
        ("run", ["--no-masked"], ["--masked", "train.py"]),
        ("pre", ["--task", "segment"], ["--task segment needs a run of finetune.py --task segment", "train.py"]),
    ],
    ids=["task", "score", "masked", "pre-training"],
)
def test_flags_that_do_not_fit_the_run_are_user_errors(name, flags, words, runs):
    with pytest.raises(UserError) as error:
        evaluate(runs / name, *flags)
    assert all(word in str(error.value) for word in words), error.value


def test_other_user_errors(runs, city, tmp_path):
    with pytest.raises(UserError, match="--modality camera does not work with --task segment; use lidar"):
        finetune.main(parse(city, tmp_path / "run", "--modality", "camera"))
    with pytest.raises(UserError, match="17 classes, but nuScenes has 16"):
        recipe = replace(RECIPE, segment=replace(RECIPE.segment, classes=17))
        evaluate(save_run(tmp_path / "17", Segmenter(recipe), city))
    root = shutil.copytree(city, tmp_path / "set", ignore=shutil.ignore_patterns("unipad-index", "lidarseg.json"))
    with pytest.raises(UserError, match="frames without lidarseg labels; unpack nuScenes-lidarseg in"):
        finetune.main(parse(root, tmp_path / "run"))
    with pytest.raises(UserError, match="frames without lidarseg labels"):
        evaluate(runs / "run", "--data-root", root)
