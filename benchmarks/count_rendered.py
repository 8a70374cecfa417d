"""Host cost of the rendered part of a training step: number of operators and launches, and the time of the host code.

    python -m benchmarks.count_rendered

The rendered part is the renderer of camera-0.1 without the encoder: samples on rays, signed distances, resampling,
rendering, losses and the backward.

Needs no GPU. Counted are launches of the project's kernels, and PyTorch's operators (on a GPU, one launch or more each)
except views and allocations. Their number does not depend on the number of rays or voxels, so there are few of both, in
Triton's interpreter. Times are almost only those of the host code: kernels are not run, and operators have almost
nothing to process. The time that Triton itself takes for a launch is not included.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.jit import KernelInterface

from unipad.config import Grid
from unipad.kernels import backend
from unipad.model.rays import Rays
from unipad.model.render import Renderer
from unipad.recipes import PRETRAIN

R = 8  # rays
GRID = Grid(low=(-8.0, -8.0, -2.0), high=(8.0, 8.0, 2.0), cell=(2.0, 2.0, 1.0))  # that the rays cross
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
def counted(run=True):
    """Counter, by name, of the launches inside this context.

    run: whether kernels run; without, their outputs are uninitialized.
    """
    counts = Counter()

    def count(original, kernel, grid):
        def launch(*args, **kwargs):
            counts[kernel.__name__] += 1
            if run:
                with _disable_current_modes():  # do not count the interpreter's own operators
                    original(kernel, grid)(*args, **kwargs)

        return launch

    with Operators(counts), kernels_replaced(count):
        yield counts


def no_launch(original, kernel, grid):  # for `kernels_replaced`
    return lambda *args, **kwargs: None


def microseconds(run, repeats=20):
    """Median CPU time of a run in microseconds, which other programs on the machine disturb less than elapsed time."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return 1e6 * sorted(times)[repeats // 2]


def of_kernels(counts):
    """How many of the launches are of the project's kernels; the others are operators."""
    return sum(n for launch, n in counts.items() if launch.endswith("_kernel"))


def most_frequent(counts):
    return ", ".join(f"{launch} {n}" for launch, n in counts.most_common(8))


class RenderedStep:
    """The rendered part of a training step of a recipe for cameras, on random rays; kernels need not run.

    settings: fields of the recipe's `Render` to replace.
    """

    def __init__(self, preset="camera-0.1", **settings):
        self.renderer = Renderer(replace(PRETRAIN["camera"][preset].render, **settings), GRID)
        channels, (X, Y, Z) = self.renderer.cfg.channels, GRID.shape
        # in bf16 and channels-last, as the projection before the renderer returns it
        volume = torch.randn(1, channels, Z, Y, X, dtype=torch.bfloat16)
        self.volume = volume.to(memory_format=torch.channels_last_3d).requires_grad_()
        directions = F.normalize(torch.randn(R, 3), dim=1)
        depth, rgb = 4 * torch.rand(R), torch.rand(R, 3)
        self.rays = Rays(directions, directions, depth, rgb, torch.zeros(R, dtype=torch.int32))
        self.jitter = torch.rand(R, self.renderer.jitters)
        self.leaves = [self.volume, *self.renderer.parameters()]

    def forward(self):
        self.rendered = self.renderer(self.volume, self.rays, self.jitter)

    def loss(self):
        self.losses = self.renderer.loss(self.rendered, self.rays)

    def backward(self):
        sum(self.losses.values()).backward()

    def whole(self):
        """All of it, after the gradients of the last step are freed, as by the optimizer's `zero_grad`."""
        for leaf in self.leaves:
            leaf.grad = None
        self.forward()
        self.loss()
        self.backward()


def rendered():
    step, all_counts = RenderedStep(), Counter()
    print("| part | operators | launches of our kernels | most frequent |\n|---|---|---|---|")
    for name, part in [("render", step.forward), ("losses", step.loss), ("backward", step.backward)]:
        with counted() as counts:
            part()
        all_counts += counts
        ours = of_kernels(counts)
        print(f"| {name} | {counts.total() - ours} | {ours} | {most_frequent(counts)} |")
    ours = of_kernels(all_counts)
    print(f"| rendered step | {all_counts.total() - ours} | {ours} | {most_frequent(all_counts)} |")

    print("\n| part | host microseconds |\n|---|---|")
    with kernels_replaced(no_launch):
        print(f"| rendered step | {microseconds(step.whole, repeats=100):.0f} |")


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backend.interpret = True  # run the kernels on CPU tensors, not their references
    rendered()


if __name__ == "__main__":
    main()
