"""Comparisons and checks that several test files use."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from unipad.kernels import backend

SLACK = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # fraction of the largest |fp64 value|


def check_against_ref(op, ref, inputs, dtype, wrt=None, slack=None, magnitude=0.0):
    """Assert that the error of `op` w.r.t. `ref` in fp64 is at most twice that of `ref` in `dtype`, plus some slack.

    op, ref:   same signature, return a tensor or a tuple of tensors; integer and bool outputs must be equal.
    inputs:    dict name -> value. fp64 tensors are cast to `dtype`; fp32 ones are geometry and stay fp32, except in the
               fp64 run; lists of tensors are handled element by element; anything else is passed through.
    wrt:       names of the inputs whose gradients are compared too; None: all floating-point tensors.
    slack:     as a fraction of the largest |fp64 value| of each output or gradient; None: SLACK of the type.
    magnitude: size of terms that cancel in outputs or gradients; where it is larger than the largest |fp64 value|,
               `slack` is a fraction of it instead.

    Also asserts that `op` launched a kernel if no output or gradient is empty, and none if all its outputs are.
    """
    truth = _run(ref, inputs, torch.float64, wrt)
    ref_in_dtype = _run(ref, inputs, dtype, wrt)
    with launches() as launched:
        ours = _run(op, inputs, dtype, wrt)
    if all(t.numel() for t in truth.values()):
        assert launched, "the op ran its reference, not its kernels"
    if not any(t.numel() for name, t in truth.items() if name.startswith("out")):
        assert not launched, f"there is nothing to do, but it launched {launched}"
    assert ours.keys() == truth.keys()
    for name in truth:
        assert ours[name].dtype == ref_in_dtype[name].dtype and ours[name].shape == ref_in_dtype[name].shape, name
        if not truth[name].is_floating_point():
            assert torch.equal(ours[name], truth[name]), name
            continue
        assert torch.isfinite(ours[name]).all(), f"{name}: not finite"
        scale = max(truth[name].abs().max().item(), magnitude) if truth[name].numel() else 0.0
        bound = 2 * _err(ref_in_dtype[name], truth[name]) + (SLACK[dtype] if slack is None else slack) * scale
        assert _err(ours[name], truth[name]) <= bound, f"{name}: {_err(ours[name], truth[name]):.2e} > {bound:.2e}"


@contextmanager
def launches():
    """Collects the names of the kernels that are launched inside: `with launches() as names`."""
    from triton.runtime.jit import KernelInterface

    names = []
    plain = KernelInterface.__getitem__

    def recording(kernel, grid):
        names.append(kernel.__name__)
        return plain(kernel, grid)

    with mock.patch.object(KernelInterface, "__getitem__", recording):
        yield names


class OperatorRecorder(TorchDispatchMode):
    """Records in `operators` the name of each PyTorch operator that launches a kernel on a GPU; none inside kernels.

    On a GPU, an operator may launch several.
    """

    def __enter__(self):
        # not at the top: both need Triton, which not every platform has
        from triton.runtime.jit import KernelInterface

        from benchmarks.dry_run import launches_kernel

        self.operators, plain = [], KernelInterface.__getitem__

        def unrecorded(kernel, grid):  # the interpreter calls operators too
            def launch(*args, **kwargs):
                with _disable_current_modes():
                    plain(kernel, grid)(*args, **kwargs)

            return launch

        self.patch = mock.patch.object(KernelInterface, "__getitem__", unrecorded)
        self.patch.__enter__()
        self.launches_kernel = launches_kernel
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.__exit__(*error)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.launches_kernel(func):
            self.operators.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class NoFloatCumsum(TorchDispatchMode):
    """Fails on a cumsum of floats, in forward or backward passes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        summed = func.overloadpacket in (torch.ops.aten.cumsum, torch.ops.aten.cumsum_)
        assert not (summed and args[0].is_floating_point()), f"{func} of {args[0].dtype} is not deterministic on a GPU"
        return func(*args, **(kwargs or {}))


