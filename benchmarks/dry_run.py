"""Dry run of a training step as on a GPU: shapes, types, devices and launches are real, values are not.

tests/dry_step.py finds faults with it, benchmarks/step_counts.py counts work.

In `DryRun`, CUDA tensors are fake (torch's FakeTensorMode) and CPU tensors are computed as usual. So a step runs the
same code as on a GPU, and

    a tensor left on the CPU       raises, as on a GPU
    a host wait for the device     raises outside of `backend.host_wait`; inside, returns a preset value (`answers`)
    a launch of a Triton kernel    is recorded, with the types, divisibility and constants that Triton specializes on

Patches replace only what PyTorch refuses to do without CUDA, nothing of this project.
"""

import contextlib
import ctypes
import importlib
from collections import Counter
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

from unipad.batch import OCCUPANCY_SHAPE, Batch
from unipad.config import OccupancyRecipe
from unipad.kernels import backend

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)


class UnmarkedWait(AssertionError):
    """The host would wait for the device outside of `backend.host_wait`."""


class DeviceMismatch(AssertionError):
    """A CPU tensor would be used on the GPU."""


class Generator(torch.Generator):
    """Stands for a CUDA generator, which cannot be created without CUDA: a CPU generator, recognized by its seed."""

    device, marker_seed = CUDA, 20_240_617

    def __init__(self):
        super().__init__()
        self.manual_seed(self.marker_seed)


class DryRun(contextlib.ExitStack):
    """Inside this context there is a "cuda" device, which computes shapes only.

    answers:   reason of a `host_wait` -> the value that the host reads, such as a number of nonzero elements; or a list
               of such values, returned one after the other, and then from the first again
    calls:     (kernel, arguments by name) of every launch
    launches:  a `Launch` for every launch
    operators: name -> number of calls of each PyTorch operator on the GPU, except views and allocations, which launch
               no kernel

    The device is an AMD GPU if `torch.version.hip` is set.
    """

    def __init__(self, answers=None):
        super().__init__()
        self.answers, self.calls, self.launches, self.operators = answers or {}, [], [], Counter()

    def __enter__(self):
        super().__enter__()
        _install_cuda_guard()
        self.fake = FakeTensorMode()
        for patch in (
            # Autocast disables itself without CUDA,
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            mock.patch("torch.cuda.is_bf16_supported", lambda *_: True),
            # device guards and streams need a driver,
            mock.patch("torch.cuda.device_of", lambda tensor: contextlib.nullcontext()),
            mock.patch("torch.cuda.current_stream", lambda device=None: SimpleNamespace(cuda_stream=0)),
            mock.patch("torch.cuda.is_current_stream_capturing", lambda: False),
            mock.patch(
                "torch.cuda.get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132)
            ),  # H100
            # fake tensors have no address (the patch: offset in an allocation, which starts at a multiple of 512),
            mock.patch.object(FakeTensor, "data_ptr", lambda t: t.storage_offset() * t.element_size()),
            # and there is no device to launch on.
            mock.patch("triton.runtime.jit.JITFunction.run", self._launch),
        ):
            self.enter_context(patch)
        self.enter_context(self.fake)
        self.enter_context(_FakeDevice(self))
        return self

    def _launch(self, kernel, *args, grid, warmup, **kwargs):
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        on_cpu = [name for name, value in given.items() for t in tensors_in(value) if not t.is_cuda]
        if on_cpu:
            raise DeviceMismatch(f"{kernel.__name__} is launched with CPU tensors: {on_cpu}")
        assert all(isinstance(n, int) and n > 0 for n in grid), f"{kernel.__name__} is launched with grid {grid}"
        self.calls.append((kernel, given))
        target = gpu("gfx942" if torch.version.hip else "sm_90")  # any GPU of a vendor: Triton specializes alike
        self.launches.append(Launch.of(kernel, args, kwargs, target))


