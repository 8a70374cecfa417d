"""What a model says of every frame of a split, over all processes."""

import sys

import torch
from tqdm import tqdm

from unipad.data.loader import all_batches
from unipad.errors import UserError
from unipad.runtime import to_main


@torch.no_grad()
def of_all_frames(model, dataset, world, predict, size=1, workers=0, doing="looking"):
    """What is predicted for every frame of a dataset: {sample token: prediction} in the main process, None in others.

    model:   put in eval mode here and back into the mode it was in.
    dataset: a `NuScenesDataset` of all the split's frames.
    world:   `runtime.World`; each process takes every world-th frame.
    predict: function of a batch on the device; returns one prediction a sample, on the host.
    size:    samples of a batch; workers: processes that load, for each process; doing: beside the progress bar.

    A frame that cannot be read is named on stderr and missing in the result. Raises `UserError` if all are.
    """
    was_training = model.training
    model.eval()
    found, unreadable = {}, []
    pinned = world.device.type == "cuda"
    silent = None if world.is_main else True  # None: where nobody watches
    with tqdm(total=len(dataset), desc=doing, unit="frame", leave=False, disable=silent) as bar:
        for batch, bad_frames in all_batches(dataset, size, world.rank, world.size, workers, pinned):
            unreadable += bad_frames
            if batch is not None:
                found |= zip(batch.tokens, predict(batch.to(world.device)), strict=True)
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
