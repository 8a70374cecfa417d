"""How good detections are: every frame of a split over all processes, then the devkit."""

from unipad.evaluate.frames import of_all_frames
from unipad.evaluate.submission import headline, score_submission, write_submission
from unipad.model.detect import Detections
from unipad.runtime import from_main


def evaluate_detections(model, dataset, folder, world, detect=None, size=1, workers=0):
    """Detect in every frame of a split and let the devkit judge.

    model, dataset, world, detect, size, workers: as for `detect_all`.
    folder: gets `results_nusc.json` and `metrics_summary.json` (the devkit's, see `submission.table`).

    Returns dict: NDS, mAP, mATE (meters), mASE, mAOE (radians), mAVE (m/s), mAAE; the same in every process. A frame
    that cannot be read counts as one in which nothing was found.
    """
    found = detect_all(model, dataset, world, detect, size, workers)
    metrics = None
    if world.is_main:
        file = submit(found, model.recipe, dataset, folder)
        metrics = headline(score_submission(file, dataset.root, dataset.version, dataset.split))
    return from_main(metrics, world)


def submit(found, recipe, dataset, folder):
    """Write what `detect_all` found to folder/results_nusc.json; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results_nusc.json"
    write_submission(found, dataset.index, file, recipe.camera is not None, recipe.lidar is not None)
    return file


def detect_all(model, dataset, world, detect=None, size=1, workers=0):
    """What a model finds in every frame of a dataset: {sample token: `Detections` on the host} in the main process,
    None in the others.

    model:  a `Detector`. dataset, world, size, workers: as for `of_all_frames`, which says what becomes of bad frames.
    detect: function of a batch instead of `model.detect`, such as `tta.detect_tta` makes.
    """

    def found_in(batch):
        found = (detect or model.detect)(batch)
        return [Detections(one.boxes.float().cpu(), one.scores.float().cpu(), one.labels.cpu()) for one in found]

    return of_all_frames(model, dataset, world, found_in, size, workers, "detecting")
