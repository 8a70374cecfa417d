"""voxel_pool: kernel, reference, and the original's formulas in eager PyTorch.   python -m benchmarks.bench_voxel_pool

The kernel's time includes finding and sorting the points; peers that are given them sorted do less.
"""

import math
from functools import partial

import torch

from benchmarks.bench_lift import AGREE_HALF, rig
from benchmarks.eager import eager_voxel_pool
from benchmarks.harness import DEVICE, Case, compare
from kernels.voxel_pool import voxel_pool, voxel_pool_ref
from unipad.recipes import GRID_075, TINY_GRID

# name, grid, channels, depth bins, (nearest, farthest) metres, image (H, W) padded, content width / 1600, stride
PAPER = ("camera-0.075", GRID_075, 256, 118, (1.0, 60.0), (928, 1600), 1.0, 32)
TINY = ("tiny", TINY_GRID, 32, 64, (1.0, 65.0), (160, 256), 0.16, 8)


def case(name, grid, channels, bins, depth_range, image_size, scale, stride, dtype=torch.float32):
    lidar2image = rig(scale)
    sizes = (*lidar2image.shape[:2], *(size // stride for size in image_size))
    features = torch.randn(*sizes, channels, device=DEVICE).to(dtype).requires_grad_()
    depths = torch.randn(*sizes, bins, device=DEVICE).softmax(-1).to(dtype).requires_grad_()
    # off the rig's planes: points on faces of voxels would lie on either side of them, as a peer rounds
    low = tuple(l + 0.0137 for l in grid.low)
    geometry = (lidar2image, low, grid.cell, grid.shape, stride, depth_range)
    out_bytes = math.prod(grid.shape) * channels * features.element_size()
    name = f"{name} {str(dtype).removeprefix('torch.')}"
    return Case(name, (features, depths, *geometry), out_bytes + features.nbytes + depths.nbytes)


if __name__ == "__main__":
    run = partial(compare, "voxel_pool", voxel_pool_ref, voxel_pool, {"eager": eager_voxel_pool})
    run([case(*TINY), case(*PAPER)])
    if DEVICE == "cuda":
        run([case(*PAPER, torch.float16), case(*PAPER, torch.bfloat16)], agree=AGREE_HALF)
