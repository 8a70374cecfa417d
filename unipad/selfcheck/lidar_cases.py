"""The LiDAR cases of the self-check: voxels and sparse convolutions."""

import math
from functools import partial

import torch

from unipad.kernels.carve import carve, carve_ref
from unipad.kernels.norm_relu import norm_relu, norm_relu_ref
from unipad.kernels.sparse_conv import sparse_conv, sparse_conv_act, sparse_conv_act_ref, sparse_conv_ref
from unipad.kernels.sparse_layers import Layer, sparse_layers, sparse_layers_ref
from unipad.kernels.sparse_map import (
    inverse_map,
    inverse_map_ref,
    strided_map,
    strided_map_ref,
    strided_tables,
    strided_tables_ref,
    submanifold_map,
    submanifold_map_ref,
    transposed_map,
    transposed_map_ref,
)
from unipad.kernels.sparse_outputs import out_shape
from unipad.kernels.sparse_tiles import NeighborTable
from unipad.kernels.voxel_keys import sort_voxels, sort_voxels_ref, voxel_keys, voxel_keys_ref
from unipad.kernels.voxelize import voxelize, voxelize_ref
from unipad.recipes import PRETRAIN
from unipad.selfcheck.check import Case

LIDAR = PRETRAIN["lidar"]["lidar-0.075"]
THREE, TWO, ONE = (3, 3, 3), (2, 2, 2), (1, 1, 1)
# (kernel, stride, padding, dilation) of the convolutions between the encoder's stages, and of a transposed convolution
DOWN = [(THREE, TWO, padding, ONE) for padding in (ONE, ONE, (0, 1, 1))]
UP = (TWO, TWO, (0, 0, 0), ONE)
WIDTHS = 16, 32, 64, 128  # channels per stage


def _grid(recipe):
    """(low, cell, (Z, Y, X)): lower corner and voxel size in meters (x, y, z), number of voxels."""
    if not recipe:
        return (-2.5, -1.5, -1.5), (0.5, 0.3, 0.7), (8, 10, 10)  # z: the fewest that leave a voxel in stage 4
    cell = LIDAR.lidar.cell
    sizes = [round((h - l) / c) for l, h, c in zip(LIDAR.grid.low, LIDAR.grid.high, cell, strict=True)]
    return LIDAR.grid.low, cell, tuple(sizes[::-1])


def _points(recipe, device):
    """[P, 5] x, y, z meters, intensity, time lag in seconds: ten sweeps of 32 beams over flat ground between 40 walls;
    two in five points return. At the small size, 300 random points, some beyond the grid's upper limits.

    The work of a sparse convolution depends on the number of neighbors. Random cells of a large grid have hardly any;
    surfaces scanned by a moving sensor have about as many as in nuScenes.
    """
    if not recipe:
        low, cell, shape = _grid(False)
        extent = torch.tensor([c * n for c, n in zip(cell, shape[::-1], strict=True)], device=device)
        points = torch.rand(300, 5, device=device)
        points[:, :3] = points[:, :3] * 1.2 * extent + torch.tensor(low, device=device)
        return points
    sweeps = []
    for sweep in range(10):
        elevation = torch.linspace(-30.67, 10.67, 32, device=device).deg2rad()[:, None]
        azimuth = (torch.arange(1084, device=device) + torch.rand((), device=device)) * (2 * math.pi / 1084)
        facet = (azimuth * (40 / (2 * math.pi))).long() % 40  # one of 40 sectors, each with a wall
        # distance of each wall, meters; the same in every sweep
        wall = 4 + 30 * torch.rand(40, generator=torch.Generator().manual_seed(2)).to(device) ** 2
        # horizontal distance along each azimuth
        to_wall = wall[facet] / ((azimuth * 40 / (2 * math.pi)) % 1 - 0.5).mul(2 * math.pi / 40).cos()
        # ranges, meters: to the wall or to the ground, 1.84 m below; noise; one in ten is 0.5 m longer on average
        t = torch.minimum(to_wall / elevation.cos(), torch.where(elevation < 0, -1.84 / elevation.sin(), math.inf))
        t = t + 0.02 * torch.randn_like(t) + (torch.rand_like(t) < 0.1) * -0.5 * torch.rand_like(t).log()
        height = elevation.sin().expand_as(t) * t
        xyz = torch.stack([elevation.cos() * azimuth.cos() * t, elevation.cos() * azimuth.sin() * t, height], dim=-1)
        xyz = xyz + torch.tensor([0.0, -0.3 * sweep, 0.0], device=device)  # 6 m/s at 20 Hz
        returned = torch.rand_like(t) < 0.4
        intensity_and_lag = torch.stack([torch.rand_like(t), torch.full_like(t, 0.05 * sweep)], dim=-1)
        sweeps.append(torch.cat([xyz, intensity_and_lag], dim=-1)[returned & (t < 70)])
    return torch.cat(sweeps)


