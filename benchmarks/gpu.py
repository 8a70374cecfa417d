"""Everything that only a GPU can say, by one command: is it right, and how fast is it?

    python -m benchmarks.gpu                          about eight minutes; fifteen to be sure that nothing is left out
    python -m benchmarks.gpu --minutes 15 --stages steps races
    python -m benchmarks.gpu --report outputs/gpu/<time>        the page and the README's table once more

Stages, of falling worth, each in a process of its own and for its share of the time:

    machine     GPU, versions, and the ceilings: copy and L2 bandwidth, bf16 and tf32 matrix products
    selfcheck   every op beside its reference in fp64, at small and at recipe sizes (unipad.selfcheck)
    steps       one training step of every recipe at full size (benchmarks.full_step)
    races       every op beside its peers (benchmarks.bench_*); install spconv-cu126 and spconv-triton to have them run
    tests       the kernel tests, compiled, on all cores
    training    train.py --modality camera on the tiny recipe, its curve beside a CPU's

All results are on disk as soon as they are known: records.jsonl, results.csv, log.txt and report.md in --out. A stage
that fails or runs out of time leaves what it has, and the next one runs. At the end the rows go to
benchmarks/results.csv, and the README's table is written from it. On a CPU all of it runs at tiny sizes, to try it, and
leaves results.csv and the README as they are.
"""

import csv
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks import full_step, harness
from benchmarks.harness import DEVICE, machine, milliseconds
from benchmarks.report import Folder, page, read_rows, with_table

