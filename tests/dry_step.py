"""One training step of every recipe on a GPU that is not there, and all it would launch compiled for all targets.

    python -m tests.dry_step            the main recipes, one of them for sm_90: what tests/test_dry_step.py runs
    python -m tests.dry_step --all      every recipe and its variants, for every target

Prints one JSON line a step and one for each distinct launch and target; a step that waits or crosses devices, a launch
that does not compile or wants more shared memory than the target has is a fault, printed so, and the exit code is 1.
"""

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

from kernels.composite import _composite_fwd_kernel, composite
from tests.dry import CUDA, Dry, Generator, backward, on_gpu
from unipad.batch import Batch
from unipad.config import DetectRecipe, PretrainRecipe
from unipad.model.detect import Detector
from unipad.model.lidar import SparseEncoder
from unipad.model.pretrain import Pretrain
from unipad.model.segment import Segmenter
from unipad.model.sparse import SparseTensor, SubMConv3d, VoxelSet
from unipad.recipes import DETECT, PRETRAIN, SEGMENT

# What a program may have of shared memory, bytes. sm_86 and 89 run what sm_80 does, with as little memory as sm_120.
SHARED = {"sm_80": 101_376, "sm_90": 232_448, "sm_120": 101_376, "gfx942": 65_536}
MAIN = ("train camera-0.1", "detect lidar-0.075", "segment segment")
COMPILED = ("train camera-0.1",)  # of these; compiling for one target takes a minute and a half of all main ones
VARIED = ("train camera-0.1", "train lidar-0.075", "detect camera-0.075", "segment segment")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VOXELS = 90_000  # of a sample, of which masks leave a fifth


@dataclass(frozen=True)
class Step:
    name: str
    recipe: object
    precision: str = "bf16"
    deterministic: bool = False


def steps():
    """Every recipe of train.py and finetune.py, and what their flags make of it."""
    found = []
    for task, presets in (("train", PRETRAIN), ("detect", DETECT), ("segment", SEGMENT)):
        for modality, named in presets.items():
            for name, recipe in named.items():
                label = f"{modality}-{name}" if name == "tiny" else name
                found.append(Step(f"{task} {label}", recipe))
    named = {step.name: step for step in found}
    camera, lidar = named["train camera-0.1"], named["train lidar-0.075"]
    for method in ("volsdf", "unisurf"):
        render = replace(camera.recipe.render, method=method)
        found.append(Step(f"{camera.name} --renderer {method}", replace(camera.recipe, render=render)))
    for choice in ("random", "dilation"):
        rays = replace(camera.recipe.rays, strategy=choice)
        found.append(Step(f"{camera.name} --ray-choice {choice}", replace(camera.recipe, rays=rays)))
    data = replace(lidar.recipe.data, cameras=False)
    found.append(Step(f"{lidar.name} --rays-from lidar", replace(lidar.recipe, data=data)))
    token = replace(lidar.recipe.lidar, learnable_token=True)
    found.append(Step(f"{lidar.name}, a token for hidden voxels", replace(lidar.recipe, lidar=token)))
    for step in (named[name] for name in VARIED):
        found += [replace(step, name=f"{step.name} --precision {p}", precision=p) for p in ("fp16", "fp32")]
        found.append(replace(step, name=f"{step.name} --deterministic", deterministic=True))
    return found


def dry_step(step, scene=0):
    """The `Dry` that a step ran in. scene: another one has other numbers of points, voxels and boxes."""
    recipe, precision = _shallow(step.recipe), PRECISIONS[step.precision]
    kind = {PretrainRecipe: Pretrain, DetectRecipe: Detector}.get(type(recipe), Segmenter)
    with torch.device("meta"):
        net = kind(recipe)
    torch.use_deterministic_algorithms(step.deterministic)
    with Dry(answers(recipe, scene)) as dry:
        net = on_gpu(net)
        batch = make_batch(recipe, scene)
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            losses = net(batch, [Generator() for _ in range(len(batch))])
        losses = losses[0] if kind is Pretrain else losses
        backward(sum(losses.values()))
        torch.nn.utils.clip_grad_norm_(net.parameters(), recipe.optim.clip)
        still = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
        assert not still, f"no gradient reaches {still}"
    torch.use_deterministic_algorithms(False)
    return dry


def _shallow(recipe):
    """A block a stage of the ConvNeXt: all the others launch the same."""
    if recipe.camera is None:
        return recipe
    return replace(recipe, camera=replace(recipe.camera, depths=(1,) * len(recipe.camera.depths)))