def _stage(number, recipe, device):
    """Coordinates [N, 4] and grid (Z, Y, X) of the encoder's stage `number`, from 0, computed by the references."""
    low, cell, (Z, Y, X) = _grid(recipe)
    points = _points(recipe, device)
    coords = voxelize_ref(points, [len(points)], low, cell, (Z, Y, X), max_points=10, max_voxels=120000)[1]
    shape = (Z + 1, Y, X)  # one more slice than there are voxels, as in `LidarEncoder`
    for geometry in DOWN[:number]:
        coords, shape = strided_map_ref(coords, shape, *geometry)[0], out_shape(shape, *geometry)
    return coords, shape


def voxel_cases(size, recipe):
    """Cases of voxelization and of neighbor tables. Names count the encoder's stages from 1, `number` from 0."""

    def points(device, dtype):
        low, cell, shape = _grid(recipe)
        one, other = _points(recipe, device), _points(recipe, device).flip(0)
        counts = [len(one), len(other)]
        return dict(
            points=torch.cat([one, other]), point_counts=counts, low=low, cell=cell, shape=shape,
            max_points=10 if recipe else 3, max_voxels=120000 if recipe else 60,  # small: fewer than the occupied ones
        )  # fmt: skip

    def rays(device, dtype):
        """From the LiDAR of each sweep to its points; small: from around the grid to points in and around it."""
        low, cell, shape = _grid(recipe)
        if recipe:
            low, cell, shape = LIDAR.grid.low, LIDAR.grid.cell, LIDAR.grid.shape[::-1]
        points = _points(recipe, device)
        ends, lag = points[:, :3].contiguous(), points[:, 4:]
        origins = torch.cat([0 * lag, -6 * lag, 0 * lag], dim=1) if recipe else 2 * ends.roll(1, 0)
        volume_idx = torch.arange(len(ends), device=device).int() % 4 - 1  # -1: not used
        rank = (2 - 4 * lag[:, 0]).clamp(min=0).int()
        hit = torch.rand(len(ends), device=device) < 0.9
        return dict(
            origins=origins, ends=ends, volume_idx=volume_idx, low=low, cell=cell, shape=shape, B=3, rank=rank, hit=hit
        )  # fmt: skip

    def voxels_of(number):
        def inputs(device, dtype):
            coords, shape = _stage(number, recipe, device)
            return dict(coords=coords, shape=shape)

        return inputs

    def neighbors(kernel):
        def inputs(device, dtype):
            coords, shape = _stage(0, recipe, device)
            keys, order = sort_voxels_ref(coords, shape)
            return dict(coords=coords, keys=keys, order=order, shape=shape, kernel=kernel, dilation=ONE)

        return inputs

    def with_geometry(number, geometry):
        def inputs(device, dtype):
            names = "kernel", "stride", "padding", "dilation"
            return voxels_of(number)(device, dtype) | dict(zip(names, geometry, strict=True)) | dict(batch_size=1)

        return inputs

    def table(device, dtype):
        coords, shape = _stage(0, recipe, device)
        return dict(neighbor_idx=strided_map_ref(coords, shape, *DOWN[0])[1], N=len(coords))

    def case(name, op, ref, inputs):
        return Case(name, size, "fp32", inputs, op, ref, double=False)

    yield case("voxelize", voxelize, voxelize_ref, points)
    yield case("carve", carve, carve_ref, rays)
    yield case("voxel_keys", voxel_keys, voxel_keys_ref, voxels_of(0))
    yield case("sort_voxels", sort_voxels, sort_voxels_ref, voxels_of(0))
    yield case("submanifold_map 3x3x3", submanifold_map, submanifold_map_ref, neighbors(THREE))
    yield case("submanifold_map 5x5x5", submanifold_map, submanifold_map_ref, neighbors((5, 5, 5)))
    for number, geometry in enumerate(DOWN):
        yield case(f"strided_map, stage {number + 1}", strided_map, strided_map_ref, with_geometry(number, geometry))
    yield case("strided_tables", strided_tables, strided_tables_ref, with_geometry(0, DOWN[0]))
    yield case("transposed_map", transposed_map, transposed_map_ref, with_geometry(1, UP))
    yield case("inverse_map", inverse_map, inverse_map_ref, table)


