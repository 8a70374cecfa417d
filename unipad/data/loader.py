"""Samples in the order of training: micro-batch i is a function of i and the seed alone.

Position p of the stream is frame `permutation(seed, p // n)[p % n]` of a dataset with n frames. The i-th micro-batches
of all processes are the next micro_batch * world positions, contiguous for each process. So a stream started at a later
micro-batch resumes exactly where another one stopped, two processes see what one sees, and no frame is dropped at the
end of an epoch.
"""

import itertools
import math
import signal
import sys
from collections.abc import Iterator

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from unipad.batch import Batch
from unipad.data.dataset import BadFrame, DataError, DrivingDataset, collate


def step_batches(
    dataset: DrivingDataset,
    micro_batch: int,
    start: int = 0,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pinned: bool = False,
    paste_until: float = math.inf,
) -> Iterator[tuple[Batch, list[str]]]:
    """Yield (Batch, bad_frames) for the micro-batches from `start` on, endlessly.

    micro_batch: samples in a micro-batch of one of the `world` processes; this one is `rank`.
    workers:     processes that load; 0 loads in this one.
    pinned:      put batches in pinned memory, so that copies to a GPU are asynchronous.
    paste_until: position of the stream from which on nothing is pasted into samples.
    bad_frames:  `path: reason` of each frame that could not be read. Another one, drawn at random, takes its place; a
        bad frame is reported each time it would be read.

    Raises `DataError` when `TRIES` frames for one place cannot be read.
    """
    loader = DataLoader(
        MicroBatches(dataset, micro_batch, seed, rank, world, paste_until),
        batch_size=None,  # an item is a whole batch already
        sampler=itertools.count(start),
        num_workers=workers,
        worker_init_fn=init_worker,
        pin_memory=pinned,
        generator=torch.Generator(),  # or the loader would draw from the global one
    )
    for batch, bad_frames in loader:
        if batch is None:
            raise _none_readable(bad_frames)
        yield batch, bad_frames


def held_out_batches(dataset: DrivingDataset, count: int, rank: int = 0, world: int = 1) -> Iterator[tuple[int, Batch]]:
    """Yield (position, Batch of one) for `count` frames spread evenly over the dataset, in order.

    Process `rank` of `world` gets every world-th of them. A frame that cannot be read is reported on stderr and
    replaced by the next one. Raises `DataError` when `TRIES` of them in a row cannot be read.
    """
    count = min(count, len(dataset))
    for position in range(rank, count, world):
        bad_frames = []
        first = position * len(dataset) // count
        following = (frame % len(dataset) for frame in range(first, first + len(dataset)))
        sample = _first_readable(dataset, following, bad_frames)
        if sample is None:
            raise _none_readable(bad_frames)
        for frame in bad_frames:
            print(f"skipped {frame}", file=sys.stderr)
        yield position, collate([sample])


def all_batches(
    dataset: DrivingDataset, size: int = 1, rank: int = 0, world: int = 1, workers: int = 0, pinned: bool = False
) -> Iterator[tuple[Batch | None, list[str]]]:
    """Yield (Batch, bad_frames) over every frame once, in order; process `rank` of `world` gets every world-th frame.

    size:       samples per batch.
    bad_frames: `path: reason` of each frame that could not be read. Nothing takes its place: the batch has fewer
        samples, and is None instead of empty.
    """
    loader = DataLoader(
        ReadableFrames(dataset),
        batch_size=size,
        sampler=range(rank, len(dataset), world),
        collate_fn=_of_readable,
        num_workers=workers,
        worker_init_fn=init_worker,
        pin_memory=pinned,
        generator=torch.Generator(),
    )
    yield from loader


class ReadableFrames(Dataset):
    """Item i is the sample of frame i, or `path: reason` where it cannot be read."""

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


class MicroBatches(Dataset):
    """Item i is what `step_batches` yields for micro-batch i; None instead of the batch when no frame can be read."""

    def __init__(self, dataset, micro_batch, seed, rank, world, paste_until):
        self.dataset, self.micro_batch, self.seed = dataset, micro_batch, seed
        self.rank, self.world, self.paste_until = rank, world, paste_until

    def __getitem__(self, i):
        samples, bad_frames = [], []
        for position, frame in self.frames(i):
            rng = np.random.default_rng([self.seed, position, 1])
            unreadable = len(bad_frames)
            sample = _first_readable(
                self.dataset, self._candidates(frame, position), bad_frames, rng, position < self.paste_until
            )
            if sample is None:
                return None, bad_frames[unreadable:]
            samples.append(sample)
        return collate(samples), bad_frames

    def _candidates(self, frame, position):
        """`frame`, then all others in random order: if always the next one took the place of a bad frame, the one after
        many bad ones would be most of what is seen."""
        yield frame
        others = np.random.default_rng([self.seed, position, 3]).permutation(len(self.dataset))
        yield from (int(other) for other in others if other != frame)

    def frames(self, i):
        """Positions in the stream of this process's micro-batch i, and their indices into the dataset."""
        n = len(self.dataset)
        first = (i * self.world + self.rank) * self.micro_batch
        positions = range(first, first + self.micro_batch)
        order = {e: np.random.default_rng([self.seed, e]).permutation(n) for e in {p // n for p in positions}}
        return [(p, int(order[p // n][p % n])) for p in positions]


TRIES = 256  # frames in a row: even if nine of ten cannot be read, this many in a row are one case in 10^12


def _first_readable(dataset, frames, bad_frames, rng=None, paste=False):
    """The sample of the first of `frames` that can be read, at most `TRIES`; bad ones are added to `bad_frames`."""
    for frame in itertools.islice(frames, TRIES):
        try:
            return dataset.read(frame, rng, paste)
        except BadFrame as bad:
            bad_frames.append(str(bad))
    return None


def _none_readable(bad_frames):
    return DataError(
        f"none of the {len(bad_frames)} frames can be read ({bad_frames[0]}); correct the files, or unpack them again."
    )


def init_worker(_):
    """Run first in each worker process of a DataLoader."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Ctrl-C reaches every process of the terminal; the main one decides what to do and terminates its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how the main process terminates it
