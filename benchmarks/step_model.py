"""A model of a recipe's training step: what bounds each part on a given GPU, how it grows, and hours of a whole run.

    python -m benchmarks.step_model --preset camera-0.1
    python -m benchmarks.step_model --task finetune --preset lidar-0.075 --batch-size 4 --gb-s 3350
    python -m benchmarks.step_model --task segment

Needs Linux (Triton), a minute or two, and no GPU. Counts come from `benchmarks.step_counts`: nothing is measured here,
and nothing is fitted to measured steps. Times are bounds:

    compute   FLOPs / peak of the unit that multiplies
    memory    bytes / bandwidth, every tensor read and written once
    GPU       the larger of the two, operator by operator, summed
    host      calls made by Python x --host-us
    load      CPU time of reading samples / --workers
    copy      bytes of the batch / --pcie-gb-s

They run side by side, so a step takes at least the longest of GPU, host, load and copy. Real kernels take longer: they
reach neither peak, and read more than once what caches do not hold (--efficiency). docs/kernels.md compares the model
with measured steps. Not in it: validation, checkpoints, compiling in the first steps, the collectives of batch norms.

In the first table, launches are operators of PyTorch and kernels of this project ("of ours": only these), and row
"data" has the copy under "GPU ms" and loading under "host ms".
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Annotated, Literal

import tyro

from benchmarks import harness
from benchmarks.full_step import TASKS
from benchmarks.report import read_rows
from benchmarks.step_counts import PARTS, Counts, Work, count
from unipad.config import PretrainRecipe
from unipad.errors import UserError, check_ranges
from unipad.exit import exit_on_user_error
from unipad.recipes import DEFAULT_PRESET


@dataclass(frozen=True)
class Machine:
    """One GPU and what feeds it. Defaults: an H200; "data sheet" is NVIDIA's of H200 SXM, without sparsity."""

    half_tflops: float = 989.5  # TFLOP/s of products in bf16 and fp16; data sheet
    tf32_tflops: float = 494.5  # TFLOP/s of products in tf32; data sheet
    fp32_tflops: float = 67.0  # TFLOP/s in fp32, without tensor cores; data sheet
    gb_s: float = 4226.0  # memory bandwidth, GB/s read plus written; measured for a copy on an H200 (docs/log.md)
    efficiency: float = 1.0  # fraction of the bounds that real kernels reach; GPU times are divided by it
    # 22.335 ms of the sparse encoder on an H200's host (benchmarks/results.csv, where the GPU works for 4.2 ms of it),
    # for 94 calls forward and 88 backward. Each direction alone gives 118 and 113 us: the other 69 calls, which C++
    # makes, hardly count.
    host_us: float = 123.0  # host time per operator or kernel that Python calls, us
    pcie_gb_s: float = 64.0  # GB/s from the host to the GPU; PCIe 5.0 x16
    nvlink_gb_s: float = 450.0  # GB/s from one GPU to the others; data sheet
    # CPU time at 900 x 1600 with augmentation (docs/data.md, by benchmarks.bench_data): lidar-0.075 loads ten sweeps in
    # 103 ms, camera-0.1 six images and a sweep in 107 ms.
    image_ms: float = 16.0  # ms to load an image
    sweep_ms: float = 10.0  # ms to load a LiDAR sweep
    workers: int = 4  # data loading processes per GPU, of which train.py starts up to 4


@dataclass(frozen=True)
class Args:
    task: Literal[tuple(TASKS)] = "train"  # train.py, or finetune.py for detection, segmentation or occupancy
    preset: str | None = None  # a recipe of docs/recipes.md; None: camera-0.1; for segment, segment
    modality: Literal["camera", "lidar", "fusion"] | None = None  # if several have a preset of that name
    batch_size: int = 1  # samples per GPU and step, in the first two tables
    cameras: int = 6  # cameras of the rig
    samples: int = 28130  # training samples; class-balanced recipes draw a sample once per class in it
    gpus: tuple[int, ...] = (1, 2, 4, 8, 16)  # rows of the last table; those that do not divide the batch are left out
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()


