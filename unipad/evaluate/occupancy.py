"""Occupancy metrics of Occ3D-nuScenes: a class for every voxel of every keyframe, written in the benchmark's format.

    <folder>/occupancy/<sample token>.npz        arr_0: [200, 200, 16] uint8 class 0 to 17

mIoU is that of the benchmark (CVPR 2023 challenge): IoUs from one confusion matrix of all voxels that the cameras of
their keyframe see, and the mean over all classes except free. A class that occurs neither in the labels nor in
predictions has no IoU, and the mean leaves it out; one that is only predicted has IoU 0.
"""

import json
import math
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import torch

from unipad.batch import FREE, OCCUPANCY_CLASSES
from unipad.data.dataset import DrivingDataset
from unipad.evaluate.frames import predict_all
from unipad.evaluate.rayiou import THRESHOLDS, RayCounts, count_rays
from unipad.model.occupancy import OccupancyModel
from unipad.runtime import World, on_main


@dataclass(frozen=True)
class Counts:
    """What the metrics need of a frame, or the sum over several."""

    confusion: np.ndarray  # [true, predicted] int64 voxels that cameras see
    rays: RayCounts | None  # None: RayIoU is not asked for

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.confusion + other.confusion, None if self.rays is None else self.rays + other.rays)


def evaluate_occupancy(
    model: OccupancyModel, dataset: DrivingDataset, folder: Path, world: World, workers: int = 0
) -> dict[str, float]:
    """mIoU and IoU (of full against free) over a split, the same in every process.

    dataset: frames of the split that have labels; each process of `world` takes its share of them.
    folder:  for `occupancy_summary.json`.
    workers: data loading processes per process.

    A frame that cannot be read does not count.
    """
    counts = count_all(model, dataset, world, workers=workers)
    return on_main(lambda: headline(summarize(counts.values(), folder)), world)


def count_all(
    model: OccupancyModel,
    dataset: DrivingDataset,
    world: World,
    batch_size: int = 1,
    workers: int = 0,
    folder: Path | None = None,
    rays: bool = False,
) -> dict[str, Counts | None] | None:
    """{sample token: `Counts`, or None without labels} of a split, in the main process; None in the others.

    folder: for the predictions, a file per frame; None writes none. rays: count RayIoU's rays too. The other arguments
    as for `evaluate_occupancy`; `predict_all` describes how bad frames are handled.
    """
    origins = dataset.lidar_origins() if rays else {}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    def predict(batch):
        found = []
        for b, (token, classes) in enumerate(zip(batch.tokens, model.predict(batch), strict=True)):
            if folder is not None:
                np.savez_compressed(folder / f"{token}.npz", classes.cpu().numpy())
            labels = None if batch.occupancy is None else batch.occupancy[b]
            found.append(None if labels is None else count(classes, labels, origins.get(token)))
        return found

    consequence = "they are not scored and have no file"
    counts = predict_all(model, dataset, world, predict, batch_size, workers, "predicting voxels", consequence)
    # a frame without prediction must have no file; other splits' files stay
    for token in dataset.tokens() if folder is not None and world.is_main else ():
        if token not in counts:
            (folder / f"{token}.npz").unlink(missing_ok=True)
    return counts


def count(classes: torch.Tensor, labels: torch.Tensor, origins: np.ndarray | None = None) -> Counts:
    """`Counts` of one frame. classes: [X, Y, Z] predicted; labels: [3, X, Y, Z] as in `Batch`; origins: [K, 3] of
    RayIoU's rays."""
    true, _, seen_by_cameras = labels
    seen, n = seen_by_cameras > 0, len(OCCUPANCY_CLASSES)
    pairs = torch.bincount(true[seen].long() * n + classes[seen].long(), minlength=n * n)
    rays = None if origins is None else count_rays(classes, true, origins)
    return Counts(pairs.view(n, n).cpu().numpy(), rays)


def summarize(counts, folder: Path | None = None) -> dict:
    """The metrics of frames' `Counts`, also written to `occupancy_summary.json` in `folder`, if given.

    Returns miou and iou in [0, 1], iou_per_class: class -> value; with rays also rayiou, the mean over thresholds and
    classes, rayiou_per_threshold, and rayiou_per_class: class -> value of each threshold. NaN, and
    null in the file: the class is absent.
    """
    total = reduce(add, counts)
    right, true, predicted = (total.confusion.diagonal(), *(total.confusion.sum(axis=i) for i in (1, 0)))
    union = true + predicted - right
    ious = np.divide(right, union, out=np.full(len(union), np.nan), where=union > 0)[:FREE]
    full = total.confusion[:FREE, :FREE].sum()
    names = OCCUPANCY_CLASSES[:FREE]
    summary = {
        "miou": mean(ious),
        "iou": float(full / max(total.confusion.sum() - total.confusion[FREE, FREE], 1)),
        "iou_per_class": dict(zip(names, ious.tolist(), strict=True)),
    }
    if total.rays is not None:
        of_rays = total.rays.ious()
        summary |= {
            "rayiou": mean(of_rays),
            "rayiou_per_threshold": {f"{most:g} m": mean(row) for most, row in zip(THRESHOLDS, of_rays, strict=True)},
            "rayiou_per_class": dict(zip(names, of_rays.T.tolist(), strict=True)),
        }
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "occupancy_summary.json").write_text(json.dumps(_with_null(summary), indent=2) + "\n")
    return summary


def _with_null(value):
    """A summary with None for each NaN, which is not JSON."""
    if isinstance(value, dict):
        return {name: _with_null(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_null(inner) for inner in value]
    return None if math.isnan(value) else value


def mean(values: np.ndarray) -> float:
    """The mean of those that are not NaN; NaN if all are."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def headline(summary: dict) -> dict[str, float]:
    """mIoU, IoU and, with rays, RayIoU."""
    names = {"mIoU": "miou", "IoU": "iou", "RayIoU": "rayiou"}
    return {name: summary[key] for name, key in names.items() if key in summary}


def occupancy_table(summary: dict) -> str:
    """The summary as text: the means, then each class."""
    lines = [f"{name}: {value:.4f}" for name, value in headline(summary).items()]
    of_thresholds, of_rays = summary.get("rayiou_per_threshold", {}), summary.get("rayiou_per_class", {})
    lines += [f"RayIoU at {name}: {value:.4f}" for name, value in of_thresholds.items()]
    heads = "".join(f"{f'Ray {name}':>9}" for name in of_thresholds)
    lines += ["", "Per-class results:", f"{'Class':<22}{'IoU':>8}{heads}"]
    for name, iou in summary["iou_per_class"].items():
        lines.append(f"{name:<22}{iou:>8.3f}" + "".join(f"{value:>9.3f}" for value in of_rays.get(name, ())))
    return "\n".join(lines)
