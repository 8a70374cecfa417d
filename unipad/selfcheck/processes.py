"""Run cases in worker processes: a faulting kernel can corrupt the GPU context of its process."""

import contextlib
import faulthandler
import json
import os
import subprocess
import sys
from dataclasses import asdict

import torch

from unipad.selfcheck.cases import checks
from unipad.selfcheck.check import Result, compile_op, run

CASE_TIMEOUT = 240  # seconds per check, including compilation; then its process is killed
MAX_JOBS = 16  # processes that compile in parallel, at most


def results(cases, isolate=None):
    """Yields the `Result` of each case as soon as it is known.

    isolate: run in separate processes, so that a crash does not affect later cases; None: if there is a GPU.
    """
    isolate = torch.cuda.is_available() if isolate is None else isolate
    left = list(cases)
    if not isolate:
        yield from map(run, left)
        return
    _compile(left)
    while left:
        left_before = len(left)
        with _worker("check", left, subprocess.PIPE) as worker:
            for line in worker.stdout:
                with contextlib.suppress(ValueError, TypeError):  # printed by another library: no JSON, or other JSON
                    yield Result(**json.loads(line))
                    left.pop(0)
        # a worker that reported a result and ended with exit code 0 had lost its GPU context: the next one continues
        if left and (worker.returncode or len(left) == left_before):
            case = left.pop(0)
            message = f"its process ended with exit code {worker.returncode} before the result was known"
            yield Result(case.name, case.size, case.dtype, "FAIL", message)


def _compile(cases):
    """Run all cases once in parallel processes, so that their kernels are in the cache: compiling takes longest.

    Failures are ignored here: the check of the case reports them.
    """
    jobs = min(MAX_JOBS, os.cpu_count())
    kinds = list(dict.fromkeys(_kind(case) for case in cases))
    parts = [[case for case in cases if kinds.index(_kind(case)) % jobs == i] for i in range(jobs)]
    for worker in [_worker("compile", part, subprocess.DEVNULL) for part in parts if part]:
        worker.wait()


def _kind(case):
    """Cases of one kind share kernels, across sizes, so one process compiles them."""
    return case.name.split(",")[0], case.dtype


def _worker(task, cases, stdout):
    """Start a process that runs `work(task)` on these cases."""
    command = [sys.executable, "-m", "unipad.selfcheck", "--worker", task]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, text=True)
    json.dump([str(case) for case in cases], worker.stdin)
    worker.stdin.close()
    return worker


def work(task):
    """A worker process: run the cases named on stdin.

    task: "compile", or "check", which prints a JSON line per `Result` and exits early if the GPU context is lost.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for strict cases
    known = {str(case): case for case in checks()}
    for name in json.load(sys.stdin):
        faulthandler.dump_traceback_later(CASE_TIMEOUT, exit=True)
        case = known[name]
        if task == "compile":
            with contextlib.suppress(Exception):
                compile_op(case)
            continue
        print(json.dumps(asdict(run(case))), flush=True)
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(0)  # reported already; with a lost context, destructors would fail too
