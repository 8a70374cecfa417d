"""Predictions for every frame of a split, over all processes."""

import sys
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

from unipad.batch import Batch
from unipad.data.dataset import DrivingDataset
from unipad.data.loader import all_batches
from unipad.errors import UserError
from unipad.runtime import World, gather_to_main, on_main


@torch.no_grad()
def predict_all(
    model: nn.Module,
    dataset: DrivingDataset,
    world: World,
    predict: Callable[[Batch], list],
    batch_size: int,
    workers: int,
    desc: str,
    consequence: str,
) -> dict | None:
    """{sample token: prediction} for every frame of a dataset, in the main process; None in the others.

    model:   put in eval mode here; its mode is restored afterwards.
    dataset: all frames of a split; each process takes every `world.size`-th frame.
    predict: from a batch on the device to one prediction per sample, on the host.
    batch_size: samples per batch and process. workers: data loading processes per process.
    desc:    label of the progress bar.
    consequence: what becomes of frames without a prediction; printed if there are any, after their number.

    A frame that cannot be read is reported on stderr. It is missing from the result, as are the frames that the dataset
    itself left out since a file is missing; the number of all these is printed. Raises `UserError` if no frame can be
    read.
    """
    was_training = model.training
    model.eval()
    predictions, unreadable = {}, []
    pinned = world.device.type == "cuda"
    silent = None if world.is_main else True  # None: no bar where there is no terminal
    with tqdm(total=len(dataset), desc=desc, unit="frame", leave=False, disable=silent) as bar:
        for batch, bad_frames in all_batches(dataset, batch_size, world.rank, world.size, workers, pinned):
            unreadable += bad_frames
            if batch is not None:
                predictions |= zip(batch.tokens, predict(batch.to(world.device)), strict=True)
            bar.update(batch_size * world.size)  # the other processes are about as far
    model.train(was_training)
    for bad in unreadable:  # `path: reason`
        print(f"skipped {bad}", file=sys.stderr)
    parts = gather_to_main((predictions, unreadable), world)  # in the main process: a pair for each process

    def check():
        if not any(part for part, _ in parts):
            reasons = [bad for _, bad_frames in parts for bad in bad_frames]
            raise UserError(
                f"none of the {len(dataset)} frames can be read ({reasons[0]}); correct the files, "
                "or unpack them again."
            )

    on_main(check, world)
    if not world.is_main:
        return None
    predictions = {token: one for part, _ in parts for token, one in part.items()}
    if missing := dataset.frame_count - len(predictions):
        frames = f"{missing} of {dataset.frame_count} frames of {dataset.split}"
        print(f"incomplete: {frames} have no prediction, since files are missing or damaged: {consequence}")
    return predictions