def sparse_cases(size, recipe):
    """Cases of the sparse convolutions. Names count the encoder's stages from 1, `number` from 0."""

    def inputs(kind, number, kernel, c_in, c_out):
        def make(device, dtype):
            # small: always the first stage, since later ones have few voxels
            coords, shape = _stage(number if recipe else 0, recipe, device)
            if kind == "submanifold":
                table = submanifold_map_ref(coords, *sort_voxels_ref(coords, shape), shape, kernel, ONE)
                tables = table, None
            else:
                table = strided_map_ref(coords, shape, *DOWN[number])[1]
                tables = table, inverse_map_ref(table, len(coords))
            if kind == "inverse":
                tables = tables[::-1]
            N = len(coords) if kind != "inverse" else table.shape[1]
            weight = torch.randn(c_out, *kernel, c_in, device=device) / (math.prod(kernel) * c_in) ** 0.5
            features = torch.randn(N, c_in, device=device).to(dtype)
            if recipe:  # a `NeighborTable` caches tiles, as in a model
                tables = [table if table is None else NeighborTable(table) for table in tables]
            given = dict(zip(("neighbor_idx", "inverse_idx"), tables, strict=True), features=features)
            # an fp32 parameter, as under autocast, with values that the type can represent
            return given | dict(weight=weight.to(dtype).float())

        return make

    def inference(make):
        """Arguments of `sparse_conv_act`, an op for inference, from those of `sparse_conv`."""

        def act(device, dtype):
            given = make(device, dtype)
            del given["inverse_idx"]
            M, O = len(given["features"]), len(given["weight"])
            scale, shift = torch.rand(O, device=device) + 0.5, torch.randn(O, device=device)
            residual = torch.randn(M, O, device=device).to(dtype)
            return given | dict(scale=scale, shift=shift, residual=residual, relu=True)

        return act

    def norm_inputs(number):
        def make(device, dtype):
            N, C = len(_stage(number if recipe else 0, recipe, device)[0]), WIDTHS[number]
            x, residual = (torch.randn(N, C, device=device).to(dtype) for _ in range(2))
            # keeps the ReLU's inputs away from 0, where rounding decides whether a gradient passes
            bias = torch.full((C,), 8.0, device=device)
            return dict(x=x, weight=torch.rand(C, device=device) + 0.5, bias=bias, eps=1e-3, residual=residual)

        return make

    def block_inputs(number):
        make, width = inputs("submanifold", number, THREE, WIDTHS[number], WIDTHS[number]), WIDTHS[number]

        def block(device, dtype):
            given = make(device, dtype)
            # as above
            norm = dict(norm_weights=[torch.rand(width, device=device) + 0.5 for _ in range(2)],
                        norm_biases=[torch.full((width,), 8.0, device=device) for _ in range(2)])  # fmt: skip
            weights = [given["weight"], given["weight"].flip(0)]
            return dict(features=given["features"], weights=weights, table=given["neighbor_idx"]) | norm

        return block

    def as_block(op):
        """`op` on the two layers of a residual block."""

        def run(features, weights, norm_weights, norm_biases, table):
            table = NeighborTable.of(table)
            layers = zip(weights, norm_weights, norm_biases, (False, True), strict=True)
            return op(features, [Layer(*layer, table, None, 1e-3, skips=skips) for *layer, skips in layers])

        return run

    def conv(dtypes, name, *what):
        """what: kind, stage from 0, kernel, c_in, c_out, as `inputs` takes them."""
        wrt = ("features", "weight")
        for dtype in dtypes.split():
            op = partial(sparse_conv, allow_tf32=True) if dtype == "tf32" else sparse_conv
            yield Case(f"sparse_conv {name}", size, dtype, inputs(*what), op, sparse_conv_ref, wrt)

    sub = "submanifold"
    yield from conv("fp32 bf16", "5 -> 16, stem", sub, 0, THREE, 5, 16)
    for number, width in enumerate(WIDTHS):
        # at the small size, every type only with the fewest and the most channels
        dtypes = "fp32 tf32 fp16 bf16" if number in (0, 3) or recipe else "bf16"
        yield from conv(dtypes, f"{width}, stage {number + 1}", sub, number, THREE, width, width)
    yield from conv("fp16", "8 -> 32", sub, 0, THREE, 8, 32)  # few channels: d_weight is computed for groups of offsets
    yield from conv("bf16", "5x5x5, 5 -> 32", sub, 0, (5, 5, 5), 5, 32)  # SpUNet's stem
    yield from conv("bf16", "96", sub, 1, THREE, 96, 96)  # SpUNet's decoder
    yield from conv("fp16", "256", sub, 3, THREE, 256, 256)
    for number in range(len(DOWN)):
        what = THREE, WIDTHS[number], WIDTHS[number + 1]
        yield from conv("fp32 bf16" if not number else "bf16", f"strided, stage {number + 1}", "strided", number, *what)
    yield from conv("bf16", "inverse", "inverse", 1, THREE, 64, 32)
    for number, dtypes in ((0, "bf16"), (2, "fp32 tf32 fp16")):
        act = inference(inputs(sub, number, THREE, WIDTHS[number], WIDTHS[number]))
        for dtype in dtypes.split():
            op = partial(sparse_conv_act, allow_tf32=True) if dtype == "tf32" else sparse_conv_act
            yield Case(f"sparse_conv_act {WIDTHS[number]}", size, dtype, act, op, sparse_conv_act_ref)
    for number in (0, 3):
        names = "x", "weight", "bias", "residual"
        yield Case(f"norm_relu {WIDTHS[number]}", size, "bf16", norm_inputs(number), norm_relu, norm_relu_ref, names)
        # not of the biases: the second norm subtracts most of what the first one's does
        names = "features", "weights", "norm_weights"
        op, ref = as_block(sparse_layers), as_block(sparse_layers_ref)
        yield Case(f"sparse_layers {WIDTHS[number]}", size, "bf16", block_inputs(number), op, ref, names)
