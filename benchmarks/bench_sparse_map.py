"""Sorting of voxels and sparse_map: kernels, references and a dense lookup, at the stages of the LiDAR recipe.

    python -m benchmarks.bench_sparse_map

Voxels come from benchmarks/lidar_scene.py. `submanifold_map` has a peer, "all cells": it stores a row number for
every cell of the grid, which needs no search, but 4 bytes for each cell: 340 MB per sample at the first stage.
"""

from itertools import product
from math import prod

import torch

from benchmarks.harness import DEVICE, Case, compare
from benchmarks.lidar_scene import DOWNSAMPLES, SHAPE, voxels
from unipad.kernels.sparse_map import (
    inverse_map,
    inverse_map_ref,
    strided_map,
    strided_map_ref,
    submanifold_map,
    submanifold_map_ref,
    transposed_map,
    transposed_map_ref,
)
from unipad.kernels.sparse_outputs import out_shape
from unipad.kernels.voxel_keys import sort_voxels, sort_voxels_ref

BATCHES = [1, 4] if DEVICE == "cuda" else [1]
DILATION = (1, 1, 1)


def stages(batch):
    """(name, coords, shape) of the four stages of the encoder."""
    coords, shape = voxels(batch, DEVICE), SHAPE
    yield f"B={batch} stage 1", coords, shape
    for stage, geometry in enumerate(DOWNSAMPLES):
        coords, shape = strided_map(coords, shape, *geometry)[0], out_shape(shape, *geometry)
        yield f"B={batch} stage {stage + 2}", coords, shape


def sort_case(name, coords, shape):
    inputs = coords, shape, False  # False: no check of the coordinates
    moved = coords.nbytes + 2 * 8 * len(coords)  # write keys and order, int64
    return Case(f"{name} N={len(coords)}", inputs, moved)


def submanifold_case(name, coords, shape, kernel):
    keys, order = sort_voxels(coords, shape)
    table = submanifold_map(coords, keys, order, shape, kernel, DILATION)
    neighbors = (table >= 0).sum().item() / len(coords)
    name = f"{name} N={len(coords)} {neighbors:.1f} of {prod(kernel)}"
    moved = coords.nbytes + keys.nbytes + order.nbytes + table.nbytes
    return Case(name, (coords, keys, order, shape, kernel, DILATION), moved)


def new_coords_case(op, batch, name, coords, shape, geometry):
    """A `Case` of `strided_map` or `transposed_map`, which return output coordinates and a table.

    geometry: (kernel, stride, padding, dilation), (z, y, x) each.
    """
    # only `strided_map` reads sorted keys; sorting is not timed, since in the model a `VoxelSet` has done it already
    keys_order = sort_voxels(coords, shape) if op is strided_map else ()
    inputs = coords, shape, *geometry, batch, *keys_order
    out_coords, table = op(*inputs)
    name = f"{name} N={len(coords)} M={len(out_coords)}"
    return Case(name, inputs, coords.nbytes + out_coords.nbytes + table.nbytes)


def inverse_case(name, coords, shape, geometry):
    out_coords, table = strided_map(coords, shape, *geometry)
    moved = table.nbytes + 4 * len(table) * len(coords)  # write the inverse [K, N], int32
    return Case(f"{name} N={len(coords)} M={len(out_coords)}", (table, len(coords)), moved)


def all_cells(coords, keys, order, shape, kernel, dilation):
    """`submanifold_map` by lookup in a dense grid of row numbers with an empty border; ignores keys and order."""
    below = [k // 2 * d for k, d in zip(kernel, dilation, strict=True)]
    size = [n + (k - 1) * d for n, k, d in zip(shape, kernel, dilation, strict=True)]
    b, z, y, x = coords.long().unbind(1)
    row_at = torch.full((int(b.max()) + 1, *size), -1, dtype=torch.int32, device=coords.device)
    row_at[b, z + below[0], y + below[1], x + below[2]] = torch.arange(len(b), dtype=torch.int32, device=b.device)
    offsets = torch.tensor([*product(*(range(k) for k in kernel))], device=b.device)
    shift = (offsets * torch.tensor(dilation, device=b.device)).T[:, :, None]  # [3, K, 1]
    z, y, x = torch.stack([z, y, x])[:, None] + shift  # [K, N] each
    return row_at[b, z, y, x]


if __name__ == "__main__":
    for batch in BATCHES:
        levels = list(stages(batch))
        compare("sort_voxels", sort_voxels_ref, sort_voxels, {}, [sort_case(*levels[0]), sort_case(*levels[2])])
        cases = [submanifold_case(*level, (3, 3, 3)) for level in levels]
        cases += [submanifold_case(*levels[0], (5, 5, 5))]  # as SpUNet's first convolution
        compare("submanifold_map", submanifold_map_ref, submanifold_map, {"all cells": all_cells}, cases)
        # (name, coords, shape, geometry) of the strided convolutions; the last stage has none
        downs = [(*level, geometry) for level, geometry in zip(levels, DOWNSAMPLES, strict=False)]
        cases = [new_coords_case(strided_map, batch, *down) for down in downs]
        compare("strided_map", strided_map_ref, strided_map, {}, cases)
        compare("inverse_map", inverse_map_ref, inverse_map, {}, [inverse_case(*down) for down in downs])
        up = (2, 2, 2), (2, 2, 2), (0, 0, 0), DILATION  # kernel, stride, padding, dilation
        cases = [new_coords_case(transposed_map, batch, *level, up) for level in levels[1:]]
        compare("transposed_map", transposed_map_ref, transposed_map, {}, cases)
