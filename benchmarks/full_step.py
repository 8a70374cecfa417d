"""One training step of every recipe at full size: its loss, gradient norm, time, and most expensive GPU kernels.

    python -m benchmarks.full_step                            every full-size recipe; on a CPU every tiny one
    python -m benchmarks.full_step train/camera/camera-0.1

Uses one sample of the synthetic city, at 900 x 1600 pixels (on a CPU 144 x 256) and with the recipe's number of sweeps.
The step is that of train.py and finetune.py: bf16 on a GPU, forward, backward, gradient clipping and AdamW, but with
batch size 1 and a learning rate of 0, so that every step is the same. Loss and gradient norm are printed next to those
of the same step on the PyTorch references, unless these run out of memory. The gradient norm of an untrained camera
encoder means little: its gradients are large and mostly rounding error.
"""

import contextlib
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from benchmarks import harness
from benchmarks.harness import DEVICE, MEASUREMENTS, Row, gpu_events, machine
from unipad.data.collate import collate
from unipad.data.nuscenes import NuScenesDataset
from unipad.data.synthetic import generate
from unipad.kernels.backend import references
from unipad.model.detect import Detector
from unipad.model.occupancy import OccupancyModel
from unipad.model.pretrain import Pretrain
from unipad.model.segment import Segmenter
from unipad.optimizer import make_optimizer
from unipad.recipes import DETECT, OCCUPANCY, PRETRAIN, SEGMENT
from unipad.runtime import generators, mixed_precision

CITY = Path("data/full-size-features" if DEVICE == "cuda" else "data/small-size-features")
IMAGE_SIZE = (900, 1600) if DEVICE == "cuda" else (144, 256)
TASKS = {"train": (PRETRAIN, Pretrain), "finetune": (DETECT, Detector), "segment": (SEGMENT, Segmenter)}
TASKS["occupancy"] = OCCUPANCY, OccupancyModel
# measured first, since users run them first and time may run out
FIRST = ("train/camera/camera-0.1", "train/lidar/lidar-0.075", "train/fusion/fusion-0.075", "segment/lidar/segment")
TIMED = 5  # number of steps, of whose times the median is reported
COSTLIEST = 20  # number of kernels listed per recipe


@dataclass(frozen=True)
class Args:
    recipes: tyro.conf.Positional[tuple[str, ...]] = ()  # task/modality/preset (default: all)


def recipes():
    """{task/modality/preset: (recipe, model class)}, in the order in which they are measured."""
    found = {
        f"{task}/{modality}/{name}": (recipe, model)
        for task, (by_modality, model) in TASKS.items()
        for modality, presets in by_modality.items()
        for name, recipe in presets.items()
        if ("tiny" in name.split("-")) == (DEVICE == "cpu")
    }
    return dict(sorted(found.items(), key=lambda item: item[0] not in FIRST))


def city():
    """Root of a small synthetic city with camera sweeps, generated once."""
    if not CITY.exists():
        # camera_sweeps: in addition to the keyframe, which `Data` counts too
        generate(CITY, scenes=2, keyframes=2, image_size=IMAGE_SIZE, camera_sweeps=2, features=16)
    return CITY


