"""Results of `benchmarks.gpu` as a Markdown report, and as the README's table "Verified on"."""

import csv
import json
import statistics

# Table of ops and steps: titles, and the columns of results.csv that they show
TITLES = ["op", "case", "impl", "fwd ms", "fwd+bwd ms", "GPU ms", "peak MB", "relative error", "why not timed"]
KEYS = ("op", "case", "impl", "fwd_ms", "both_ms", "gpu_ms", "peak_mb", "error", "note")
STEP_TITLES = ["recipe", "loss", "reference", "gradient norm", "reference", "ms", "GPU ms", "idle", "launches", "MB"]
BEGIN, END = "<!-- verified: written by python -m benchmarks.gpu -->", "<!-- /verified -->"
# op -> part of the name of the case that the README shows: the size in a recipe; other ops show their last case
README_CASES = {
    "sdf_render": "R=3072",
    "lift": "camera-0.1 bfloat16, 6 views, 128",
    "voxel_pool": "camera-0.075 bfloat16, 6 views, 180 x 180 x 5, C 256",
    "composite": "S=96 C=4",
    "resample": "R=3072",
    "trilinear": "R=3072 S=96",
    "rotated_iou_bev": "N=900 M=100",
    "rotated_nms": "N=300",
}


class Folder:
    """The results of a run; a record is on disk when `write` returns.

    stage: a stage of `benchmarks.gpu`; or "begun" or "ended", for the records that say when stages began, and how they
    ended.
    """

    def __init__(self, path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def write(self, stage, record):
        with (self.path / "records.jsonl").open("a") as f:
            f.write(json.dumps({"stage": stage} | record) + "\n")

    def records(self, stage):
        """The records of a stage, a list of dicts."""
        return [record for record in read_records(self.path / "records.jsonl") if record["stage"] == stage]

    def rows(self):
        """The rows that stages "steps" and "ops" measured, as in results.csv: a list of dicts of str."""
        return read_rows(self.path / "results.csv")


def read_records(file):
    """The dicts of a JSONL file; an incomplete last line is skipped."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_rows(file):
    return list(csv.DictReader(file.open(newline=""))) if file.exists() else []


def page(folder):
    """The report: Markdown text."""
    parts = [f"# GPU report {folder.path.name}", *_machine(folder.records("machine"))]
    stages = [[r["name"], r["ended"], f"{r['seconds']:.0f}"] for r in folder.records("ended")]
    parts += ["## Stages", _table(["stage", "outcome", "seconds"], stages)]
    checks = folder.records("selfcheck")
    passed = sum(r["status"] == "ok" for r in checks)
    others = [r["line"] for r in checks if r["status"] != "ok"]
    parts += ["## Self-check", f"{passed} of {len(checks)} checks passed."]
    parts += ["\n".join(["```", *others, "```"])] if others else []
    parts += ["## One training step of every recipe, batch 1", *_steps(folder.records("steps"))]
    parts += ["## Ops and steps", _table(TITLES, [[_short(row[k]) for k in KEYS] for row in folder.rows()])]
    parts += ["## Tests", "\n".join(f"- {r['line']}" for r in folder.records("tests"))]
    parts += ["## Training", "\n".join(_curves(folder.records("training")))]
    return "\n\n".join(parts) + "\n"


def _table(titles, rows):
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _short(value):
    """A value of a CSV file for a table cell: a number rounded to four digits, or text with | replaced."""
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value.replace("|", "/")


def _machine(records):
    for found in records:
        yield ", ".join(f"{k} {found[k]}" for k in ("device", "torch", "triton", "commit"))
        ceilings = [["copy", "copy_gb_s", "GB/s"], ["copy in the L2", "l2_gb_s", "GB/s"]]
        ceilings += [[f"{t} matrix product", f"{t}_tflop_s", "TFLOP/s"] for t in ("tf32", "bf16")]
        yield _table(["ceiling", "measured"], [[name, f"{found[key]:.0f} {unit}"] for name, key, unit in ceilings])


def _steps(records):
    rows = []
    for r in records:
        if "error" in r:
            rows.append([r["recipe"], r["error"].replace("|", "/").replace("\n", " "), *[""] * (len(STEP_TITLES) - 2)])
            continue
        keys = ("loss", "loss_ref", "grad_norm", "grad_norm_ref", "ms")
        numbers = ["-" if r[k] is None else f"{r[k]:.5g}" for k in keys]  # None: the references ran out of memory
        on_gpu = [f"{r['gpu_ms']:.1f}", f"{r['idle']:.0%}", r["launches"]] if "gpu_ms" in r else ["-"] * 3
        rows.append([r["recipe"], *numbers, *on_gpu, f"{r['mem_mb']:.0f}" if r["mem_mb"] else "-"])
    yield _table(STEP_TITLES, rows)
    for r in records:
        if r.get("costliest"):
            yield f"Kernels of {r['recipe']} that take the most time:"
            yield _table(
                ["ms", "launches", "kernel"], [[f"{ms:.3f}", n, f"`{name}`"] for name, n, ms in r["costliest"]]
            )


def _curves(runs):
    """Yield a line about the training on each device, and for every 20 steps that ran on both a line of mean losses."""
    for r in runs:
        metrics = ", ".join(f"{k} {v:.3f}" for k, v in r.items() if k.startswith("val/"))
        steps = len(r["curve"])
        yield f"- {r['device']}: {r['ended']}, {steps} steps in {r['seconds']:.0f} s; {metrics}"
    curves = {r["device"]: dict(map(tuple, r["curve"])) for r in runs}
    if {"cpu", "cuda"} <= curves.keys():
        # CPU and GPU draw different random numbers: compare means, not single steps
        for first in range(1, max(curves["cpu"], default=0) + 1, 20):
            means = [_mean(curves[device], first, first + 20) for device in ("cpu", "cuda")]
            yield f"- mean loss of steps {first} to {first + 19}: CPU {means[0]:.3f}, GPU {means[1]:.3f}"


def _mean(curve, first, end):
    losses = [loss for step, loss in curve.items() if first <= step < end]
    return statistics.fmean(losses) if losses else float("nan")


def readme_table(rows):
    """The README's table: for each op and GPU the newest row of one case and its fastest peer; a sentence if empty.

    rows: of benchmarks/results.csv, which has the rows of all runs, the oldest first; a list of dicts of str.
    """
    shown = {}
    for row in rows:
        # spaces: C=4 must not match C=48
        is_shown = f"{README_CASES.get(row['op'], '')} " in f"{row['case']} "
        if row["impl"] == "triton" and _ms(row) and is_shown:
            shown[row["device"], row["op"]] = row
    if not shown:
        return "No kernel has been timed on a GPU yet; `python -m benchmarks.gpu` writes a table here."
    cells = []
    for row in shown.values():
        peer = _fastest_peer(row, rows)
        theirs = [peer["impl"], f"{_ms(peer):.3f}", f"{_ms(peer) / _ms(row):.1f}"] if peer else ["-"] * 3
        gpu = f"{float(row['gpu_ms']):.3f}" if row["gpu_ms"] else "-"
        cells.append([row["device"], row["op"], row["case"], f"{_ms(row):.3f}", gpu, *theirs, row["commit"]])
    return _table(["GPU", "op", "case", "ms", "GPU ms", "fastest peer", "peer ms", "ratio", "commit"], cells)


def _ms(row):
    """Time of forward and backward, or of forward if there is no backward; 0 if not timed."""
    return float(row["both_ms"] or row["fwd_ms"] or 0)


def _fastest_peer(row, rows):
    """The fastest peer or reference of the same case; not the op's own variants, such as "triton, bit-equal"."""
    same = ("device", "op", "case", "commit")
    peers = [r for r in rows if all(r[k] == row[k] for k in same) and not r["impl"].startswith("triton") and _ms(r)]
    return min(peers, key=_ms, default=None)


def replace_table(text, rows):
    """The README's text with its table replaced."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{readme_table(rows)}\n{END}{tail}"
