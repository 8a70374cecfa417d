"""A training step on a GPU that is not there: shapes, types, devices and launches are real, numbers are not.

On the GPU of `Dry` tensors are fake (torch's FakeTensorMode), what the host computes it computes. So a step goes
through the code that a GPU's step goes through, and

    a tensor left on the CPU       raises, as it would on a GPU
    a wait for the device          raises, unless it has a name (`backend.waits`): then the step is told a number
    a launch                       is noted, with the types, divisibility and constants that Triton would compile it for

Patched is what a PyTorch without CUDA refuses to do, and nothing of the project.
"""

import contextlib
import ctypes
import importlib
from dataclasses import dataclass
from itertools import cycle
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from triton.backends.compiler import GPUTarget

from kernels import backend

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)


class Waits(AssertionError):
    """The host would wait for the device, and nothing says so."""


class Crosses(AssertionError):
    """What is on the CPU would be used on the GPU."""


class Generator(torch.Generator):
    """A generator on the GPU. It is one of the CPU, since others need CUDA, and known by its seed."""

    device, seed_of_all = CUDA, 20_240_617

    def __init__(self):
        super().__init__()
        self.manual_seed(self.seed_of_all)


class Dry(contextlib.ExitStack):
    """Inside, the device "cuda" is there, and computes shapes alone.

    answers:  name of a wait -> what the host is told: the number of rows that are found, or numbers in turn
    calls:    (kernel, arguments by name) of every launch
    launches: the same as `Launch`

    Where `torch.version.hip` is set the device is AMD's.
    """

    def __init__(self, answers=None):
        super().__init__()
        self.answers, self.calls, self.launches = answers or {}, [], []

    def __enter__(self):
        super().__enter__()
        _guard_a_device_without_cuda()
        self.fake = FakeTensorMode()
        for patch in (
            # Autocast turns itself off where CUDA is not there, ...
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            mock.patch("torch.cuda.is_bf16_supported", lambda *_: True),
            # ... a device is made current by a driver, which also has the streams, ...
            mock.patch("torch.cuda.device_of", lambda tensor: contextlib.nullcontext()),
            mock.patch("torch.cuda.current_stream", lambda device=None: SimpleNamespace(cuda_stream=0)),
            mock.patch("torch.cuda.is_current_stream_capturing", lambda: False),
            # ... fake tensors have no address: this one is that in an allocation, which begins at a multiple of 512 ...
            mock.patch.object(FakeTensor, "data_ptr", lambda t: t.storage_offset() * t.element_size()),
            # ... and there is nothing to launch on.
            mock.patch("triton.runtime.jit.JITFunction.run", self._launch),
        ):
            self.enter_context(patch)
        self.enter_context(self.fake)
        self.enter_context(_Watch(self))
        return self

    def _launch(self, kernel, *args, grid, warmup, **options):
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        lost = [name for name, value in given.items() for t in _tensors(value) if not t.is_cuda]
        if lost:
            raise Crosses(f"{kernel.__name__} is launched on what the CPU has: {lost}")
        assert all(isinstance(n, int) and n > 0 for n in grid), f"{kernel.__name__} is launched as {grid} programs"
        self.calls.append((kernel, given))
        self.launches.append(Launch.of(kernel, args, options, gpu("gfx942" if torch.version.hip else "sm_90")))


class _Watch(TorchDispatchMode):
    """Runs what concerns the CPU alone, fakes the rest, and raises where the host would wait."""

    def __init__(self, dry):
        super().__init__()
        self.dry = dry
        self.answers = {why: cycle(told if isinstance(told, list) else [told]) for why, told in dry.answers.items()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        tensors = _tensors((args, kwargs))
        from_gpu, to = any(t.is_cuda for t in tensors), kwargs.get("device")
        if not from_gpu and (to is None or torch.device(to).type != "cuda"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            found = self._copy(func, args, kwargs, to)
            if found is not None:
                return found
        generator = kwargs.get("generator")
        if generator is not None and generator.initial_seed() != Generator.seed_of_all:
            raise Crosses(f"{func} draws on the GPU by a generator of the CPU")
        if func in _SIZED_BY_DATA or _is_masked(func, args):
            return self._sized_by_data(func, args)
        if not all(isinstance(t, FakeTensor) for t in tensors):
            # One number on the CPU may go into what the GPU computes: it travels with the launch.
            faked = self.dry.fake.from_tensor
            args, kwargs = tree_map_only(
                torch.Tensor, lambda t: t if isinstance(t, FakeTensor) else faked(t), (args, kwargs)
            )
        return func(*args, **kwargs)

    def _copy(self, func, args, kwargs, to):
        """Copies to the GPU must not block; copies from it always do."""
        source, goal = (args[1], args[0].device) if func is aten.copy_.default else (args[0], to)
        goal = source.device if goal is None else torch.device(goal)
        if source.device.type == goal.type:
            return
        if goal.type == "cuda":
            hurried = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
            if not hurried and source.dim():
                raise Waits(f"the host waits until {tuple(source.shape)} numbers are on the GPU: use non_blocking")
        elif backend.waiting_for is None:
            raise Waits(f"the host waits for {tuple(source.shape)} numbers of the GPU")
        else:
            with unset_fake_temporarily():
                return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)

    def _sized_by_data(self, func, args):
        """What a GPU finds is counted there, and the host waits for the number."""
        if backend.waiting_for is None:
            raise Waits(f"the host waits for the size of what {func} finds")
        number = next(self.answers[backend.waiting_for])
        if func is aten._local_scalar_dense.default:
            return number
        if func is aten._unique2.default:
            inverse, counts = (len(args[0]) if wanted else 0 for wanted in (*args[2:], False, False)[:2])
            return args[0].new_empty(number), *(args[0].new_empty(n, dtype=torch.int64) for n in (inverse, counts))
        if func is aten.nonzero.default:
            return args[0].new_empty(number, args[0].dim(), dtype=torch.int64)
        if func is aten.index.Tensor:
            (mask,) = (i for i in args[1] if i is not None)
            at = args[1].index(mask)
            return args[0].new_empty(*args[0].shape[:at], number, *args[0].shape[at + mask.dim() :])
        raise NotImplementedError(f"{func} inside of backend.waits: teach tests/dry.py what it returns")


_SIZED_BY_DATA = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.masked_select.default,
    aten.bincount.default,
}


