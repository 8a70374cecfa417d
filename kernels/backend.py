"""Dispatch: Triton kernels for tensors on a GPU, the PyTorch reference everywhere else.

Kernel files import `triton` and `tl` from here, so that they can be imported without Triton (macOS, Windows), where
only the references run.
"""

from contextlib import contextmanager
from functools import partial, wraps

import torch

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # Triton has wheels for Linux only

    class _Absent:
        """Stands in for `triton` and `tl` so that kernel files can be imported; runs nothing."""

        constexpr = int  # kernels have it as an annotation

        def jit(self, kernel, **_):
            return kernel

    triton = tl = _Absent()

# Set by tests: ops run their kernels on CPU tensors too, in Triton's interpreter (TRITON_INTERPRET=1). And by
# benchmarks.count_launches and benchmarks.count_rendered, which launch nothing while they time the host.
interpret = False
_references_only = False
waiting_for = None  # reason of the active `host_wait`; read by tests


@contextmanager
def references():
    """Inside this context every op runs its PyTorch reference, on a GPU too: used to compare the kernels with them."""
    global _references_only
    before, _references_only = _references_only, True
    try:
        yield
    finally:
        _references_only = before


def jit(kernel=None, *, varying=()):
    """Decorator for kernels launched from the host; device functions, called by kernels, use plain `triton.jit`.

    Launch the kernel with keyword arguments, tensors (or tuples of them) first: it runs on the GPU of the first tensor,
    whichever device is current. `enable_fp_fusion` is always passed, by default True: Triton's own default varies by
    version, and with it the rounding.

    varying: names of integers that change with the data, such as the number of voxels (Triton's `do_not_specialize`).
        Otherwise Triton compiles a kernel again for values that are 1 or a multiple of 16, which can stall any step.
    """
    if kernel is None:
        return partial(jit, varying=varying)
    kernel = triton.jit(kernel, do_not_specialize=varying)

    def run(*, grid, warmup, enable_fp_fusion=True, **kwargs):
        first = next(v for v in kwargs.values() if not isinstance(v, (int, float, type(None))))
        with torch.cuda.device_of(first[0] if isinstance(first, tuple) else first):
            return type(kernel).run(kernel, grid=grid, warmup=warmup, enable_fp_fusion=enable_fp_fusion, **kwargs)

    kernel.run = run
    return kernel


@triton.jit
def pick(ptrs, i):
    """Inside of a kernel: ptrs[i] of a tuple, where i is known only at run time."""
    ptr = ptrs[0]
    for k in tl.static_range(1, len(ptrs)):
        ptr = tl.where(i == k, ptrs[k], ptr)
    return ptr


def cdiv(n, size):
    """n / size, rounded up; on the host, `triton.cdiv` costs ten times as much."""
    return -(-n // size)


def on_triton(tensor, deterministic=True):
    """True if an op on `tensor` runs its Triton kernels.

    deterministic: whether the kernels are. False for kernels that add atomically: the op then runs its reference under
        `torch.use_deterministic_algorithms(True)`.
    """
    if _references_only or not deterministic and strictly_deterministic():
        return False
    return tensor.is_cuda or interpret


def without_autocast(reference):
    """Decorator that disables autocast inside a reference: like the kernels, it computes in the types of its inputs."""

    @wraps(reference)
    def call(*args, **kwargs):
        first = args[0] if args else next(iter(kwargs.values()))
        first = first[0] if isinstance(first, (tuple, list)) else first
        with torch.autocast(first.device.type, enabled=False):
            return reference(*args, **kwargs)

    return call


def multiprocessors(tensor):
    """Number of multiprocessors of the tensor's GPU; 1 on a CPU."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


def capturing(device):
    """True during CUDA graph capture: tensors made then must not be cached, since replays overwrite them."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream(device):
    """The handle of the current CUDA stream, 0 on a CPU: a cache key, since other streams' results may not be ready."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class StreamCache:
    """Values derived from an owner's tensors, which must not change: computed once per stream, freed with the owner.

    Streams do not share entries, since streams do not wait for each other. A CUDA graph is captured on its own stream
    and uses entries of any stream, since `torch.cuda.graph` synchronizes the device first; the owner must outlive the
    graph. Values computed during a capture are valid only while the graph is replayed and are not cached. Compiled code
    reads the cache and does not write to it.
    """

    def __init__(self):
        self._entries = {}  # key -> {stream: value}

    def __reduce__(self):
        return StreamCache, ()  # a copied or unpickled owner starts with an empty cache, unless it calls `copy`

    def find(self, key, device):
        """The cached value, or None."""
        values = self._entries.get(key)
        if values is None:
            return None
        if torch.compiler.is_compiling() or capturing(device):
            return list(values.values())[-1]
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

    Ops and models wait nowhere else in a training step; decoding detections and visualization are not marked.
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
    """True under `torch.use_deterministic_algorithms(True)`, without `warn_only`."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def opaque(fake):
    """Decorator: torch.compile does not trace into the op; `fake` is its `register_fake` function."""

    def wrap(op):
        custom_op = torch.library.custom_op(f"unipad::{op.__name__}", op, mutates_args=())
        custom_op.register_fake(fake)

        @wraps(op)
        def call(*args, **kwargs):
            # the plain function in eager mode: the registered one costs tens of microseconds more per call
            return (custom_op if torch.compiler.is_compiling() else op)(*args, **kwargs)

        return call

    return wrap
