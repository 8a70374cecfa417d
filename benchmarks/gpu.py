"""Everything that only a GPU can say, by one command: is it right, and how fast is it?

    python -m benchmarks.gpu                          eight minutes, and what they have no time for is left out
    python -m benchmarks.gpu --minutes 15 --stages steps races
    python -m benchmarks.gpu --report outputs/gpu/<time>        the page and the README's table once more

Stages, of falling worth, each for its part of the time:

    machine     GPU, versions, and the ceilings: copy and L2 bandwidth, bf16 and tf32 matrix products
    selfcheck   every op beside its reference in fp64, at small and at recipe sizes (unipad.selfcheck)
    steps       one training step of every recipe at full size (benchmarks.full_step)
    races       every op beside its peers (benchmarks.bench_*); install spconv-cu126 and spconv-triton to have them run
    tests       the kernel tests, compiled, on all cores
    training    train.py --modality camera on the tiny recipe, its curve beside a CPU's

All results are on disk as soon as they are known: records.jsonl, results.csv, log.txt and report.md in --out. A stage
that fails or runs out of time leaves what it has, and the next one runs, in a process of its own. At the end the rows
go to benchmarks/results.csv, and the README's table is written from it. On a CPU all of it runs at tiny sizes, to try
it, and leaves results.csv and the README as they are.
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
from benchmarks.report import Folder, page, read_records, read_rows, with_table
from kernels import tuning

ROOT = Path(__file__).parents[1]
ON_GPU = DEVICE == "cuda"
# Parts of the time; what a stage leaves goes to those behind it
SHARES = {"machine": 0.06, "selfcheck": 0.18, "steps": 0.18, "races": 0.34, "tests": 0.17, "training": 0.07}
# Parts of the races' time, the most telling first
RACES = {
    "sdf_render": 0.17, "sparse_conv": 0.28, "lift": 0.12, "voxel_pool": 0.12, "spunet": 0.08, "sparse_map": 0.05,
    "rotated_iou": 0.05, "voxelize": 0.03, "trilinear": 0.03, "ray_sample": 0.03, "composite": 0.02, "sdf_alpha": 0.02,
}  # fmt: skip
CURVE_STEPS = 60 if ON_GPU else 3  # of the training's curve that a CPU takes too


@dataclass(frozen=True)
class Args:
    minutes: float = 8.0  # for all stages
    stages: tuple[Literal[tuple(SHARES)], ...] = tuple(SHARES)  # which; they run in this order
    out: Path | None = None  # folder of the results (default: outputs/gpu/<time>)
    commit: str | None = None  # of this code, for the rows (default: what git tells)
    report: Path | None = None  # write the page, the rows and the README's table of this folder; run nothing


# The stages


def measure_machine(folder):
    """The ceilings of this GPU; on a CPU of the same operations at tiny sizes."""
    size, n = (2**30, 8192) if ON_GPU else (2**24, 256)
    found = machine() | {"copy_gb_s": _copy(size), "l2_gb_s": _copy(2**23 if ON_GPU else 2**20)}
    torch.backends.cuda.matmul.allow_tf32 = True
    for name, dtype in {"tf32": torch.float32, "bf16": torch.bfloat16}.items():
        x, y = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        found[f"{name}_tflop_s"] = 2e-9 * n**3 / _back_to_back(lambda x=x, y=y: x @ y)
    print(found)
    folder.write("machine", found)


def _copy(size):
    """GB/s read and written, copies back to back: of a size that fits the L2, from the L2."""
    source = torch.randint(255, (size,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2e-6 * size / _back_to_back(lambda: target.copy_(source))


def _back_to_back(fn, runs=20):
    """Milliseconds of a run among others, the least of five times; no cache is flushed."""
    fn()
    return min(_runs(fn, runs) for _ in range(5)) / runs


def _runs(fn, runs):
    """Milliseconds of some runs; a GPU has all of them before it begins, or the host's pace would count."""
    if not ON_GPU:
        began = time.perf_counter()
        for _ in range(runs):
            fn()
        return 1e3 * (time.perf_counter() - began)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(tuning.SPIN)
    begin.record()
    for _ in range(runs):
        fn()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def check_ops(folder):
    from unipad import selfcheck

    for result in selfcheck.results(list(selfcheck.checks(selfcheck.SIZES if ON_GPU else ("small",)))):
        print(result, flush=True)
        folder.write("selfcheck", vars(result) | {"ok": result.ok, "line": str(result)})


def measure_steps(folder):
    full_step.main(full_step.Args(), lambda record: folder.write("steps", record))


def race(folder, op):
    sys.argv = [f"bench_{op}"]
    runpy.run_module(f"benchmarks.bench_{op}", run_name="__main__")


def run_tests(folder):
    """The kernel tests, as far as time reaches; without a GPU those of one file, in the interpreter."""
    what = ["tests/kernels", "-n", str(min(16, os.cpu_count()))] if ON_GPU else ["tests/kernels/test_backend.py", "-n0"]
    flags = ["-q", "-p", "no:cacheprovider", "--durations=10", "-o", "addopts="]
    done = subprocess.Popen(
        [sys.executable, "-m", "pytest", *flags, *what], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )  # fmt: skip
    # pytest tells which tests failed when it ends, and where it is interrupted
    interrupt = threading.Timer(min(harness.deadline - time.monotonic(), 3600), done.send_signal, [signal.SIGINT])
    interrupt.daemon = True
    interrupt.start()
    for line in done.stdout:
        print(line, end="", flush=True)
        if line.startswith(("FAILED", "ERROR", "!")) or " passed" in line or " failed" in line:
            folder.write("tests", {"line": line.strip()})
    interrupt.cancel()
    folder.write("tests", {"line": f"exit code {done.wait()}"})


