"""Run an op and its reference, and compare outputs and gradients."""

import contextlib
import math
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

TYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Error allowed in addition to twice that of the reference in the same type, as a fraction of the largest true value.
# tf32 has the mantissa of fp16, but more slack: its reference computes in fp32, and tensor cores truncate operands
# instead of rounding them (the renderer's kernels round them before), so that errors add up instead of averaging out.
SLACK = {"fp32": 1e-5, "tf32": 1e-2, "fp16": 1e-3, "bf16": 1e-2}
TIMED_RUNS = 3  # the time of the fastest is reported


@dataclass(frozen=True)
class Case:
    """One op at one size, in one type."""

    name: str
    size: str  # "small" or "recipe"
    dtype: str  # a key of TYPES
    inputs: Callable  # takes the device and the torch dtype, returns the arguments by name
    op: Callable
    ref: Callable
    wrt: tuple = ()  # names of the inputs whose gradients are compared
    slack: float | None = None  # as in SLACK; None: SLACK of the type
    # the true values are those of `ref` in fp64; False: in the type, since rounding decides e.g. a point's cell
    double: bool = True
    strict: bool = False  # run under strict determinism, twice: both runs must be bitwise equal

    def __str__(self):
        return f"{self.name}, {self.size}, {self.dtype}"


@dataclass(frozen=True)
class Result:
    name: str
    size: str
    dtype: str
    status: str  # "ok", "FAIL" or "skipped"
    message: str = ""  # why it failed or was skipped
    error: float = math.nan  # of the output or gradient with the largest error relative to its bound, see `_error`
    bound: float = math.nan  # of that error
    ms: float = math.nan  # forward and backward of the op; NaN without a GPU

    def __str__(self):
        ms = "" if math.isnan(self.ms) else f"  {self.ms:8.3f} ms"
        text = self.message or f"error {self.error:.1e} (bound {self.bound:.1e}){ms}"
        return f"{self.name:36} {self.size:6} {self.dtype:4}  {self.status:4}  {text}"


def run(case):
    """The `Result` of a case. Never raises: an exception of the op becomes the result's message."""
    result = partial(Result, case.name, case.size, case.dtype)
    try:
        torch.manual_seed(0)
        inputs = case.inputs(default_device(), TYPES[case.dtype])
        truth = _run(case.ref, inputs, case, torch.float64 if case.double else None)
        ref_in_type = _run(case.ref, inputs, case)
        with _strict_determinism(case.strict):
            ours = _run(case.op, inputs, case)
            again = _run(case.op, inputs, case) if case.strict else ours
        error, bound, message = _compare(ours, ref_in_type, truth, case)
        differ = [name for name in ours if not torch.equal(ours[name], again[name])]
        if not message and differ:
            message = f"{differ[0]} differs from run to run"
        with _strict_determinism(case.strict):
            ms = _milliseconds(case, inputs)
        return result("FAIL" if message else "ok", message, error, bound, ms)
    except Exception as fault:  # noqa: BLE001 any exception of an op is a result to report
        if isinstance(fault, torch.OutOfMemoryError) and case.size == "recipe":  # a small GPU, not a wrong kernel
            return result("skipped", "needs more memory")
        where = traceback.extract_tb(fault.__traceback__)[-1]
        text = " ".join(str(fault).split())[:300]
        location = f"{os.path.basename(where.filename)}:{where.lineno}"
        return result("FAIL", f"{type(fault).__name__}: {text} ({location})")


