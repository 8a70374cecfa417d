"""A simulated GPU: kernels run as TTIR on the CPU, and tensors report the device that they would be on.

The PyPI package ttsem executes every launch on the CPU and reports out-of-bounds accesses, races between programs and
undefined results with the kernel's source line. This file simulates the rest: the device of each storage, CUDA's errors
(mixed devices, a CPU tensor passed to a kernel), NaN in every uninitialized tensor (also in backward passes), and
functions of `torch.cuda`.
"""

import contextlib
import functools
import threading
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction
from ttsem import harness, mlir, ops, sanitize
from ttsem.memory import Memory

SM = 90  # the compute capability that kernels are compiled for
aten = torch.ops.aten


@contextlib.contextmanager
def simulated_gpu():
    """Inside this context, `device="cuda"` works as on a machine with one GPU."""
    mlir.enable_generic_printing()
    with contextlib.ExitStack() as stack:
        patch = lambda *args, **kwargs: stack.enter_context(mock.patch.object(*args, **kwargs))  # noqa: E731
        patch(harness, "ir_for_launch", _ttir)
        patch(mlir, "parse", functools.cache(mlir.parse))
        patch(Memory, "atomic", _vectorized(Memory.atomic))
        stack.enter_context(sanitize.session(SM, "<as on a GPU>", on_unchecked=_refuse_unchecked))
        (ttsem_mode,) = _get_current_function_mode_stack()  # of the session; replaces "cuda" by the CPU
        requests = DeviceRequests()
        patch(JITFunction, "run", _launch_on_cuda_tensors_only(JITFunction.run))
        run_backward = _with_modes(torch.autograd._engine_run_backward, ttsem_mode, requests)
        patch(torch.autograd, "_engine_run_backward", run_backward)
        patch(torch.Tensor, "device", property(_device_of(ttsem_mode)))
        patch(torch.Tensor, "is_cuda", property(lambda t: device_type(t) != "cpu"))
        patch(torch.Tensor, "is_cpu", property(lambda t: device_type(t) == "cpu"))
        for name, answer in CUDA.items():
            patch(torch.cuda, name, answer)
        patch(torch, "Generator", Generator)
        patch(torch, "autocast", Autocast)
        patch(torch.amp, "GradScaler", GradScaler)
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            patch(torch, name, _query_cpu(getattr(torch, name)))
        stack.enter_context(requests)
        stack.enter_context(DevicePropagation())
        yield


def in_full_fp32():
    """Inside this context, `tl.dot` does not round operands to tf32, so that tolerances can be those of fp32."""
    return mock.patch.object(ops, "_to_tf32", lambda x: x)


class _State(threading.local):
    launching = False  # inside a launch, where tensors report their real device, the CPU
    requested = None  # device type of the tensor that is being created


_state = _State()


# The simulated device of a tensor


def device_type(tensor):
    """ "cuda", "cpu", or None for a tensor that PyTorch created internally: usable with either, it reports "cuda".

    It is an attribute of the storage, so that views have the device of their base.
    """
    return getattr(_storage(tensor), "device_type", None)


def set_device_type(tensor, where):
    _storage(tensor).device_type = where


def _storage(tensor):
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()


def _type_of(device):
    return torch.device(device).type if isinstance(device, (str, torch.device)) else "cuda"  # an index means a GPU


def _device_of(ttsem_mode):
    real = torch._C.TensorBase.device.__get__

    def device(tensor):
        # without ttsem's mode, nothing would map "cuda" back to the CPU
        if device_type(tensor) == "cpu" or _state.launching or ttsem_mode not in _get_current_function_mode_stack():
            return real(tensor)
        return torch.device("cuda", 0)

    return device


class DevicePropagation(TorchDispatchMode):
    """Propagates the device from the inputs of each operator to its new outputs: the GPU, if any input is there.

    Raises for inputs on both devices, unless CUDA allows them.
    """

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        device_types = {device_type(t) for t in inputs}
        if {"cuda", "cpu"} <= device_types and op not in MAY_MIX_DEVICES:
            _refuse_mixed(op, args, inputs)
        out = op(*args, **kwargs)
        where = next((d for d in ("cuda", "cpu") if d in device_types), None if inputs else _state.requested)
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                if device_type(t) is None and where:
                    set_device_type(t, where)
                if op in EMPTY:
                    _poison(t)
        return out


