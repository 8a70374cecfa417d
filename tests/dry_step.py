"""Dry-run one training step of every recipe as on a GPU, and compile everything it launches for all targets.

    python -m tests.dry_step            the main recipes, without compiling (tests/test_dry_step.py)
    python -m tests.dry_step --all      every recipe, and variants of some; compiles for every target

Prints one JSON line per step and, with --all, one per distinct launch and target. A line has the key "fault", and the
exit code is 1, if a step waits for the device without a `host_wait` or mixes devices, if a kernel specializes on a size
that depends on the data (two scenes are compared, and a hundred with --all), or if a launch does not compile or needs
more shared memory than its target has.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from multiprocessing import get_context

import torch
from torch.utils._pytree import tree_iter

from benchmarks.dry_run import CUDA, DryRun, Generator, backward, make_batch, to_gpu
from unipad.config import DetectRecipe, OccupancyRecipe, PretrainRecipe, UnetConfig
from unipad.kernels.composite import _composite_fwd_kernel, composite
from unipad.model.detect import Detector
from unipad.model.lidar import SparseEncoder
from unipad.model.occupancy import OccupancyModel
from unipad.model.pretrain import Pretrain
from unipad.model.segment import Segmenter
from unipad.recipes import DETECT, OCCUPANCY, PRETRAIN, SEGMENT
from unipad.spconv.conv import SubMConv3d
from unipad.spconv.tensor import SparseConvTensor
from unipad.spconv.voxels import VoxelSet

# Bytes of shared memory per program, at most. sm_80 stands for sm_86 and sm_89 too, so it gets their smaller limit.
SHARED = {"sm_80": 101_376, "sm_90": 232_448, "sm_120": 101_376, "gfx942": 65_536}
MAIN = ("train camera-0.1", "detect lidar-0.075", "segment segment")
# These also run with the other precisions, and with --deterministic
WITH_VARIANTS = ("train camera-0.1", "train lidar-0.075", "detect camera-0.075", "segment segment")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VOXELS = 90_000  # occupied voxels per sample


@dataclass(frozen=True)
class Step:
    name: str
    recipe: object
    precision: str = "bf16"
    deterministic: bool = False


def steps():
    """Every recipe of train.py and finetune.py, and variants of some; names have their flags, if there are any."""
    all_steps = []
    tasks = {"train": PRETRAIN, "detect": DETECT, "segment": SEGMENT, "occupancy": OCCUPANCY}
    for task, presets in tasks.items():
        for modality, named in presets.items():
            for name, recipe in named.items():
                shared = sum(name in others for others in presets.values()) > 1
                label = f"{modality}-{name}" if shared else name
                all_steps.append(Step(f"{task} {label}", recipe))
    named = {step.name: step for step in all_steps}
    camera, lidar = named["train camera-0.1"], named["train lidar-0.075"]
    for method in ("volsdf", "unisurf"):
        render = replace(camera.recipe.render, method=method)
        all_steps.append(Step(f"{camera.name} --render.method {method}", replace(camera.recipe, render=render)))
    for strategy in ("random", "dilation"):
        rays = replace(camera.recipe.rays, strategy=strategy)
        all_steps.append(Step(f"{camera.name} --rays.strategy {strategy}", replace(camera.recipe, rays=rays)))
    data = replace(lidar.recipe.data, cameras=False)
    all_steps.append(Step(f"{lidar.name} --data.no-cameras", replace(lidar.recipe, data=data)))
    token = replace(lidar.recipe.lidar, learnable_token=True)
    all_steps.append(Step(f"{lidar.name}, learnable token for masked voxels", replace(lidar.recipe, lidar=token)))
    for step in (named[name] for name in WITH_VARIANTS):
        all_steps += [replace(step, name=f"{step.name} --precision {p}", precision=p) for p in ("fp16", "fp32")]
        all_steps.append(replace(step, name=f"{step.name} --deterministic", deterministic=True))
    return all_steps


def dry_step(step, scene=0):
    """Run a step and return its `DryRun`. scene: any integer; changes the numbers of points, voxels and boxes."""
    recipe, precision = _shallow(step.recipe), PRECISIONS[step.precision]
    models = {PretrainRecipe: Pretrain, DetectRecipe: Detector, OccupancyRecipe: OccupancyModel}
    model = models.get(type(recipe), Segmenter)
    with torch.device("meta"):
        net = model(recipe)
    with DryRun(answers(recipe, scene)) as dry, _deterministic(step.deterministic):
        net = to_gpu(net)
        batch = make_batch(recipe, scene)
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            losses = net(batch.to(CUDA), [Generator() for _ in range(len(batch))])
        losses = losses[0] if model is Pretrain else losses  # `Pretrain` returns (losses, missed rays)
        backward(sum(losses.values()))
        torch.nn.utils.clip_grad_norm_(net.parameters(), recipe.optim.clip)
        missing = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing, f"no gradient reaches {missing}"
    return dry


@contextlib.contextmanager
def _deterministic(on):
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _shallow(recipe):
    """The recipe with one block per stage, one neck layer, two decoder layers: further ones launch the same kernels."""
    if recipe.camera:
        recipe = replace(recipe, camera=replace(recipe.camera, depths=(1,) * len(recipe.camera.depths)))
    if isinstance(recipe.lidar, UnetConfig):
        recipe = replace(recipe, lidar=replace(recipe.lidar, blocks=(1,) * len(recipe.lidar.blocks)))
    elif recipe.lidar:
        recipe = replace(recipe, lidar=replace(recipe.lidar, blocks=1, neck_layers=1))
    if isinstance(recipe, DetectRecipe):
        recipe = replace(recipe, detect=replace(recipe.detect, layers=2))
    return recipe


def answers(recipe, scene):
    """The values that the host reads where it waits, by the reason of the wait; made up, sizes differ by scene."""
    voxels = VOXELS * recipe.optim.batch_size - 1007 * scene
    return {
        "assignment costs for the Hungarian method": None,  # a copy of a tensor: `DryRun` returns zeros
        "number of occupied voxels": voxels,
        # the number of cells, then the lowest and the highest cell (z, y, x)
        "number and extent of occupied cells": [voxels, 0, 0, 0, 39, 1023 - 16 * scene, 1023 - scene],
        "indices of the visible voxels": voxels // 5,  # that many: masking hides the rest
        "number of a convolution's output voxels": voxels // 6,
        "indices of the labeled points": voxels - 1001,  # that many
        "indices of the labeled voxels": 43_001 - 11 * scene,  # that many, of one sample
        "convergence of VolSDF's sampler": False,
    }


def specialized_on_data(calls, other_calls):
    """(kernel, argument) pairs: integers that differ between two scenes and on which Triton may specialize the kernel.

    calls, other_calls: `DryRun.calls` of the scenes.
    """
    specialized = set()
    for (kernel, given), (other, other_given) in zip(calls, other_calls, strict=True):
        assert kernel is other, f"{kernel.__name__} is launched here, {other.__name__} in another scene"
        # arguments that `jit` was told to vary; Triton specializes on elements of tuples even then
        generic = {p.name for p in kernel.params if p.do_not_specialize and not isinstance(given.get(p.name), tuple)}
        for name, value in given.items():
            numbers = [[n for n in tree_iter(v) if isinstance(n, int)] for v in (value, other_given[name])]
            if numbers[0] != numbers[1] and name not in generic:
                specialized.add((kernel.__name__, name))
    return specialized


def count_specializations(scenes, first, seed=0):
    """Number of specializations per kernel in training steps of a sparse encoder: after `first` steps, and after all.

    scenes: number of training steps, with a scene of 1 to 150,000 voxels each; about half of them have fewer than 1000.
    """
    rng = random.Random(seed)
    # voxels; Triton compiles separately for 1 and for multiples of 16
    sizes = [1, 16, *(rng.randrange(1, rng.choice([1000, 150_000])) for _ in range(scenes - 2))]
    # Output voxels of the strided convolutions, as fractions of a scene's voxels. There are four per scene, but a step
    # reads only the next two, so mostly not those of its own scene: the numbers only have to vary.
    out_voxels = [1 + int(n * fraction) for n in sizes for fraction in (0.9, 0.4, 0.1, 0.1)]
    with torch.device("meta"):
        net = SparseEncoder(in_channels=5, widths=(16, 32, 64), blocks=1, out_channels=128)
    counts = []
    with DryRun({"number of a convolution's output voxels": out_voxels}) as dry:
        net = to_gpu(net)
        for i, n in enumerate(sizes, 1):
            coords = torch.zeros(n, 4, dtype=torch.int32, device=CUDA)
            features = torch.zeros(n, 5, device=CUDA, requires_grad=True)
            with torch.autocast("cuda", torch.bfloat16):
                voxels = VoxelSet(coords, shape=(41, 1440, 1440), batch_size=1, in_order=True, check=False)
                out = net(SparseConvTensor.of(features, voxels))
            backward(out.dense().float().sum())
            if i in (first, scenes):
                counts.append(dict(Counter(launch.kernel for launch in set(dry.launches))))
    return counts


def compile_line(launch, target):
    """Compile a launch for a target; returns its line of output as a dict."""
    line = {"kernel": launch.kernel, "target": target}
    try:
        line["shared"] = launch.compile(target).metadata.shared
    except Exception as error:  # any compiler error is a fault to report
        return line | {"fault": f"{type(error).__name__}: {str(error)[-2000:]}"}
    if line["shared"] > SHARED[target]:
        line["fault"] = f"shared memory: {line['shared']} bytes, {target} has {SHARED[target]}: {launch}"
    return line


def main(everything=False):
    """Run the steps and compile their launches; returns whether there was a fault."""
    targets = ["gfx942"] if torch.version.hip else ["sm_80", "sm_90", "sm_120"]
    launches, faults = {}, 0
    for step in steps():
        if everything or step.name in MAIN:
            line = {"step": step.name}
            try:
                run, other = dry_step(step), dry_step(step, scene=1)
                line |= {"launches": len(run.launches), "distinct": len(set(run.launches))}
                line |= {"operators": run.operators.total()}
                specialized = specialized_on_data(run.calls, other.calls)
                if specialized:
                    line["fault"] = f"compiled again for another scene: {sorted(specialized)}"
                launches |= dict.fromkeys(run.launches)
            except Exception as error:
                line["fault"] = f"{type(error).__name__}: {error}"
            faults += "fault" in line
            print(json.dumps(line), flush=True)
    if everything and not torch.version.hip:  # once is enough: the sizes that vary are the same for AMD
        of_twenty, of_hundred = count_specializations(100, first=20)
        line = {"scenes": 100, "specializations": of_hundred}
        if of_twenty != of_hundred:
            line["fault"] = f"the first twenty scenes need only {of_twenty}"
        faults += "fault" in line
        print(json.dumps(line), flush=True)
    work = [(launch, target) for launch in launches for target in targets] if everything else []
    with get_context("fork").Pool(os.cpu_count()) as pool:
        for line in pool.imap_unordered(_compile_line, work):
            faults += "fault" in line
            print(json.dumps(line), flush=True)
    return faults > 0


def _compile_line(work):
    return compile_line(*work)


def print_seeded_faults():
    """Print a JSON line for each deliberate fault: what detects it, or None (asserted in tests/test_dry_step.py)."""

    def caught(fault):
        """The exception's name, or the `DryRun` if there was none."""
        with DryRun() as dry:
            x = torch.zeros(8, device=CUDA)
            try:
                fault(x)
            except Exception as error:
                return type(error).__name__
        return dry

    def respecialized(*sizes):
        """What `composite` specializes on that differs between two sizes (rays R, samples S)."""
        first, second = (
            caught(lambda _, R=R, S=S: composite(torch.zeros(R, S, device=CUDA), torch.zeros(R, S, 3, device=CUDA)))
            for R, S in sizes
        )
        return [f"{kernel} on {name}" for kernel, name in specialized_on_data(first.calls, second.calls)] or None

    def too_large(stages):
        """The fault of a convolution with that many pipeline stages, each of which needs its own shared memory."""

        def convolve(x):
            coords = torch.zeros(20_000, 4, dtype=torch.int32, device=CUDA)
            voxels = VoxelSet(coords, shape=(40, 99, 99), batch_size=1, in_order=True, check=False)
            with torch.device("meta"):
                convolution = SubMConv3d(128, 128, 3, bias=False)
            features = torch.zeros(20_000, 128, dtype=torch.bfloat16, device=CUDA)
            to_gpu(convolution)(SparseConvTensor.of(features, voxels))

        launch = caught(convolve).launches[-1]
        options = dict(launch.options) | {"num_stages": stages}
        line = compile_line(replace(launch, options=tuple(options.items())), "sm_120")  # 99 KB
        return line.get("fault", "")[:6] or None  # "shared"

    composite_sizes = dict(R=1, S=8, C=1, BLOCK_R=1, BLOCK_C=16)
    faults = {
        "a tensor left on the CPU": lambda x: x + torch.ones(8),
        "a CPU tensor in a launch": lambda x: _composite_fwd_kernel[(1,)](
            **dict.fromkeys(("alpha_ptr", "out_ptr", "trans_ptr", "weights_ptr"), x),
            values_ptr=torch.ones(8),
            **composite_sizes,
        ),
        "a CPU generator": lambda x: torch.rand(8, device=CUDA, generator=torch.Generator()),
        "item": lambda x: x.sum().item(),
        "tolist": lambda x: x.tolist(),
        "a condition": lambda x: bool(x.max() > 0),
        "a mask": lambda x: x[x > 0],
        "a write under a mask": lambda x: x.index_put_((x > 0,), x),
        "nonzero": lambda x: x.nonzero(),
        "unique": lambda x: x.unique(),
        "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
        "tensor": lambda x: torch.tensor([1.0, 2.0], device=CUDA),
        "a copy back": lambda x: x.cpu(),
    }
    for name, fault in faults.items():
        found = caught(fault)
        print(json.dumps({"seeded": name, "found": None if isinstance(found, DryRun) else found}))
    no_error = caught(lambda x: torch.ones(8).to(CUDA, non_blocking=True).add_(1.0).masked_fill_(x > 0, 1.0))
    print(json.dumps({"seeded": "no fault", "found": None if isinstance(no_error, DryRun) else no_error}))
    # (R, S) of two calls: R may vary (`do_not_specialize`), S is specialized on
    print(json.dumps({"seeded": "a specialized size", "found": respecialized((1600, 96), (1601, 97))}))
    print(json.dumps({"seeded": "a varying size", "found": respecialized((1600, 96), (1601, 96))}))
    print(json.dumps({"seeded": "more than 99 KB", "found": too_large(stages=9)}))
    print(json.dumps({"seeded": "less than 99 KB", "found": too_large(stages=2)}))


# torch.version.hip must be set before the kernels are imported: their constants depend on it.
AMD_RUN = "import sys, torch; torch.version.hip = '7.0'; from tests.dry_step import main; sys.exit(main(True))"

if __name__ == "__main__":
    everything = "--all" in sys.argv
    failed = main(everything)
    if everything:
        failed |= subprocess.run([sys.executable, "-c", AMD_RUN]).returncode != 0
    sys.exit(failed)
