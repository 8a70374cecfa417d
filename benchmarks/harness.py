"""Time and memory of one op under several implementations, side by side; prints a Markdown table.

An implementation is timed only if its outputs and gradients agree with the reference's. Times are medians with the
20th and 80th percentile beside them: forward, backward, and both in one go. Bandwidth is the forward's least traffic
over its time, as a share of what a copy reaches on the same device in the same minute, not of the data sheet.

On a GPU: the op (its kernels), its reference and its peers; rows are appended to results.csv.
On a CPU: the reference, which is what the op runs there, and its peers; nothing is appended.
"""

import csv
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch._functorch import config as functorch_config

from kernels.backend import triton
from unipad.runtime import commit

RESULTS = Path(__file__).with_name("results.csv")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AGREE = 1e-3  # largest error of an output or gradient, as a share of its largest true value


@dataclass
class Case:
    name: str  # what varies, e.g. "R=3072 S=96 C=3"
    inputs: tuple  # positional arguments, tensors on DEVICE; gradients are taken of those that require them
    fwd_bytes: int  # least bytes the forward must move


@dataclass
class Row:
    """One line of results.csv. Milliseconds are medians; None: there is none (no gradient, no counter)."""

    op: str
    case: str
    impl: str
    fwd_ms: float
    fwd_p20: float
    fwd_p80: float
    bwd_ms: float | None
    both_ms: float | None
    peak_mb: float  # of forward and backward, above what the inputs take
    of_copy: float  # share of the copy's bandwidth that the forward reaches
    error: float  # largest, of outputs and gradients, as a share of each one's largest true value
    device: str
    torch: str
    triton: str
    commit: str


def compare(op, reference, kernels, peers, cases, agree=AGREE, exact=None):
    """Check, time and print.

    Args:
        op:        the name.
        reference: the function every other one must agree with.
        kernels:   the op itself; on a CPU it is the reference and left out.
        peers:     {name: function} other implementations. All functions take a case's inputs.
        cases:     list of Case.
        agree:     largest error, as AGREE; more only where rounding is known to move a result by more.
        exact:     the function that gives the truth when its inputs are in fp64; None: the reference, in their type.

    Returns the list of `Row`.
    """
    rows = []
    impls = {"reference": reference} | ({"triton": kernels} if DEVICE == "cuda" else {}) | peers
    machine = dict(
        device=_device_name(), torch=torch.__version__, triton=getattr(triton, "__version__", "none"), commit=commit()
    )
    copy = _copy_bandwidth()
    print(f"## {op}\n\n{', '.join(f'{k} {v}' for k, v in machine.items())}, copy {copy:.0f} GB/s\n")
    print("| case | impl | fwd ms (p20-p80) | bwd ms | fwd+bwd ms | peak MB | of copy | error |")
    print("|---|---|---|---|---|---|---|---|")
    for case in cases:
        ups = _upstream(reference, case.inputs)
        inputs = case.inputs if exact is None else _double(case.inputs)
        truth = _forward_backward(exact or reference, inputs, ups if exact is None else _double(ups))
        for name, fn in impls.items():
            error = _largest_error(_forward_backward(fn, case.inputs, ups), truth)
            assert error <= agree, f"{op}, {case.name}: {name} is {error:.1e} away from the truth"
            row = Row(op, case.name, name, **_measure(fn, case, ups, copy), error=error, **machine)
            fwd = f"{row.fwd_ms:.3f} ({row.fwd_p20:.3f}-{row.fwd_p80:.3f})"
            rest = " | ".join("-" if x is None else f"{x:.3f}" for x in (row.bwd_ms, row.both_ms, row.peak_mb))
            print(f"| {case.name} | {name} | {fwd} | {rest} | {row.of_copy:.0%} | {error:.0e} |", flush=True)
            rows.append(row)
            if DEVICE == "cuda":
                _append(row)
    return rows


def compiled(fn):
    """`fn` under torch.compile, able to run its backward several times over one forward, which is how it is timed."""
    functorch_config.donated_buffer = False
    return torch.compile(fn)


