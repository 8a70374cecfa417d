"""One training step of every recipe on a GPU that is not there, and all it would launch compiled for all targets.

    python -m tests.dry_step            the main recipes, for sm_90: what tests/test_dry_step.py runs
    python -m tests.dry_step --all      every recipe and its variants, for every target

Prints one JSON line a step and one for each distinct launch and target; a step that waits or crosses devices, a launch
that does not compile or wants more shared memory than the target has is a fault, printed so, and the exit code is 1.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, replace
from multiprocessing import get_context

import torch

from tests.dry import CUDA, Dry, Generator, backward, on_gpu
from unipad.batch import Batch
from unipad.config import DetectRecipe, PretrainRecipe
from unipad.model.detect import Detector
from unipad.model.pretrain import Pretrain
from unipad.model.segment import Segmenter
from unipad.recipes import DETECT, PRETRAIN, SEGMENT

# What a program may have of shared memory, bytes
SHARED = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
MAIN = ("train camera-0.1", "train lidar-0.075", "detect camera-0.075", "segment segment")
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
    for step in (named[name] for name in MAIN):
        found += [replace(step, name=f"{step.name} --precision {p}", precision=p) for p in ("fp16", "fp32")]
        found.append(replace(step, name=f"{step.name} --deterministic", deterministic=True))
    return found


def dry_step(step, hip=False):
    """The launches of a step."""
    recipe, precision = _shallow(step.recipe), PRECISIONS[step.precision]
    kind = {PretrainRecipe: Pretrain, DetectRecipe: Detector}.get(type(recipe), Segmenter)
    with torch.device("meta"):
        net = kind(recipe)
    torch.use_deterministic_algorithms(step.deterministic)
    with Dry(answers(recipe), hip) as dry:
        net = on_gpu(net)
        batch = make_batch(recipe)
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            losses = net(batch, [Generator() for _ in range(len(batch))])
        losses = losses[0] if kind is Pretrain else losses
        backward(sum(losses.values()))
        torch.nn.utils.clip_grad_norm_(net.parameters(), recipe.optim.clip)
        still = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
        assert not still, f"no gradient reaches {still}"
    torch.use_deterministic_algorithms(False)
    return dry.launches


def _shallow(recipe):
    """A block a stage of the ConvNeXt: all the others launch the same."""
    if recipe.camera is None:
        return recipe
    return replace(recipe, camera=replace(recipe.camera, depths=(1,) * len(recipe.camera.depths)))


def make_batch(recipe):
    """A batch of a recipe's size on the GPU, with what nuScenes has of points and boxes."""
    B, data = recipe.optim.batch_size, recipe.data
    H, W = (-(-size // 32) * 32 for size in data.image_size or (900, 1600))
    views = 6 * data.camera_sweeps if data.cameras else 0
    points = [25_000 * data.sweeps + 137 * b for b in range(B)]
    boxes = [30 + 3 * b for b in range(B)]

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


def answers(recipe):
    """What the host is told where it waits."""
    voxels = VOXELS * recipe.optim.batch_size
    return {
        "how many voxels hold points": voxels,
        "how many cells hold points, and how far they reach": [voxels, 999, 999, 39],
        "which voxels stay visible": voxels // 5,
        "how many voxels a convolution reaches": voxels // 6,
        "which points have a label": voxels - 1001,
    }


def compiled(launch, target):
    """A line about a launch compiled for a target."""
    line = {"kernel": launch.kernel, "target": target}
    try:
        line["shared"] = launch.compiled(target).metadata.shared
    except Exception as error:  # whatever the compiler says is the finding
        return line | {"fault": f"{type(error).__name__}: {str(error)[-2000:]}"}
    if line["shared"] > SHARED[target]:
        line["fault"] = f"{line['shared']} bytes of shared memory, {target} has {SHARED[target]}: {launch}"
    return line


def main(everything=False, hip=False):
    """Run and compile; returns whether there was a fault."""
    targets = ["gfx942"] if hip else [name for name in SHARED if name != "gfx942"] if everything else ["sm_90"]
    launches, faults = Counter(), 0
    for step in steps():
        if everything or step.name in MAIN:
            line = {"step": step.name}
            try:
                made = dry_step(step, hip)
                launches.update(made)
                line["launches"] = len(made)
            except Exception as error:
                line["fault"], faults = f"{type(error).__name__}: {error}", faults + 1
            print(json.dumps(line), flush=True)
    work = [(launch, target) for launch in launches for target in targets]
    with get_context("fork").Pool(os.cpu_count()) as pool:
        for line in pool.starmap(compiled, work, chunksize=1):
            faults += "fault" in line
            print(json.dumps(line), flush=True)
    return faults > 0


if __name__ == "__main__":
    sys.exit(main("--all" in sys.argv, "--hip" in sys.argv))
