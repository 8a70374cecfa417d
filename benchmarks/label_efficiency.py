"""What pre-training gains with few labels, and how good the features are that it has learned.

    python -m benchmarks.label_efficiency --modality lidar                 # on a synthetic city, a few minutes a run
    python -m benchmarks.label_efficiency --task segment --fractions 0.05 0.2 --seeds 0 1 2 --jobs 2
    python -m benchmarks.label_efficiency --modality lidar --data-root /data/nuscenes --version v1.0-trainval \
        --pretrained RUN --preset lidar-0.075-ablation --arms scratch pretrained --fractions 0.2 --steps 7000
    python -m benchmarks.label_efficiency --figure docs/label_efficiency.png          # of all results so far

Pre-trains once on all frames of the training split (or takes --pretrained). Then, for each label fraction, seed and
number of steps, it fine-tunes the arms:

    scratch            all weights start at random
    pretrained         the encoder starts from the pre-trained one
    frozen-random      only the head is trained, on a random encoder
    frozen-pretrained  only the head is trained, on the pre-trained encoder

The arms of a seed see the same frames in the same order. Each run is evaluated on --split by `eval.py`. Results are
appended to results.csv in --out as they come; a command that is repeated runs only what is missing, and resumes what
was interrupted. Choose settings with --split city_dev, scenes of the city that are in neither the training nor the
validation split.
"""

import csv
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure

from unipad.data.synthetic import generate, is_synthetic
from unipad.run_folder import commit

ARMS = ("scratch", "pretrained", "frozen-random", "frozen-pretrained")
CITY = Path("data/label-efficiency")  # 64 scenes of 6 keyframes: 270 for training, 36 for choosing settings, 78 for val
METRICS = {"detect": ("NDS", "mAP"), "segment": ("mIoU",)}


@dataclass(frozen=True)
class Args:
    task: Literal["detect", "segment"] = "detect"  # task of fine-tuning
    modality: Literal["camera", "lidar", "fusion"] = "lidar"  # input of the encoder
    arms: tuple[Literal["scratch", "pretrained", "frozen-random", "frozen-pretrained"], ...] = ARMS  # what to compare
    fractions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0)  # label fractions: of the training frames, 1/k each
    seeds: tuple[int, ...] = (0, 1, 2)  # seeds of the fine-tuning runs
    steps: tuple[int, ...] = (600,)  # steps of each fine-tuning run; several: until more steps gain nothing
    pretrained: Path | None = None  # pre-training run; None: train one with --pretrain-flags
    pretrain_steps: int | None = None  # steps of pre-training; None: its preset's
    pretrain_flags: str = ""  # more flags of train.py
    flags: str = ""  # more flags of finetune.py
    init: Path | None = None  # ImageNet weights of the camera encoder, for all arms
    preset: str | None = None  # preset of fine-tuning; None: tiny; with --data-root finetune.py's
    data_root: Path | None = None  # folder of a nuScenes dataset; None: a synthetic city of 64 scenes
    version: str = "city"  # version of the dataset
    split: str = "val"  # split to evaluate on
    variant: str = "default"  # name of these settings in the results, to compare with other --flags
    jobs: int = 1  # runs at once; each gets one thread if there are several
    out: Path = Path("outputs/label-efficiency")  # folder of all runs and of results.csv
    figure: Path | None = None  # only draw the results so far into this file


@dataclass(frozen=True)
class Row:
    """One result of results.csv."""

    task: str
    modality: str
    variant: str
    split: str
    arm: str
    fraction: float
    seed: int
    steps: int
    metric: str
    value: float
    seconds: float  # of fine-tuning and evaluation, wall-clock
    commit: str
    flags: str


def main(args: Args):
    if args.figure:
        draw(read_rows(args.out / "results.csv"), args.figure)
        return
    root = args.data_root or ensure_city()
    folder = args.out / (args.modality if args.task == "detect" else args.task) / args.variant
    common = ["--modality", args.modality, "--data-root", root, "--version", args.version]
    pretrained = args.pretrained or folder / "pretrained"
    if not args.pretrained and any(arm.endswith("pretrained") for arm in args.arms):
        run("train.py", pretrained, *common, *pretraining_flags(args))
    done = {(r.split, r.arm, r.fraction, r.seed, r.steps) for r in read_rows(args.out / "results.csv") if of(args, r)}
    cases = product(args.steps, args.seeds, args.fractions, args.arms)
    cases = [(arm, fraction, seed, steps) for steps, seed, fraction, arm in cases]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [
            pool.submit(measure, args, folder, common, pretrained, *case)
            for case in cases
            if (args.split, *case) not in done
        ]
        for future in futures:
            future.result()
    print_table([row for row in read_rows(args.out / "results.csv") if of(args, row) and row.split == args.split])


def of(args, row):
    return (row.task, row.modality, row.variant) == (args.task, args.modality, args.variant)


def ensure_city():
    """The root of the synthetic city for this experiment, which is generated if it does not exist yet."""
    if not is_synthetic(CITY):
        generate(CITY, scenes=64, keyframes=6)
    return CITY


