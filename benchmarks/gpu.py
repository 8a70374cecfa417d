"""Verify and benchmark everything on a GPU with one command.

    python -m benchmarks.gpu                          as much as eight minutes allow
    python -m benchmarks.gpu --minutes 15 --stages steps ops
    python -m benchmarks.gpu --report outputs/gpu/<time>        rewrite the report and the README's table

Stages, the most important first, each with a fraction of the time:

    machine     GPU, versions, and roofline ceilings: copy and L2 bandwidth, bf16 and tf32 matrix products
    selfcheck   every op compared with its reference in fp64, at small and at recipe sizes (unipad.selfcheck)
    steps       one training step of every recipe at full size (benchmarks.full_step)
    ops         every op timed against other implementations (the benchmarks.bench_* of `OPS`), spconv-cu126 and
                spconv-triton among them if installed
    tests       the kernel tests, with compiled kernels, on up to 16 cores
    training    train.py --modality camera on the tiny recipe, and its loss curve compared with that on a CPU

Results are written as soon as they are known: records.jsonl, results.csv, log.txt and report.md in --out. If a stage
fails, crashes or runs out of time, its results so far are kept and the next stage runs. At the end the rows of that
results.csv are added to benchmarks/results.csv, from which the README's table is generated. On a CPU, everything runs
at tiny sizes, as a trial, and benchmarks/results.csv and the README do not change.
"""

import csv
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks import full_step, harness
from benchmarks.harness import DEVICE, machine
from benchmarks.report import Folder, page, read_records, read_rows, replace_table
from unipad.kernels import tuning

ROOT = Path(__file__).parents[1]
ON_GPU = DEVICE == "cuda"
# Fraction of the total time for each of the --stages; time that a stage does not use goes to later ones
TIME_FRACTIONS = {"machine": 0.02, "selfcheck": 0.22, "steps": 0.18, "ops": 0.3, "tests": 0.2, "training": 0.08}
# Benchmarks and their fractions of the time of stage ops, the most important first
OPS = {
    "sdf_render": 0.15, "sparse_conv": 0.21, "lift": 0.12, "voxel_pool": 0.12, "spunet": 0.08, "sparse_map": 0.05,
    "rotated_iou": 0.05, "voxelize": 0.03, "trilinear": 0.03, "ray_sample": 0.03, "composite": 0.02, "sdf_alpha": 0.02,
    "norm_relu": 0.02, "sparse_layers": 0.02, "warp": 0.02, "ray_features": 0.02, "carve": 0.01,
}  # fmt: skip
CURVE_STEPS = 60 if ON_GPU else 3  # stage training: steps that also run on a CPU, for comparison


@dataclass(frozen=True)
class Args:
    minutes: float = 8.0  # minutes for all stages together
    stages: tuple[Literal[tuple(TIME_FRACTIONS)], ...] = tuple(TIME_FRACTIONS)  # stages to run, always in this order
    out: Path | None = None  # folder of the results (default: outputs/gpu/<time>)
    commit: str | None = None  # commit of this code, for results.csv (default: from git)
    report: Path | None = None  # folder of an earlier run: only rewrite its report, its rows and the README's table


# The stages


def measure_machine(folder):
    """Measure the roofline ceilings of this GPU; on a CPU, at tiny sizes."""
    size, n = (2**30, 8192) if ON_GPU else (2**24, 256)  # bytes to copy; rows and columns of the matrices
    found = machine() | {"copy_gb_s": _copy_gb_s(size), "l2_gb_s": _copy_gb_s(2**23 if ON_GPU else 2**20)}
    torch.backends.cuda.matmul.allow_tf32 = True
    for name, dtype in {"tf32": torch.float32, "bf16": torch.bfloat16}.items():
        x, y = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        found[f"{name}_tflop_s"] = 2 * n**3 / _ms_per_run(lambda x=x, y=y: x @ y) * 1e-9
    print(found)
    folder.write("machine", found)


