"""What --render.occupancy-window does to cells that moving objects have left.   python -m benchmarks.carve_windows

Uses every seventh training frame of the synthetic city with ten sweeps, for cells of the size of the tiny recipes and
of half that size. A trail cell is a cell above the road that a moving box (faster than 1 m/s) overlapped at the time of
an earlier sweep, but no longer overlaps: "full" is wrong there. Full cells that a longer window adds elsewhere are
mostly right: they are surfaces that only an earlier sweep has hit, and over which later rays pass.
"""

from dataclasses import replace

import numpy as np
import torch

from unipad.config import Data
from unipad.data.collate import collate
from unipad.data.nuscenes import NuScenesDataset
from unipad.kernels.carve import FREE, FULL
from unipad.model.carving import Carving
from unipad.recipes import PRETRAIN

WINDOWS = 0.01, 0.1, 0.2, 0.3, 1.0  # seconds: one sweep, two, four, six, all
ABOVE_ROAD = -0.9  # meters, lowest center of a trail cell: those below contain the road


def overlapped(centers, cell, box, lag):
    """[Z, Y, X] whether a box, `lag` seconds ago, contains a cell's center, half a cell of slack above and below."""
    x, y, z, width, length, height, yaw, vx, vy = box
    dx, dy, dz = np.moveaxis(centers - (x - lag * vx, y - lag * vy, z), -1, 0)
    along, across = dx * np.cos(yaw) + dy * np.sin(yaw), dy * np.cos(yaw) - dx * np.sin(yaw)
    slack = cell[0] / 2 if lag == 0 else 0  # a cell that the box has hardly left is no trail cell
    inside = (abs(along) < length / 2 + slack) & (abs(across) < width / 2 + slack)
    return inside & (abs(dz) < (height + cell[2]) / 2)


def trail_of(sample, grid):
    """[Z, Y, X] bool, the trail cells of a sample."""
    steps = [np.arange(n) + 0.5 for n in grid.shape[::-1]]
    centers = np.stack(np.meshgrid(*steps, indexing="ij")[::-1], axis=-1) * grid.cell + grid.low
    moving = sample.boxes[np.hypot(*sample.boxes[:, 7:].T) > 1]
    now, before = np.zeros((2, *centers.shape[:3]), bool)
    for box in moving.astype(np.float64):
        now |= overlapped(centers, grid.cell, box, 0)
        for lag in sample.sweep_origins[1:, 3]:
            before |= overlapped(centers, grid.cell, box, lag)
    return before & ~now & (centers[..., 2] > ABOVE_ROAD)


def main():
    recipe = replace(PRETRAIN["lidar"]["tiny-occupancy"], data=Data(cameras=False, sweeps=10))
    box = recipe.grid.low, recipe.grid.high
    dataset = NuScenesDataset(
        NuScenesDataset.default_root(recipe.data), "v1.0-mini", "mini_train", recipe.data, 1.0, box
    )
    dataset = dataset.with_points_beyond()
    samples = [dataset[i] for i in range(3, len(dataset), 7)]
    print(
        "| cell, m | window, s | full cells | free cells | trail cells | full | free |\n|---|---|---|---|---|---|---|"
    )
    for fraction in (1.0, 0.5):
        grid = replace(recipe.grid, cell=tuple(fraction * c for c in recipe.grid.cell))
        trails = torch.from_numpy(np.stack([trail_of(sample, grid) for sample in samples]))
        for window in WINDOWS:
            render = replace(recipe.render, occupancy_window=window)
            state = Carving(replace(recipe, grid=grid, render=render)).target(collate(samples).to("cpu"))
            cells = [f"{(state == s).double().mean():.2%}" for s in (FULL, FREE)]
            left = [f"{(state[trails] == s).double().mean():.0%}" for s in (FULL, FREE)]
            print(
                f"| {grid.cell[0]} | {window} | {' | '.join(cells)} | {trails.sum()} | {' | '.join(left)} |", flush=True
            )


if __name__ == "__main__":
    main()
