"""Samples in the order of training: a stream of batches that is a function of the pass alone.

Position p of the stream is frame `permutation(seed, p // n)[p % n]` of a dataset with n frames. A pass takes the next
share * world positions, each process a contiguous share of them. So a stream that starts at a later pass goes on
exactly where another one stopped, two processes see what one sees, and no frame is dropped at the end of an epoch.
"""

import itertools
import math
import signal
import sys

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from unipad.data.dataset import BadFrame, DataError, collate


def step_batches(dataset, share, start=0, seed=0, rank=0, world=1, workers=0, pinned=False, paste_until=math.inf):
    """Yield (Batch, bad_frames) for the passes from `start` on, without end.

    share:      samples of one pass of one of the `world` processes; this one is `rank`.
    workers:    processes that load; 0 loads in this one.
    pinned:     lay the batches in pinned memory, from where a GPU copies without waiting.
    paste_until: position of the stream from which on nothing is pasted into samples.
    bad_frames: list of `path: reason` of the frames that could not be read. In place of such a frame stands the next
        one of the dataset that can; it is named each time its turn comes.

    Raises `DataError` when no frame at all can be read.
    """
    loader = DataLoader(
        Passes(dataset, share, seed, rank, world, paste_until),
        batch_size=None,  # an item of the dataset is a whole batch already
        sampler=itertools.count(start),
        num_workers=workers,
        worker_init_fn=start_worker,
        pin_memory=pinned,
        generator=torch.Generator(),  # or the loader would draw from the global one
    )
    for batch, bad_frames in loader:
        if batch is None:
            raise _none_readable(dataset, bad_frames)
        yield batch, bad_frames


def held_out_batches(dataset, count, rank=0, world=1):
    """Yield (position, Batch of one) for `count` frames spread evenly over the dataset, in order.

    Process `rank` of `world` gets every world-th of them. A frame that cannot be read is named on stderr and replaced
    by the next one.
    Raises `DataError` when no frame at all can be read.
    """
    count = min(count, len(dataset))
    for position in range(rank, count, world):
        bad_frames = []
        sample = _read_from(dataset, position * len(dataset) // count, bad_frames)
        if sample is None:
            raise _none_readable(dataset, bad_frames)
        for frame in bad_frames:
            print(f"skipped {frame}", file=sys.stderr)
        yield position, collate([sample])


def all_batches(dataset, size=1, rank=0, world=1, workers=0, pinned=False):
    """Yield (Batch, bad_frames) until every frame was there once, in order; process `rank` of `world` gets every
    world-th of them.

    size:       samples of a batch.
    bad_frames: list of `path: reason` of the frames that could not be read. Nothing stands in their place: a batch has
        fewer samples, and is None where it would have none.
    """
    loader = DataLoader(
        Readable(dataset),
        batch_size=size,
        sampler=range(rank, len(dataset), world),
        collate_fn=_of_readable,
        num_workers=workers,
        worker_init_fn=start_worker,
        pin_memory=pinned,
        generator=torch.Generator(),
    )
    yield from loader


class Readable(Dataset):
    """`dataset[i]` is the sample of frame i, or `path: reason` where it cannot be read."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, i):
        try:
            return self.dataset[i]
        except BadFrame as bad:
            return str(bad)


def _of_readable(items):
    samples = [item for item in items if not isinstance(item, str)]
    return collate(samples) if samples else None, [item for item in items if isinstance(item, str)]


class Passes(Dataset):
    """`dataset[i]` is what `step_batches` yields for pass i; None instead of the batch when no frame can be read."""

    def __init__(self, dataset, share, seed, rank, world, paste_until=math.inf):
        self.dataset, self.share, self.seed, self.rank, self.world = dataset, share, seed, rank, world
        self.paste_until = paste_until

    def __getitem__(self, i):
        samples, bad_frames = [], []
        for position, frame in self.frames(i):
            rng = np.random.default_rng([self.seed, position, 1])
            sample = _read_from(self.dataset, frame, bad_frames, rng, position < self.paste_until)
            if sample is None:
                return None, bad_frames
            samples.append(sample)
        return collate(samples), bad_frames

    def frames(self, i):
        """Positions in the stream of this process's share of pass i, and their indices into the dataset."""
        n = len(self.dataset)
        first = (i * self.world + self.rank) * self.share
        positions = range(first, first + self.share)
        order = {e: np.random.default_rng([self.seed, e]).permutation(n) for e in {p // n for p in positions}}
        return [(p, int(order[p // n][p % n])) for p in positions]


def _read_from(dataset, first, bad_frames, rng=None, paste=False):
    """The sample of frame `first` or of the next one that can be read; those that cannot are added to `bad_frames`."""
    for k in range(len(dataset)):
        try:
            return dataset.read((first + k) % len(dataset), rng, paste)
        except BadFrame as bad:
            bad_frames.append(str(bad))
    return None


def _none_readable(dataset, bad_frames):
    return DataError(f"none of the {len(dataset)} frames can be read ({bad_frames[0]}); unpack the set's files there.")


def start_worker(_):
    """What a process of a DataLoader does first."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Ctrl-C reaches every process of the terminal; the main one decides what to do and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # this is how it ends them
