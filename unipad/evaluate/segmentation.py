"""Segmentation metrics: a class for every point of every keyframe, written in nuScenes' format, scored by the devkit.

    <folder>/lidarseg/<split>/<LIDAR_TOP sample_data token>_lidarseg.bin    uint8 1 to 16, ordered as the LiDAR file
    <folder>/<split>/submission.json                                        the sensors that were used

The devkit's evaluation requires every scene of nuScenes' official split, and stops at an invalid file without
naming it. Here it scores the frames that have a prediction, after every file has been validated.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from unipad.batch import LIDARSEG_CLASSES
from unipad.data.nuscenes import NuScenesDataset
from unipad.errors import UserError
from unipad.evaluate.frames import predict_all
from unipad.evaluate.submission import devkit_errors
from unipad.model.segment import Segmenter
from unipad.runtime import World, on_main


def evaluate_segmentation(
    model: Segmenter,
    dataset: NuScenesDataset,
    folder: Path,
    world: World,
    segment: Callable | None = None,
    batch_size: int = 1,
    workers: int = 0,
) -> dict[str, float]:
    """Segment every frame of a split and score with the devkit.

    dataset: all frames of a split, with all their points (no `point_range`), since each of them needs a class; each
        process of `world` takes its share of the frames.
    folder:  for the files and `segmentation_summary.json` (see `score_segmentation`).
    segment: function of a batch in place of `model.segment`, such as
        `partial(tta.segment_tta, model.logits, transforms)`.
    batch_size: samples per batch and process. workers: data loading processes per process.

    Returns mIoU, mAcc, allAcc, the same in every process. A frame that cannot be read does not count.
    """
    predictions = segment_all(model, dataset, world, segment, batch_size, workers)

    def score():
        write_segmentation(predictions, dataset, folder)
        return headline(score_segmentation(folder, dataset, predictions))

    return on_main(score, world)


def segment_all(
    model: Segmenter,
    dataset: NuScenesDataset,
    world: World,
    segment: Callable | None = None,
    batch_size: int = 1,
    workers: int = 0,
) -> dict[str, torch.Tensor] | None:
    """{sample token: [K] uint8 classes of its points, on the host}, in the main process; None in the others.

    Arguments as for `evaluate_segmentation`; `predict_all` describes how bad frames are handled.
    """

    def predict(batch):
        return [classes.cpu() for classes in (segment or model.segment)(batch)]

    consequence = "they are not scored and have no file"
    return predict_all(model, dataset, world, predict, batch_size, workers, "segmenting", consequence)


def write_segmentation(predictions: dict[str, torch.Tensor], dataset: NuScenesDataset, folder: Path):
    """Write the result of `segment_all` as a submission to nuScenes; a frame without prediction must have no
    file, so its file of an earlier evaluation is removed."""
    files = _files(dataset, folder)
    for subfolder in (folder / "lidarseg" / dataset.split, folder / dataset.split):
        subfolder.mkdir(parents=True, exist_ok=True)
    for token, file in files.items():
        if token in predictions:
            file.write_bytes(predictions[token].numpy().tobytes())
        else:
            file.unlink(missing_ok=True)
    uses = {"use_camera": False, "use_lidar": True, "use_radar": False, "use_map": False, "use_external": False}
    (folder / dataset.split / "submission.json").write_text(json.dumps({"meta": uses}, indent=2) + "\n")


def score_segmentation(folder: Path, dataset: NuScenesDataset, tokens: Iterable[str] | None = None) -> dict:
    """Score written files with the devkit's LidarSegEval; writes `segmentation_summary.json`.

    dataset: all frames of the split.
    tokens:  of the samples to score; None: all of the split.

    Returns miou, freq_weighted_iou, macc and allacc in [0, 1], iou_per_class and acc_per_class: class -> value. The
    accuracies come from the devkit's confusion matrix. A class without true points has accuracy NaN, and IoU NaN if it
    is not predicted either; the means leave out what is NaN.
    Raises `UserError` for a missing or invalid file, and where the devkit fails.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")  # the devkit imports pyplot, which looks for a display
    from nuscenes import NuScenes
    from nuscenes.eval.lidarseg.evaluate import LidarSegEval
    from nuscenes.eval.lidarseg.utils import ConfusionMatrix, LidarsegClassMapper

    index, files = dataset.index, _files(dataset, folder)
    tokens = dict.fromkeys(files if tokens is None else tokens)  # ordered, with fast lookup
    for token, label_file in zip(index.tokens, index.lidarseg_files, strict=True):
        if token.decode() in tokens:
            check_classes(files[token.decode()], dataset.root / label_file.decode())
    with devkit_errors(dataset.root / dataset.version):
        nusc = NuScenes(dataset.version, str(dataset.root), verbose=False)
        mapper = LidarsegClassMapper(nusc)
        names = {number: name for name, number in mapper.coarse_name_2_coarse_idx_mapping.items()}
        confusions = ConfusionMatrix(len(names), mapper.ignore_class["index"])
        # The constructor of LidarSegEval refuses a split that lacks a scene, so this stands in for its `self`
        evaluation = SimpleNamespace(
            nusc=nusc, mapper=mapper, id2name=names, global_cm=confusions, verbose=False,
            results_folder=str(folder), eval_set=dataset.split, sample_tokens=list(tokens),
        )  # fmt: skip
        summary = LidarSegEval.evaluate(evaluation)
    ious = {name: float(iou) for name, iou in summary["iou_per_class"].items() if name in LIDARSEG_CLASSES}
    counts = confusions.global_cm[1:, 1:]  # [16 true, 16 predicted], without class 0, which is ignored
    points, right = counts.sum(axis=1), counts.diagonal()
    accuracies = np.divide(right, points, out=np.full(len(points), np.nan), where=points > 0)
    summary |= {
        "iou_per_class": ious,
        "acc_per_class": dict(zip(LIDARSEG_CLASSES, accuracies.tolist(), strict=True)),
        "macc": float(np.nanmean(accuracies)),
        "allacc": float(right.sum() / points.sum()),
    }
    (folder / "segmentation_summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def check_classes(file: Path, label_file: Path):
    """Raises `UserError` unless `file` has one uint8 class from 1 to 16 per byte of `label_file`, the ground truth."""
    try:
        classes, count = np.fromfile(file, np.uint8), label_file.stat().st_size
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: every frame of the split needs one.") from None
    except IsADirectoryError as error:
        raise UserError(f"{error.filename} is a folder; it needs to be a file.") from None
    if len(classes) != count:
        raise UserError(f"{file} has {len(classes)} classes for {count} points; it needs one byte per point.")
    wrong = classes[(classes < 1) | (classes > len(LIDARSEG_CLASSES))]
    if len(wrong):
        raise UserError(f"{file} holds class {wrong[0]}; the classes are 1 to {len(LIDARSEG_CLASSES)}.")


def headline(summary: dict) -> dict[str, float]:
    """mIoU, mAcc and allAcc."""
    return {"mIoU": summary["miou"], "mAcc": summary["macc"], "allAcc": summary["allacc"]}


def segmentation_table(summary: dict) -> str:
    """The summary as text: the means, then each class."""
    lines = [f"{name}: {value:.4f}" for name, value in headline(summary).items()]
    lines += ["", "Per-class results:", f"{'Class':<22}{'IoU':>8}{'Acc':>8}"]
    accuracies = summary["acc_per_class"]
    lines += [f"{name:<22}{iou:>8.3f}{accuracies[name]:>8.3f}" for name, iou in summary["iou_per_class"].items()]
    return "\n".join(lines)


def _files(dataset, folder):
    """{sample token: file of its predicted classes} of the split."""
    tokens, lidar_tokens = dataset.index.tokens, dataset.index.lidar_tokens
    folder = folder / "lidarseg" / dataset.split
    pairs = zip(tokens, lidar_tokens, strict=True)
    return {token.decode(): folder / f"{lidar_token.decode()}_lidarseg.bin" for token, lidar_token in pairs}