def compile_op(case):
    """Run the op of a case once, forward and backward, so that its kernels are compiled and cached."""
    with _strict_determinism(case.strict):
        _run(case.op, case.inputs(default_device(), TYPES[case.dtype]), case)


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def _run(fn, inputs, case, dtype=None):
    """Outputs as out0, out1, ...; gradients as d_<name>, under one fixed random upstream gradient per output.

    dtype: the type that floating inputs are cast to; None: no cast.
    """
    inputs, named = _prepare(inputs, case, dtype)
    outs, grads = _forward_backward(fn, inputs, named, lambda outs: _upstream(outs, case))
    values = {f"out{i}": out.detach() for i, out in enumerate(outs)}
    for (name, leaf), grad in zip(named, grads, strict=True):
        values[f"d_{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return values


def _prepare(inputs, case, dtype=None):
    """The inputs, and (name, leaf) of those that get gradients."""
    inputs = _map(inputs, lambda t: t.detach().to(dtype) if t.is_floating_point() else t)
    named = [(name, leaf) for key in case.wrt for name, leaf in _leaves(inputs[key], key)]
    for _, leaf in named:
        leaf.requires_grad_()
    return inputs, named


def _forward_backward(fn, inputs, named, upstream):
    """Outputs as a tuple, and the gradients of the leaves in `named`, which is from `_prepare`.

    upstream: outputs -> their upstream gradients; only called with differentiable outputs.
    """
    with torch.set_grad_enabled(bool(named)):
        outs = fn(**inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    if not named:
        return outs, []
    tracked = [out for out in outs if out.requires_grad]
    return outs, torch.autograd.grad(tracked, [leaf for _, leaf in named], upstream(tracked), allow_unused=True)


def _upstream(outs, case):
    """A fixed random gradient for each output."""
    gen = torch.Generator(outs[0].device).manual_seed(1)
    return [torch.randn(o.shape, generator=gen, dtype=TYPES[case.dtype], device=o.device).to(o) for o in outs]


def _compare(ours, ref_in_type, truth, case):
    """Error and bound of the output or gradient whose error / bound is largest, and a message: "" if all are within."""
    slack = SLACK[case.dtype] if case.slack is None else case.slack
    worst, error, bound, message = -1.0, 0.0, slack, ""
    for name, true in truth.items():
        value = ours[name]
        if value.shape != true.shape:
            return math.nan, slack, f"{name} is {list(value.shape)}, not {list(true.shape)}"
        if not true.is_floating_point():
            if not torch.equal(value, true):
                wrong = (value != true).sum().item()
                return math.nan, 0.0, f"{name}: {wrong} of {true.numel()} numbers are wrong"
            continue
        if not true.isfinite().all():
            return math.nan, slack, f"{name}: the reference is not finite"
        if not value.isfinite().all():
            return math.nan, slack, f"{name}: {(~value.isfinite()).sum().item()} of {true.numel()} are not finite"
        own_error, own_bound = _error(value, true), 2 * _error(ref_in_type[name], true) + slack
        if own_error / own_bound > worst:
            worst, error, bound = own_error / own_bound, own_error, own_bound
            message = "" if error <= bound else f"{name}: error {error:.1e} exceeds {bound:.1e}"
    return error, bound, message


def _error(value, true):
    """Largest absolute difference, as a fraction of the largest absolute true value."""
    if not true.numel():
        return 0.0
    scale = true.double().abs().max().item()
    return (value.double() - true.double()).abs().max().item() / (scale or 1.0)


@contextlib.contextmanager
def _strict_determinism(on):
    """Context in which strict determinism, as under `--deterministic`, is `on` or off."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _milliseconds(case, inputs):
    """Time of the op's forward and backward on a GPU: the fastest of a few runs."""
    if default_device() != "cuda":
        return math.nan
    inputs, named = _prepare(inputs, case)
    ups = []  # made in the first run and kept, so that the fastest does not include their making

    def upstream(outs):
        if not ups:
            ups.extend(_upstream(outs, case))
        return ups

    fastest = math.inf
    for _ in range(TIMED_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        _forward_backward(case.op, inputs, named, upstream)
        end.record()
        torch.cuda.synchronize()
        fastest = min(fastest, start.elapsed_time(end))
    return fastest


def _map(value, fn):
    """`fn` applied to every tensor in nested lists, tuples and dicts."""
    if isinstance(value, dict):
        return {name: _map(v, fn) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(v, fn) for v in value)
    return fn(value) if torch.is_tensor(value) else value


def _leaves(value, name):
    """(name, tensor) of every floating tensor in nested lists and tuples."""
    if isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            yield from _leaves(v, f"{name}[{i}]")
    elif torch.is_tensor(value) and value.is_floating_point():
        yield name, value
