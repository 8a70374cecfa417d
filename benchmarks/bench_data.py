"""Loading a sample, from files to the device: CPU time, bytes, and how many workers keep up with a step.

    python -m benchmarks.bench_data                                       # every full-size recipe
    python -m benchmarks.bench_data train/camera/camera-0.1 --step-ms 97
    python -m benchmarks.bench_data train/camera/tiny --data-root /data/nuscenes --version v1.0-trainval

Runs, in one process on one thread, what a data loading process (worker) does: read files, decode, augment, collate,
copy to shared memory. Files are in the system's page cache, so waiting for a disk is not included; neither is the copy
to the device, which is up to the training process. Cut-and-paste is left out. By default, the data is a synthetic city
with 900 x 1600 images and LiDAR frames of nuScenes' size, generated once (data/bench-data).

Columns: milliseconds of CPU time per sample; samples per second on one core; megabytes of a sample that go to the
device; and the number of workers that keep up with steps of `--step-ms` with one sample each.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import tyro

from benchmarks.full_step import TASKS
from unipad.data.collate import collate
from unipad.data.nuscenes import NuScenesDataset
from unipad.data.synthetic import generate, is_synthetic
from unipad.errors import UserError
from unipad.exit import exit_on_user_error
from unipad.model.occupancy import OccupancyModel
from unipad.model.segment import Segmenter

CITY = Path("data/bench-data")
COLUMNS = 1084  # azimuths of nuScenes' LiDAR


@dataclass(frozen=True)
class Args:
    recipes: tyro.conf.Positional[tuple[str, ...]] = ()  # task/modality/preset (default: all except the tiny ones)
    step_ms: float = 100.0  # milliseconds of a training step with one sample
    repeats: int = 5  # passes over the frames, of which the fastest counts
    data_root: Path | None = None  # folder of a dataset in the nuScenes format; None: a synthetic city
    version: str = "v1.0-mini"  # version of the dataset


def training_set(recipe, model, root, version):
    """The training set of a recipe, as the scripts open it."""
    point_range = None if model is Segmenter else (recipe.grid.low, recipe.grid.high)
    train_set, _ = NuScenesDataset.train_and_val(root, version, recipe, label_fraction=1.0, point_range=point_range)
    return train_set.with_occupancy() if model is OccupancyModel else train_set


def loaded(dataset, i):
    """(milliseconds of CPU time, bytes for the device) of frame i, loaded and augmented as a batch of one."""
    begin = time.process_time()
    batch = collate([dataset.read(i, np.random.default_rng(i))])
    tensors = {name: value for name, value in vars(batch).items() if torch.is_tensor(value)}
    for tensor in tensors.values():
        tensor.share_memory_()
    spent = time.process_time() - begin
    return 1e3 * spent, sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith("_counts"))


def measure(dataset, repeats):
    """(milliseconds, bytes) as of `loaded`, the mean over the last frames of at most 16 scenes: a scene's first frame
    has no sweeps. The milliseconds are those of the fastest of `repeats` passes over these frames.
    """
    frames = [indices[-1] for indices in dataset.scenes().values()][:16]
    loaded(dataset, frames[0])  # imports, caches
    passes = [[loaded(dataset, i) for i in frames] for _ in range(repeats)]
    times, sizes = np.moveaxis(np.array(passes), -1, 0)
    return times.mean(axis=1).min(), sizes.mean()


def main(args: Args):
    known = {
        f"{task}/{modality}/{name}": (recipe, model)
        for task, (by_modality, model) in TASKS.items()
        for modality, presets in by_modality.items()
        for name, recipe in presets.items()
    }
    unknown = [name for name in args.recipes if name not in known]
    if unknown:
        raise UserError(f"No recipe {unknown[0]}; choose from {', '.join(known)}.")
    names = args.recipes or [name for name in known if "tiny" not in name.split("-")]
    if args.data_root is None and not is_synthetic(CITY):
        generate(CITY, scenes=2, keyframes=2, image_size=(900, 1600), columns=COLUMNS, camera_sweeps=2)
    root = args.data_root or CITY
    print(f"| recipe | CPU ms | samples / s / core | MB to the device | workers for {args.step_ms:g} ms |")
    print("|---|---|---|---|---|")
    for name in names:
        ms, size = measure(training_set(*known[name], root, args.version), args.repeats)
        workers = math.ceil(ms / args.step_ms)
        print(f"| {name} | {ms:.0f} | {1e3 / ms:.1f} | {size / 1e6:.1f} | {workers} |", flush=True)


if __name__ == "__main__":
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    with exit_on_user_error():
        main(tyro.cli(Args, description=__doc__))
