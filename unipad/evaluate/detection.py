"""How good detections are: every frame of a split over all processes, then the devkit."""

import sys

import torch
from tqdm import tqdm

from unipad.data.loader import all_batches
from unipad.errors import UserError
from unipad.evaluate.submission import headline, score_submission, write_submission
from unipad.model.detect import Detections
from unipad.runtime import from_main, to_main


def evaluate_detections(model, dataset, folder, world, detect=None, size=1, workers=0):
    """Detect in every frame of a split and let the devkit judge.

    model, dataset, world, detect, size, workers: as for `detect_all`.
    folder: gets `results_nusc.json` and `metrics_summary.json` (the devkit's, see `submission.table`).

    Returns dict: NDS, mAP, mATE (metres), mASE, mAOE (radians), mAVE (m/s), mAAE; the same in every process. A frame
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


@torch.no_grad()
def detect_all(model, dataset, world, detect=None, size=1, workers=0):
    """What a model finds in every frame of a dataset: {sample token: `Detections` on the host} in the main process,
    None in the others.

    model:   a `Detector`; put in eval mode here and back into the mode it was in.
    dataset: a `NuScenesDataset` of all the split's frames.
    world:   `runtime.World`; each process takes every world-th frame.
    detect:  function of a batch instead of `model.detect`, such as `tta.detect_in_looks` makes.
    size:    samples of a batch; workers: processes that load, for each process.

    A frame that cannot be read is named on stderr and missing in the result. Raises `UserError` if all are.
    """
    was_training = model.training
    model.eval()
    found, unreadable = {}, []
    pinned = world.device.type == "cuda"
    silent = None if world.is_main else True  # None: where nobody watches
    with tqdm(total=len(dataset), desc="detecting", unit="frame", leave=False, disable=silent) as bar:
        for batch, bad_frames in all_batches(dataset, size, world.rank, world.size, workers, pinned):
            unreadable += bad_frames
            if batch is not None:
                for token, one in zip(batch.tokens, (detect or model.detect)(batch.to(world.device)), strict=True):
                    found[token] = Detections(one.boxes.float().cpu(), one.scores.float().cpu(), one.labels.cpu())
            bar.update(size * world.size)
    model.train(was_training)
    for frame in unreadable:
        print(f"skipped {frame}", file=sys.stderr)
    parts = to_main((found, unreadable), world)
    if parts is None:
        return None
    found = {token: one for part, _ in parts for token, one in part.items()}
    if not found:
        reasons = [frame for _, bad_frames in parts for frame in bad_frames]
        raise UserError(f"none of the {len(dataset)} frames can be read ({reasons[0]}); unpack the set's files there.")
    return found
