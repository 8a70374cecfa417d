"""Batches of a dataset: for training an endless stream of micro-batches, for evaluation some or all frames in order.

Position p of the stream is frame `permutation(seed, p // n)[p % n]` of a dataset with n frames. The i-th micro-batches
of all ranks together cover the i-th group of micro_batch * world positions, split into one contiguous range per rank.
So a stream started at a later micro-batch resumes exactly where another one stopped, two ranks together load the same
frames as one with twice the micro-batch, and no frame is dropped at the end of an epoch.

A rank is one of the `world` training processes; workers are processes of a rank that only load. A frame is given by its
index in the dataset, 0 to n - 1 (`DrivingDataset.frames` maps it to the frame's number in the split).
"""

import collections
import itertools
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Iterable, Iterator

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from unipad.batch import Batch
from unipad.data.collate import collate
from unipad.data.dataset import BadFrame, DataError, DrivingDataset
from unipad.errors import check_memory
from unipad.exit import SIGNALS


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
    """Yield (Batch, bad_frames) endlessly: the micro-batches of the training steps, from micro-batch `start` on.

    micro_batch: samples in a micro-batch of one of the `world` ranks; this one is `rank`.
    workers:     processes that load; 0 loads in this one.
    pinned:      put batches in pinned memory, so that copies to a GPU are asynchronous.
    paste_until: objects are pasted only into samples at positions of the stream below this.
    bad_frames:  `path: reason` of each frame that could not be read. Another one, drawn at random, takes its place; a
        bad frame is listed each time it would be read.

    Raises `DataError` when `TRIES` frames in a row cannot be read for one position.
    """
    _check_batch_size(dataset, micro_batch, workers)
    items = MicroBatches(dataset, micro_batch, seed, rank, world, paste_until)
    for batch, bad_frames in load_items(items, itertools.count(start), workers, pinned):
        if batch is None:
            raise _none_readable(bad_frames)
        yield batch, bad_frames


def held_out_batches(dataset: DrivingDataset, count: int, rank: int = 0, world: int = 1) -> Iterator[tuple[int, Batch]]:
    """Yield (position, Batch of one sample) for `count` frames spread evenly over the dataset, in order; position: 0 to
    count - 1.

    `rank` of `world` gets every world-th of them. A frame that cannot be read is reported on stderr and replaced by the
    next one of the dataset. Raises `DataError` when `TRIES` in a row, or all frames, cannot be read.
    """
    count = min(count, len(dataset))
    for position in range(rank, count, world):
        bad_frames = []
        first = position * len(dataset) // count
        following = (frame % len(dataset) for frame in range(first, first + len(dataset)))
        sample = _first_readable(dataset, following, bad_frames)
        if sample is None:
            raise _none_readable(bad_frames)
        for bad in bad_frames:
            print(f"skipped {bad}", file=sys.stderr)
        yield position, collate([sample])


def all_batches(
    dataset: DrivingDataset, size: int = 1, rank: int = 0, world: int = 1, workers: int = 0, pinned: bool = False
) -> Iterator[tuple[Batch | None, list[str]]]:
    """Yield (Batch, bad_frames) over every frame once, in order; `rank` of `world` gets every world-th frame.

    size:       samples per batch.
    bad_frames: `path: reason` of each frame that could not be read. Nothing takes its place: the batch has fewer
        samples, and is None instead of empty.
    """
    frames = range(rank, len(dataset), world)
    _check_batch_size(dataset, min(size, len(frames)), workers)
    parts = [frames[i : i + size] for i in range(0, len(frames), size)]
    yield from load_items(ReadableFrames(dataset), parts, workers, pinned)


def _check_batch_size(dataset, size, workers):
    """Raises `UserError` for a batch so large that the system would kill the program."""
    # batches of up to 64 samples are assumed to fit: no frame is read for them here
    sample = _first_readable(dataset, range(len(dataset)), []) if size > 64 else None
    if sample is not None:
        image_bytes = sum(image.nbytes for image in sample.images)
        others = [sample.points, *(sample.source_images or ()), *(sample.features or ())]
        others += [] if sample.points_beyond is None else [sample.points_beyond]
        loaded = image_bytes + sum(array.nbytes for array in others)
        loaded *= 1 + PREFETCH * workers  # the batch in use, and those ahead
        # Images are loaded as bytes; those of the batch in use also become fp32: in host memory too, without a GPU.
        check_memory(size * (loaded + 4 * image_bytes), f"loading with --batch-size, {size} samples per process,")


PREFETCH = 2  # batches per worker that are loaded ahead and wait in shared memory; PyTorch's default


