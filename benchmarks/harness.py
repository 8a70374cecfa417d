"""Time and memory of one op under several implementations, side by side; prints a Markdown table.

An implementation is timed only if its outputs and gradients agree with the true values (a reference's, see `compare`);
one that disagrees or raises gets a row without times, and the others still run. Times are medians of forward (with the
20th and 80th percentiles), backward, and both together; on a GPU the L2 is flushed before each run. They include
launching from Python, which dominates for small ops. "gpu ms" is the GPU time of forward and backward: the summed times
of their kernels and copies from the profiler, averaged over runs, with caches as the previous run left them. "of
copy" is the forward's bandwidth (its minimum traffic over its time) as a fraction of that of a copy, measured first.

On a GPU: the op (its kernels), its peers (other implementations) and its reference; rows are appended to results.csv.
On a CPU: the reference, which is what the op runs there, and its peers; nothing is appended.
"""

import csv
import math
import statistics
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch._functorch import config as functorch_config

from unipad.kernels.backend import triton
from unipad.run_folder import commit

RESULTS = Path(__file__).with_name("results.csv")
code_commit = commit()  # of the measured code; `benchmarks.gpu` can set it where git is not available
deadline = math.inf  # a value of time.monotonic(), set by `benchmarks.gpu`; no measurement starts after it
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AGREE = 1e-3  # largest error allowed of an output or gradient, as a fraction of its largest true value
# columns of `Row` that are measured
MEASUREMENTS = ("fwd_ms", "fwd_p20", "fwd_p80", "bwd_ms", "both_ms", "gpu_ms", "peak_mb", "of_copy", "error")


@dataclass
class Case:
    name: str  # what varies, e.g. "R=3072 S=96 C=3"
    inputs: tuple  # positional arguments; gradients are computed for the tensors, also in lists, that require them
    fwd_bytes: int  # minimum memory traffic of the forward, in bytes


@dataclass
class Row:
    """One line of results.csv. None: not measured (no gradient, no GPU, not timed)."""

    op: str
    case: str
    impl: str  # "triton" (the op), "reference" or the name of a peer
    fwd_ms: float | None  # median time of the forward in ms
    fwd_p20: float | None  # 20th and 80th percentile of that time in ms
    fwd_p80: float | None
    bwd_ms: float | None  # median in ms
    both_ms: float | None  # forward and backward together, median in ms
    gpu_ms: float | None  # GPU time of forward and backward, mean in ms
    peak_mb: float | None  # peak memory of forward and backward in MiB, without the inputs
    of_copy: float | None  # bandwidth of the forward (`Case.fwd_bytes` over its time) over that of a copy
    error: float | None  # largest error of outputs and gradients, as a fraction of each one's largest true value
    note: str  # why it was not timed
    device: str
    torch: str
    triton: str
    commit: str


def machine():
    """The columns of a row that describe the machine and the versions."""
    return dict(
        device=_device_name(),
        torch=torch.__version__,
        triton=getattr(triton, "__version__", "none"),
        commit=code_commit,
    )