def largest_error(fn, reference, inputs):
    """Of outputs and gradients, as a share of each one's largest true value; NaN if one is."""
    ups = _upstream(reference, inputs)
    return _largest_error(_forward_backward(fn, inputs, ups), _forward_backward(reference, inputs, ups))


def _largest_error(ours, truth):
    return torch.tensor([_error(a, b) for a, b in zip(ours, truth, strict=True)]).max().item()


def _double(value):
    """Floating tensors in fp64, those in lists too; the rest as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(_double(v) for v in value)
    if not torch.is_tensor(value) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _measure(fn, case, ups, copy):
    peak_mb = _peak_mb(partial(_forward_backward, fn, case.inputs, ups))
    fwd_ms, fwd_p20, fwd_p80 = milliseconds(partial(fn, *case.inputs))
    bwd_ms = both_ms = None
    if ups:
        both_ms, _, _ = milliseconds(partial(_forward_backward, fn, case.inputs, ups))
        outs = [o for o in _outputs(fn, case.inputs) if o.requires_grad]
        wanted = _wanted(case.inputs)
        bwd_ms, _, _ = milliseconds(lambda: torch.autograd.grad(outs, wanted, ups, retain_graph=True))
    return dict(
        fwd_ms=fwd_ms,
        fwd_p20=fwd_p20,
        fwd_p80=fwd_p80,
        bwd_ms=bwd_ms,
        both_ms=both_ms,
        peak_mb=peak_mb,
        of_copy=case.fwd_bytes / fwd_ms * 1e-6 / copy,
    )


def _upstream(fn, inputs):
    """A random upstream gradient for each output that has one."""
    gen = torch.Generator(DEVICE).manual_seed(1)
    outs = [o for o in _outputs(fn, inputs) if o.requires_grad]
    return [torch.randn(o.shape, generator=gen, device=o.device, dtype=o.dtype) for o in outs]


def _forward_backward(fn, inputs, ups):
    """Everything two implementations are to agree on: outputs, then gradients."""
    outs = _outputs(fn, inputs)
    if not ups:
        return outs
    grads = torch.autograd.grad([o for o in outs if o.requires_grad], _wanted(inputs), ups)
    return [o.detach() for o in outs] + list(grads)


def _outputs(fn, inputs):
    outs = fn(*inputs)
    return list(outs) if isinstance(outs, tuple) else [outs]


def _wanted(inputs):
    """The inputs whose gradients are taken, those in lists too."""
    flat = [t for value in inputs for t in (value if isinstance(value, (list, tuple)) else [value])]
    return [t for t in flat if torch.is_tensor(t) and t.requires_grad]


def _error(ours, truth):
    if not truth.numel():
        return 0.0
    worst, scale = (ours.double() - truth.double()).abs().max().item(), truth.double().abs().max().item()
    return worst / scale if scale else worst


def milliseconds(fn):
    """Median, 20th and 80th percentile in ms: of at least 100 runs on a GPU, of at least 5 in a second on a CPU."""
    if DEVICE == "cuda":
        from triton.testing import do_bench  # flushes the L2 between runs

        estimate = do_bench(fn, rep=20)
        return do_bench(fn, rep=100 * max(estimate, 1), quantiles=[0.5, 0.2, 0.8])
    fn()
    runs, end = [], time.perf_counter() + 1
    while len(runs) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        fn()
        runs.append(1e3 * (time.perf_counter() - start))
    return torch.tensor(runs).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()


def _peak_mb(fn):
    if DEVICE == "cpu":
        return _peak_cpu_mb(fn)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _peak_cpu_mb(fn):
    """Of what PyTorch allocates; scratch of the libraries that it calls is not seen."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fn()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda e: e.start_ns())
    return max(accumulate((e.nbytes() for e in changes), initial=0)) / 2**20


def _copy_bandwidth():
    """GB/s, read and written."""
    src = torch.zeros(2**30 if DEVICE == "cuda" else 2**27, dtype=torch.uint8, device=DEVICE)
    dst = torch.zeros_like(src)
    return 2 * src.nbytes / milliseconds(lambda: dst.copy_(src))[0] * 1e-6


def _device_name():
    return torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def _append(row):
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as f:
        writer = csv.DictWriter(f, [field.name for field in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))
