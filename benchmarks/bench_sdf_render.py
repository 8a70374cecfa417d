"""The fused NeuS renderer for few and many rays, and its peers.   python -m benchmarks.bench_sdf_render

Sampling, field and compositing: rays through a volume to color and depth; backward to the volume and every parameter.

    reference       the original's formulas in eager PyTorch, with a double backward through the gradient of the SDF
    triton          `unipad.kernels.sdf_render` (GPU), products in tf32
    triton, exact   the same with fp32 accuracy (GPU)
    triton, unfused the same renderer, one kernel per op (GPU); "unfused" on a CPU, where it is the default
    compiled        the reference under torch.compile, or the error that it raises

All are asserted to agree; `benchmarks.bench_render` explains why importance sampling limits the agreement in fp32. In
tf32, errors of distances reach a hundredth of the largest distance.
"""

from copy import copy
from dataclasses import replace

import torch
from torch.nn import functional as F

from benchmarks.bench_render import AGREE_FP32
from benchmarks.eager import EagerRenderer
from benchmarks.harness import DEVICE, Case, compare, compiled
from unipad.model.rays import Rays
from unipad.model.render import Renderer
from unipad.recipes import PRETRAIN

SAMPLES, IMPORTANCE = 72, 24
RAYS = [3072, 512, 12288, 49152] if DEVICE == "cuda" else [512, 1024, 3072]
AGREE = 5e-2 if DEVICE == "cuda" else AGREE_FP32


def case(R):
    """R rays of one sample, from cameras around the origin outwards; on a CPU through the tiny preset's volume."""
    recipe = PRETRAIN["camera"]["camera-0.1" if DEVICE == "cuda" else "tiny"]
    cfg, grid = replace(recipe.render, samples=SAMPLES, importance=IMPORTANCE), recipe.grid
    renderer = Renderer(cfg, grid).to(DEVICE)
    (X, Y, Z), C = grid.shape, cfg.channels
    volume = torch.randn(1, C, Z, Y, X, device=DEVICE).relu().to(memory_format=torch.channels_last_3d)
    directions = F.normalize(torch.randn(R, 3, device=DEVICE) * torch.tensor([1, 1, 0.1], device=DEVICE), dim=1)
    zeros = torch.zeros(R, device=DEVICE)
    rays = Rays(directions, directions, zeros, directions, zeros.int())
    jitter = torch.rand(R, renderer.jitters, device=DEVICE)
    parameters = [p for p in renderer.parameters() if p.requires_grad]
    moved = volume.nbytes + 2 * directions.nbytes + 4 * zeros.nbytes
    name = f"R={R} S={SAMPLES}+{IMPORTANCE} C={C}"
    return Case(name, (renderer, volume.requires_grad_(), rays, jitter, parameters), moved)


def triton(renderer, volume, rays, jitter, parameters):
    rendered = renderer(volume, rays, jitter)
    return rendered.rgb, rendered.depth


def exact(renderer, *inputs):
    renderer = copy(renderer)
    renderer.exact = True
    return triton(renderer, *inputs)


def unfused(renderer, *inputs):
    renderer = copy(renderer)
    renderer._fused = lambda volume: False
    return triton(renderer, *inputs)


def eager(renderer, *inputs):
    return triton(EagerRenderer(renderer), *inputs)


if __name__ == "__main__":
    torch.manual_seed(0)
    cases = [case(R) for R in RAYS]
    on_gpu = {"triton, unfused": unfused, "triton, exact": exact}
    peers = on_gpu if DEVICE == "cuda" else {"unfused": unfused}
    rows = compare("sdf_render", eager, triton, peers | {"compiled": compiled(eager)}, cases, AGREE)
    print("\n| case | impl | forward + backward, us per ray |\n|---|---|---|")
    for row in (row for row in rows if row.both_ms):
        print(f"| {row.case} | {row.impl} | {1e3 * row.both_ms / int(row.case.split()[0][2:]):.1f} |")