def _tensors(tree):
    return [a for a in tree_iter(tree) if isinstance(a, torch.Tensor)]


def _is_masked(func, args):
    """Whether rows are chosen by a mask, which are then counted; one number is written under a mask without that."""
    if func not in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        return False
    masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return masked and not (func is not aten.index.Tensor and args[2].numel() == 1 and args[2].device.type == "cpu")


def _guard_a_device_without_cuda():
    """PyTorch's own device guard of CUDA for computers without a GPU, which it gives to builds with CUDA alone.

    It takes the place of a guard that counts no devices, which the lazy backend's does.
    """
    if torch.backends.cuda.is_built():
        return
    cuda, lazy = 1, 17  # places in c10::DeviceType
    c10 = ctypes.CDLL(f"{torch.__path__[0]}/lib/libc10.so")
    guards = (ctypes.c_void_p * (lazy + 1)).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    if guards[cuda] is None:
        guards[cuda] = guards[lazy]
        torch._C._ensureCUDADeviceGuardSet()
        assert guards[cuda] != guards[lazy]


def on_gpu(net):
    """A module that was made on the meta device, on the GPU; what is no parameter or buffer stays where it is."""
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(_like(p), p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = _like(b)
    return net


def _like(t):
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=CUDA)


def gpu(name):
    """Triton's target of a name like sm_90 or gfx942."""
    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


def backward(loss):
    """`loss.backward()`. PyTorch's engine would ask for the GPU's streams; here its nodes are called one by one."""
    grads = {loss.grad_fn: [torch.ones_like(loss)]}
    with torch.no_grad():
        for node in _from_the_loss(loss.grad_fn):
            given = grads.pop(node, None)
            if given is None:
                continue
            edges = node.next_functions
            for (below, place), grad in zip(edges, _called(node, given), strict=True):
                if below is None or grad is None:
                    continue
                told = below._input_metadata
                seen = grads.setdefault(below, [None] * len(told))
                if grad.device != told[place].device:
                    raise Crosses(f"{node.name()} has a gradient on {grad.device} for {told[place].device}")
                grad = grad.to(told[place].dtype)
                if grad.shape != told[place].shape:
                    grad = grad.sum_to_size(told[place].shape)
                seen[place] = grad if seen[place] is None else seen[place] + grad


def _called(node, given):
    """The gradients of a node's inputs: one for each of its edges."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        out = node(*given)
        return out if isinstance(out, tuple) else (out,) * len(node.next_functions)
    given = [g if g is not None else torch.zeros(m.shape, dtype=m.dtype, device=m.device)
             for g, m in zip(given, node._input_metadata, strict=True)]  # fmt: skip
    out = node.apply(*given)
    out = out if isinstance(out, tuple) else (out,)
    wanted = iter([g for g, needed in zip(out, node.needs_input_grad, strict=True) if needed])
    return [None if below is None else next(wanted) for below, _ in node.next_functions]


def _from_the_loss(root):
    """All nodes of a graph, each before those that it hands gradients to."""
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((below, False) for below, _ in node.next_functions if below is not None)
    return reversed(order)


@dataclass(frozen=True)
class Launch:
    """A kernel as Triton would compile it."""

    module: str
    kernel: str
    signature: tuple  # (argument, type) of each
    constants: tuple  # (path, value)
    attributes: tuple  # (path, divisibility and the like)
    options: tuple  # (name, value): warps, stages

    @classmethod
    def of(cls, kernel, args, options, target):
        import triton
        from triton.runtime.jit import create_function_from_signature

        compiler = triton.compiler.make_backend(target)
        bind = create_function_from_signature(kernel.signature, kernel.params, compiler)
        bound, specialization, chosen = bind(*args, **options)
        _, signature, constants, attributes = kernel._pack_args(compiler, options, bound, specialization, chosen)
        return cls(
            kernel.__module__,
            kernel.__name__,
            tuple(signature.items()),
            tuple(constants.items()),
            tuple((path, tuple(map(tuple, value))) for path, value in attributes.items()),
            tuple(sorted((name, value) for name, value in options.items() if name not in kernel.arg_names)),
        )

    def compiled(self, target):
        import triton

        kernel = getattr(importlib.import_module(self.module), self.kernel)
        attributes = {path: [list(pair) for pair in value] for path, value in self.attributes}
        source = triton.compiler.ASTSource(kernel, dict(self.signature), dict(self.constants), attributes)
        return triton.compile(source, target=gpu(target), options=dict(self.options))
