"""`python -m benchmarks.gpu`, tested without a GPU: stages at tiny sizes, the report and the README's table."""

import csv
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks import full_step, gpu, harness
from benchmarks.gpu import Args, plan
from benchmarks.harness import Case, Row, compare
from benchmarks.report import BEGIN, END, README_CASES, Folder, page, readme_table, replace_table

ROOT = Path(__file__).parents[1]


def row(op, case, impl, ms, device="GPU 1", commit="c1", note=""):
    """A row of results.csv as `csv.DictReader` returns it. ms: in all columns of times, and in peak_mb; with a note
    they are empty."""
    measured = "" if note else str(ms)
    numbers = dict.fromkeys(("fwd_ms", "fwd_p20", "fwd_p80", "bwd_ms", "both_ms", "gpu_ms", "peak_mb"), measured)
    return dict(op=op, case=case, impl=impl, **numbers, of_copy="0.1", error="1e-6", note=note, device=device,
                torch="2", triton="3", commit=commit)  # fmt: skip


def test_the_table_shows_the_newest_rows_and_the_fastest_peer():
    rows = [
        row("lift", "camera-0.1 bfloat16, 6 views, 128 x 128", "triton", 2.0, commit="old"),
        row("lift", "camera-0.1 bfloat16, 6 views, 128 x 128", "triton", 1.0),
        row("lift", "camera-0.1 bfloat16, 6 views, 128 x 128", "eager", 30.0),
        row("lift", "camera-0.1 bfloat16, 6 views, 128 x 128", "compiled", 9.0),
        row("lift", "camera-0.1 bfloat16, 6 views, 128 x 128", "wrong", 0.1, note="error 1"),
        row("lift", "camera-0.1 bfloat16, 6 views, 128 x 128", "triton, bit-equal", 2.0),
        row("lift", "tiny", "triton", 0.1),  # not in README_CASES
        row("voxelize", "B=1", "triton", 0.5, device="GPU 2"),
    ]
    lines = readme_table(rows).splitlines()
    assert len(lines) == 4  # two of the header, one per op and GPU
    # after GPU, op, case: ms, GPU ms, fastest peer, its ms, ratio, commit
    assert lines[2].split(" | ")[3:] == ["1.000", "1.000", "compiled", "9.000", "9.0", "c1 |"]
    # no other implementation ran on GPU 2
    assert lines[3].split(" | ")[3:] == ["0.500", "0.500", "-", "-", "-", "c1 |"]


def test_the_case_n_300_of_the_table_does_not_match_n_3000():
    rows = [row("rotated_nms", f"N={N}", "triton", N) for N in (300, 1000, 3000)]
    assert "| rotated_nms | N=300 |" in readme_table(rows)


def test_ops_of_the_table_occur_in_the_benchmarks():
    text = "".join((ROOT / "benchmarks" / f"bench_{op}.py").read_text() for op in gpu.OPS)
    assert not [op for op in README_CASES if f'"{op}"' not in text]


def test_the_table_replaces_the_one_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert readme_table([]) == readme_table([row("lift", "tiny", "triton", 1)])  # not in README_CASES
    written = replace_table(readme, [row("voxelize", "B=1", "triton", 0.5)])
    assert "| GPU 1 | voxelize |" in written
    assert replace_table(written, []).split(BEGIN)[1].split(END)[0].strip() == readme_table([])
    assert written.split(BEGIN)[0] == readme.split(BEGIN)[0] and written.split(END)[1] == readme.split(END)[1]


def test_an_incomplete_record_is_skipped(tmp_path):
    folder = Folder(tmp_path)
    folder.write("tests", {"line": "1 passed"})
    with (tmp_path / "records.jsonl").open("a") as f:
        f.write('{"stage": "tests", "li')
    assert folder.records("tests") == [{"stage": "tests", "line": "1 passed"}]


