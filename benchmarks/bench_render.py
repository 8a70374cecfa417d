"""The NeuS renderer: ours, and UniPAD's formulas in eager PyTorch.   python -m benchmarks.bench_render

Forward: rays through a volume to color, depth and the sum of the losses. Backward: to the volume and to every
parameter. The row "reference" is UniPAD's formulas, the eager renderer; both run on the same parameters, rays and
jitter.

Outputs and gradients are asserted to agree in fp64 to AGREE_FP64; there, ours uses separate ops on a GPU too, because
the fused op has no fp64. In fp32 they must agree to AGREE: rounding moves some importance samples (the inverse CDF
jumps over intervals of almost no mass), which alone changes gradients by up to AGREE on a CPU; on a GPU the fused op
multiplies in tf32, which changes signed distances by up to a hundredth of the largest. Both tolerances are fractions of
the largest entry of each output or gradient.
"""

from copy import deepcopy
from dataclasses import replace

import torch
from torch.nn import functional as F

from benchmarks.eager import EagerRenderer
from benchmarks.harness import DEVICE, Case, compare, largest_error
from unipad.model.rays import Rays
from unipad.model.render import Renderer
from unipad.recipes import PRETRAIN

VIEWS = 6
AGREE_FP64 = 1e-5
AGREE = 5e-2 if DEVICE == "cuda" else 1e-2
# Settings of the case "all losses": in addition to the recipe's losses of color and depth, those of the SDF along the
# rays
LOSSES = dict(free_space_weight=1.0, sdf_weight=10.0, eikonal_weight=0.01, truncation=1.5)


def case(preset, **settings):
    """Rays of one batch sample: they start 1 m from the LiDAR and point outwards; three quarters of them have a depth.

    settings: fields of the preset's `Render` to replace.
    """
    recipe = PRETRAIN["camera"][preset]
    cfg, grid, R = replace(recipe.render, **settings), recipe.grid, VIEWS * recipe.rays.per_view
    renderer = Renderer(cfg, grid).to(DEVICE)
    (X, Y, Z), C = grid.shape, cfg.channels
    volume = torch.randn(1, C, Z, Y, X, device=DEVICE).relu().to(memory_format=torch.channels_last_3d)
    directions = F.normalize(torch.randn(R, 3, device=DEVICE) * torch.tensor([1, 1, 0.1], device=DEVICE), dim=1)
    depth = torch.where(torch.rand(R, device=DEVICE) < 0.25, -1, 3 + 40 * torch.rand(R, device=DEVICE))  # -1: none
    rays = Rays(
        origins=directions,  # 1 m from the LiDAR
        directions=directions,
        depth=depth,
        rgb=torch.rand(R, 3, device=DEVICE),
        volume_idx=torch.zeros_like(depth).int(),
    )
    jitter = torch.rand(R, renderer.jitters, device=DEVICE)
    parameters = [p for p in renderer.parameters() if p.requires_grad]
    name = f"{preset}{', all losses' if settings else ''}: R={R} S={cfg.samples}+{cfg.importance}"
    # read the volume and the rays; write color and depth, 4 numbers per ray
    moved = volume.nbytes + sum(t.nbytes for t in vars(rays).values() if t is not None) + 4 * depth.nbytes
    return Case(name, (renderer, volume.requires_grad_(), rays, jitter, parameters), moved)


def render(renderer, volume, rays, jitter, parameters):
    """Color, depth and loss. `parameters`, unused here, are inputs: `compare` differentiates w.r.t. inputs only."""
    rendered = renderer(volume, rays, jitter)
    return rendered.rgb, rendered.depth, sum(renderer.loss(rendered, rays).values())


def eager(renderer, *inputs):
    return render(EagerRenderer(renderer), *inputs)


def in_fp64(case):
    """The case's inputs in double precision; nothing is timed with them."""
    renderer, volume, rays, jitter, _ = case.inputs
    renderer = deepcopy(renderer).double()
    rays = rays.each(lambda t: t.double() if t.is_floating_point() else t)
    parameters = [p for p in renderer.parameters() if p.requires_grad]
    return renderer, volume.detach().double().requires_grad_(), rays, jitter.double(), parameters


if __name__ == "__main__":
    torch.manual_seed(0)
    preset = "camera-0.1" if DEVICE == "cuda" else "tiny"
    cases = [case(preset), case(preset, **LOSSES)]
    for one in cases:
        error = largest_error(render, eager, in_fp64(one))
        assert error <= AGREE_FP64, f"{one.name}: ours differs from the original's formulas by {error:.1e} in fp64"
    # on a CPU, `compare` times no op, since ops run their references there; ours is not the reference here: a peer
    peers = {} if DEVICE == "cuda" else {"ours": render}
    compare("render", eager, render, peers, cases, agree=AGREE)
