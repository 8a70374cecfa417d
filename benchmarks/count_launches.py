"""Host cost of the sparse encoder of lidar-0.075: number of launches, and the time in Python between them.

    python -m benchmarks.count_launches

Needs no GPU. Counted are launches of the project's kernels, and PyTorch's operators (on a GPU, one launch or more each)
except views and allocations. Their number does not depend on the scene's size, so a small one is used, and Triton's
interpreter. "neighbor tables" is the part that finds the neighbors of voxels, before the first convolution. Times
are of the host code alone, or nearly: kernels are not run, and operators have almost no voxels to process.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import time
from collections import Counter
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.jit import KernelInterface

from unipad.kernels import backend
from unipad.model.lidar import SparseEncoder
from unipad.model.sparse import SparseTensor, VoxelSet, make_tables

N, SHAPE = 200, (41, 16, 200)  # voxels, cells (Z, Y, X)
WIDTHS = (16, 32, 64, 128)  # channels of the stages, as in the recipe
ALLOCATES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Operators(TorchDispatchMode):
    """Counts the operators that run, except those that only allocate or make a view."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and name not in ALLOCATES and func.namespace == "aten":
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def kernels_replaced(make):
    """Inside this context `kernel[grid]` is `make(original, kernel, grid)`; original: Triton's `__getitem__`."""
    original = KernelInterface.__getitem__
    with mock.patch.object(KernelInterface, "__getitem__", lambda kernel, grid: make(original, kernel, grid)):
        yield


@contextmanager
def counted():
    """Counter, by name, of the launches inside this context."""
    counts = Counter()

    def count(original, kernel, grid):
        def launch(*args, **kwargs):
            counts[kernel.__name__] += 1
            with _disable_current_modes():  # do not count the interpreter's own operators
                original(kernel, grid)(*args, **kwargs)

        return launch

    with Operators(counts), kernels_replaced(count):
        yield counts


def no_launch(original, kernel, grid):  # for `kernels_replaced`
    return lambda *args, **kwargs: None


def microseconds(run, repeats=20):
    """Median time of a run in microseconds."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return 1e6 * sorted(times)[repeats // 2]


def voxels():
    """A `VoxelSet` of N voxels side by side along x."""
    coords = torch.zeros(N, 4, dtype=torch.int32)
    coords[:, 3] = torch.arange(N)
    return VoxelSet(coords, SHAPE, 1, in_order=True, check=False)


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    backend.interpret = True  # run the kernels on CPU tensors, not their references
    encoder = SparseEncoder(in_channels=5, widths=WIDTHS, blocks=2, out_channels=256)
    features = torch.randn(N, 5, requires_grad=True)
    state = {}

    def tables():
        state["voxels"] = voxels()
        state["voxel sets"] = make_tables(encoder, state["voxels"])  # held: tables are freed with their sets

    def forward():
        state["out"] = encoder(SparseTensor(features, state["voxels"])).dense()

    def backward():
        state["out"].sum().backward()

    def step():
        forward()
        backward()

    def infer():
        with torch.no_grad():
            forward()

    print("| part | launches | of our kernels | most frequent |\n|---|---|---|---|")
    for name, part in [("neighbor tables", tables), ("forward", forward), ("backward", backward)]:
        with counted() as counts:
            part()
        ours = sum(n for launch, n in counts.items() if launch.endswith("_kernel"))
        most = ", ".join(f"{launch} {n}" for launch, n in counts.most_common(8))
        print(f"| {name} | {counts.total()} | {ours} | {most} |")
    encoder.eval()
    infer()  # our batch norms compute scale and shift in the first call in eval mode, and cache them
    with counted() as counts:
        infer()
    print(f"| forward, inference | {counts.total()} |")

    print("\n| part | host microseconds |\n|---|---|")
    with kernels_replaced(no_launch):
        print(f"| forward, inference | {microseconds(infer):.0f} |")
        encoder.train()
        print(f"| forward | {microseconds(forward):.0f} |")
        print(f"| forward and backward | {microseconds(step):.0f} |")


if __name__ == "__main__":
    main()