def _copy_gb_s(size):
    """GB/s, read plus written, of back-to-back copies of `size` bytes; of the L2 if source and target fit in it."""
    source = torch.randint(255, (size,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / _ms_per_run(lambda: target.copy_(source)) * 1e-6


def _ms_per_run(fn, runs=20):
    """Milliseconds per run when launched back to back, without flushing caches; the fastest of five measurements."""
    fn()
    return min(_total_ms(fn, runs) for _ in range(5)) / runs


def _total_ms(fn, runs):
    """Milliseconds of `runs` runs together; on a GPU all are launched before the first begins: no host time counts."""
    if not ON_GPU:
        began = time.perf_counter()
        for _ in range(runs):
            fn()
        return 1e3 * (time.perf_counter() - began)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(tuning.SPIN)  # keeps the GPU busy while the host launches
    begin.record()
    for _ in range(runs):
        fn()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def check_ops(folder):
    from unipad import selfcheck

    for size in selfcheck.SIZES if ON_GPU else ("small",):  # the small ones first: compiling may take all the time
        for result in selfcheck.results(list(selfcheck.checks((size,)))):
            print(result, flush=True)
            folder.write("selfcheck", vars(result) | {"line": str(result)})


def measure_steps(folder):
    full_step.main(full_step.Args(), lambda record: folder.write("steps", record))


def benchmark_op(folder, op):
    """Run a benchmark as a script; its rows reach the folder since `work` has set `harness.RESULTS`."""
    sys.argv = [f"bench_{op}"]
    runpy.run_module(f"benchmarks.bench_{op}", run_name="__main__")


def run_tests(folder):
    """Run the kernel tests until time runs out; without a GPU those of one file, in Triton's interpreter."""
    jobs = str(min(16, os.cpu_count()))
    paths = ["tests/kernels", "-n", jobs] if ON_GPU else ["tests/kernels/test_backend.py", "-n0"]
    # "addopts=": without the options of pyproject.toml, which leave out slow tests and set -n
    flags = ["-q", "-p", "no:cacheprovider", "--durations=10", "-o", "addopts="]
    command = [sys.executable, "-m", "pytest", *flags, *paths]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    # On SIGINT, pytest still lists the tests that failed. At most an hour: without `work` the deadline is infinite
    interrupt = threading.Timer(min(harness.deadline - time.monotonic(), 3600), process.send_signal, [signal.SIGINT])
    interrupt.daemon = True
    interrupt.start()
    for line in process.stdout:
        print(line, end="", flush=True)
        # a line of "!!!" says that pytest was interrupted
        if line.startswith(("FAILED", "ERROR", "!")) or " passed" in line or " failed" in line:
            folder.write("tests", {"line": line.strip()})
    interrupt.cancel()
    folder.write("tests", {"line": f"exit code {process.wait()}"})


def train_tiny(folder):
    """Train the tiny camera recipe on the GPU, if there is one, and for CURVE_STEPS steps on the CPU.

    Records the loss of every step.
    """
    common = ["--modality", "camera", "--log-every", "1", "--val-samples", "2", "--picture-stride", "8"]
    # Without a GPU on a smaller city. "tiny" must then be named: with --data-root, the default preset is the paper's
    common += [] if ON_GPU else ["--data-root", str(full_step.city()), "--preset", "tiny"]
    first_steps = ["--stop-at", str(CURVE_STEPS)]
    runs = {"cpu": ["--device", "cpu", *first_steps]} | ({"cuda": []} if ON_GPU else {})
    for device, flags in reversed(runs.items()):  # the GPU first: time may run out
        out = folder.path / f"train-{device}"
        began = time.perf_counter()
        command = [sys.executable, "train.py", *common, *flags, "--out", str(out)]
        try:
            left = min(harness.deadline - time.monotonic(), 3600)  # as in `run_tests`
            ended = f"exit code {subprocess.run(command, cwd=ROOT, timeout=left).returncode}"
        except subprocess.TimeoutExpired:
            ended = "out of time"
        logged = read_records(out / "log.jsonl")
        curve = [[r["step"], r["train/loss"]] for r in logged if "train/loss" in r]
        last = next((r for r in reversed(logged) if "val/depth_abs_rel" in r), {})
        found = {k: v for k, v in last.items() if k.startswith("val/")}
        seconds = time.perf_counter() - began
        folder.write("training", {"device": device, "seconds": seconds, "ended": ended, "curve": curve} | found)


# --stages, with one entry for each op instead of "ops"
STAGES = {
    "machine": measure_machine,
    "selfcheck": check_ops,
    "steps": measure_steps,
    **{f"op-{op}": partial(benchmark_op, op=op) for op in OPS},
    "tests": run_tests,
    "training": train_tiny,
}
# Fraction of the total time for each of STAGES
STAGE_FRACTIONS = {name: fraction for name, fraction in TIME_FRACTIONS.items() if name != "ops"}
STAGE_FRACTIONS |= {f"op-{op}": TIME_FRACTIONS["ops"] * fraction for op, fraction in OPS.items()}


def plan(stages):
    """The names in STAGES of the given --stages, one list per process: all ops share one, which saves start-up time."""
    ops = [f"op-{op}" for op in OPS]
    return [ops if stage == "ops" else [stage] for stage in TIME_FRACTIONS if stage in stages]


def time_limit(names, end):
    """Seconds for the first of these stages, so that all can finish by `end` (a `time.time()`)."""
    return max(2.0, (end - time.time()) * STAGE_FRACTIONS[names[0]] / sum(STAGE_FRACTIONS[name] for name in names))


def run(folder, names, later, end):
    """Run stages in a process, each for its fraction of the time until `end`, which is shared with `later` stages.

    If the process crashes or a stage exceeds its time, that stage ends and a new process runs the remaining ones.
    """
    # records of an earlier run in the same folder do not count
    remaining, n_ended, n_begun = list(names), len(folder.records("ended")), len(folder.records("begun"))
    while remaining:
        process, first, running = _worker(folder, remaining, later, end), remaining[0], True
        began = time.time()
        limit = began + time_limit(remaining + later, end)
        while running and remaining:
            time.sleep(0.1)
            running = process.poll() is None
            for record in folder.records("ended")[n_ended:]:
                remaining.remove(record["name"])
                _print_record(record)
                n_ended += 1
                if remaining:  # a limit until the next stage reports its start and its own limit
                    began = time.time()
                    limit = began + time_limit(remaining + later, end)
            # written by the worker when it began the first of `remaining`
            current = [r for r in folder.records("begun")[n_begun:][-1:] if r["name"] in remaining[:1]]
            if current:
                began, limit = current[0]["at"], current[0]["until"]
            # A process that ended between two stages was killed by the earlier one: the next is not to blame and gets a
            # new process. One that ended before it began its first stage would do so again: that stage is given up.
            if remaining and (time.time() > limit if running else current or remaining[0] == first):
                reason = "out of time" if running else f"exit code {process.returncode}"
                record = {"name": remaining.pop(0), "ended": reason, "seconds": round(time.time() - began, 1)}
                folder.write("ended", record)
                _print_record(record)
                n_ended += 1
                break
        _kill(process)


def _worker(folder, names, later, end):
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", str(folder.path), harness.code_commit or ""]
    with (folder.path / "log.txt").open("a") as log:
        command += [str(end), ",".join(names), ",".join(later)]
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _kill(process):
    """Kill the process and all its children."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(2)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


def _print_record(record):
    print(f"{record['name']:<18}{record['ended']:<14}{record['seconds']:6.0f} s", flush=True)


def work(path, code_commit, end, names, later):
    """The worker process of `run`: its stages, one after the other. The arguments are strings: see `_worker`."""
    folder, end = Folder(Path(path)), float(end)
    harness.code_commit, harness.RESULTS = code_commit or None, folder.path / "results.csv"
    names, later = ([name for name in text.split(",") if name] for text in (names, later))
    for i, name in enumerate(names):
        seconds, began = time_limit(names[i:] + later, end), time.time()
        harness.deadline = time.monotonic() + 0.9 * seconds  # leaves time to end what has begun before `run` kills it
        folder.write("begun", {"name": name, "at": began, "until": began + seconds})
        print(f"\n# {name}, {seconds:.0f} s", flush=True)
        try:
            STAGES[name](folder)
            ended = "ok"
        except Exception:
            traceback.print_exc()
            ended = "failed"
        folder.write("ended", {"name": name, "ended": ended, "seconds": round(time.time() - began, 1)})
        if ON_GPU:
            torch.cuda.synchronize()  # raises if a kernel corrupted the GPU context: the next stages need a new process


def save_rows(folder):
    """Add the rows of a run to benchmarks/results.csv, without duplicates, and generate the README's table from it."""
    # only in workers is `harness.RESULTS` the results.csv of the run
    known, new = read_rows(harness.RESULTS), folder.rows()
    if not new:
        return
    rows = known + [row for row in new if row not in known]
    with harness.RESULTS.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(new[0]))
        writer.writeheader()
        writer.writerows(rows)
    readme = ROOT / "README.md"
    readme.write_text(replace_table(readme.read_text(), rows))


def finish(folder):
    """Write the run's report.md, benchmarks/results.csv and the README's table; returns the report."""
    text = page(folder)
    (folder.path / "report.md").write_text(text)
    save_rows(folder)
    return text


def main(args: Args):
    out = args.report or args.out or Path("outputs/gpu") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder = Folder(out.resolve())
    harness.code_commit = args.commit or harness.code_commit
    if args.report:
        print(finish(folder))
        return
    end, processes = time.time() + 60 * args.minutes, plan(args.stages)
    for i, names in enumerate(processes):
        run(folder, names, sum(processes[i + 1 :], []), end)
        (folder.path / "report.md").write_text(page(folder))
    print(finish(folder))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    else:
        main(tyro.cli(Args, description=__doc__))
