"""voxelize (kernels and reference) and grid_subsample on ten LiDAR sweeps.   python -m benchmarks.bench_voxelize

`grid_subsample` (one point of each occupied cell) is plain PyTorch on every device; on a GPU, its rows "triton" and
"reference" time the same function.
"""

import torch

from benchmarks.harness import DEVICE, Case, compare
from benchmarks.lidar_scene import CELL, LOW, SHAPE, scene
from unipad.kernels.voxelize import grid_subsample, voxelize, voxelize_ref

BATCHES = [1, 4] if DEVICE == "cuda" else [1]
SEGMENTATION_CELL = 0.05  # meters, of fine-tuning for segmentation


def points_of(batch):
    """Points [P, 5] of `batch` scenes, and the number of points of each."""
    scenes = [scene(seed, DEVICE) for seed in range(batch)]
    return torch.cat(scenes), [len(points) for points in scenes]


def voxelize_case(batch):
    points, counts = points_of(batch)
    # of the LiDAR recipe; the encoder's SHAPE has one more slice in z, which is always empty
    shape, max_points, max_voxels = (SHAPE[0] - 1, *SHAPE[1:]), 10, 120000
    inputs = (points, counts, LOW, CELL, shape, max_points, max_voxels)
    features, coords = voxelize(*inputs)
    moved = points.nbytes + features.nbytes + coords.nbytes
    return Case(name=f"B={batch} P={len(points)} V={len(coords)}", inputs=inputs, fwd_bytes=moved)


def sample_case(batch, noisy):
    """noisy: of each cell a random point is taken, not the first."""
    points, counts = points_of(batch)
    noise = torch.rand(len(points), device=DEVICE) if noisy else None
    rows, *_ = grid_subsample(points, counts, SEGMENTATION_CELL, noise)
    name = f"B={batch} P={len(points)} V={len(rows)}" + " noise" * noisy
    moved = 12 * len(points) + rows.nbytes  # read x, y, z; write the rows
    return Case(name=name, inputs=(points, counts, SEGMENTATION_CELL, noise), fwd_bytes=moved)


def sampled(*inputs):
    """The tensors that `grid_subsample` returns, for `compare`; its fourth result is two lists."""
    return grid_subsample(*inputs)[:3]


if __name__ == "__main__":
    compare("voxelize", voxelize_ref, voxelize, {}, [voxelize_case(batch) for batch in BATCHES])
    cases = [sample_case(batch, noisy) for batch in BATCHES for noisy in (False, True)]
    compare("grid_subsample", sampled, sampled, {}, cases)