def compare(op, reference, kernels, peers, cases, agree=AGREE, exact=None):
    """Check and time implementations of an op on all cases; prints a Markdown table.

    Args:
        op:        the op's name.
        reference: the op in PyTorch; all others must agree with its results, or with those of `exact`.
        kernels:   the op itself, "triton" in the table; skipped on a CPU, where the op runs its reference.
        peers:     {name: function} other implementations. All functions take a case's inputs.
        cases:     list of `Case`.
        agree:     largest error allowed, defined like AGREE; raise it only where rounding is known to cause more.
        exact:     a function that computes the true values, from the inputs in fp64; None: the reference computes them,
                   from the inputs as they are.

    Returns the list of `Row`.
    """
    rows, where = [], machine()
    ours = {"triton": kernels} if DEVICE == "cuda" else {}
    with_compile = {name: peer for name, peer in peers.items() if name.startswith("compiled")}
    others = {name: peer for name, peer in peers.items() if name not in with_compile}
    # those under torch.compile last: compiling may take longer than all the rest
    impls = ours | others | {"reference": reference} | with_compile
    copy_gb_s = _copy_gb_s()
    print(f"## {op}\n\n{', '.join(f'{k} {v}' for k, v in where.items())}, copy {copy_gb_s:.0f} GB/s\n")
    print("| case | impl | fwd ms (p20-p80) | bwd ms | fwd+bwd ms | gpu ms | peak MB | of copy | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in cases:
        if _past_deadline(case, "all"):
            continue
        try:
            upstream = _upstream(reference, case.inputs)
            inputs = case.inputs if exact is None else _double(case.inputs)
            truth = _forward_backward(exact or reference, inputs, upstream if exact is None else _double(upstream))
        except torch.OutOfMemoryError:
            print(f"| {case.name} | all | skipped: the reference does not fit into memory | | | | | | |", flush=True)
            continue
        for name, fn in list(impls.items()):
            if _past_deadline(case, name):
                continue
            # quick: a reference may take seconds
            measured = _checked(fn, case, upstream, truth, agree, copy_gb_s, quick=name == "reference")
            row = Row(op, case.name, name, **measured, **where)
            print(_line(row), flush=True)
            rows.append(row)
            if name in with_compile and row.error is None:
                del impls[name]  # it failed to compile and would for every case
            if DEVICE == "cuda":
                append(row)
                torch.cuda.synchronize()  # raises here, not in the next one, if this one corrupted the GPU context
    return rows


def _past_deadline(case, name):
    late = time.monotonic() > deadline
    if late:
        print(f"| {case.name} | {name} | skipped: out of time | | | | | | |", flush=True)
    return late


def _checked(fn, case, upstream, truth, agree, copy_gb_s, quick):
    """Error and times of an implementation (a dict of MEASUREMENTS and "note"); no times if it is wrong or raises."""
    measured = dict.fromkeys(MEASUREMENTS)
    try:
        measured["error"] = _largest_error(_forward_backward(fn, case.inputs, upstream), truth)
        if not measured["error"] <= agree:  # NaN too
            return measured | {"note": f"error {measured['error']:.1e} exceeds {agree:.0e}: not timed"}
        return measured | _measure(fn, case, upstream, copy_gb_s, quick) | {"note": ""}
    except Exception as exception:  # e.g. from a peer that is not built for this machine
        reason = (str(exception).strip().splitlines() or [""])[0]
        return measured | {"note": f"{type(exception).__name__}: {reason}"[:200]}


def _line(row):
    if row.note:
        return f"| {row.case} | {row.impl} | {row.note} | | | | | | |"
    fwd = f"{row.fwd_ms:.3f} ({row.fwd_p20:.3f}-{row.fwd_p80:.3f})"
    rest = (row.bwd_ms, row.both_ms, row.gpu_ms, row.peak_mb)
    rest = " | ".join("-" if x is None else f"{x:.3f}" for x in rest)
    return f"| {row.case} | {row.impl} | {fwd} | {rest} | {row.of_copy:.0%} | {row.error:.0e} |"


def compiled(fn):
    """`fn` under torch.compile, with a backward that can run repeatedly after one forward, for timing."""
    functorch_config.donated_buffer = False
    return torch.compile(fn)


def largest_error(fn, reference, inputs):
    """Largest error of outputs and gradients, as a fraction of each one's largest true value; NaN if any is NaN.

    The true values are the reference's.
    """
    upstream = _upstream(reference, inputs)
    return _largest_error(_forward_backward(fn, inputs, upstream), _forward_backward(reference, inputs, upstream))


def _largest_error(results, truths):
    return torch.tensor([_error(result, truth) for result, truth in zip(results, truths, strict=True)]).max().item()


def _double(value):
    """Floating-point tensors in fp64, including those in lists; everything else unchanged."""
    if isinstance(value, (list, tuple)):
        return type(value)(_double(v) for v in value)
    if not torch.is_tensor(value) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _measure(fn, case, upstream, copy_gb_s, quick):
    both = partial(_forward_backward, fn, case.inputs, upstream)
    peak_mb = _peak_mb(both)
    fwd_ms, fwd_p20, fwd_p80 = milliseconds(partial(fn, *case.inputs), quick)
    bwd_ms = both_ms = None
    if upstream:
        both_ms, _, _ = milliseconds(both, quick)
        outs = [o for o in _outputs(fn, case.inputs) if o.requires_grad]
        wanted = _wanted(case.inputs)
        bwd_ms, _, _ = milliseconds(lambda: torch.autograd.grad(outs, wanted, upstream, retain_graph=True), quick)
    return dict(
        gpu_ms=gpu_milliseconds(both, 1 if quick else 5),
        fwd_ms=fwd_ms,
        fwd_p20=fwd_p20,
        fwd_p80=fwd_p80,
        bwd_ms=bwd_ms,
        both_ms=both_ms,
        peak_mb=peak_mb,
        of_copy=case.fwd_bytes / fwd_ms * 1e-6 / copy_gb_s,
    )


def _upstream(fn, inputs):
    """A random upstream gradient for each output that requires one."""
    gen = torch.Generator(DEVICE).manual_seed(1)
    outs = [o for o in _outputs(fn, inputs) if o.requires_grad]
    return [torch.randn(o.shape, generator=gen, device=o.device, dtype=o.dtype) for o in outs]


def _forward_backward(fn, inputs, upstream):
    """Outputs, then gradients of the inputs: what implementations must agree on."""
    outs = _outputs(fn, inputs)
    if not upstream:
        return outs
    grads = torch.autograd.grad([o for o in outs if o.requires_grad], _wanted(inputs), upstream)
    return [o.detach() for o in outs] + list(grads)


def _outputs(fn, inputs):
    outs = fn(*inputs)
    return list(outs) if isinstance(outs, tuple) else [outs]


def _wanted(inputs):
    """Inputs that require gradients, including those in lists."""
    flat = [t for value in inputs for t in (value if isinstance(value, (list, tuple)) else [value])]
    return [t for t in flat if torch.is_tensor(t) and t.requires_grad]


def _error(result, truth):
    if not truth.numel():
        return 0.0
    worst, scale = (result.double() - truth.double()).abs().max().item(), truth.double().abs().max().item()
    return worst / scale if scale else worst


def milliseconds(fn, quick=False):
    """Median, 20th and 80th percentile of the times of several runs, in ms.

    GPU: as many runs as fit in two seconds, at most 100; CPU: as many as fit in one second. Both at least 5 (on a CPU
    fewer once `deadline` has passed). quick: three runs.
    """
    if DEVICE == "cuda":
        times = _gpu_runs(fn, 3)  # unless `quick`, to warm up and to estimate the time of a run
        if not quick:
            times = _gpu_runs(fn, min(100, max(5, int(2000 / statistics.median(times)))))
    else:
        fn()  # warms up
        times, end = [], time.perf_counter() + (0 if quick else 1)
        while len(times) < (3 if quick else 5) or time.perf_counter() < end:
            start = time.perf_counter()
            fn()
            times.append(1e3 * (time.perf_counter() - start))
            if time.monotonic() > deadline:
                break
    return torch.tensor(times).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()


def _gpu_runs(fn, count):
    """Milliseconds of each run, with the L2 flushed before it."""
    flush = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)  # bytes; several times the size of any L2
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in pairs:
        flush.zero_()
        begin.record()
        fn()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