MAY_MIX_DEVICES = {
    aten.copy_.default,
    aten._to_copy.default,
    aten.set_.source_Tensor,
    aten.set_.source_Storage_storage_offset,
}
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
EMPTY = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


def _refuse_mixed(op, args, inputs):
    """Raise PyTorch's error, unless CUDA allows this mix of devices."""
    if op in INDEXING and device_type(args[0]) == "cuda":
        inputs = [args[0], *args[2:3]]  # the indexed tensor and the values; indices, args[1], may be on the CPU
    on_cpu = [tuple(t.shape) for t in inputs if device_type(t) == "cpu" and t.dim()]  # and so may scalars
    if on_cpu and any(device_type(t) == "cuda" for t in inputs):
        raise RuntimeError(f"Expected all tensors to be on the same device: {op} has {on_cpu} on the CPU")


def _poison(tensor):
    """Fill an uninitialized tensor with NaN, or with its type's largest integer."""
    if not tensor.numel() or tensor.layout != torch.strided:
        return
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


class DeviceRequests(TorchFunctionMode):
    """Handles calls that name a device, and methods that depend on a tensor's device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if tensor is not None and name in ("to", "cuda", "cpu"):
            return _moved(func, name, tensor, args, kwargs)
        if tensor is not None and name in ("numpy", "__array__") and device_type(tensor) == "cuda":
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if name == "pin_memory":
            return tensor.clone()
        if name == "is_pinned":  # of any tensor: pinning is not simulated
            return True
        if name == "record_stream":
            return None
        if name in FACTORIES or name in TENSOR_FACTORIES and kwargs.get("device") is not None:
            return _created(func, name, tensor, args, kwargs)
        return func(*args, **kwargs)


FACTORIES = {
    *("tensor", "as_tensor", "asarray", "from_numpy", "frombuffer", "scalar_tensor", "empty", "empty_strided"),
    *("zeros", "ones", "full", "eye", "arange", "linspace", "logspace", "tril_indices", "triu_indices"),
    *("rand", "randn", "randint", "randperm"),
}
TENSOR_FACTORIES = {  # without a `device`, on that of their argument: see `DevicePropagation`
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"),
    *("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full", "new_tensor"),
}


def _moved(func, name, tensor, args, kwargs):
    """The result of `to`, `cuda` or `cpu`, with its simulated device."""
    where = name if name != "to" else None
    for a in () if where else (*args[1:], *kwargs.values()):
        if isinstance(a, torch.Tensor):
            where = device_type(a)
        elif isinstance(a, torch.device) or isinstance(a, str) and a.split(":")[0] in ("cpu", "cuda"):
            where = _type_of(a)
    out = tensor if name == "cpu" else func(*args, **kwargs)
    if where and device_type(tensor) != where:
        out = out.clone() if _storage(out) is _storage(tensor) else out  # a storage has one device
        set_device_type(out, where)
    return out


def _created(func, name, tensor, args, kwargs):
    """The result of a factory function, with the simulated device that the call names.

    Without one: that of the tensor passed to `as_tensor` or `asarray`, else the CPU.
    """
    device, generator = kwargs.get("device"), kwargs.get("generator")
    if name in ("as_tensor", "asarray") and tensor is not None and device is None:
        return func(*args, **kwargs)
    where = "cpu" if device is None else _type_of(device)
    if generator is not None and generator.device.type != where:
        raise RuntimeError(f"Expected a '{where}' device type for generator but found '{generator.device.type}'")
    outer, _state.requested = _state.requested, where
    try:
        out = func(*args, **kwargs)
    finally:
        _state.requested = outer
    if tensor is not None and device_type(tensor) not in (None, where) and _storage(out) is _storage(tensor):
        out = out.clone()
    set_device_type(out, where)
    return out


def _with_modes(run_backward, *modes):
    """`run_backward` with the modes entered again: PyTorch disables a mode while that mode handles `backward`."""

    def run(*args, **kwargs):
        with contextlib.ExitStack() as stack:
            for mode in modes:
                if mode not in _get_current_function_mode_stack():
                    stack.enter_context(mode)
            return run_backward(*args, **kwargs)

    return run


# Launches


def _launch_on_cuda_tensors_only(run):
    """`run`, ttsem's `JITFunction.run`, preceded by Triton's error for tensors on the CPU."""

    def launch(kernel, *args, grid, warmup, **kwargs):
        __tracebackhide__ = True
        for name, arg in [*zip(kernel.arg_names, args, strict=False), *kwargs.items()]:
            if any(isinstance(t, torch.Tensor) and device_type(t) == "cpu" for t in tree_leaves(arg)):
                raise ValueError(f"{name} cannot be accessed from Triton (cpu tensor?)")  # Triton's own message
        _state.launching = True
        try:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)
        finally:
            _state.launching = False

    return launch


_ttir_of = {}


def _ttir(record, stage, target, *_):
    """Replaces ttsem's `harness.ir_for_launch`, without assembling and once per specialization: full compilation would
    take most of the run time."""
    specialization = str(harness._specialize(record.fn, record.args, record.kwargs, target))
    key = record.fn, specialization
    if key not in _ttir_of:
        _ttir_of[key] = mlir.to_generic(harness._stage_text(record, stage, target))
    return _ttir_of[key]


def _vectorized(one_by_one):
    """ttsem's `Memory.atomic`, vectorized over lanes that add to different elements."""

    def atomic(memory, kind, addrs, values, mask, sem="acq_rel", codec=None):
        if kind not in ("add", "fadd") or codec:
            return one_by_one(memory, kind, addrs, values, mask, sem, codec)
        shape = np.shape(addrs)
        live = np.flatnonzero(np.broadcast_to(True if mask is None else mask, shape))
        addrs = np.asarray(addrs, np.int64).reshape(-1)[live]
        values = np.broadcast_to(values, shape).reshape(-1)[live]
        before = np.zeros(np.prod(shape, dtype=int), values.dtype)
        if memory.tracing and live.size:
            memory._log("a", addrs, values.itemsize, None)  # for the race check; "a": atomic
        order = np.argsort(addrs, kind="stable")
        first = np.flatnonzero(np.diff(addrs[order], prepend=-1))  # the first lane of each element
        rank = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))  # 0, 1, ... in each element
        for i in range(rank.max(initial=-1) + 1):
            lanes = order[rank == i]
            before[live[lanes]] = memory._read(addrs[lanes], values.dtype)
            memory._write(addrs[lanes], before[live[lanes]] + values[lanes])
        return before.reshape(shape)

    return atomic