def train_tiny(folder):
    """The loss of the first command of the README on this device, and of its first steps on a CPU, step by step."""
    common = ["--modality", "camera", "--log-every", "1", "--val-samples", "2", "--picture-stride", "8"]
    common += [] if ON_GPU else ["--data-root", str(full_step.city()), "--preset", "tiny"]
    part = ["--stop-at", str(CURVE_STEPS)]
    runs = {"cpu": ["--device", "cpu", *part]} | ({"cuda": []} if ON_GPU else {})
    for device, flags in reversed(runs.items()):
        out = folder.path / f"train-{device}"
        began = time.perf_counter()
        command = [sys.executable, "train.py", *common, *flags, "--out", str(out)]
        try:
            left = min(harness.deadline - time.monotonic(), 3600)
            ended = f"exit code {subprocess.run(command, cwd=ROOT, timeout=left).returncode}"
        except subprocess.TimeoutExpired:
            ended = "out of time"
        logged = read_records(out / "log.jsonl")
        curve = [[r["step"], r["train/loss"]] for r in logged if "train/loss" in r]
        last = next((r for r in reversed(logged) if "val/depth_abs_rel" in r), {})
        found = {k: v for k, v in last.items() if k.startswith("val/")}
        took = time.perf_counter() - began
        folder.write("training", {"device": device, "seconds": took, "ended": ended, "curve": curve} | found)


STAGES = {
    "machine": measure_machine,
    "selfcheck": check_ops,
    "steps": measure_steps,
    **{f"race-{op}": partial(race, op=op) for op in RACES},
    "tests": run_tests,
    "training": train_tiny,
}
PARTS = {name: part for name, part in SHARES.items() if name != "races"}
PARTS |= {f"race-{op}": SHARES["races"] * part for op, part in RACES.items()}


def plan(stages):
    """Lists of names in STAGES, each for a process of its own: all races share one, which saves its start."""
    races = [f"race-{op}" for op in RACES]
    return [races if stage == "races" else [stage] for stage in SHARES if stage in stages]


def time_for(names, end):
    """Seconds of the first of these, which all are to be through by `end` on the clock."""
    return max(2.0, (end - time.time()) * PARTS[names[0]] / sum(PARTS[name] for name in names))


def run(folder, names, later, end):
    """Run some stages in a process, each for its part of the time until `end`, which `later` ones need too.

    A process that breaks, or a stage that takes longer, is followed by a process for those that are left.
    """
    left, seen = list(names), len(folder.records("ended"))
    while left:
        process, first, running = _worker(folder, left, later, end), left[0], True
        began = time.time()
        limit = began + time_for(left + later, end)
        while running and left:
            time.sleep(0.1)
            running = process.poll() is None
            for record in folder.records("ended")[seen:]:
                left.remove(record["name"])
                _say(record)
                seen += 1
                if left:  # until the next one says that it has begun
                    began = time.time()
                    limit = began + time_for(left + later, end)
            begun = [r for r in folder.records("begun")[-1:] if r["name"] in left[:1] and r["until"] > began]
            if begun:
                began, limit = begun[0]["at"], begun[0]["until"]
            # a process that ends between two stages was broken by the first
            if left and (time.time() > limit if running else begun or left[0] == first):
                why = "out of time" if running else f"exit code {process.returncode}"
                record = {"name": left.pop(0), "ended": why, "seconds": round(time.time() - began, 1)}
                folder.write("ended", record)
                _say(record)
                seen += 1
                break
        _end(process)


def _worker(folder, names, later, end):
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", str(folder.path), harness.source or "", str(end)]
    with (folder.path / "log.txt").open("a") as log:
        command += [",".join(names), ",".join(later)]
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _end(process):
    """The process and all that it started."""
    for signalled in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signalled)
            process.wait(2)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


def _say(record):
    print(f"{record['name']:<18}{record['ended']:<14}{record['seconds']:6.0f} s", flush=True)


def work(path, source, end, names, later):
    """The process of `run`: its stages, one after the other."""
    folder, end = Folder(Path(path)), float(end)
    harness.source, harness.RESULTS = source or None, folder.path / "results.csv"
    names, later = ([name for name in text.split(",") if name] for text in (names, later))
    for i, name in enumerate(names):
        seconds, began = time_for(names[i:] + later, end), time.time()
        harness.deadline = time.monotonic() + 0.9 * seconds
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
            torch.cuda.synchronize()  # raises where a kernel broke the GPU's context: the next stages need a new one


def keep(folder):
    """Add a run's rows to results.csv, once, and write the README's table from it."""
    known, new = read_rows(harness.RESULTS), folder.rows()
    if not new:
        return
    rows = known + [row for row in new if row not in known]
    with harness.RESULTS.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(new[0]))
        writer.writeheader()
        writer.writerows(rows)
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(), rows))


def finish(folder):
    text = page(folder)
    (folder.path / "report.md").write_text(text)
    keep(folder)
    return text


def main(args: Args):
    out = args.report or args.out or Path("outputs/gpu") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder = Folder(out.resolve())
    harness.source = args.commit or harness.source
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
