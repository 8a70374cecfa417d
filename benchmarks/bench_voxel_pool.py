"""voxel_pool: kernel, reference and peers; then with more and fewer views, voxels and channels.

    python -m benchmarks.bench_voxel_pool
    OMP_NUM_THREADS=1 python -m benchmarks.bench_voxel_pool --paper      on a CPU: paper size too, over 70 s

At paper size, the peer's products of features and probabilities alone are a million points x 256 channels, 1 GB.
Peers: UniPAD's formulas, eager and compiled; on a GPU BEVPoolv2 and BEVFusion's bev_pool, if mmdet3d is installed.
Every timed call finds the voxels of the frustum points and sorts them, since the camera matrices differ from sample to
sample.
"""

import importlib
import math
from functools import partial

import torch
import tyro

from benchmarks.bench_lift import AGREE_HALF, rig
from benchmarks.eager import eager_voxel_pool
from benchmarks.harness import AGREE, DEVICE, Case, compare, compiled
from unipad.kernels.pool_points import geometry_ref, voxels_ref
from unipad.kernels.voxel_pool import voxel_pool, voxel_pool_ref
from unipad.recipes.encoders import GRID_075, TINY_GRID

# name, grid, channels, depth bins, (nearest, farthest) meters, padded image (H, W), width before padding / 1600, stride
PAPER = ("camera-0.075", GRID_075, 256, 118, (1.0, 60.0), (928, 1600), 1.0, 32)
TINY = ("tiny", TINY_GRID, 32, 64, (1.0, 65.0), (160, 256), 0.16, 8)  # no preset: the tiny ones do not pool
PEERS = {"BEVPoolv2": "mmdet3d.ops.bev_pool_v2.bev_pool", "bev_pool": "mmdet3d.ops.bev_pool"}  # name -> module


def case(size, dtype=torch.float32, views=6, channels=None, across=None):
    """A `Case` of size PAPER or TINY. channels, across (voxels along x and along y): instead of that size's."""
    name, grid, C, bins, depth_range, image_size, scale, stride = size
    C, shape, cell = channels or C, grid.shape, grid.cell
    if across:
        shape = (across, across, shape[2])
        cell = (*((h - l) / across for l, h in zip(grid.low[:2], grid.high[:2], strict=True)), cell[2])
    lidar2image = rig(scale, views)
    pixels = (*lidar2image.shape[:2], *(s // stride for s in image_size))  # 1, views, h, w
    features = torch.randn(*pixels, C, device=DEVICE).to(dtype).requires_grad_()
    depths = torch.randn(*pixels, bins, device=DEVICE).softmax(-1).to(dtype).requires_grad_()
    # shifted so that no plane of a camera's points lies on voxel faces: peers would round these points to either side
    low = tuple(l + 0.0137 for l in grid.low)
    geometry = (lidar2image, low, cell, shape, stride, depth_range)
    out_bytes = math.prod(shape) * C * features.element_size()
    name = f"{name} {str(dtype).removeprefix('torch.')}, {views} views, {shape[0]} x {shape[1]} x {shape[2]}, C {C}"
    return Case(name, (features, depths, *geometry), out_bytes + features.nbytes + depths.nbytes)


class Peer:
    """An op of mmdet3d with the signature of `voxel_pool`; PyTorch finds the points' voxels, as in mmdet3d's models."""

    def __init__(self, name, module):
        self.call_op = getattr(self, f"_{name.lower()}")
        self.op = getattr(module, "bev_pool_v2" if name == "BEVPoolv2" else "bev_pool")

    def __call__(self, features, depths, lidar2image, low, cell, shape, stride, depth_range):
        matrices, bins = geometry_ref(lidar2image, low, cell, depth_range, depths.shape[4])
        voxel = voxels_ref(matrices, bins, features.shape, shape, stride, truncate=False)  # [B * N * h * w * D]
        point = (voxel < len(features) * math.prod(shape)).nonzero()[:, 0]  # larger: outside the grid
        return self.call_op(features.float(), depths.float(), point, voxel[point], shape).to(features.dtype)

    def _bevpoolv2(self, features, depths, point, voxel, shape):
        # pixel: row of the features; k: depth bin; first, lengths: range of each voxel's points, once sorted
        voxel, order = voxel.sort()
        point, D = point[order], depths.shape[4]
        pixel, k = point // D, point % D
        R = features.shape[2:4].numel()  # pixels of a view
        first = torch.cat([voxel.new_zeros(1), (voxel[1:] != voxel[:-1]).nonzero()[:, 0] + 1])
        lengths = torch.diff(first, append=first.new_tensor([len(voxel)]))
        at_depth = (pixel // R * D + k) * R + pixel % R  # the op takes depths as [B, N, D, h, w]
        ranks = [i.int() for i in (at_depth, pixel, voxel)]
        out_shape = (len(features), *reversed(shape), features.shape[4])
        volume = self.op(depths.movedim(4, 2), features, *ranks, out_shape, first.int(), lengths.int())
        return volume.permute(0, 2, 3, 4, 1)

    def _bev_pool(self, features, depths, point, voxel, shape):  # the op sorts the points
        X, Y, Z = shape
        products = features.flatten(0, 3)[point // depths.shape[4]] * depths.flatten()[point, None]
        coords = torch.stack([voxel % X, voxel // X % Y, voxel // (X * Y) % Z, voxel // (X * Y * Z)], dim=1)
        return self.op(products, coords, len(features), Z, X, Y).permute(0, 2, 4, 3, 1)  # from [B, C, Z, X, Y]


def peers():
    """{name: function} of the peers that run on this machine, without the compiled one."""
    found = {"eager": eager_voxel_pool}
    if DEVICE == "cuda":
        for name, module in PEERS.items():
            try:
                found[name] = Peer(name, importlib.import_module(module))
            except ImportError as error:
                print(f"{name} is left out: {error}")
    return found


def main(paper: bool = False):
    """Measure and print.

    Args:
        paper: paper size on a CPU too.
    """
    on_gpu, run = DEVICE == "cuda", partial(compare, "voxel_pool", voxel_pool_ref, voxel_pool)
    uncompiled = peers()
    with_compiled = uncompiled | {"compiled": compiled(eager_voxel_pool)}
    if on_gpu:
        run(with_compiled, [case(PAPER, torch.bfloat16), case(PAPER, torch.float16)], agree=AGREE_HALF)
    if on_gpu or paper:
        run(with_compiled if on_gpu else uncompiled, [case(PAPER)])  # on a CPU, only the tiny size is compiled
    run(with_compiled, [case(TINY)])
    size, dtype = (PAPER, torch.bfloat16) if on_gpu else (TINY, torch.float32)
    scaling = [case(size, dtype, views=views) for views in (1, 3, 12)]
    scaling += [case(size, dtype, across=across) for across in ((90, 360) if on_gpu else (32, 128))]
    scaling += [case(size, dtype, channels=C) for C in ((64, 128, 512) if on_gpu else (16, 64, 128))]
    run(uncompiled, scaling, agree=AGREE_HALF if on_gpu else AGREE)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