def _refuse_unchecked():
    raise AssertionError("this launch is too large to be checked for races: make the test smaller")


# Replacements for `torch.cuda` and related functions


class _Stream:
    """The only stream, and also any event: all work is already done."""

    device, cuda_stream = torch.device("cuda", 0), 0

    def __init__(self, *_, **__):
        pass

    def __eq__(self, other):
        return isinstance(other, _Stream)

    def __hash__(self):
        return 0

    def nothing(self, *_):
        pass

    synchronize = wait_stream = wait_event = record = nothing


CUDA = dict(
    device_of=lambda tensor: contextlib.nullcontext(),
    current_stream=_Stream,
    default_stream=_Stream,
    Stream=_Stream,
    Event=_Stream,
    stream=lambda stream: contextlib.nullcontext(),
    is_current_stream_capturing=lambda: False,
    get_device_properties=lambda *_: SimpleNamespace(multi_processor_count=1),
    is_bf16_supported=lambda *_, **__: True,
    max_memory_allocated=lambda *_: 0,
    reset_peak_memory_stats=lambda *_: None,
)


class Generator(torch.Generator):
    """A generator for either device. Both draw the same numbers, so that a step can be compared between devices."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.where = torch.device(device)
        return made

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self):
        return self.where

    def manual_seed(self, seed):
        super().manual_seed(seed)
        return self


class Autocast(torch.autocast):
    """Autocast for either device, with the CPU's lists of operators."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu", *args, **kwargs)


class GradScaler(torch.amp.GradScaler):
    def __init__(self, device="cuda", *args, **kwargs):
        super().__init__("cpu", *args, **kwargs)


def _query_cpu(query):
    """Replaces a query of autocast's state: always that of the CPU, as in `Autocast`."""
    return lambda device="cpu": query("cpu")
