"""carve: kernels and reference, ten LiDAR sweeps in the volume of lidar-0.075.   python -m benchmarks.bench_carve

On a CPU, one sweep is timed first: about as many rays as in a sample of the tiny preset.
"""

import torch

from benchmarks.harness import DEVICE, Case, compare
from benchmarks.lidar_scene import SPEED, SWEEPS, scene
from unipad.kernels.carve import carve, carve_ref
from unipad.recipes import PRETRAIN

SIZES = [(1, SWEEPS), (4, SWEEPS)] if DEVICE == "cuda" else [(1, 1), (1, SWEEPS)]  # samples, sweeps
GRID = PRETRAIN["lidar"]["lidar-0.075-occupancy"].grid


def carve_case(batch, sweeps):
    rays = []
    for seed in range(batch):
        points = scene(seed, DEVICE)
        rays.append(points[points[:, 4] < 0.05 * sweeps - 0.01])
    points = torch.cat(rays)
    lag = points[:, 4:]
    origins = torch.cat([0 * lag, -SPEED * lag / 0.05, 0 * lag], dim=1)
    volume_idx = torch.arange(batch, device=DEVICE).repeat_interleave(torch.tensor([len(r) for r in rays]).to(DEVICE))
    rank = 2 - (lag[:, 0] / 0.225).int()  # two windows of time
    inputs = (origins, points[:, :3].contiguous(), volume_idx.int(), GRID.low, GRID.cell, GRID.shape[::-1], batch, rank)
    X, Y, Z = GRID.shape
    # read origin and end, volume and rank; set the marks to 0, read them and write the states
    moved = len(points) * (2 * 12 + 2 * 4) + batch * X * Y * Z * (4 + 4 + 1)
    return Case(name=f"B={batch} R={len(points)}", inputs=inputs, fwd_bytes=moved)


if __name__ == "__main__":
    compare("carve", carve_ref, carve, {}, [carve_case(*size) for size in SIZES])