def gpu_milliseconds(fn, runs):
    """GPU time of a run in ms: the sum of the times of its kernels and copies; None without a GPU."""
    if DEVICE == "cpu":
        return None
    events = gpu_events(fn, runs)
    return sum(e.duration_ns() for e in events) * 1e-6 / runs


def gpu_events(fn, runs=1):
    """The profiler's GPU events (kernels and copies) of `runs` runs."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(runs):
            fn()
        torch.cuda.synchronize()
    events = profile.profiler.kineto_results.events()
    on_gpu = torch.autograd.DeviceType.CUDA
    named = {e.name() for e in events if e.device_type() != on_gpu}  # host annotations are repeated as GPU events
    return [e for e in events if e.device_type() == on_gpu and e.name() not in named]


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
    """Peak of PyTorch's allocations, in MiB; scratch memory of libraries is not counted."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fn()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda e: e.start_ns())
    return max(accumulate((e.nbytes() for e in changes), initial=0)) / 2**20


def _copy_gb_s():
    """Copy bandwidth in GB/s, read plus written."""
    src = torch.zeros(2**30 if DEVICE == "cuda" else 2**27, dtype=torch.uint8, device=DEVICE)
    dst = torch.zeros_like(src)
    return 2 * src.nbytes / milliseconds(lambda: dst.copy_(src))[0] * 1e-6


def _device_name():
    return torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def append(row):
    """Add a `Row` to results.csv."""
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as f:
        writer = csv.DictWriter(f, [field.name for field in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))
