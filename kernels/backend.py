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
waiting_for = None  # the reason given to the `host_wait` that is active; read by tests


@contextmanager
def references():
    """Every op takes its PyTorch reference inside this context, on a GPU too; checks compare the kernels with it."""
    global _references_only
    before, _references_only = _references_only, True
    try:
        yield
    finally:
        _references_only = before


def jit(kernel=None, *, varying=()):
    """Decorator of a kernel that the host launches; functions that kernels call keep `triton.jit`.

    The kernel runs on the GPU that holds its first tensor, whichever is the current device. FP fusion is on:
    Triton's default depends on its version, and so would the rounding.

    varying: names of integers that change with the data, such as the number of voxels (Triton's `do_not_specialize`).
        Triton compiles a kernel again for an integer that is 1 or a multiple of 16, which may stall a run at any step.
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
    """The handle of the current CUDA stream; 0 on a CPU. Results of other streams may not be ready on it."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class StreamCache:
    """Values derived from an owner's tensors, which must not change: computed once per stream, freed with the owner.

    Streams do not share entries, since they do not wait for each other. A CUDA graph is captured on its own stream and
    uses entries of any stream, since `torch.cuda.graph` synchronizes the device first; the owner must outlive the
    graph. Values computed during a capture are valid only while the graph is replayed and are not cached. Compiled code
    reads the cache and does not write to it.
    """

    def __init__(self):
        self._entries = {}  # key -> {stream: value}

    def __reduce__(self):
        return StreamCache, ()  # a copy of the owner starts with an empty cache

    def find(self, key, device):
        """The cached value, or None."""
        values = self._entries.get(key, {})
        if torch.compiler.is_compiling() or capturing(device):
            return list(values.values())[-1] if values else None
        return values.get(stream(device))

    def put(self, key, device, value):
        if not torch.compiler.is_compiling() and not capturing(device):
            self._entries.setdefault(key, {})[stream(device)] = value

    def get(self, key, device, make):
        """The cached value; computed by `make()` and cached if there is none."""
        value = self.find(key, device)
        if value is None:
            value = make()
            self.put(key, device, value)
        return value

    def copy(self):
        """A cache with the same entries; later entries of one do not appear in the other."""
        copy = StreamCache()
        copy._entries = {key: dict(values) for key, values in self._entries.items()}
        return copy


@contextmanager
def host_wait(reason):
    """Marks code in which the host waits for the device, with the reason.

    Ops and models wait nowhere else in a training step; detections and pictures wait without it.
    """
    global waiting_for
    before, waiting_for = waiting_for, reason
    try:
        yield
    finally:
        waiting_for = before


def to_host(tensor, reason):
    """`tensor.tolist()`, marked as a `host_wait`: a number or nested lists of numbers."""
    with host_wait(reason):
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