def make_batch(recipe, scene):
    """A batch of a recipe's size on the GPU, with what nuScenes has of points and boxes."""
    B, data = recipe.optim.batch_size, recipe.data
    H, W = (-(-size // 32) * 32 for size in data.image_size or (900, 1600))
    views = 6 * data.camera_sweeps if data.cameras else 0
    points = [25_000 * data.sweeps + 137 * b + 23 * scene for b in range(B)]
    boxes = [30 + 3 * b + scene for b in range(B)]

    def on_gpu(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=CUDA)

    return Batch(
        images=on_gpu(B, views, 3, H, W),
        image_sizes=on_gpu(B, views, 2, dtype=torch.int64),
        lidar2image=on_gpu(B, views, 4, 4),
        lidar2camera=on_gpu(B, views, 4, 4),
        points=on_gpu(sum(points), 5),
        point_counts=torch.tensor(points),
        boxes=on_gpu(sum(boxes), 9),
        labels=on_gpu(sum(boxes), dtype=torch.int64),
        box_counts=torch.tensor(boxes),
        point_labels=on_gpu(sum(points), dtype=torch.uint8),
        tokens=("",) * B,
        frame_lags=on_gpu(B, data.camera_sweeps) if data.camera_sweeps > 1 else None,
    )


def answers(recipe, scene):
    """What the host is told where it waits."""
    voxels = VOXELS * recipe.optim.batch_size - 1007 * scene
    return {
        "costs, for the Hungarian method": None,  # all 0
        "how many voxels hold points": voxels,
        "how many cells hold points, and how far they reach": [voxels, 1023 - scene, 1023 - 16 * scene, 39],
        "which voxels stay visible": voxels // 5,
        "how many voxels a convolution reaches": voxels // 6,
        "which points have a label": voxels - 1001,
        "whether VolSDF has looked closely enough": False,
    }


def specialised_on_data(calls, others):
    """(kernel, argument) pairs that differ between two scenes, and that Triton would compile the kernel anew for."""
    found = set()
    for (kernel, given), (other, given_there) in zip(calls, others, strict=True):
        assert kernel is other, f"{kernel.__name__} is launched here, {other.__name__} in another scene"
        free = {p.name for p in kernel.params if p.do_not_specialize and not isinstance(given.get(p.name), tuple)}
        for name, value in given.items():
            numbers = [[n for n in tree_iter(v) if isinstance(n, int)] for v in (value, given_there[name])]
            if numbers[0] != numbers[1] and name not in free:  # elements of a tuple are specialised whatever is said
                found.add((kernel.__name__, name))
    return found


def variants(scenes, seed=0):
    """How many ways of each kernel a sparse encoder's steps compile: (of the first tenth of the scenes, of all).

    scenes: number of scenes, of 1 to 150,000 voxels; half of them have fewer than 1000.
    """
    rng = random.Random(seed)
    sizes = [1, 16, *(rng.randrange(1, rng.choice([1000, 150_000])) for _ in range(scenes - 2))]
    # a scene's first strided convolution reaches nine tenths of its voxels, the next ones fewer
    reached = [1 + int(n * part) for n in sizes for part in (0.9, 0.4, 0.1, 0.1)]
    with torch.device("meta"):
        net = SparseEncoder(5, (16, 32, 64), 1, 128)
    counts = []
    with Dry({"how many voxels a convolution reaches": reached}) as dry:
        net = on_gpu(net)
        for i, n in enumerate(sizes, 1):
            coords = torch.zeros(n, 4, dtype=torch.int32, device=CUDA)
            features = torch.zeros(n, 5, device=CUDA, requires_grad=True)
            with torch.autocast("cuda", torch.bfloat16):
                out = net(SparseTensor(features, VoxelSet(coords, (41, 1440, 1440), 1, in_order=True, check=False)))
            backward(out.dense().float().sum())
            if i in (scenes // 10, scenes):
                counts.append(dict(Counter(launch.kernel for launch in set(dry.launches))))
    return counts


def compiled(launch, target):
    """A line about a launch compiled for a target."""
    line = {"kernel": launch.kernel, "target": target}
    try:
        line["shared"] = launch.compiled(target).metadata.shared
    except Exception as error:  # whatever the compiler says is the finding
        return line | {"fault": f"{type(error).__name__}: {str(error)[-2000:]}"}
    if line["shared"] > SHARED[target]:
        line["fault"] = f"shared memory: {line['shared']} bytes, {target} has {SHARED[target]}: {launch}"
    return line


def main(everything=False):
    """Run and compile; returns whether there was a fault."""
    targets = ["gfx942"] if torch.version.hip else ["sm_80", "sm_90", "sm_120"] if everything else ["sm_90"]
    launches, faults = {}, 0
    for step in steps():
        if everything or step.name in MAIN:
            line = {"step": step.name}
            try:
                made, other = dry_step(step), dry_step(step, scene=1)
                line |= {"launches": len(made.launches), "kinds": len(set(made.launches))}
                anew = specialised_on_data(made.calls, other.calls)
                if anew:
                    line["fault"] = f"compiled anew for another scene: {sorted(anew)}"
                if everything or step.name in COMPILED:
                    launches |= dict.fromkeys(made.launches)
            except Exception as error:
                line["fault"] = f"{type(error).__name__}: {error}"
            faults += "fault" in line
            print(json.dumps(line), flush=True)
    work = [(launch, target) for launch in launches for target in targets]
    with get_context("fork").Pool(os.cpu_count()) as pool:
        for line in pool.imap_unordered(_compiled, work):
            faults += "fault" in line
            print(json.dumps(line), flush=True)
    return faults > 0


def _compiled(work):
    return compiled(*work)


def seeded():
    """Print what is found of faults that are made on purpose."""

    def caught(fault):
        with Dry() as dry:
            x = torch.zeros(8, device=CUDA)
            try:
                fault(x)
            except Exception as error:
                return type(error).__name__
        return dry

    def compiled_anew(*sizes):
        here, there = (
            caught(lambda _, shape=(R, S): composite(*(torch.zeros(*shape, *n, device=CUDA) for n in ((), (3,)))))
            for R, S in sizes
        )
        return [f"{kernel} by {name}" for kernel, name in specialised_on_data(here.calls, there.calls)] or None

    def too_large(stages):
        def convolve(x):
            voxels = VoxelSet(torch.zeros(20_000, 4, dtype=torch.int32, device=CUDA), (40, 99, 99), 1, True, False)
            with torch.device("meta"):
                convolution = SubMConv3d(128, 128, 3, bias=False)
            features = torch.zeros(20_000, 128, dtype=torch.bfloat16, device=CUDA)
            on_gpu(convolution)(SparseTensor(features, voxels))

        launch = caught(convolve).launches[-1]
        options = dict(launch.options) | {"num_stages": stages}
        return compiled(replace(launch, options=tuple(options.items())), "sm_120").get("fault", "")[:6] or None

    faults = {
        "a tensor left on the CPU": lambda x: x + torch.ones(8),
        "a kernel on what the CPU has": lambda x: _composite_fwd_kernel[(1,)](
            x, torch.ones(8), *3 * [x], 1, 8, 1, BLOCK_R=1, BLOCK_C=16
        ),
        "a generator of the CPU": lambda x: torch.rand(8, device=CUDA, generator=torch.Generator()),
        "item": lambda x: x.sum().item(),
        "tolist": lambda x: x.tolist(),
        "a condition": lambda x: bool(x.max() > 0),
        "a mask": lambda x: x[x > 0],
        "a mask that is written": lambda x: x.index_put_((x > 0,), x),
        "nonzero": lambda x: x.nonzero(),
        "unique": lambda x: x.unique(),
        "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
        "tensor": lambda x: torch.tensor([1.0, 2.0], device=CUDA),
        "a copy back": lambda x: x.cpu(),
    }
    for name, fault in faults.items():
        print(json.dumps({"seeded": name, "found": caught(fault)}))
    sound = caught(lambda x: torch.ones(8).to(CUDA, non_blocking=True).add_(1.0).masked_fill_(x > 0, 1.0))
    print(json.dumps({"seeded": "no fault", "found": None if isinstance(sound, Dry) else sound}))
    print(json.dumps({"seeded": "a size that is specialised", "found": compiled_anew((1600, 96), (1601, 97))}))
    print(json.dumps({"seeded": "a size that is not", "found": compiled_anew((1600, 96), (1601, 96))}))
    print(json.dumps({"seeded": "more than 99 KB", "found": too_large(9)}))
    print(json.dumps({"seeded": "less than 99 KB", "found": too_large(2)}))


# The device is AMD's from before the kernels are imported on: they choose by it.
AS_AMD = "import sys, torch; torch.version.hip = '7.0'; from tests.dry_step import main; sys.exit(main(True))"

if __name__ == "__main__":
    everything = "--all" in sys.argv
    failed = main(everything)
    if everything:
        failed |= subprocess.run([sys.executable, "-c", AS_AMD]).returncode != 0
    sys.exit(failed)