class DivideLikeGpu(TorchDispatchMode):
    """Divides a tensor by a number as PyTorch does on a GPU: multiplies by the reciprocal."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.div.Tensor and not torch.is_tensor(args[1]):
            return args[0] * (args[0].new_ones(()) / args[1])
        return func(*args, **(kwargs or {}))


# Operators for which the host waits: for their result, or for its size
BLOCKING = "nonzero", "_local_scalar_dense", "_unique2", "unique_consecutive", "unique_dim", "masked_select", "equal"


class WaitRecorder(TorchDispatchMode):
    """Records where the host would wait for a GPU.

    marked:   reason of the `backend.host_wait` around each wait.
    unmarked: name of each operator that waits outside of a `backend.host_wait`.
    without:  modules whose kernels are not run, to save time; no tensor's size may depend on their results.

    Creating a tensor from a list (`lift_fresh`) counts, since the host waits for its copy. Operators inside kernels do
    not count: they are the interpreter's.
    """

    def __init__(self, without=()):
        super().__init__()
        self.without, self.marked, self.unmarked = without, [], []

    def __enter__(self):
        from triton.runtime.jit import KernelInterface

        plain, tolist = KernelInterface.__getitem__, torch.Tensor.tolist

        def launched_unrecorded(kernel, grid):
            def launch(*args, **kwargs):
                if kernel.fn.__module__ not in self.without:
                    with _disable_current_modes():
                        plain(kernel, grid)(*args, **kwargs)

            return launch

        # of a CPU tensor, `tolist` calls no operator that `__torch_dispatch__` would see
        def recorded_tolist(tensor):
            self._record("tolist")
            with _disable_current_modes():
                return tolist(tensor)

        self.patches = ExitStack()
        self.patches.enter_context(mock.patch.object(KernelInterface, "__getitem__", launched_unrecorded))
        self.patches.enter_context(mock.patch.object(torch.Tensor, "tolist", recorded_tolist))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(i is not None and i.dtype == torch.bool for i in indices)
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in BLOCKING or name == "lift_fresh" or by_mask or unsized:
            self._record(name)
        return func(*args, **kwargs)

    def _record(self, name):
        if backend.waiting_for is None:
            self.unmarked.append(name)
        else:
            self.marked.append(backend.waiting_for)


def _run(fn, inputs, dtype, wrt):
    """Outputs, as out0, out1, ..., and gradients, as d_<name>, for fixed random upstream gradients."""
    inputs = {name: _cast(value, dtype) for name, value in inputs.items()}
    leaves = {}
    for name, value in inputs.items():
        if wrt is None or name in wrt:
            is_list = isinstance(value, (list, tuple))
            items = {f"{name}[{i}]": v for i, v in enumerate(value)} if is_list else {name: value}
            leaves |= {k: v.requires_grad_() for k, v in items.items() if _is_float(v)}
    outs = fn(**inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    results = {f"out{i}": o.detach() for i, o in enumerate(outs)}
    outs = [o for o in outs if o.requires_grad]
    if outs:
        gen = torch.Generator().manual_seed(1)
        ups = [torch.randn(o.shape, generator=gen, dtype=torch.float64).to(o) for o in outs]
        grads = torch.autograd.grad(outs, list(leaves.values()), ups)
        results |= {f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}
    return results


def _cast(value, dtype):
    """A detached copy of `value`: fp64 becomes `dtype`, fp32 stays fp32 unless `dtype` is fp64."""
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(v, dtype) for v in value)
    if not _is_float(value):
        return value
    keep = value.dtype == torch.float32 and dtype != torch.float64
    return value.detach().clone() if keep else value.detach().to(dtype, copy=True)


def _is_float(value):
    return torch.is_tensor(value) and value.is_floating_point()


def _err(a, b):
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