ROOT = Path(__file__).parents[1]
ON_GPU = DEVICE == "cuda"
# Parts of the time; what a stage leaves goes to those behind it
SHARES = {"machine": 0.06, "selfcheck": 0.18, "steps": 0.18, "races": 0.34, "tests": 0.17, "training": 0.07}
# Parts of the races' time, the most telling first
RACES = {
    "sdf_render": 0.17, "sparse_conv": 0.30, "lift": 0.12, "voxel_pool": 0.12, "spunet": 0.08, "sparse_map": 0.05,
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


def measure_machine(folder, seconds):
    """The ceilings of this GPU; on a CPU of the same operations at tiny sizes."""
    size, n = (2**30, 8192) if ON_GPU else (2**24, 256)
    found = {"copy_gb_s": _copy(size), "l2_gb_s": _copy(2**23 if ON_GPU else 2**20)}
    a, b = (torch.randn(n, n, device=DEVICE) for _ in range(2))
    for name, dtype in {"tf32": torch.float32, "bf16": torch.bfloat16}.items():
        torch.backends.cuda.matmul.allow_tf32 = True
        x, y = a.to(dtype), b.to(dtype)
        found[f"{name}_tflop_s"] = 2e-9 * n**3 / _back_to_back(lambda x=x, y=y: x @ y)
    folder.write("machine", found | machine())
    print(found)


def _copy(size):
    """GB/s read and written, copies back to back: of a size that fits the L2, from the L2."""
    source = torch.randint(255, (size,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2e-6 * size / _back_to_back(lambda: target.copy_(source))


def _back_to_back(fn, runs=20):
    """Milliseconds a run, by a CUDA graph where there is one: no launch is waited for, no cache is flushed."""
    if not ON_GPU:
        return milliseconds(fn)[0]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fn()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(runs):
            fn()
    return min(milliseconds(graph.replay)) / runs


def check_ops(folder, seconds):
    from unipad import selfcheck

    for result in selfcheck.results(list(selfcheck.checks(selfcheck.SIZES if ON_GPU else ("small",)))):
        print(result, flush=True)
        folder.write("selfcheck", vars(result) | {"ok": result.ok, "line": str(result)})


def measure_steps(folder, seconds):
    full_step.main(full_step.Args(), lambda record: folder.write("steps", record))


def race(folder, op):
    harness.RESULTS = folder.path / "results.csv"
    sys.argv = [f"bench_{op}"]
    runpy.run_module(f"benchmarks.bench_{op}", run_name="__main__")


def run_tests(folder, seconds):
    """The kernel tests; without a GPU those of one file, in the interpreter."""
    what = ["tests/kernels", "-n", str(min(16, os.cpu_count()))] if ON_GPU else ["tests/kernels/test_backend.py", "-n0"]
    flags = ["-q", "-p", "no:cacheprovider", "--durations=10", "-o", "addopts="]
    done = subprocess.Popen(
        [sys.executable, "-m", "pytest", *flags, *what], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )  # fmt: skip
    for line in done.stdout:
        print(line, end="", flush=True)
        if line.startswith(("FAILED", "ERROR")) or " passed" in line or " failed" in line:
            folder.write("tests", {"line": line.strip()})


def train_tiny(folder, seconds):
    """The loss of the first command of the README on this device, and of its first steps on a CPU, step by step."""
    common = ["--modality", "camera", "--log-every", "1", "--val-samples", "2", "--picture-stride", "8"]
    common += [] if ON_GPU else ["--data-root", str(full_step.city()), "--preset", "tiny"]
    part = ["--stop-at", str(CURVE_STEPS)]
    runs = {"cpu": ["--device", "cpu", *part]} | ({"cuda": []} if ON_GPU else {})
    for device, flags in reversed(runs.items()):
        out = folder.path / f"train-{device}"
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "train.py", *common, *flags, "--out", str(out)], cwd=ROOT)
        lines = (out / "log.jsonl").read_text().splitlines() if done.returncode == 0 else []
        logged = [json.loads(line) for line in lines]
        curve = [[r["step"], r["train/loss"]] for r in logged if "train/loss" in r]
        last = next((r for r in reversed(logged) if "val/depth_abs_rel" in r), {})
        found = {k: v for k, v in last.items() if k.startswith("val/")}
        took = time.perf_counter() - began
        folder.write("training", {"device": device, "seconds": took, "exit": done.returncode, "curve": curve} | found)


STAGES = {
    "machine": measure_machine,
    "selfcheck": check_ops,
    "steps": measure_steps,
    "tests": run_tests,
    "training": train_tiny,
}


def run_limited(folder, stage, seconds):
    """Run a stage in a process of its own, which ends with its time; what it prints goes to log.txt too."""
    began = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker"]
    command += [stage, str(seconds), str(folder.path), harness.source or ""]
    with (folder.path / "log.txt").open("a") as log:
        log.write(f"\n# {stage}, {seconds:.0f} s\n")
        log.flush()
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            ended = f"exit code {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            ended = "out of time"
        # also what it started and left
        for signalled in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, signalled)
                process.wait(2)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass
    took = time.monotonic() - began
    folder.write("ended", {"name": stage, "ended": ended, "seconds": round(took, 1)})
    print(f"{stage:<16}{ended:<16}{took:6.0f} s", flush=True)


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


def work(stage, seconds, path, source):
    """A stage, or the race of one op, in this process."""
    harness.deadline, harness.source = time.monotonic() + 0.9 * float(seconds), source or None
    folder, op = Folder(Path(path)), stage.removeprefix("race-")
    if op != stage:
        race(folder, op)
    else:
        STAGES[stage](folder, float(seconds))


def plan(stages):
    """{name: part of the time} of the processes to run, each race one of its own."""
    parts = {}
    for stage, part in SHARES.items():
        if stage == "races":
            of_stage = {f"race-{op}": part * share for op, share in RACES.items()}
        else:
            of_stage = {stage: part}
        parts |= of_stage if stage in stages else {}
    return parts


def main(args: Args):
    out = args.report or args.out or Path("outputs/gpu") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder = Folder(out.resolve())
    harness.source = args.commit or harness.source
    if args.report:
        print(finish(folder))
        return
    end, left = time.monotonic() + 60 * args.minutes, plan(args.stages)
    while left:
        share = next(iter(left.values())) / sum(left.values())
        name = next(iter(left))
        run_limited(folder, name, max(2.0, (end - time.monotonic()) * share))
        (folder.path / "report.md").write_text(page(folder))
        del left[name]
    print(finish(folder))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    else:
        main(tyro.cli(Args, description=__doc__))