class _FakeDevice(TorchDispatchMode):
    """Runs operators on CPU tensors, fakes those on CUDA tensors, and raises where the host would wait."""

    def __init__(self, dry):
        super().__init__()
        self.dry = dry
        self.answers = {reason: cycle(v if isinstance(v, list) else [v]) for reason, v in dry.answers.items()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # `tensor.device`
            return args[0].fake_device
        tensors = tensors_in((args, kwargs))
        from_gpu, to = any(t.is_cuda for t in tensors), kwargs.get("device")
        if not from_gpu and (to is None or torch.device(to).type != "cuda"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if launches_kernel(func):
            self.dry.operators[func.overloadpacket.__name__] += 1
        if func in (aten._to_copy.default, aten.copy_.default):
            copied = self._copy(func, args, kwargs, to)
            if copied is not None:
                return copied
        generator = kwargs.get("generator")
        if generator is not None and generator.initial_seed() != Generator.marker_seed:
            raise DeviceMismatch(f"{func} on the GPU is given a CPU generator")
        if func in _SIZED_BY_DATA or _indexes_by_mask(func, args):
            return self._sized_by_data(func, args)
        if not all(isinstance(t, FakeTensor) for t in tensors):
            # A CPU scalar is allowed: it is passed with the launch. For any other CPU tensor the fake operator raises.
            faked = self.dry.fake.from_tensor
            args, kwargs = tree_map_only(
                torch.Tensor, lambda t: t if isinstance(t, FakeTensor) else faked(t), (args, kwargs)
            )
        return func(*args, **kwargs)

    def _copy(self, func, args, kwargs, to):
        """Raises if a copy to the GPU blocks or one from it is outside of `host_wait`.

        Returns zeros for a copy from the GPU inside of `host_wait`, None for any other.
        """
        source, target = (args[1], args[0].device) if func is aten.copy_.default else (args[0], to)
        target = source.device if target is None else torch.device(target)
        if source.device.type == target.type:
            return
        if target.type == "cuda":
            non_blocking = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
            if not non_blocking:
                raise UnmarkedWait(f"the host waits for a copy of {tuple(source.shape)} to the GPU: use non_blocking")
        elif backend.waiting_for is None:
            raise UnmarkedWait(f"the host waits for a copy of {tuple(source.shape)} from the GPU")
        else:
            with unset_fake_temporarily():
                return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)

    def _sized_by_data(self, func, args):
        """The result of an operator whose output size (or number, for `item`) the host waits for."""
        if backend.waiting_for is None:
            raise UnmarkedWait(f"the host waits for the output, or its size, of {func}")
        number = next(self.answers[backend.waiting_for])
        if func is aten._local_scalar_dense.default:
            return number
        if func is aten._unique2.default:  # args: tensor, sorted, return_inverse, return_counts; absent: False
            return_inverse, return_counts = (*args[2:], False, False)[:2]
            inverse = args[0].new_empty(args[0].shape if return_inverse else 0, dtype=torch.int64)
            counts = args[0].new_empty(number if return_counts else 0, dtype=torch.int64)
            return args[0].new_empty(number), inverse, counts
        if func is aten.nonzero.default:
            return args[0].new_empty(number, args[0].dim(), dtype=torch.int64)
        if func is aten.index.Tensor:
            (mask,) = (i for i in args[1] if i is not None)
            at = args[1].index(mask)
            return args[0].new_empty(*args[0].shape[:at], number, *args[0].shape[at + mask.dim() :])
        raise NotImplementedError(f"{func} in a backend.host_wait: implement its result in benchmarks/dry_run.py")


_SIZED_BY_DATA = {
    aten._local_scalar_dense.default,  # `item`: the number itself
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.masked_select.default,
    aten.bincount.default,
}


_ALLOCATE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def launches_kernel(func):
    """Whether an operator launches a kernel: it does more than allocate or make a view."""
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return func.namespace == "aten" and not is_view and func.overloadpacket.__name__ not in _ALLOCATE


def tensors_in(tree):
    return [a for a in tree_iter(tree) if isinstance(a, torch.Tensor)]


def _indexes_by_mask(func, args):
    """Whether the operator indexes by a mask and must count its true elements, as all do but writes of a CPU scalar."""
    if func not in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        return False
    masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return masked and not (func is not aten.index.Tensor and args[2].numel() == 1 and args[2].device.type == "cpu")


def _install_cuda_guard():
    """In a CPU build of PyTorch, register the device guard that CUDA builds use for CUDA on machines without a GPU.

    `_ensureCUDADeviceGuardSet` only replaces a guard that reports no devices, such as the one of the lazy backend.
    """
    if torch.backends.cuda.is_built():
        return
    cuda, lazy = 1, 17  # values of c10::DeviceType
    c10 = ctypes.CDLL(f"{torch.__path__[0]}/lib/libc10.so")
    guards = (ctypes.c_void_p * (lazy + 1)).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    if guards[cuda] is None:
        guards[cuda] = guards[lazy]
        torch._C._ensureCUDADeviceGuardSet()
        assert guards[cuda] != guards[lazy]


def to_gpu(net):
    """Replace a module's parameters and buffers by uninitialized ones on the GPU.

    Other tensors stay where they are, as with `Module.to`, so that the dry run finds them.
    """
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


def make_batch(recipe, scene=0, cameras=6):
    """A batch of the recipe's size on the GPU, before `Batch.to` divides its images, with about as many points and
    boxes as in nuScenes.

    The numbers of points and boxes differ between samples and between scenes. cameras: of the rig.
    """
    B, data = recipe.optim.batch_size, recipe.data
    H, W = (-(-size // 32) * 32 for size in data.image_size or (900, 1600))  # padded as by `collate`
    views = cameras * data.camera_sweeps if data.cameras else 0
    points = [(25_000 * data.sweeps + 137 * b + 23 * scene) * (data.sweeps > 0) for b in range(B)]
    sources = cameras * len(data.sources)
    boxes, voxels = [30 + 3 * b + scene for b in range(B)], isinstance(recipe, OccupancyRecipe)
    feature_shape = B, cameras, H // 16, W // 16, data.feature_channels

    def on_gpu(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=CUDA)

    return Batch(
        images=on_gpu(B, views, H, W, 3 if recipe.reads_pixels else 0, dtype=torch.uint8).permute(0, 1, 4, 2, 3),
        image_sizes=on_gpu(B, views, 2, dtype=torch.int64),
        lidar2image=on_gpu(B, views, 4, 4),
        lidar2camera=on_gpu(B, views, 4, 4),
        points=on_gpu(sum(points), 5),
        point_counts=torch.tensor(points),
        boxes=on_gpu(sum(boxes), 9),
        labels=on_gpu(sum(boxes), dtype=torch.int64),
        box_counts=torch.tensor(boxes),
        point_labels=on_gpu(sum(points), dtype=torch.uint8),
        tokens=("",) * B,
        frame_lags=on_gpu(B, data.camera_sweeps) if data.camera_sweeps > 1 else None,
        source_images=on_gpu(B, sources, H, W, 3, dtype=torch.uint8).permute(0, 1, 4, 2, 3) if sources else None,
        source_sizes=on_gpu(B, sources, 2, dtype=torch.int64) if sources else None,
        lidar2source=on_gpu(B, sources, 4, 4) if sources else None,
        features=on_gpu(*feature_shape, dtype=torch.float16) if data.features else None,
        feature_sizes=on_gpu(B, cameras, 2, dtype=torch.int64) if data.features else None,
        sweep_origins=on_gpu(B, data.sweeps, 4) if recipe.reads_points_beyond else None,
        occupancy=on_gpu(B, 3, *OCCUPANCY_SHAPE, dtype=torch.uint8) if voxels else None,
        ego2lidar=on_gpu(B, 4, 4) if voxels else None,
        points_beyond=on_gpu(sum(n // 5 for n in points), 5) if recipe.reads_points_beyond else None,
        beyond_counts=torch.tensor([n // 5 for n in points]) if recipe.reads_points_beyond else None,
    )


def gpu(name):
    """Triton's target for a name such as sm_90 or gfx942."""
    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


def backward(loss, entering=lambda node: None):
    """`loss.backward()` without PyTorch's engine, which needs CUDA streams: calls the nodes of the graph one by one.

    entering: called with each node before it runs.
    """
    grads = {loss.grad_fn: [torch.ones_like(loss)]}
    with torch.no_grad():
        for node in _topological_order(loss.grad_fn):
            d_outs = grads.pop(node, None)
            if d_outs is None:
                continue
            entering(node)
            edges = node.next_functions
            for (next_node, i), grad in zip(edges, _call_node(node, d_outs), strict=True):
                if next_node is None or grad is None:
                    continue
                metadata = next_node._input_metadata
                sums = grads.setdefault(next_node, [None] * len(metadata))
                if grad.device != metadata[i].device:
                    raise DeviceMismatch(f"{node.name()} returns a gradient on {grad.device} for {metadata[i].device}")
                grad = grad.to(metadata[i].dtype)
                if grad.shape != metadata[i].shape:
                    grad = grad.sum_to_size(metadata[i].shape)
                sums[i] = grad if sums[i] is None else sums[i] + grad


def _call_node(node, d_outs):
    """The gradients w.r.t. a node's inputs, one for each of its edges, from those w.r.t. its outputs."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):  # not a custom autograd.Function
        out = node(*d_outs)
        return out if isinstance(out, tuple) else (out,) * len(node.next_functions)
    d_outs = [g if g is not None else torch.zeros(m.shape, dtype=m.dtype, device=m.device)
              for g, m in zip(d_outs, node._input_metadata, strict=True)]  # fmt: skip
    out = node.apply(*d_outs)
    out = out if isinstance(out, tuple) else (out,)  # one gradient per argument; an edge per tensor argument
    grads = iter([g for g, needed in zip(out, node.needs_input_grad, strict=True) if needed])
    return [None if next_node is None else next(grads) for next_node, _ in node.next_functions]


def _topological_order(root):
    """All nodes of an autograd graph, each before those that it passes gradients to."""
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((next_node, False) for next_node, _ in node.next_functions if next_node is not None)
    return reversed(order)


@dataclass(frozen=True)
class Launch:
    """A kernel specialization, as Triton would compile it for a launch that was recorded.

    (`tests.ahead_of_time.Launch` describes a launch by hand.)
    """

    module: str  # Python module of the kernel
    kernel: str
    signature: tuple  # (argument, type) pairs
    constants: tuple  # (path, value) pairs; path: (position of the argument, position in it if it is a tuple, ...)
    attributes: tuple  # (path, attributes such as divisibility) pairs
    options: tuple  # (name, value) pairs: warps, stages

    @classmethod
    def of(cls, kernel, args, kwargs, target):
        """kwargs: the kernel's arguments passed by name, and the options of the launch."""
        import triton
        from triton.runtime.jit import create_function_from_signature

        compiler = triton.compiler.make_backend(target)
        bind = create_function_from_signature(kernel.signature, kernel.params, compiler)
        bound, specialization, options = bind(*args, **kwargs)
        _, signature, constants, attributes = kernel._pack_args(compiler, kwargs, bound, specialization, options)
        return cls(
            kernel.__module__,
            kernel.__name__,
            tuple(signature.items()),
            tuple(constants.items()),
            tuple((path, tuple(map(tuple, value))) for path, value in attributes.items()),
            tuple(sorted((name, value) for name, value in kwargs.items() if name not in kernel.arg_names)),
        )

    def compile(self, target):
        import triton

        kernel = getattr(importlib.import_module(self.module), self.kernel)
        attributes = {path: [list(pair) for pair in value] for path, value in self.attributes}
        source = triton.compiler.ASTSource(kernel, dict(self.signature), dict(self.constants), attributes)
        return triton.compile(source, target=gpu(target), options=dict(self.options))
