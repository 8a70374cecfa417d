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
    batch_size: int = 1,
    workers: int = 0,
) -> dict[str, float]:
    """Detect in every frame of a split and score with the devkit.

    dataset: all frames of a split; each process of `world` takes its share of them.
    folder:  for `results_nusc.json` and `metrics_summary.json`, the devkit's summary.
    detect:  function of a batch in place of `model.detect`, such as
        `partial(tta.detect_tta, model.detect, transforms)`.
    batch_size: samples per batch and process. workers: data loading processes per process.

    Returns NDS, mAP, mATE (meters), mASE, mAOE (radians), mAVE (m/s), mAAE; the same in every process. A frame of
    which a file is missing or cannot be read counts as one without detections, since the devkit scores whole splits.
    """
    detections = detect_all(model, dataset, world, detect, batch_size, workers)

    def score():
        file = write_detections(detections, model.recipe, dataset, folder)
        return headline(score_submission(file, dataset.root, dataset.version, dataset.split))

    return on_main(score, world)


def write_detections(detections: dict[str, Detections], recipe: Recipe, dataset: NuScenesDataset, folder: Path) -> Path:
    """Write the result of `detect_all` to folder/results_nusc.json, as a submission to nuScenes; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results_nusc.json"
    uses = {"use_camera": recipe.camera is not None, "use_lidar": recipe.lidar is not None}
    write_submission(detections, dataset.index, file, **uses)
    return file


def detect_all(
    model: Detector,
    dataset: NuScenesDataset,
    world: World,
    detect: Callable | None = None,
    batch_size: int = 1,
    workers: int = 0,
) -> dict[str, Detections] | None:
    """{sample token: `Detections` on the host} for every frame, in the main process; None in the others.

    Arguments as for `evaluate_detections`; `predict_all` describes how bad frames are handled.
    """

    def predict(batch):
        detections = (detect or model.detect)(batch)
        return [Detections(one.boxes.float().cpu(), one.scores.float().cpu(), one.labels.cpu()) for one in detections]

    consequence = "they count as frames without detections"
    return predict_all(model, dataset, world, predict, batch_size, workers, "detecting", consequence)
