"""Memory accesses of lift and voxel_pool on nuScenes' rig, each at the size of a recipe of the paper, without a GPU.

    python -m benchmarks.count_views

The counts guide the choice of block shapes: the views that a program skips, its active lanes, how often it reads the
same row of features (the channels of one pixel), and how many terms are summed per pixel (in lift's backward) or rows
per voxel (in voxel_pool).
"""

import torch

from benchmarks import bench_lift, bench_voxel_pool
from unipad.kernels import lift, pool_points
from unipad.recipes import PRETRAIN

BLOCKS = [(8, 1, 1), (4, 2, 1), (2, 2, 2), (16, 1, 1), (4, 4, 1), (4, 2, 2), (32, 1, 1), (8, 4, 1)]  # (x, y, z) voxels
RUN_LENGTHS = (1, 2, 4)  # maximum number of consecutive points of a ray in one voxel that share one read


def count_lift():
    _, image_size, scale, strides = bench_lift.PAPER
    recipe = PRETRAIN["camera"]["camera-0.1"]
    (X, Y, Z), N = recipe.grid.shape, len(bench_lift.CAMERAS)
    uvd, visible = lift._project_ref(
        bench_lift.rig(scale),
        recipe.grid.low,
        recipe.grid.cell,
        recipe.grid.shape,
        image_size,
        recipe.camera.depth_range,
    )
    (u, v, _), visible = uvd[:, 0], visible[0]  # [N, V] each, of the batch's one sample
    n, voxel = visible.nonzero(as_tuple=True)  # [P] pairs of view and voxel
    x, y, z = voxel % X, voxel // X % Y, voxel // (X * Y)
    pixels = {}  # stride -> pixels per view, [4, P] the pixels around each projection
    for stride in strides:
        h, w = (-(-size // stride) for size in image_size)
        columns, _ = lift._nodes_ref(u[n, voxel], w)
        rows, _ = lift._nodes_ref(v[n, voxel], h)
        pixels[stride] = h * w, (((n * h + rows)[:, None]) * w + columns).flatten(0, 1)

    visible_pairs, all_pairs, voxels = len(voxel), N * X * Y * Z, X * Y * Z
    print(f"## lift\n\n{visible_pairs} of {all_pairs} pairs of view and voxel are visible, ", end="")
    print(f"{visible_pairs / voxels:.2f} per voxel;")
    # the table below: what is skipped by programs of several voxels
    print(f"with one voxel per program, {1 - visible_pairs / all_pairs:.1%} of the views would be skipped\n")
    print("| block x, y, z | programs | views skipped | active lanes | reads per row |", end="")
    print("".join(f" stride {s} |" for s in strides) + "\n|" + "---|" * (5 + len(strides)))
    for bx, by, bz in BLOCKS:
        blocks_x, blocks_y = -(-X // bx), -(-Y // by)
        programs = blocks_x * blocks_y * -(-Z // bz)
        block = (z // bz * blocks_y + y // by) * blocks_x + x // bx
        passes = len((block * N + n).unique())  # pairs of program and view with a visible voxel
        # rows that a program reads, each once, summed over the programs; by stride
        distinct = [len((block * N * per_view + pixel).unique()) for per_view, pixel in pixels.values()]
        # four pixels per pair of view and voxel; first the ratio for all strides together
        reads = " | ".join(f"{4 * visible_pairs / rows:.2f}" for rows in [sum(distinct) / len(distinct), *distinct])
        lanes = visible_pairs / (passes * bx * by * bz)
        print(f"| {bx}, {by}, {bz} | {programs} | {1 - passes / (programs * N):.1%} | {lanes:.1%} | {reads} |")

    print(
        "\n| stride | pixels | with a hit | hits per pixel, mean | max | elements added atomically, if not gathered |"
    )
    print("|---|---|---|---|---|---|")
    for stride, (per_view, pixel) in pixels.items():
        hits = torch.bincount(pixel.flatten(), minlength=N * per_view)  # each projection hits four pixels
        nonzero = hits[hits > 0].float()
        added = hits.sum() * recipe.camera.channels / 1e6
        print(
            f"| {stride} | {len(hits)} | {len(nonzero)} | {nonzero.mean():.1f} | {nonzero.max():.0f} | {added:.0f} M |"
        )


def count_pool():
    _, grid, C, D, depth_range, image_size, scale, stride = bench_voxel_pool.PAPER
    lidar2image = bench_lift.rig(scale)
    matrices, bins = pool_points.geometry_ref(lidar2image, grid.low, grid.cell, depth_range, D)
    # of the features [B, N, h, w, C]
    sizes = (1, lidar2image.shape[1], image_size[0] // stride, image_size[1] // stride, C)
    V = grid.shape[0] * grid.shape[1] * grid.shape[2]
    voxel = pool_points.voxels_ref(matrices, bins, sizes, grid.shape, stride, truncate=False).view(-1, D)
    index_in_run = torch.zeros_like(voxel)  # a run: consecutive points of a ray in the same voxel
    for k in range(1, D):
        index_in_run[:, k] = torch.where(voxel[:, k] == voxel[:, k - 1], index_in_run[:, k - 1] + 1, 0)
    inside = voxel < V
    occupied = len(voxel[inside].unique())
    print(f"\n## voxel_pool\n\n{inside.sum()} of {inside.numel()} points lie in {occupied} of {V} voxels\n")
    print("| points per run | rows read | per voxel, mean | max |\n|---|---|---|---|")
    for length in RUN_LENGTHS:
        rows = torch.bincount(voxel[inside & (index_in_run % length == 0)])
        rows = rows[rows > 0].float()
        print(f"| {length} | {rows.sum():.0f} | {rows.mean():.2f} | {rows.max():.0f} |")


if __name__ == "__main__":
    count_lift()
    count_pool()