def pretraining_flags(args):
    preset = {"segment": "segment" if args.data_root else "segment-tiny"}.get(args.task)
    preset = preset or (None if args.data_root else "tiny")
    flags = ["--preset", preset] if preset else []
    flags += ["--steps", args.pretrain_steps] if args.pretrain_steps else []
    flags += ["--init", args.init] if args.init else []
    return [*flags, *args.pretrain_flags.split()]


def measure(args, folder, common, pretrained, arm, fraction, seed, steps):
    """Fine-tune one arm, evaluate it, and append its results."""
    path, began = folder / f"{arm}-{fraction}-{steps}-{seed}", time.monotonic()
    source = pretrained if arm.endswith("pretrained") else args.init
    flags = ["--task", args.task, "--label-fraction", fraction, "--seed", seed, "--steps", steps, "--val-every", 0]
    preset = args.preset or (None if args.data_root else "tiny")
    flags += ["--preset", preset] if preset else []
    flags += ["--pretrained", source] if source else []
    flags += ["--freeze-encoder"] if arm.startswith("frozen") else []
    run("finetune.py", path, *common, *flags, *args.flags.split(), threads=1 if args.jobs > 1 else None)
    evaluation = path / f"eval-{args.split}"
    execute("eval.py", path, "--split", args.split, "--out", evaluation, threads=1 if args.jobs > 1 else None)
    names = {"detect": "metrics_summary.json", "segment": "segmentation_summary.json"}
    summary = json.loads((evaluation / names[args.task]).read_text())
    keys = {"NDS": "nd_score", "mAP": "mean_ap", "mIoU": "miou"}
    seconds = round(time.monotonic() - began, 1)
    rows = [
        Row(
            args.task, args.modality, args.variant, args.split, arm, fraction, seed, steps,
            metric, summary[keys[metric]], seconds, commit() or "", args.flags,
        )
        for metric in METRICS[args.task]
    ]  # fmt: skip
    append_rows(args.out / "results.csv", rows)


def run(script, folder, *flags, threads=None):
    """Run a training script into `folder`, or resume a run there."""
    execute(script, "--out", folder, "--resume", "auto", *flags, threads=threads)


def execute(*command, threads=None):
    """Run a script of this repository; exit if it fails."""
    variables = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    done = subprocess.run([sys.executable, *map(str, command)], env=variables)
    if done.returncode:
        sys.exit(done.returncode)


def read_rows(file: Path) -> list[Row]:
    """The rows of a results.csv; none without the file."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [Row(**{f.name: f.type(line[f.name]) for f in fields(Row)}) for line in csv.DictReader(lines)]


def append_rows(file: Path, rows: list[Row]):
    file.parent.mkdir(parents=True, exist_ok=True)
    is_new = not file.exists()
    with file.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, [f.name for f in fields(Row)])
        if is_new:
            writer.writeheader()
        writer.writerows(vars(row) for row in rows)


def groups(rows: list[Row]) -> dict[tuple, list[float]]:
    """{(task, modality, variant, split, metric, steps, fraction, arm): values over the seeds}."""
    found = {}
    for r in rows:
        key = r.task, r.modality, r.variant, r.split, r.metric, r.steps, r.fraction, r.arm
        found.setdefault(key, []).append(r.value)
    return found


def print_table(rows: list[Row]):
    """Mean and standard deviation over the seeds, as Markdown."""
    values = groups(rows)
    arms = [arm for arm in ARMS if any(key[-1] == arm for key in values)]
    print("\n| task | modality | variant | split | metric | steps | labels | " + " | ".join(arms) + " |")
    print("|---" * (7 + len(arms)) + "|")
    for *line, fraction in sorted({key[:-1] for key in values}, key=str):
        cells = [_cell(values.get((*line, fraction, arm))) for arm in arms]
        print(f"| {' | '.join(map(str, line))} | {fraction:.0%} | {' | '.join(cells)} |")


def _cell(values):
    if values is None:
        return "-"
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread} ({len(values)})"


def draw(rows: list[Row], file: Path):
    """Draw label fraction against metric: one panel for each task, modality and metric, one line for each arm."""
    values = groups([row for row in rows if row.variant == "default" and row.split == "val"])
    panels = sorted({(key[0], key[1], key[4]) for key in values})
    figure = Figure(figsize=(3.2 * len(panels), 3.2), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    colors = dict(zip(ARMS, matplotlib.colormaps["tab10"].colors, strict=False))
    for axis, panel in zip(axes, panels, strict=True):
        for arm in ARMS:
            line = {
                100 * key[6]: found for key, found in values.items()
                if (key[0], key[1], key[4]) == panel and key[7] == arm
            }  # fmt: skip
            if line:
                x = sorted(line)
                mean, spread = ([f(line[fraction]) for fraction in x] for f in (np.mean, np.std))
                axis.errorbar(x, mean, spread, color=colors[arm], label=arm, marker="o", markersize=3, capsize=2)
        axis.set(xscale="log", xlabel="labels, %", title=f"{panel[0]}, {panel[1]}", ylabel=panel[2])
        axis.set_xticks(sorted({100 * key[6] for key in values}), minor=False)
        axis.get_xaxis().set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