def test_rows_are_saved_once(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "all.csv")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    folder = Folder(tmp_path / "run")
    with (folder.path / "results.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, Row.__annotations__)
        writer.writeheader()
        writer.writerow(row("voxelize", "B=1", "triton", 1.0))
    gpu.finish(folder)
    gpu.finish(folder)
    assert len(harness.RESULTS.read_text().splitlines()) == 2  # header, row
    assert "| GPU 1 | voxelize | B=1 | 1.000 |" in (tmp_path / "README.md").read_text()
    assert "| voxelize | B=1 | triton | 1 |" in (folder.path / "report.md").read_text()


def test_time_is_divided_among_the_requested_stages():
    assert sum(plan(Args().stages), []) == list(gpu.STAGES)
    assert set(gpu.STAGE_FRACTIONS) == set(gpu.STAGES) and abs(sum(gpu.STAGE_FRACTIONS.values()) - 1) < 1e-6
    assert plan(("tests", "machine")) == [["machine"], ["tests"]]
    # seconds of the first of these stages
    assert 29 < gpu.time_limit(["training"], end=time.time() + 30) <= 30
    assert gpu.time_limit(["machine", "tests"], end=time.time() + 30) < 10


STALLS = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


@pytest.mark.parametrize("code, limit, ended", [(STALLS, 0.5, "out of time"), ("exit(3)", 60, "exit code 3")])
def test_other_stages_run_after_one_that_stalls_or_crashes(tmp_path, monkeypatch, code, limit, ended):
    original, requested = subprocess.Popen, []  # requested: of each process, the stages that it is started for

    def popen(command, **options):
        requested.append(command[-2])
        return original([sys.executable, "-c", code], **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(gpu, "time_limit", lambda names, end: limit)
    began, folder = time.monotonic(), Folder(tmp_path)
    gpu.run(folder, ["selfcheck", "steps"], later=[], end=time.time() + 1)
    assert time.monotonic() - began < 20
    assert [(r["name"], r["ended"]) for r in folder.records("ended")] == [("selfcheck", ended), ("steps", ended)]
    assert requested == ["selfcheck,steps", "steps"], "a new process for the remaining stage"
    assert f"| steps | {ended} |" in page(folder)


def test_a_crash_between_stages_skips_no_stage(tmp_path, monkeypatch):
    """After an illegal memory access in a kernel, `synchronize` may raise only after the stage has ended.

    Here each process writes that its first stage has ended, lets `gpu.run` read that, and exits before the next one.
    """
    original, requested = subprocess.Popen, []  # requested: of each process, the stages that it is started for
    code = """
from benchmarks.report import Folder
import pathlib, sys, time
Folder(pathlib.Path(sys.argv[1])).write("ended", {"name": sys.argv[2], "ended": "failed", "seconds": 0})
time.sleep(0.5)
exit(1)
"""

    def popen(command, **options):
        requested.append(command[-2])
        return original([sys.executable, "-c", code, str(tmp_path), command[-2].split(",")[0]], **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    folder = Folder(tmp_path)
    gpu.run(folder, ["op-lift", "op-voxelize", "op-composite"], later=[], end=time.time() + 60)
    assert [r["name"] for r in folder.records("ended")] == ["op-lift", "op-voxelize", "op-composite"]
    assert {r["ended"] for r in folder.records("ended")} == {"failed"}  # as the processes wrote it
    assert len(requested) == 3


def test_a_stage_that_fails_does_not_stop_the_next_one_in_its_process(tmp_path, monkeypatch):
    for name in ("code_commit", "deadline", "RESULTS"):
        monkeypatch.setattr(harness, name, getattr(harness, name))  # `gpu.work` sets it; restored after the test
    monkeypatch.setitem(gpu.STAGES, "steps", lambda folder: 1 / 0)
    monkeypatch.setitem(gpu.STAGES, "tests", lambda folder: folder.write("tests", {"line": "1 passed"}))
    folder = Folder(tmp_path)
    gpu.work(str(tmp_path), code_commit="c1", end=str(time.time() + 60), names="steps,tests", later="training")
    assert [(r["name"], r["ended"]) for r in folder.records("ended")] == [("steps", "failed"), ("tests", "ok")]
    begun = folder.records("begun")
    assert begun[0]["until"] < begun[1]["until"] < time.time() + 60


def test_kernel_tests_that_run_out_of_time_report_their_failures(tmp_path, monkeypatch):
    tests = ["def test_right(): pass", "def test_wrong(): assert 0", "def test_slow():", " import pathlib, time"]
    tests += [" pathlib.Path('slow').touch()", " time.sleep(60)"]
    (tmp_path / "tests/kernels").mkdir(parents=True)
    (tmp_path / "tests/kernels/test_backend.py").write_text("\n".join(tests))

    class Timer(threading.Timer):
        """Expires when the slow test has started."""

        def run(self):
            while not (tmp_path / "slow").exists():
                time.sleep(0.05)
            self.function(*self.args)

    monkeypatch.setattr(threading, "Timer", Timer)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    gpu.run_tests(folder := Folder(tmp_path))
    wrong, interrupted, counts, code = (record["line"] for record in folder.records("tests"))
    assert wrong.startswith("FAILED tests/kernels/test_backend.py::test_wrong") and "KeyboardInterrupt" in interrupted
    assert counts.startswith("1 failed, 1 passed in ") and code == "exit code 2"


def test_training_that_runs_out_of_time_keeps_its_curve(tmp_path, monkeypatch):
    script = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir()
(out / "log.jsonl").write_text('{"command": []}\\n{"step": 1, "train/loss": 2.5}\\n{"step": 2, "tr')
time.sleep(60)
"""
    (tmp_path / "train.py").write_text(script)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "ON_GPU", False)
    monkeypatch.setattr(full_step, "city", lambda: tmp_path)
    monkeypatch.setattr(harness, "deadline", time.monotonic() + 3)
    gpu.train_tiny(folder := Folder(tmp_path))
    (record,) = folder.records("training")
    assert record["ended"] == "out of time" and record["curve"] == [[1, 2.5]]
    assert "- cpu: out of time, 1 steps in" in page(folder)


@pytest.mark.slow
def test_stages_run_without_a_gpu(tmp_path):
    folder = Folder(tmp_path)
    gpu.run(folder, ["machine", "op-composite", "tests"], later=[], end=time.time() + 300)
    log = (tmp_path / "log.txt").read_text()
    assert [r["ended"] for r in folder.records("ended")] == ["ok"] * 3, log
    assert "| bf16 matrix product |" in page(folder) and " passed in " in page(folder)
    assert "| R=384 S=64 C=4 | eager |" in log


@pytest.mark.slow
def test_the_command_ends_at_its_time_limit(tmp_path):
    """Stages that exceed their part of the limit are killed, but listed in the report."""
    began, stages = time.monotonic(), ["selfcheck", "steps"]
    command = [sys.executable, "-m", "benchmarks.gpu", "--minutes", "0.1", "--out", str(tmp_path), "--stages", *stages]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 60  # 6 s, imports, and the end of the stages
    text = (tmp_path / "report.md").read_text()
    assert all(f"| {name} | " in text for name in stages)
    assert text in done.stdout


def test_a_step_is_compared_with_its_references(city, monkeypatch):
    monkeypatch.setattr(full_step, "city", lambda: city)
    monkeypatch.setattr(full_step, "TIMED", 1)  # timed steps
    records = []
    full_step.main(full_step.Args(("train/lidar/tiny", "segment/lidar/tiny")), records.append)
    assert [r["recipe"] for r in records] == ["train/lidar/tiny", "segment/lidar/tiny"]
    for r in records:  # without a GPU, the step itself runs the references too
        assert r["loss"] == r["loss_ref"] > 0 and r["grad_norm"] == r["grad_norm_ref"] > 0 and r["ms"] > 0


def test_a_step_whose_references_run_out_of_memory_keeps_its_measurements(tmp_path, monkeypatch):
    fits = True

    class Step:
        def __init__(self, recipe, model, root):
            pass

        def __call__(self):
            if not fits:
                raise torch.OutOfMemoryError
            return torch.tensor([1.0, 2.0])  # loss, gradient norm

    @contextmanager
    def references():
        nonlocal fits
        fits = False
        yield
        fits = True

    monkeypatch.setattr(full_step, "Step", Step)
    monkeypatch.setattr(full_step, "references", references)
    monkeypatch.setattr(full_step, "city", lambda: tmp_path)
    folder = Folder(tmp_path)
    full_step.main(full_step.Args(("train/lidar/tiny",)), lambda record: folder.write("steps", record))
    assert "| train/lidar/tiny | 1 | - | 2 | - | " in page(folder)  # loss, reference, gradient norm, reference
    (record,) = folder.records("steps")
    (ours,) = full_step.rows(record | {"gpu_ms": 1.5})  # as measured on a GPU
    assert ours.impl == "triton" and ours.both_ms > 0 and ours.error is None


def test_a_record_of_a_step_gives_two_rows():
    record = dict(recipe="train/camera/tiny", loss=1.1, loss_ref=1.0, ms=2.0, ms_ref=6.0, gpu_ms=1.5, mem_mb=8.0)
    ours, reference = (vars(row) for row in full_step.rows(record | harness.machine()))
    assert ours["op"] == reference["op"] == "step of train/camera/tiny"
    assert ours["impl"] == "triton" and ours["gpu_ms"] == 1.5 and abs(ours["error"] - 0.1) < 1e-6
    assert reference["impl"] == "references" and reference["both_ms"] == 6.0 and reference["gpu_ms"] is None
    written = [{k: "" if v is None else str(v) for k, v in row.items()} for row in (ours, reference)]
    # ms, GPU ms, fastest peer, its ms, ratio
    assert "| 2.000 | 1.500 | references | 6.000 | 3.0 |" in readme_table(written)


def test_an_implementation_that_disagrees_or_raises_is_not_timed(capsys):
    x = torch.rand(8, requires_grad=True)

    def broken(x):
        raise RuntimeError("no kernel image")

    peers = {"wrong": lambda x: 1.1 * x, "nan": lambda x: x * float("nan"), "broken": broken}
    # None: `kernels`, which are not run on a CPU
    rows = compare("double", lambda x: 2 * x, None, peers, [Case("N=8", (x,), fwd_bytes=64)])
    assert [r.impl for r in rows] == ["wrong", "nan", "broken", "reference"]
    assert rows[0].note.startswith("error 4.5e-01 exceeds") and rows[0].both_ms is None  # (2 - 1.1) / 2
    assert rows[1].note.startswith("error nan")
    assert rows[2].note == "RuntimeError: no kernel image"
    assert rows[3].note == "" and rows[3].both_ms > 0 and rows[3].gpu_ms is None
    assert "| N=8 | broken | RuntimeError: no kernel image |" in capsys.readouterr().out


def test_only_the_reference_is_timed_with_few_runs(monkeypatch):
    quicks, checked = [], harness._checked
    monkeypatch.setattr(harness, "_checked", lambda *args, quick: quicks.append(quick) or checked(*args, quick=quick))
    x = torch.rand(8, requires_grad=True)
    compare("double", lambda x: 2 * x, None, {"peer": lambda x: x + x}, [Case("N=8", (x,), fwd_bytes=64)])
    assert quicks == [False, True]  # peer, reference


def test_torch_compile_is_tried_once_if_it_fails():
    """Peers whose names begin with "compiled" are those of torch.compile; they run last."""

    def broken(x):
        raise RuntimeError("no double backward")

    x = torch.rand(8, requires_grad=True)
    peers = {"compiled": broken, "other": broken}
    rows = compare(
        "double", lambda x: 2 * x, None, peers, [Case("N=8", (x,), fwd_bytes=64), Case("again", (x,), fwd_bytes=64)]
    )
    assert [(r.case, r.impl) for r in rows if r.note] == [("N=8", "other"), ("N=8", "compiled"), ("again", "other")]


@pytest.mark.parametrize(
    "ms, quick, runs", [(1, False, [3, 100]), (40, False, [3, 50]), (900, False, [3, 5]), (900, True, [3])]
)
def test_number_of_timed_runs_on_a_gpu(monkeypatch, ms, quick, runs):
    """Three runs estimate the time of a function, `ms`; with quick=True there are no others."""
    counts = []
    monkeypatch.setattr(harness, "DEVICE", "cuda")
    monkeypatch.setattr(harness, "_gpu_runs", lambda fn, count: counts.append(count) or [float(ms)] * count)
    assert harness.milliseconds(None, quick) == [ms] * 3  # median, 20th and 80th percentile
    assert counts == runs


def test_other_cases_run_if_the_reference_of_one_does_not_fit(capsys):
    def reference(x):
        if len(x) > 8:
            raise torch.OutOfMemoryError
        return 2 * x

    cases = [Case(f"N={n}", (torch.rand(n, requires_grad=True),), fwd_bytes=64) for n in (9, 8)]
    assert [r.case for r in compare("double", reference, None, {}, cases)] == ["N=8"]
    assert "| N=9 | all | skipped: the reference does not fit" in capsys.readouterr().out


def test_nothing_starts_after_the_deadline(capsys, monkeypatch):
    monkeypatch.setattr(harness, "deadline", time.monotonic() - 1)
    assert compare("double", lambda x: x, None, {}, [Case("N=8", (None,), fwd_bytes=64)]) == []
    assert "skipped: out of time" in capsys.readouterr().out
