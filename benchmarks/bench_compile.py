"""The time of a training step with and without --compile, and the time to compile.

    python -m benchmarks.bench_compile                      every tiny recipe, and the image encoder of camera-0.1
    python -m benchmarks.bench_compile train/lidar/tiny     one recipe (without a GPU, a tiny one)
    python -m benchmarks.bench_compile --image-size 448 800 with larger images for the image encoder

Steps are those of benchmarks/full_step.py. The image encoder has one sample of six masked images, forward and backward.
Eager and compiled steps alternate, so that other programs on the machine slow down both. "First step" is the time of
the first compiled step, which compiles everything; it is shorter in a second run on the same machine, since Inductor
keeps what it has compiled. The compiled loss must agree with the eager one within AGREE; otherwise the row has no
times.
"""

import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from torch._inductor.utils import fresh_cache

from benchmarks.full_step import Step, city, recipes
from benchmarks.harness import DEVICE, machine
from unipad.compile import compile_parts
from unipad.model.camera import CameraEncoder
from unipad.model.mask import MASK_PATCH, draw_mask
from unipad.recipes import PRETRAIN
from unipad.runtime import World, mixed_precision

ENCODER = "image encoder of camera-0.1"
AGREE = 1e-3 if DEVICE == "cpu" else 1e-2  # relative; in fp32, and in bf16
WORLD = World(rank=0, size=1, device=torch.device(DEVICE))


@dataclass(frozen=True)
class Args:
    cases: tyro.conf.Positional[tuple[str, ...]] = (*recipes(), ENCODER)  # task/modality/preset, or the image encoder
    image_size: tuple[int, int] = (128, 224)  # (height, width) of the image encoder's images, multiples of 32
    steps: int = 10  # number of timed steps, eager and compiled each


class EncoderStep:
    """Repeats forward and backward of the image encoder of camera-0.1; a call returns the mean of its outputs."""

    def __init__(self, image_size):
        cfg = PRETRAIN["camera"]["camera-0.1"].camera
        torch.manual_seed(0)
        self.net = CameraEncoder(cfg).to(DEVICE)
        (H, W), rng = image_size, torch.Generator().manual_seed(1)
        h, w = H // MASK_PATCH, W // MASK_PATCH
        mask = draw_mask(torch.rand(6, h * w, generator=rng), h, w, cfg.mask_ratio)
        noise = torch.rand(6, sum(cfg.depths), generator=rng)
        inputs = torch.rand(1, 6, 3, H, W, generator=rng), torch.tensor([H, W]).expand(1, 6, 2), mask, noise
        self.inputs = [t.to(DEVICE) for t in inputs]
        self.autocast, _ = mixed_precision(None, torch.device(DEVICE))

    def __call__(self):
        self.net.zero_grad()
        with self.autocast:
            features, depths = self.net(*self.inputs)
        out = sum(t.float().square().mean() for t in features + depths)
        out.backward()
        return out.detach()


def seconds(step):
    """(time of one call in seconds, its first result)"""
    start = time.perf_counter()
    result = step()
    value = result.flatten()[0].item()  # waits for the GPU
    return time.perf_counter() - start, value


def row(name, make, steps):
    """One line of the table. make: builds the step, each time with the same weights."""
    eager, compiled = make(), make()
    torch._dynamo.reset()  # else graphs of the row before are used again
    compile_parts(compiled.net, WORLD)
    _, expected = seconds(eager)
    with fresh_cache():
        first, result = seconds(compiled)
    if not abs(result - expected) <= AGREE * abs(expected):  # NaN too
        return f"| {name} | results differ: {result:.6g}, eager {expected:.6g} | | | |"
    seconds(compiled)  # the first step that is only run
    times = [(seconds(eager)[0], seconds(compiled)[0]) for _ in range(steps)]
    a, b = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    return f"| {name} | {a:.0f} | {b:.0f} | {b / a:.2f} | {first:.0f} |"


def main(args: Args):
    found = recipes()
    print(", ".join(f"{k} {v}" for k, v in machine().items()), flush=True)
    lines = ["| step | eager ms | compiled ms | compiled / eager | first step s |", "|---|---|---|---|---|"]
    for name in args.cases:
        if name == ENCODER:
            lines.append(row(f"{name}, {args.image_size}", lambda: EncoderStep(args.image_size), args.steps))
        else:
            recipe, model = found[name]
            lines.append(row(name, lambda recipe=recipe, model=model: Step(recipe, model, city()), args.steps))
        print(lines[-1], flush=True)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