class ReadableFrames(Dataset):
    """`self[frames]`, for a range of indices: (`Batch` of those that can be read, None without any; list of
    `path: reason` of the others)."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, frames):
        samples, bad_frames = [], []
        for i in frames:
            try:
                samples.append(self.dataset[i])
            except BadFrame as bad:
                bad_frames.append(str(bad))
        return _shared(collate(samples) if samples else None), bad_frames


def load_items(items: Dataset, keys: Iterable, workers: int, pinned: bool = False) -> Iterator:
    """Yield items[key] for each of `keys`, loaded by `workers` processes.

    If a worker dies (the system kills processes to free memory) or finds no shared memory for its batches, loading
    continues from the next item with half as many workers; with 0, in this process.
    """
    keys = iter(keys)
    due = collections.deque()  # keys whose items have not been yielded

    def upcoming():
        yield from list(due)  # after a restart, those that the previous loader did not deliver
        for key in keys:
            due.append(key)
            yield key

    while True:
        loaded = iter(
            DataLoader(
                items,
                batch_size=None,  # an item is a whole batch already
                sampler=upcoming(),
                num_workers=workers,
                prefetch_factor=PREFETCH if workers else None,
                worker_init_fn=init_worker,
                pin_memory=pinned,
                generator=torch.Generator(),  # else the loader would draw from the global one, which training uses
            )
        )
        if workers and hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            # PyTorch's handler would raise wherever this process is when a worker dies, in the middle of a step too
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            for item in loaded:
                due.popleft()
                yield item
            return
        except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
            # When a worker dies, PyTorch raises a RuntimeError of its own or, as a connection closes, one of the other
            # types. What the dataset raises in a worker keeps its type, but its message then begins with "Caught".
            died = not isinstance(error, RuntimeError) or re.match(r"DataLoader worker \(pid|Pin memory", str(error))
            died = died and not str(error).startswith("Caught")
            no_shared_memory = re.search(SHARED_MEMORY_ERROR, str(error))
            if not workers or not (died or no_shared_memory):
                raise
            error.__traceback__ = None  # its stack frames hold the loader, which must end before the next starts
            reason = f"{workers} data loading processes need more shared memory (/dev/shm; docker run --shm-size)"
            if not no_shared_memory:
                reason = f"one of {workers} data loading processes died, as when memory is short"
        del loaded  # ends the other workers
        workers //= 2
        print(f"{reason}: going on with --workers {workers}", file=sys.stderr)


# Regex of PyTorch's messages where shared memory, or the number of files open at a time, is too small
SHARED_MEMORY_ERROR = "shared memory|ancdata|Too many open files"


def _shared(batch):
    """The batch; in a worker, moved to shared memory. PyTorch would do so in a thread, whose exceptions are lost."""
    if torch.utils.data.get_worker_info() is not None and batch is not None:
        for tensor in vars(batch).values():
            if torch.is_tensor(tensor):
                tensor.share_memory_()
    return batch


class MicroBatches(Dataset):
    """Item i is what `step_batches` yields for micro-batch i; None instead of the batch when one of its positions finds
    no frame that can be read."""

    def __init__(self, dataset, micro_batch, seed, rank, world, paste_until):
        self.dataset, self.micro_batch, self.seed = dataset, micro_batch, seed
        self.rank, self.world, self.paste_until = rank, world, paste_until

    def __getitem__(self, i):
        samples, bad_frames = [], []
        for position, frame in self.positions_and_frames(i):
            # the last number tells random streams apart: 1 augmentation, 2 `DrivingDataset.balanced`, 3 replacements
            rng = np.random.default_rng([self.seed, position, 1])
            earlier = len(bad_frames)  # those of earlier positions
            sample = _first_readable(
                self.dataset, self._candidates(frame, position), bad_frames, rng, position < self.paste_until
            )
            if sample is None:
                return None, bad_frames[earlier:]
            samples.append(sample)
        return _shared(collate(samples)), bad_frames

    def _candidates(self, frame, position):
        """`frame`, then all others in random order: if a bad frame were always replaced by the next one, the frame
        after a long run of bad ones would be loaded far too often."""
        yield frame
        others = np.random.default_rng([self.seed, position, 3]).permutation(len(self.dataset))
        yield from (int(other) for other in others if other != frame)

    def positions_and_frames(self, i):
        """[(position in the stream, frame)] of the samples of this rank's micro-batch i."""
        n = len(self.dataset)
        first = (i * self.world + self.rank) * self.micro_batch
        positions = range(first, first + self.micro_batch)
        epochs = {p // n for p in positions}
        order = {epoch: np.random.default_rng([self.seed, epoch]).permutation(n) for epoch in epochs}
        return [(p, int(order[p // n][p % n])) for p in positions]


TRIES = 256  # frames in a row: even if nine of ten cannot be read, so many bad ones in a row have probability 2e-12


def _first_readable(dataset, frames, bad_frames, rng=None, paste=False):
    """The sample of the first of `frames` that can be read, of at most `TRIES`; None if none can. Bad ones are added to
    `bad_frames`. rng, paste: as in `DrivingDataset.read`."""
    for frame in itertools.islice(frames, TRIES):
        try:
            return dataset.read(frame, rng, paste)
        except BadFrame as bad:
            bad_frames.append(str(bad))
    return None


def _none_readable(bad_frames):
    """The error when `_first_readable` returns None."""
    return DataError(
        f"none of the {len(bad_frames)} frames can be read ({bad_frames[0]}); correct the files, or unpack them again."
    )


def init_worker(_):
    """Run first in each worker process of a DataLoader.

    Workers ignore signals, which a terminal or job sends to all processes: the main process decides, and ends its
    workers with SIGTERM.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux, where a process can see who sent the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_exit_on_sigterm_from, args=(os.getppid(),), daemon=True).start()
    else:  # a SIGTERM to all processes ends the workers, too
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit_on_sigterm_from(parent):
    """End this process on a SIGTERM from its parent; ignore those from others, who signal all processes of the job."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