def find(args):
    """(task/modality/preset, recipe) that the arguments name. Raises `UserError` if none or several have the name."""
    presets, _ = TASKS[args.task]
    default = {"train": DEFAULT_PRESET["camera"], "segment": "segment"}.get(args.task, "camera-0.1")
    named = {f"{args.task}/{modality}/{name}": recipe for modality, by_name in presets.items()
             for name, recipe in by_name.items() if args.modality in (None, modality)}  # fmt: skip
    found = [name for name in named if name.endswith(f"/{args.preset or default}")]
    if len(found) != 1:
        problem = "several modalities have it: add --modality" if found else f"choose one of {', '.join(named)}"
        raise UserError(f"--preset {args.preset or default}: {problem}.")
    return found[0], named[found[0]]


@dataclass(frozen=True)
class Times:
    """Milliseconds of a step or of one of its parts."""

    compute: float
    memory: float
    gpu: float
    host: float

    @staticmethod
    def of(work: list[Work], machine: Machine):
        peaks = {"half": machine.half_tflops, "tf32": machine.tf32_tflops, "fp32": machine.fp32_tflops}
        compute = [1e-9 * w.flops / peaks[w.unit] for w in work]
        memory = [1e-6 * w.bytes / machine.gb_s for w in work]
        host = 1e-3 * machine.host_us * sum(w.python for w in work)
        gpu = sum(map(max, compute, memory)) / machine.efficiency
        return Times(sum(compute), sum(memory), gpu, host)

    @property
    def bound(self):
        if self.host > self.gpu:
            return "host"
        return "compute" if self.compute >= self.memory else "memory"


def load_ms(recipe, cameras, machine):
    """Milliseconds in which a GPU's data loading processes together load one sample."""
    frames = recipe.data.camera_sweeps + len(recipe.data.sources)
    images = cameras * frames if recipe.data.cameras and recipe.reads_pixels else 0
    return (images * machine.image_ms + recipe.data.sweeps * machine.sweep_ms) / machine.workers


def with_batch(recipe, samples):
    return replace(recipe, optim=replace(recipe.optim, batch_size=samples))


def table(titles, rows):
    lines = [titles, ["---"] * len(titles), *rows]
    print("\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n")


def print_parts(counts: Counts, load: float, args: Args):
    """load: milliseconds of loading the batch."""
    machine, copy = args.machine, 1e-6 * counts.batch_bytes / args.machine.pcie_gb_s
    data = f"{counts.batch_bytes / 1e6:.0f}", *"----", f"{copy:.2f}", f"{load:.1f}", "load" if load > copy else "copy"
    rows = [["data", "-", *data]]
    for part in [*PARTS, "all"]:
        work = [w for w in counts.work if part in ("all", w.part)]
        if work:
            ours, times = sum(w.name.endswith("_kernel") for w in work), Times.of(work, machine)
            numbers = (times.compute, times.memory, times.gpu, times.host)
            row = [part, f"{sum(w.flops for w in work) / 1e9:.1f}", f"{sum(w.bytes for w in work) / 1e6:.0f}"]
            rows.append([*row, len(work), ours, *(f"{ms:.2f}" for ms in numbers), times.bound])
    table(["part", "GFLOP", "MB", "launches", "of ours", "compute ms", "memory ms", "GPU ms", "host ms", "bound"], rows)


def print_growth(recipe, counts: Counts, args: Args):
    """Print the step with twice as much of everything that it grows with; returns the `Counts` of twice the samples."""
    twice, rows = {}, []
    if isinstance(recipe, PretrainRecipe):
        rays = replace(recipe.rays, per_view=2 * recipe.rays.per_view, lidar_per_view=2 * recipe.rays.lidar_per_view)
        twice["rays"] = count(replace(recipe, rays=rays), args.cameras)
    if recipe.lidar:
        twice["voxels"] = count(recipe, args.cameras, voxels=2.0)
    if recipe.camera:
        twice["cameras"] = count(recipe, 2 * args.cameras)
    twice["samples"] = count(with_batch(recipe, 2 * args.batch_size), args.cameras)
    for name, of in {"as above": counts, **{f"twice the {name}": of for name, of in twice.items()}}.items():
        times = Times.of(of.work, args.machine)
        row = [f"{sum(w.flops for w in of.work) / 1e12:.2f}", f"{sum(w.bytes for w in of.work) / 1e9:.1f}"]
        rows.append([name, *row, len(of.work), f"{times.gpu:.1f}", f"{times.host:.1f}"])
    table(["step", "TFLOP", "GB", "launches", "GPU ms", "host ms"], rows)
    return twice["samples"]


