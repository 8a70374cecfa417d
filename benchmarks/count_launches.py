"""Host cost of the sparse encoder of lidar-0.075: number of launches, and the time in Python between them.

    python -m benchmarks.count_launches

Needs no GPU. Launches are counted in a dry run of a training step under autocast (benchmarks/dry_run.py): those of the
project's kernels, and PyTorch's operators (on a GPU, one launch or more each) except views and allocations. Their
number depends on the scene only where a size decides how a kernel is launched: it has the voxels of one nuScenes frame.
"neighbor tables" is the part that finds the neighbors of voxels, before the first convolution. The step is that of one
process: with several, batch norm, residual and ReLU are not one op.

Times are almost only those of the host code: kernels are not run, and operators have almost no voxels to process and
few channels. Neighbor tables, and what is derived from them, are reused.
"""

import time
from collections import Counter
from unittest import mock

import torch
from torch import nn
from triton.runtime.jit import KernelInterface

from benchmarks.dry_run import CUDA, DryRun, backward, to_gpu
from unipad.kernels import backend
from unipad.model.lidar import SparseEncoder
from unipad.model.norm import SyncedBatchNorm
from unipad.model.sparse import make_tables
from unipad.spconv.tensor import SparseConvTensor
from unipad.spconv.voxels import VoxelSet

ENCODER = dict(in_channels=5, widths=(16, 32, 64, 128), blocks=2, out_channels=256)  # as in the recipe
# Occupied voxels of a scene, and of the outputs of each strided convolution (benchmarks/lidar_scene.py)
VOXELS, OUTPUTS, SHAPE = 76796, [70559, 27584, 8408], (41, 1440, 1440)
# Where the host is timed: voxels, cells, channels (more would have it cast large weights, which a GPU does)
FEW, SMALL_SHAPE, SMALL_WIDTHS = 200, (41, 16, 200), (16,) * 4


def launches():
    """{part: Counter of launches by name} of a training step of the encoder, and of a forward in evaluation mode."""
    with torch.device("meta"):
        encoder = SparseEncoder(**ENCODER)
    counts = {name: Counter() for name in ("neighbor tables", "forward", "backward", "forward, inference")}
    # 1: this wait is for keys, and there is one after those of the voxels
    with DryRun({"number of a convolution's output voxels": [n + 1 for n in OUTPUTS]}) as dry:
        encoder, counted = to_gpu(encoder), Counter()
        coords = torch.zeros(VOXELS, 4, dtype=torch.int32, device=CUDA)
        features = torch.zeros(VOXELS, 5, device=CUDA)

        def add_to(name):
            """Add all launches since the last call to a part, or if it is None to nothing."""
            nonlocal counted
            before, counted = counted, dry.operators + Counter(kernel.__name__ for kernel, _ in dry.calls)
            if name:
                counts[name] += counted - before

        add_to(None)
        with torch.autocast("cuda", torch.bfloat16):
            voxels = VoxelSet(coords, SHAPE, 1, in_order=True, check=False)
            voxel_sets = make_tables(encoder, voxels)  # held: tables are freed with their sets
            add_to("neighbor tables")
            out = encoder(SparseConvTensor.of(features, voxels)).dense(memory_format=torch.channels_last_3d)
            add_to("forward")
        part = None

        def entering(node):
            nonlocal part
            add_to(part)
            # copies in `dry_run.backward`; PyTorch's engine does not
            part = None if node.name().endswith("AccumulateGrad") else "backward"

        backward(out.sum(), entering)
        add_to(part)
        encoder.eval()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            # norms compute scale and shift in the first call, and cache them
            encoder(SparseConvTensor.of(features, voxels))
            add_to(None)
            encoder(SparseConvTensor.of(features, voxels)).dense(memory_format=torch.channels_last_3d)
            add_to("forward, inference")
        del voxel_sets
    return counts


def host_microseconds():
    """{part: time}; with autocast, as in training."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    encoder = SparseEncoder(**ENCODER | dict(widths=SMALL_WIDTHS, out_channels=16))
    coords = torch.zeros(FEW, 4, dtype=torch.int32)
    coords[:, 3] = torch.arange(FEW)  # side by side along x
    voxels = VoxelSet(coords, SMALL_SHAPE, 1, in_order=True, check=False)
    voxel_sets = make_tables(encoder, voxels)  # by the references, since kernels will not run
    features = torch.randn(FEW, 5)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return encoder(SparseConvTensor.of(features, voxels)).dense(memory_format=torch.channels_last_3d)

    def step():
        forward().float().sum().backward()

    def infer():
        with torch.no_grad():
            forward()

    times = {}
    no_launch = mock.patch.object(KernelInterface, "__getitem__", lambda kernel, grid: lambda *args, **kwargs: None)
    # a GPU runs PyTorch's batch norm where ours has no kernel
    gpu_norm = mock.patch.object(SyncedBatchNorm, "forward", nn.modules.batchnorm._BatchNorm.forward)
    with no_launch, gpu_norm, mock.patch.object(backend, "interpret", True):
        for name, run in [("forward", forward), ("forward and backward", step)]:
            times[name] = _microseconds(run)
        encoder.eval()
        times["forward, inference"] = _microseconds(infer)
    del voxel_sets
    return times


def _microseconds(run, repeats=40):
    """Smallest time of a run in microseconds: other processes only add to it."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return 1e6 * min(times)


def main():
    print("| part | launches | of our kernels | most frequent |\n|---|---|---|---|")
    for name, counts in launches().items():
        ours = sum(n for launch, n in counts.items() if launch.endswith("_kernel"))
        most = ", ".join(f"{launch} {n}" for launch, n in counts.most_common(8))
        print(f"| {name} | {counts.total()} | {ours} | {most} |")
    print("\n| part | host microseconds |\n|---|---|")
    for name, microseconds in host_microseconds().items():
        print(f"| {name} | {microseconds:.0f} |")


if __name__ == "__main__":
    main()
