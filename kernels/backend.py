"""Which path an op takes: Triton kernels for tensors on a GPU, the PyTorch reference everywhere else.

Kernel files import `triton` and `tl` from here, so that they import on machines without Triton too
(macOS, Windows), where only the references run.
"""

from contextlib import contextmanager
from functools import partial, wraps

import torch

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # Triton has wheels for Linux only

    class _Absent:
        """Takes the place of `triton` and `tl` while kernel files are read; never runs anything."""

        constexpr = int

        def jit(self, kernel, **_):
            return kernel

    triton = tl = _Absent()

# Tests set this: tensors on the CPU then take the kernels too, in Triton's interpreter (TRITON_INTERPRET=1).
interpret = False
_references_only = False
waiting_for = None  # what the host waits for at the moment, as `waits` names it; tests look here


@contextmanager
def references():
    """Inside, every op takes its PyTorch reference, on a GPU too: what a check compares the kernels with."""
    global _references_only
    before, _references_only = _references_only, True
    try:
        yield
    finally:
        _references_only = before


def jit(kernel=None, *, varying=()):
    """Decorator of a kernel that the host launches; functions that kernels call keep `triton.jit`.

    The kernel runs on the GPU that has its first tensor, whichever is the current one. Products and sums are fused
    (Triton's default varies by version), so that kernels of all versions round alike.

    varying: names of integers that change with the data, like a count of voxels. Triton compiles a kernel once more
        where an integer is 1 or a multiple of 16; of these it does not, since that would stop a run at any step.
    """
    if kernel is None:
        return partial(jit, varying=varying)
    kernel = triton.jit(kernel, do_not_specialize=varying)

    def run(*args, **kwargs):
        first = next(a[0] if isinstance(a, tuple) else a for a in args if not isinstance(a, (int, float, type(None))))
        with torch.cuda.device_of(first):
            return type(kernel).run(kernel, *args, **{"enable_fp_fusion": True} | kwargs)

    kernel.run = run
    return kernel


def on_triton(tensor, deterministic=True):
    """True if an op on `tensor` runs its Triton kernels.

    deterministic: False for an op whose kernels add atomically; it takes its reference
        under `torch.use_deterministic_algorithms(True)`.
    """
    if _references_only or not deterministic and strictly_deterministic():
        return False
    return tensor.is_cuda or interpret


def capturing(device):
    """True while a CUDA graph is recorded: it runs again later, so what is made in it is nobody else's to use."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream(device):
    """The number of the current stream. What another one is about to make is not there yet."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class Kept:
    """What was made of an owner's tensors, which do not change: made once, and gone with the owner.

    Each stream makes its own, since none waits for another. A CUDA graph is captured on a stream of its own and takes
    what any has made, since `torch.cuda.graph` waits for the device first; so the owner has to outlive the graph. What
    is made in a capture is there only while the graph is replayed, and is not kept. Compiled code takes what is there.
    """

    def __init__(self):
        self._made = {}  # what -> {stream: made}

    def __reduce__(self):
        return Kept, ()  # a copy of the owner has had nothing made yet

    def find(self, what, device):
        """What `put` was given; None if there is nothing."""
        made = self._made.get(what, {})
        if torch.compiler.is_compiling() or capturing(device):
            return list(made.values())[-1] if made else None
        return made.get(stream(device))

    def put(self, what, device, made):
        if not torch.compiler.is_compiling() and not capturing(device):
            self._made.setdefault(what, {})[stream(device)] = made

    def get(self, what, device, make):
        """What is kept as `what`, made now if it is not there."""
        made = self.find(what, device)
        if made is None:
            made = make()
            self.put(what, device, made)
        return made

    def branch(self):
        """The same, but what is put into either from now on is not in the other."""
        branch = Kept()
        branch._made = {what: dict(made) for what, made in self._made.items()}
        return branch


@contextmanager
def waits(why):
    """Marks where the host waits for the device, and for what; a training step's ops and models wait nowhere else.

    Beyond a step, detections and pictures are waited for without it.
    """
    global waiting_for
    before, waiting_for = waiting_for, why
    try:
        yield
    finally:
        waiting_for = before


def to_host(tensor, why):
    """`tensor.tolist()`, for which the host waits: a number or lists of them."""
    with waits(why):
        return tensor.tolist()


def strictly_deterministic():
    """True under `torch.use_deterministic_algorithms(True)`; its `warn_only` is no promise."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def opaque(fake):
    """Decorator: torch.compile calls the op without looking inside, and knows its outputs' shapes from `fake`."""

    def wrap(op):
        custom_op = torch.library.custom_op(f"unipad::{op.__name__}", op, mutates_args=())
        custom_op.register_fake(fake)

        @wraps(op)
        def call(*args, **kwargs):
            # outside of a graph the plain function: the registered one costs tens of microseconds a call
            return (custom_op if torch.compiler.is_compiling() else op)(*args, **kwargs)

        return call

    return wrap