class Step:
    """Repeats one training step; a call returns loss and gradient norm, on the device."""

    def __init__(self, recipe, model, root):
        version = "v1.0-mini"
        # points outside the box are dropped, except for segmentation: as the scripts do
        box = None if model is Segmenter else (recipe.grid.low, recipe.grid.high)
        split, _ = NuScenesDataset.train_val_splits(root, version)
        data = NuScenesDataset(root, version, split, recipe.data, point_range=box)
        data = data if recipe.reads_pixels else data.without_pixels()
        data = data.with_occupancy() if model is OccupancyModel else data
        data = data.with_points_beyond() if recipe.reads_points_beyond else data
        self.batch = collate([data[len(data) - 1]]).to(DEVICE)  # the last frame has sweeps before it
        torch.manual_seed(0)
        with torch.device(DEVICE):
            self.net = model(recipe)
        self.net.to(DEVICE)
        self.optimizer = make_optimizer(self.net, recipe.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0  # so that every step is the same
        self.autocast, _ = mixed_precision(None, torch.device(DEVICE))
        self.clip = recipe.optim.clip

    def __call__(self):
        self.optimizer.zero_grad()  # first, since a step that ran out of memory leaves gradients
        with self.autocast:
            out = self.net(self.batch, generators(seed=0, step=0, positions=[0], device=DEVICE))
        losses = out[0] if isinstance(out, tuple) else out  # `Pretrain` also returns the fraction of missed rays
        loss = sum(losses.values())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        self.optimizer.step()
        return torch.stack([loss.detach().float(), norm.float()])


def measure(name, recipe, model, root):
    """A dict with loss, gradient norm, times and memory of a recipe's step; keys that end in _ref: with the references.

    Values that were not measured are None; on a CPU the keys of `_profile` are absent.
    """
    began = time.perf_counter()
    step = Step(recipe, model, root)
    loss, norm = step().tolist()
    # first_step_s includes loading the sample, building the model and compiling
    found = {"recipe": name, "loss": loss, "grad_norm": norm, "first_step_s": time.perf_counter() - began}
    found |= dict.fromkeys(("loss_ref", "grad_norm_ref", "ms_ref", "mem_mb"))
    with references(), contextlib.suppress(torch.OutOfMemoryError):  # they need far more memory than the kernels
        loss, norm = step().tolist()
        found |= {"loss_ref": loss, "grad_norm_ref": norm}
        found["ms_ref"] = _milliseconds(step, runs=1)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found |= {"ms": _milliseconds(step, TIMED)}
    if DEVICE == "cuda":
        found |= {"mem_mb": torch.cuda.max_memory_allocated() / 2**20} | _profile(step, found["ms"])
    return found


def _milliseconds(step, runs):
    """Median time of `runs` steps; the host waits for the device after each."""
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        step().tolist()
        times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times)[runs // 2]


def _profile(step, ms):
    """GPU kernels and copies in a step: total ms, number, the most expensive ones; idle: fraction of `ms` without any.

    ms: time of the step.
    """
    events = gpu_events(step)
    cost, count = Counter(), Counter()
    for event in events:
        cost[event.name()] += event.duration_ns() * 1e-6
        count[event.name()] += 1
    busy = sum(cost.values())
    costliest = [[name[:100], count[name], round(spent, 4)] for name, spent in cost.most_common(COSTLIEST)]
    return {"gpu_ms": busy, "launches": len(events), "idle": max(0.0, 1 - busy / ms), "costliest": costliest}


def rows(record):
    """A recipe's record as rows of results.csv: with our kernels, and on the references if they fit into memory.

    record: what `measure` returned on a GPU, and the columns of `machine()`.
    """
    none = dict.fromkeys(MEASUREMENTS)
    where = {key: record[key] for key in machine()}
    name = {"op": f"step of {record['recipe']}", "case": "batch 1, 900 x 1600", "note": ""}
    # both_ms: of a whole step with its optimizer; in other rows of results.csv, of forward and backward
    ours = {"both_ms": record["ms"], "gpu_ms": record["gpu_ms"], "peak_mb": record["mem_mb"]}
    if record["loss_ref"] is not None:
        # of the loss, relative; in other rows of results.csv it is that of outputs and gradients
        ours["error"] = abs(record["loss"] - record["loss_ref"]) / abs(record["loss_ref"])
    yield Row(**none | name | ours, impl="triton", **where)
    if record["ms_ref"] is not None:
        yield Row(**none | name | {"both_ms": record["ms_ref"]}, impl="references", **where)


def main(args: Args, write=None):
    """Measure and print. write: called with the record (a dict) of each recipe as soon as it is known."""
    root, known = city(), recipes()
    for name in args.recipes or known:
        if time.monotonic() > harness.deadline:  # set by `benchmarks.gpu`
            print(f"{name}: skipped, out of time")
            continue
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        try:
            record = measure(name, *known[name], root)
        except Exception as error:  # other recipes may still work
            record = {"recipe": name, "error": f"{type(error).__name__}: {error}"[:500]}
        record |= machine()
        print(json.dumps({k: v for k, v in record.items() if k != "costliest"}), flush=True)
        for kernel, count, ms in record.get("costliest", ()):
            print(f"    {ms:9.3f} ms {count:5} x {kernel}")
        if DEVICE == "cuda" and "error" not in record:
            for row in rows(record):
                harness.append(row)
        if write:
            write(record)
        if DEVICE == "cuda":
            torch.cuda.synchronize()  # raises here, not in the next recipe, if this one corrupted the GPU context


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
