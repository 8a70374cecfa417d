"""SpUNet at full size, forward and backward, from voxels to features, with our convolutions and those of peers.

    python -m benchmarks.bench_spunet                      # 23.5k voxels, and on a GPU 120k
    OMP_NUM_THREADS=1 python -m benchmarks.bench_spunet    # on a CPU: with more threads the spconv wheel has data races

Voxels of 0.05 m, as in fine-tuning, of the newest points of benchmarks/lidar_scene.py: 23.5k are a little more than
those of one sweep, 120k those of eight. Every run builds its tables from the voxels, as every training step
does. Peers, if installed: spconv and spconv-triton, see bench_sparse_conv.
"""

import copy

import torch
import tyro
from torch import nn

from benchmarks.bench_sparse_conv import AGREE_DEEP, PeerConv, PeerTensor, Pointwise, half, installed, run_with
from benchmarks.harness import DEVICE, Case, compare
from benchmarks.lidar_scene import scene
from unipad.kernels.sparse_conv import sparse_conv, sparse_conv_ref
from unipad.kernels.voxelize import grid_subsample
from unipad.model import sparse
from unipad.model.unet import Unet
from unipad.recipes import SEGMENT
from unipad.spconv.conv import SparseConvolution
from unipad.spconv.tensor import SparseConvTensor
from unipad.spconv.voxels import VoxelSet

CFG = SEGMENT["lidar"]["segment"].lidar


def voxels_of(points, max_voxels):
    """[V, 4] int32 (b, z, y, x >= 0) of the `max_voxels` newest voxels of points [P, 5], in ascending order."""
    rows, coords, *_ = grid_subsample(points, [len(points)], CFG.cell)
    lag = points[rows, 4]  # seconds: of the first point in each voxel
    coords = coords[lag.argsort(stable=True)[:max_voxels].sort().values]
    coords[:, 1:] -= coords[:, 1:].amin(dim=0)
    return coords


class Nets:
    """One SpUNet, its weights shared by all implementations."""

    def __init__(self):
        self.net = Unet(5, CFG.stem, CFG.widths, CFG.blocks).to(DEVICE)
        for module in self.net.modules():
            if isinstance(module, sparse.SparseBatchNorm):
                # keeps the ReLUs' inputs away from 0, where rounding decides whether a gradient passes, as in
                # bench_sparse_conv
                nn.init.constant_(module.bias, 8)
        # Those of the convolutions only, as there. They are inputs of a case, too, to get gradients from `compare`.
        self.weights = [p for p in self.net.parameters() if p.dim() == 5]
        self.stride = 2 ** len(self.net.down)  # of the deepest level

    def ours(self, op):
        """A function of a case's inputs that runs the net with `op`: `sparse_conv` or its reference."""

        def run(features, weights, coords):
            # as many cells as needed, rounded up to a multiple of the stride
            shape = [-(-(last + 1) // self.stride) * self.stride for last in coords[:, 1:].amax(dim=0).tolist()]
            voxels = VoxelSet(coords, shape, 1, in_order=True, check=False)
            with run_with(op), half():
                return self.net(SparseConvTensor.of(features, voxels)).features

        return run

    def theirs(self, lib):
        """`ours` with the convolutions of a peer."""
        net = as_peer(self.net, lib)

        def run(features, weights, coords):
            shape = (coords[:, 1:].amax(dim=0) + 96).tolist()  # largest coordinate + 96, as in Pointcept
            with half():
                return net(PeerTensor(lib.SparseConvTensor(features, coords, shape, 1))).features

        return run


def as_peer(net, lib):
    """A copy of the U-Net with the peer's convolutions; all parameters are shared."""
    twin = copy.deepcopy(net, {id(p): p for p in net.parameters()})
    for name, conv in list(twin.named_modules()):
        if not isinstance(conv, SparseConvolution):
            continue
        part, *rest = name.split(".")  # e.g. enc.2.block0.conv1: part enc, stage 2, ...
        kernel = list(conv.weight.shape[1:4])
        sizes = conv.weight.shape[4], conv.weight.shape[0], kernel  # channels in, out; kernel
        if kernel == [1, 1, 1]:
            theirs = Pointwise(conv.weight)
        else:
            # 0: the finest; of the two levels that "down" or "up" links, the finer one
            level = {"conv_input": 0, "enc": 1}.get(part, 0) + int(rest[0] if part != "conv_input" else 0)
            if part == "down":
                theirs = lib.SparseConv3d(*sizes, stride=2, bias=False, indice_key=f"between{level}")
            elif part == "up":
                theirs = lib.SparseInverseConv3d(*sizes, bias=False, indice_key=f"between{level}")
            else:
                theirs = lib.SubMConv3d(*sizes, bias=False, indice_key=f"kernel {kernel[0]}, level {level}")
            theirs.weight = conv.weight
            theirs = PeerConv(theirs.to(DEVICE))
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, theirs)
    return twin


def main(voxels: tuple[int, ...] = (23_500, 120_000) if DEVICE == "cuda" else (23_500,)):
    """Measure and print.

    Args:
        voxels: maximum number of voxels of each case.
    """
    nets, libs = Nets(), installed()
    cases = []
    for max_voxels in voxels:
        coords = voxels_of(scene(device=DEVICE), max_voxels)
        features = torch.randn(len(coords), 5, device=DEVICE, requires_grad=True)
        moved = features.nbytes + sum(w.nbytes for w in nets.weights)
        cases.append(Case(f"N={len(coords)}", (features, nets.weights, coords), moved))
    peers = {name: nets.theirs(lib) for name, lib in libs.items()}
    compare("SpUNet", nets.ours(sparse_conv_ref), nets.ours(sparse_conv), peers, cases, agree=AGREE_DEEP)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
