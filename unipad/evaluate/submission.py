"""Detections -> `results_nusc.json` in nuScenes' format, scored by the unmodified devkit.

The devkit fails on boxes without a size or with numbers that are not finite, so these are not written. It also fails on
a file without any box (from an untrained model): here such a file gets mAP and NDS 0 and all errors 1.
"""

import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from unipad.batch import CLASSES
from unipad.boxes import boxes_to_global
from unipad.data.index import Index
from unipad.errors import UserError
from unipad.model.detect import Detections

MAX_BOXES = 500  # boxes per sample; nuScenes' rule
MOVING = 0.2  # m/s; faster objects count as moving, as in the original

VEHICLE = ("vehicle.parked", "vehicle.moving")
CYCLE = ("cycle.without_rider", "cycle.with_rider")
# class -> attribute (at rest, moving), since attributes are not predicted; as in the original
ATTRIBUTES = {
    "car": VEHICLE,
    "truck": VEHICLE,
    "construction_vehicle": VEHICLE,
    "bus": ("vehicle.stopped", "vehicle.moving"),
    "trailer": VEHICLE,
    "barrier": ("", ""),
    "motorcycle": CYCLE,
    "bicycle": CYCLE,
    "pedestrian": ("pedestrian.standing", "pedestrian.moving"),
    "traffic_cone": ("", ""),
}

# Name of a mean error in papers -> its key in the devkit's summary; in the order of papers
ERRORS = {"mATE": "trans_err", "mASE": "scale_err", "mAOE": "orient_err", "mAVE": "vel_err", "mAAE": "attr_err"}


def write_submission(detections: dict[str, Detections], index: Index, file: Path, use_camera: bool, use_lidar: bool):
    """Write the detections of a split; every sample of it becomes a key of `results`.

    detections: by sample token, on the host, in the LiDAR frame of the keyframe; samples may be missing.
    index:      of the split.
    """
    results = {}
    for token, lidar_row in zip(index.tokens, index.frame_lidar, strict=True):
        token, lidar2global = token.decode(), index.lidar2global[lidar_row]
        results[token] = _records(detections[token], token, lidar2global) if token in detections else []
    uses = {"use_camera": use_camera, "use_lidar": use_lidar, "use_radar": False, "use_map": False}
    file.write_text(json.dumps({"meta": uses | {"use_external": False}, "results": results}))


def _records(detections, token, lidar2global):
    """The best `MAX_BOXES` boxes of one sample as the records of a submission."""
    boxes, scores, labels = (t.numpy() for t in (detections.boxes, detections.scores, detections.labels))
    valid = np.isfinite(boxes).all(axis=1) & np.isfinite(scores) & (boxes[:, 3:6] > 0).all(axis=1)
    rows = np.nonzero(valid)[0]
    rows = rows[np.argsort(-scores[rows], kind="stable")][:MAX_BOXES]
    centers, sizes, rotations, velocities = (a.tolist() for a in boxes_to_global(boxes[rows], lidar2global))
    moving = np.hypot(*boxes[rows, 7:].T) > MOVING  # speed from vx, vy
    names = [CLASSES[label] for label in labels[rows]]
    return [
        {
            "sample_token": token,
            "translation": center,
            "size": size,
            "rotation": rotation,
            "velocity": velocity,
            "detection_name": name,
            "detection_score": score,
            "attribute_name": ATTRIBUTES[name][int(moves)],
        }
        for center, size, rotation, velocity, name, score, moves in zip(
            centers, sizes, rotations, velocities, names, scores[rows].tolist(), moving, strict=True
        )
    ]


def score_submission(file: Path, root: Path, version: str, split: str) -> dict:
    """The devkit's summary of the detection metrics (CVPR 2019); writes `metrics_summary.json` next to `file`.

    root: the dataset's folder, from `unipad.data.tables.find_root`. On the full nuScenes this takes half a minute and
    several GB of memory. Raises `UserError` if the devkit fails.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")  # the devkit imports pyplot, which looks for a display
    from nuscenes import NuScenes
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.detection.evaluate import DetectionEval

    config = config_factory("detection_cvpr_2019")
    try:
        written = json.loads(file.read_text())
        has_boxes = any(written["results"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} does not hold the results of a detector ({type(error).__name__}).") from None
    if has_boxes:
        with devkit_errors(root / version), tempfile.TemporaryDirectory() as plots:  # which the devkit requires
            nusc = NuScenes(version, str(root), verbose=False)
            metrics, _ = DetectionEval(nusc, config, str(file), split, plots, verbose=False).evaluate()
    else:
        # without the constructor, which fails: `evaluate` reads only these attributes of `self`
        nothing = {"gt_boxes": EvalBoxes(), "pred_boxes": EvalBoxes()}
        metrics, _ = DetectionEval.evaluate(SimpleNamespace(cfg=config, verbose=False, **nothing))
    summary = metrics.serialize() | {"meta": written["meta"]}
    (file.parent / "metrics_summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


@contextmanager
def devkit_errors(tables: Path):
    """Context in which the devkit scores; raises `UserError` where it fails, as on a split without true boxes."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"the nuScenes devkit cannot score with {tables} ({reason}): check its tables.") from error


def headline(summary: dict) -> dict[str, float]:
    """NDS, mAP and the five mean errors of true positives."""
    errors = {name: summary["tp_errors"][key] for name, key in ERRORS.items()}
    return {"NDS": summary["nd_score"], "mAP": summary["mean_ap"]} | errors


def table(summary: dict) -> str:
    """The summary as the devkit prints it: the means, then each class."""
    values = headline(summary)
    lines = [f"{name}: {values[name]:.4f}" for name in ("mAP", *ERRORS, "NDS")]
    heads = ("AP", *(name[1:] for name in ERRORS))
    lines += ["", "Per-class results:", f"{'Object Class':<22}" + "".join(f"{head:>8}" for head in heads)]
    for name, ap in summary["mean_dist_aps"].items():
        errors = [summary["label_tp_errors"][name][key] for key in ERRORS.values()]
        lines.append(f"{name:<22}" + "".join(f"{value:>8.3f}" for value in (ap, *errors)))
    return "\n".join(lines)
