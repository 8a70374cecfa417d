"""The fused NeuS renderer for few and many rays, and its peers.   python -m benchmarks.bench_sdf_render

Forward: from rays through a volume to color and depth, by sampling, field and compositing. Backward: to the volume and
every parameter.

    reference       UniPAD's formulas in eager PyTorch, with a double backward through the gradient of the SDF
    triton          `unipad.kernels.sdf_render` (GPU), products in tf32
    triton, exact   the same with products of fp32 accuracy (GPU)
    triton, unfused the same renderer, op by op (GPU); "unfused" on a CPU, which has no fused op
    compiled        the reference under torch.compile, or the error that it raises

Before it, `pack`, which makes the matrices that the fused op reads: kernel and reference.

Only what agrees with the reference to AGREE is timed; `benchmarks.bench_render`, which defines it, explains its value.
"""

from copy import copy
from dataclasses import replace

import torch
from torch.nn import functional as F

from benchmarks.bench_render import AGREE
from benchmarks.eager import EagerRenderer
from benchmarks.harness import DEVICE, Case, compare, compiled
from unipad.kernels.sdf_pack import pack, pack_ref
from unipad.model.rays import Rays
from unipad.model.render import Renderer
from unipad.recipes import PRETRAIN

SAMPLES, IMPORTANCE = 72, 24  # per ray, as in UniPAD: stratified, and drawn where the surface is likely
RAYS = [3072, 512, 12288, 49152] if DEVICE == "cuda" else [512, 1024, 3072]  # UniPAD: 6 cameras x 512


def case(R):
    """R rays of one batch sample, from 1 m around the origin outwards; on a CPU through the tiny preset's volume."""
    recipe = PRETRAIN["camera"]["camera-0.1" if DEVICE == "cuda" else "tiny"]
    cfg, grid = replace(recipe.render, samples=SAMPLES, importance=IMPORTANCE), recipe.grid
    renderer = Renderer(cfg, grid).to(DEVICE)
    (X, Y, Z), C = grid.shape, cfg.channels
    volume = torch.randn(1, C, Z, Y, X, device=DEVICE).relu().to(memory_format=torch.channels_last_3d)
    directions = F.normalize(torch.randn(R, 3, device=DEVICE) * torch.tensor([1, 1, 0.1], device=DEVICE), dim=1)
    zeros = torch.zeros(R, device=DEVICE)
    rays = Rays(
        origins=directions,  # each ray starts 1 m from the origin
        directions=directions,
        depth=zeros,  # this and the color are for losses, which are not computed here
        rgb=directions,
        volume_idx=zeros.int(),
    )
    jitter = torch.rand(R, renderer.jitters, device=DEVICE)
    parameters = [p for p in renderer.parameters() if p.requires_grad]
    moved = volume.nbytes + 2 * directions.nbytes + 4 * zeros.nbytes  # read volume, rays; write color (3), depth
    name = f"R={R} S={SAMPLES}+{IMPORTANCE} C={C}"
    return Case(name, (renderer, volume.requires_grad_(), rays, jitter, parameters), moved)


def pack_case():
    cfg = PRETRAIN["camera"]["camera-0.1"].render
    field = Renderer(cfg, PRETRAIN["camera"]["camera-0.1"].grid).to(DEVICE).field
    mlps = field.sdf_decoder.tensors(), field.rgb_decoder.tensors()
    # read the parameters, write the packed matrices
    moved = sum(t.nbytes for t in (*mlps[0], *mlps[1], *pack_ref(*mlps, cfg.channels)))
    return Case(f"C={cfg.channels} H={cfg.hidden}", (*mlps, cfg.channels), moved)


def render(renderer, volume, rays, jitter, parameters):
    """Color and depth. `compare` computes the gradients of all inputs, so `parameters` is one of them."""
    rendered = renderer(volume, rays, jitter)
    return rendered.rgb, rendered.depth


def exact(renderer, *inputs):
    renderer = copy(renderer)
    renderer.exact = True
    return render(renderer, *inputs)


def unfused(renderer, *inputs):
    renderer = copy(renderer)
    renderer._fused = lambda volume: False
    return render(renderer, *inputs)


def eager(renderer, *inputs):
    return render(EagerRenderer(renderer), *inputs)


if __name__ == "__main__":
    torch.manual_seed(0)
    compare("pack", pack_ref, pack, {}, [pack_case()])
    cases = [case(R) for R in RAYS]
    gpu_peers = {"triton, unfused": unfused, "triton, exact": exact}
    peers = gpu_peers if DEVICE == "cuda" else {"unfused": unfused}
    rows = compare("sdf_render", eager, render, peers | {"compiled": compiled(eager)}, cases, agree=AGREE)
    print("\n| case | impl | forward + backward, us per ray |\n|---|---|---|")
    for row in (row for row in rows if row.both_ms):
        R = int(row.case.split()[0].removeprefix("R="))
        print(f"| {row.case} | {row.impl} | {1e3 * row.both_ms / R:.1f} |")
