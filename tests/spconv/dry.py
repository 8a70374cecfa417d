"""unipad.spconv in a dry run as on a GPU: nothing is left on the CPU, and the host waits only where it is marked.

A program, run by test_dry.py: kernels cannot be in the interpreter's mode, as in the tests.
"""

import torch
from torch import nn

import unipad.spconv as spconv
from benchmarks.dry_run import CUDA, DryRun, backward, to_gpu

ANSWERS = {
    "whether any voxel is invalid": [False, False],
    "largest batch index of a voxel": 1,
    "number of a convolution's output voxels": 301,  # one more than voxels
    "number of voxels of each sample": [100, 200],
    "number of occupied voxels": 50,
    "points that are kept": 90,
    "cells that are not 0": 70,
}


def training_step():
    with torch.device("meta"):
        net = spconv.SparseSequential(
            spconv.SubMConv3d(4, 16, 3, indice_key="a"), nn.BatchNorm1d(16), nn.ReLU(),
            spconv.SparseConv3d(16, 32, 3, 2, 1, indice_key="b"), spconv.SubMConv3d(32, 32, (2, 3, 3)),
            spconv.SparseInverseConv3d(32, 16, 3, indice_key="b"), spconv.SubMConv3d(16, 16, 1),
            spconv.SparseMaxPool3d(2), spconv.SparseAvgPool3d(3, 1, 1), spconv.SparseConvTranspose3d(16, 16, 2, 2),
        )  # fmt: skip
    with DryRun(ANSWERS) as dry:
        net = to_gpu(net)
        indices = torch.zeros(500, 4, dtype=torch.int32, device=CUDA)
        features = torch.zeros(500, 4, device=CUDA, requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16):
            out = net(spconv.SparseConvTensor(features, indices, [41, 64, 64], 2))
        pooled = spconv.SparseGlobalMaxPool()(out) + spconv.SparseGlobalAvgPool()(out)
        assert pooled.shape == (2, 16) and pooled.is_cuda
        backward(out.dense().float().sum() + pooled.float().sum())
        assert features.grad.shape == (500, 4) and all(p.grad is not None for p in net.parameters())
    launched = {kernel.__name__ for kernel, _ in dry.calls}
    assert {"_gather_gemm_kernel", "_neighbors_kernel", "_inverse_kernel", "_d_weight_kernel"} <= launched


def flat_grid_and_points():
    with DryRun(ANSWERS):
        conv = to_gpu(spconv.SubMConv2d(4, 8, 3))
        generator = spconv.PointToVoxel([0.5, 0.5], [0, 0, 20, 20], 4, 40, 5, device=CUDA)
        voxels, zyx, count, ids = generator.generate_voxel_with_id(torch.zeros(1000, 4, device=CUDA), empty_mean=True)
        assert voxels.shape == (40, 5, 4) and zyx.shape == (40, 2) and count.shape == (40,) and ids.shape == (1000,)
        x = spconv.SparseConvTensor(voxels.sum(dim=1), torch.cat([zyx.new_zeros(40, 1), zyx], dim=1), [40, 40], 2)
        assert conv(x).dense().shape == (2, 8, 40, 40)
        assert len(spconv.SparseConvTensor.from_dense(torch.zeros(2, 40, 40, 3, device=CUDA)).indices) == 70


if __name__ == "__main__":
    training_step()
    flat_grid_and_points()
    print("no fault")
