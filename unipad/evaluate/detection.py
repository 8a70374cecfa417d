"""Detection metrics: predict every frame of a split over all processes, then score with the devkit."""

from collections.abc import Callable
from pathlib import Path

from unipad.config import Recipe
from unipad.data.nuscenes import NuScenesDataset
from unipad.evaluate.frames import predict_all
from unipad.evaluate.submission import headline, score_submission, write_submission
from unipad.model.detect import Detections, Detector
from unipad.runtime import World, on_main


def evaluate_detections(
    model: Detector,
    dataset: NuScenesDataset,
    folder: Path,
    world: World,
    detect: Callable | None = None,
    size: int = 1,
    workers: int = 0,
) -> dict[str, float]:
    """Detect in every frame of a split and score with the devkit.

    model, dataset, world, detect, size, workers: as for `detect_all`.
    folder: for `results_nusc.json` and `metrics_summary.json`, the devkit's summary.

    Returns NDS, mAP, mATE (meters), mASE, mAOE (radians), mAVE (m/s), mAAE; the same in every process. A frame of
    which a file is missing or cannot be read counts as one without detections, since the devkit scores whole splits.
    """
    detections = detect_all(model, dataset, world, detect, size, workers)

    def score():
        file = submit(detections, model.recipe, dataset, folder)
        return headline(score_submission(file, dataset.root, dataset.version, dataset.split))

    return on_main(score, world)


def submit(detections: dict[str, Detections], recipe: Recipe, dataset: NuScenesDataset, folder: Path) -> Path:
    """Write the result of `detect_all` to folder/results_nusc.json; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results_nusc.json"
    write_submission(detections, dataset.index, file, recipe.camera is not None, recipe.lidar is not None)
    return file


def detect_all(
    model: Detector,
    dataset: NuScenesDataset,
    world: World,
    detect: Callable | None = None,
    size: int = 1,
    workers: int = 0,
) -> dict[str, Detections] | None:
    """{sample token: `Detections` on the host} for every frame, in the main process; None in the others.

    dataset, world, size, workers: as for `predict_all`, which describes how bad frames are handled.
    detect: function of a batch in place of `model.detect`, such as `tta.detect_tta`.
    """

    def predict(batch):
        detections = (detect or model.detect)(batch)
        return [Detections(one.boxes.float().cpu(), one.scores.float().cpu(), one.labels.cpu()) for one in detections]

    consequence = "they count as frames without detections"
    return predict_all(model, dataset, world, predict, size, workers, "detecting", consequence)