def linear(value: Callable[[Counts], float], once: Counts, twice: Counts, samples: int):
    """n -> value for n samples per GPU: a line through the values for `samples` and for twice as many."""
    slope = (value(twice) - value(once)) / samples
    return lambda n: value(once) + slope * (n - samples)


def print_runs(recipe, once: Counts, twice: Counts, args: Args):
    """Print step times and hours of the whole recipe on several numbers of GPUs."""
    machine, optim, rows = args.machine, recipe.optim, []
    gpu, host = (linear(lambda c, n=name: getattr(Times.of(c.work, machine), n), once, twice, args.batch_size)
                 for name in ("gpu", "host"))  # fmt: skip
    frames = args.samples * getattr(recipe, "label_fraction", 1.0)
    steps = max(1, round(optim.epochs * frames / optim.batch_size))
    for gpus in args.gpus:
        if optim.batch_size % gpus == 0:
            n = optim.batch_size // gpus
            times = {
                "GPU": gpu(n),
                "host": host(n),
                "load": n * load_ms(recipe, args.cameras, machine),
                "copy": 1e-6 * n * once.batch_bytes / args.batch_size / machine.pcie_gb_s,
                # a ring sends nearly all gradients twice; DistributedDataParallel does so during the backward
                "all-reduce": 2e-6 * (gpus - 1) / gpus * once.gradient_bytes / machine.nvlink_gb_s,
            }
            bound = max(times, key=times.get)
            hours = steps * times[bound] / 3.6e6
            row = [*(f"{ms:.1f}" for ms in times.values()), bound, f"{optim.batch_size / times[bound] * 1e3:.0f}"]
            rows.append([gpus, n, *row, f"{hours:.1f}", f"{gpus * hours:.1f}"])
    if getattr(recipe, "balanced", False):
        print("Class-balanced: an epoch has one sample per sample and class in it; give that number as --samples.\n")
    print(f"{steps} steps of {optim.batch_size} samples: {optim.epochs:g} epochs of {frames:.0f}. ms per step:\n")
    columns = ["GPU", "host", "load", "copy", "all-reduce", "bound", "samples/s", "hours", "GPU-hours"]
    table(["GPUs", "samples per GPU", *columns], rows)


def print_measured(name, times: Times):
    """Print the recipe's newest step measured by `benchmarks.full_step`, without load and copy, beside the model's."""
    rows = [r for r in read_rows(harness.RESULTS) if r["op"] == f"step of {name}" and r["impl"] == "triton"]
    for key, title, model in (("gpu_ms", "GPU", times.gpu), ("both_ms", "step", max(times.gpu, times.host))):
        measured = [r for r in rows if r[key]]
        if measured:
            ms, where = float(measured[-1][key]), f"{measured[-1]['device']}, {measured[-1]['commit']}"
            print(f"{title}: model {model:.1f} ms, measured {ms:.1f} ms ({where}), model / measured {model / ms:.2f}")


def main(args: Args):
    check_ranges(args, ("batch_size", "cameras", "samples"))
    check_ranges(args.machine, tuple(vars(args.machine)))
    check_ranges(SimpleNamespace(gpus=min(args.gpus, default=None)), ("gpus",))
    name, recipe = find(args)
    of_gpu = with_batch(recipe, args.batch_size)
    counts, load = count(of_gpu, args.cameras), args.batch_size * load_ms(recipe, args.cameras, args.machine)
    print(f"# {name}, {args.batch_size} sample(s) per GPU\n", flush=True)
    print_parts(counts, load, args)
    twice = print_growth(of_gpu, counts, args)
    print_runs(recipe, counts, twice, args)
    if (args.batch_size, args.cameras, args.machine) == (1, 6, Machine()):  # as steps were measured
        print_measured(name, Times.of(counts.work, args.machine))


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(Args, description=__doc__))
