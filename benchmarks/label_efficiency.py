"""What pre-training gains with few labels, and how good the features are that it learns.

    python -m benchmarks.label_efficiency --modality lidar               # a synthetic city, a few minutes per run
    python -m benchmarks.label_efficiency --task segment --fractions 0.05 0.2 --seeds 0 1 2 --jobs 2
    python -m benchmarks.label_efficiency --task occupancy --modality lidar --fractions 0.05 --jobs 2
    python -m benchmarks.label_efficiency --modality lidar --data-root /data/nuscenes --version v1.0-trainval \
        --preset lidar-0.075-ablation --pretrained RUN --arms scratch pretrained --fractions 0.2 --steps 7000 --gpus 4
    python -m benchmarks.label_efficiency --figure docs/label_efficiency.png         # draw all results so far

Give --flags and --pretrain-flags with an equals sign: --flags="--lr 1e-3 --workers 0".

Pre-trains once on all training frames (or takes --pretrained). Then, for each label fraction, seed and number of steps,
it fine-tunes the arms of the experiment:

    scratch            all weights start at random
    pretrained         the encoder starts from the pre-trained one
    frozen-random      only the head is trained, on a random encoder
    frozen-pretrained  only the head is trained, on the pre-trained encoder

The arms of a seed see the same frames in the same order. `eval.py` evaluates each run on --split. Rows are appended to
results.csv in --out as they come; the same command again runs only what is missing, and resumes what was interrupted.
On a CPU, each run computes with one thread, so that its result does not depend on the number of cores: use --jobs.
It still depends on the CPU model, unless --portable is given (see `PORTABLE`): rounding differs, and training amplifies
this to differences as large as those between seeds.

Choose settings with --split city_dev, whose scenes are in neither the training nor the validation split.
"""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from itertools import cycle, product
from pathlib import Path
from typing import Literal, get_args

import matplotlib
import matplotlib.image
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from unipad.data.synthetic import is_synthetic
from unipad.errors import UserError
from unipad.exit import exit_on_user_error
from unipad.run_folder import commit

Arm = Literal["scratch", "pretrained", "frozen-random", "frozen-pretrained"]
ARMS = get_args(Arm)
CITY = Path("data/label-efficiency")
PORTABLE_CITY = Path("data/label-efficiency-portable")  # the same, with the last digits of --portable
CITY_SIZE = {"scenes": 128, "keyframes": 4}  # 360 keyframes to train on, 48 to choose settings with, 104 to validate on
# Metrics by task: name -> (file of eval.py, its key)
METRICS = {
    "detect": {"NDS": ("metrics_summary.json", "nd_score"), "mAP": ("metrics_summary.json", "mean_ap")},
    "segment": {"mIoU": ("segmentation_summary.json", "miou")},
    "occupancy": {"mIoU": ("occupancy_summary.json", "miou"), "RayIoU": ("occupancy_summary.json", "rayiou")},
}
TASKS = {"detect": "detection", "segment": "segmentation", "occupancy": "occupancy"}  # name of each in titles
TITLES = {"camera": "Camera", "lidar": "LiDAR", "fusion": "Fusion"}

# Environment of the programs with --portable. Every library chooses its code by what the CPU has: width of vectors,
# vendor, sizes of caches; each choice adds in another order or approximates functions otherwise. With these variables,
# all use code that every x86-64 CPU with AVX2 and FMA has and that contains no instruction whose result is up to the
# vendor (`rsqrtps`, `rcpps`). Then results are bitwise equal on all of them, given the same versions of the packages
# and of the C library; `python -m tests.other_cpus` compares them with those of emulated CPUs. On one AMD CPU with
# AVX-512, a step from LiDAR takes 1.5 times as long in pre-training, and 1.2 times in fine-tuning.
PORTABLE = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "ATEN_CPU_CAPABILITY": "avx2",  # PyTorch's own loops
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # PyTorch's convolutions
    "MKL_CBWR": "COMPATIBLE",  # PyTorch's matrix products: the only branch that MKL has for all vendors
    # PyTorch's square roots, logarithms and so on: MKL's only kernels for them without `rsqrtps`. MKL_CBWR does not
    # reach these, and Intel does not document the variable: a test checks that it has an effect.
    "MKL_VML_DEBUG_CPU_TYPE": "1",
    "OPENBLAS_CORETYPE": "Haswell",  # matrix products of NumPy and SciPy
    # NumPy's own loops; the last is NumPy 2.4's name for all of them. Unknown names are ignored.
    "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR X86_V4",
}


@dataclass(frozen=True)
class Args:
    task: Literal["detect", "segment", "occupancy"] = "detect"  # task of fine-tuning
    modality: Literal["camera", "lidar", "fusion"] = "lidar"  # input of the encoder
    arms: tuple[Arm, ...] = ARMS  # arms to compare
    fractions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0)  # label fractions: 1/k of the training frames each
    seeds: tuple[int, ...] = (0, 1, 2)  # seeds of the fine-tuning runs
    steps: tuple[int, ...] = (1000,)  # steps of a fine-tuning run; several: one run each, which shows where gains end
    pretrained: Path | None = None  # pre-training run; None: the variant's own, which is started or resumed
    pretrain_steps: int | None = None  # steps of pre-training; None: its preset's
    pretrain_flags: str = ""  # more flags of train.py, in one string
    flags: str = ""  # more flags of finetune.py, in one string
    init: Path | None = None  # ImageNet weights of the camera encoder, for pre-training and the arms without it
    preset: str | None = None  # preset of fine-tuning; None: tiny, or with --data-root the default of finetune.py
    data_root: Path | None = None  # folder of a nuScenes dataset; None: a synthetic city of 128 scenes
    version: str = "city"  # version of the dataset
    split: str = "val"  # split to evaluate on
    variant: str = "default"  # name of these settings in results.csv; different --flags need different names
    jobs: int = 1  # number of fine-tuning runs at the same time
    gpus: int = 0  # GPUs per run, under torchrun; 0: one GPU, or the CPU, without it
    portable: bool = False  # same digits on every x86-64 CPU with AVX2, but slower; adds -portable to --variant
    out: Path = Path("outputs/label-efficiency")  # folder of results.csv and of all runs
    figure: Path | None = None  # only draw the validation results of results.csv in --out, into this file


@dataclass(frozen=True)
class Row:
    """A line of results.csv: one metric of one run."""

    task: str
    modality: str
    variant: str
    split: str
    arm: str
    fraction: float  # of the labels
    seed: int
    steps: int
    metric: str
    value: float
    cpu_seconds: float  # of fine-tuning and evaluation, since the last interruption
    commit: str
    flags: str
    pretrained: str  # the pre-training run and its steps; empty for arms that need none

    @property
    def case(self):
        """What tells a variant's runs apart."""
        return self.split, self.arm, self.fraction, self.seed, self.steps


def main(args: Args):
    file = args.out / "results.csv"
    if args.figure:
        rows = [row for row in read_rows(file) if row.variant == "default" and row.split == "val"]
        draw(rows, args.figure)
        draw_frame(args.out, rows, args.figure.with_stem(f"{args.figure.stem}_frame"))
        return
    if args.portable:
        if args.gpus or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            raise UserError(
                "--portable needs an x86-64 CPU with AVX2, and uses no GPU; leave out --portable or --gpus."
            )
        args = replace(args, variant=f"{args.variant}-portable")
    missing = missing_cases(args, read_rows(file))
    folder = variant_folder(args.out, args)
    if missing:
        prepare(args, folder)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {pool.submit(measure, args, folder, *case): case for case in missing}
        try:
            for number, run in enumerate(as_completed(runs), 1):
                append_rows(file, run.result())
                values = "  ".join(f"{row.metric} {row.value:.3f}" for row in run.result())
                arm, fraction, seed, steps = runs[run]
                print(
                    f"{number} of {len(runs)}: {arm}, {fraction:g} of the labels, seed {seed}, {steps} steps: {values}",
                    flush=True,
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    rows = [row for row in read_rows(file) if is_of(args, row) and row.split == args.split]
    print("\n".join(table(rows)))


def missing_cases(args, rows):
    """The (arm, fraction, seed, steps) of `args` without a row. Raises `UserError` if rows have other settings."""
    for flags in (args.flags.split(), args.pretrain_flags.split()):
        if "--seed" in flags or "--steps" in flags:
            raise UserError("--flags and --pretrain-flags must not contain --seed or --steps; use --seeds and --steps.")
    rows = [row for row in rows if is_of(args, row)]
    pretrained = f"{args.pretrained or variant_folder(args.out, args) / 'pretrained'}, "
    for row in rows:
        if row.flags != args.flags or row.pretrained and not row.pretrained.startswith(pretrained):
            raise UserError(
                f"--variant {args.variant} has runs with --flags '{row.flags}' and the pre-training run "
                f"'{row.pretrained}' in {args.out}; choose another name for --variant."
            )
    done = {row.case for row in rows}
    cases = [case[::-1] for case in product(args.steps, args.seeds, args.fractions, args.arms)]
    return [case for case in cases if (args.split, *case) not in done]


def variant_folder(out, settings):
    """The folder of the runs of a variant; settings: `Args` or a `Row`."""
    kinds = {"detect": settings.modality, "occupancy": f"occupancy-{settings.modality}"}
    return out / kinds.get(settings.task, settings.task) / settings.variant


def run_folder(out, settings, arm, fraction, steps, seed):
    """The folder of a fine-tuning run."""
    return variant_folder(out, settings) / f"{arm}-{fraction:g}-{steps}-{seed}"


def is_of(args, row):
    return (row.task, row.modality, row.variant) == (args.task, args.modality, args.variant)


def prepare(args, folder):
    """Generate the city and pre-train, unless this has been done."""
    if args.data_root is None and not is_synthetic(city(args)):
        size = [text for name, value in CITY_SIZE.items() for text in (f"--{name}", str(value))]
        run_python(args, "-m", "unipad.data.synthetic", "--out", str(city(args)), *size)
    if args.data_root is None and args.task == "occupancy" and not (city(args) / "gts").exists():
        add = "import pathlib, sys, unipad.data.synthetic as s; s.add_occupancy(pathlib.Path(sys.argv[1]))"
        run_python(args, "-c", add, str(city(args)))  # before two runs do
    if args.pretrained is None and any(arm.endswith("pretrained") for arm in args.arms):
        preset = {"segment": "segment" if args.data_root else "segment-tiny"}.get(args.task)
        preset = preset or (None if args.data_root else "tiny")
        flags = ["--preset", preset] if preset else []
        flags += ["--steps", args.pretrain_steps] if args.pretrain_steps else []
        flags += ["--init", args.init] if args.init else []
        train(args, "train.py", folder / "pretrained", *flags, *args.pretrain_flags.split())


def run_python(args, *arguments):
    """Run Python in a process of its own, since NumPy reads the variables of --portable when it is loaded."""
    if subprocess.run([sys.executable, *arguments], env=environment(args)).returncode:
        sys.exit(1)


def city(args):
    """The folder of the synthetic city."""
    return PORTABLE_CITY if args.portable else CITY


def environment(args):
    """The environment of the programs that this one starts."""
    return os.environ | (PORTABLE if args.portable else {})


def measure(args, folder, arm, fraction, seed, steps):
    """Fine-tune one arm and evaluate it: its rows."""
    path = run_folder(args.out, args, arm, fraction, steps, seed)
    from_pretrained = arm.endswith("pretrained")
    source = (args.pretrained or folder / "pretrained") if from_pretrained else args.init
    flags = ["--task", args.task, "--label-fraction", fraction, "--seed", seed, "--steps", steps, "--val-every", 0]
    preset = args.preset or (None if args.data_root else "tiny")
    flags += ["--preset", preset] if preset else []
    flags += ["--pretrained", source] if source else []
    flags += ["--freeze-encoder"] if arm.startswith("frozen") else []
    seconds = train(args, "finetune.py", path, *flags, *args.flags.split())
    results = path / f"eval-{args.split}"
    seconds += execute(args, log_of(path), "eval.py", path, "--split", args.split, "--out", results)
    origin = f"{source}, {pretraining_steps(source)} steps" if from_pretrained else ""
    return [
        Row(
            task=args.task,
            modality=args.modality,
            variant=args.variant,
            split=args.split,
            arm=arm,
            fraction=fraction,
            seed=seed,
            steps=steps,
            metric=metric,
            value=json.loads((results / name).read_text())[key],
            cpu_seconds=round(seconds),
            commit=commit() or "",
            flags=args.flags,
            pretrained=origin,
        )
        for metric, (name, key) in METRICS[args.task].items()
    ]


def pretraining_steps(run):
    """Steps of a pre-training run; "?" for a checkpoint outside a run's folder."""
    file = Path(run) / "config.json"
    return json.loads(file.read_text())["steps"] if file.exists() else "?"


def log_of(folder):
    """The file next to a run's folder with all that its scripts print."""
    return folder.with_name(f"{folder.name}.log")


def train(args, script, folder, *flags):
    """Run a training script into `folder`, or resume the run there; returns CPU seconds."""
    common = ["--modality", args.modality, "--data-root", args.data_root or city(args), "--version", args.version]
    return execute(args, log_of(folder), script, "--out", folder, "--resume", "auto", *common, *flags)


def execute(args, log, *command):
    """Run a script of this repository, its output appended to `log`; returns CPU seconds. Exits if the script fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable]
    if args.gpus:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.gpus)]
    with log.open("a") as output:
        print("\n" + " ".join(map(str, command)), file=output, flush=True)
        process = subprocess.Popen(
            [*launcher, *map(str, command)],
            env=environment(args) | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        print(f"{command[0]} ended with {process.returncode}; the end of {log}:", file=sys.stderr)
        print("\n".join(log.read_text().splitlines()[-5:]), file=sys.stderr)
        sys.exit(1)
    return usage.ru_utime + usage.ru_stime


def read_rows(file: Path) -> list[Row]:
    """The rows of a results.csv; none if the file does not exist."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [Row(**{f.name: f.type(line[f.name]) for f in fields(Row)}) for line in csv.DictReader(lines)]


def append_rows(file: Path, rows: list[Row]):
    """Append rows to a results.csv, which is made if it does not exist."""
    is_new = not file.exists()
    with file.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, [f.name for f in fields(Row)])
        if is_new:
            writer.writeheader()
        writer.writerows(vars(row) for row in rows)


def by_seed(rows: list[Row], *names: str) -> dict[tuple, dict[int, float]]:
    """{the rows' values of the fields `names`: {seed: value of the metric}}."""
    found = {}
    for row in rows:
        found.setdefault(tuple(getattr(row, name) for name in names), {})[row.seed] = row.value
    return found


def table(rows: list[Row]) -> list[str]:
    """Lines of Markdown: mean ± standard deviation over seeds; gain: of `pretrained` over `scratch`, seed by seed."""
    line_of = ("task", "modality", "variant", "split", "metric", "steps", "fraction")
    values = by_seed(rows, *line_of, "arm")
    arms = [arm for arm in ARMS if any(key[-1] == arm for key in values)]
    lines = [f"| task | modality | variant | split | metric | steps | labels | {' | '.join(arms)} | gain |"]
    lines += ["|---" * (8 + len(arms)) + "|"]
    for key in sorted({key[:-1] for key in values}):
        of_arm = {arm: values.get((*key, arm), {}) for arm in arms}
        scratch, pretrained = of_arm.get("scratch", {}), of_arm.get("pretrained", {})
        gains = [pretrained[seed] - scratch[seed] for seed in scratch.keys() & pretrained.keys()]
        cells = [spread(list(of_arm[arm].values())) for arm in arms] + [spread(gains, "+")]
        lines += [f"| {' | '.join(map(str, key[:-1]))} | {100 * key[-1]:g} % | {' | '.join(cells)} |"]
    return lines


def spread(values: list[float], sign: str = "") -> str:
    """`mean ± standard deviation (number of values)`."""
    if not values:
        return "-"
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.3f}{deviation} ({len(values)})"


def draw(rows: list[Row], file: Path):
    """Draw every metric of a task and modality over label fractions; and the first one over the steps of fine-tuning,
    with the fewest labels that runs of several lengths have in common."""
    if not rows:
        raise UserError(
            "results.csv in --out has no rows of the variant default on the split val: there is nothing to draw."
        )
    over_labels, over_steps = [], []  # the rows of each panel
    for panel in sorted({(row.task, row.modality, row.metric) for row in rows}):
        of_panel = [row for row in rows if (row.task, row.modality, row.metric) == panel]
        over_labels.append(of_the_widest_length(of_panel))
        longer = runs_of_several_lengths(of_panel) if panel[2] == next(iter(METRICS[panel[0]])) else []
        if len({row.arm for row in longer}) > 1:
            over_steps.append(longer)
    lengths = sorted({row.steps for of_panel in over_labels for row in of_panel})
    markers = dict(zip(lengths, cycle("soD^v"), strict=False))
    panels = len(over_labels + over_steps)
    columns = min(4, panels)
    figure = Figure(figsize=(3.1 * columns, 2.8 * -(-panels // columns) + 0.4), dpi=120, layout="constrained")
    axes = figure.subplots(-(-panels // columns), columns, squeeze=False).ravel()
    for axis, of_panel in zip(axes, over_labels, strict=False):
        draw_lines(axis, of_panel, lambda row: 100 * row.fraction, lambda row: (row.arm, row.steps), markers)
        axis.set(xlabel="labels, %", title=title_of(of_panel))
    for axis, of_panel in zip(axes[len(over_labels) :], over_steps, strict=False):
        draw_lines(axis, of_panel, lambda row: row.steps, lambda row: (row.arm, 0), {0: "."})
        axis.set(xlabel=f"steps, with {100 * of_panel[0].fraction:.3g} % of the labels", title=title_of(of_panel))
    for axis in axes[panels:]:
        axis.axis("off")
    arms = [arm for arm in ARMS if any(row.arm == arm for row in rows)]
    legend = [Line2D([], [], color=f"C{ARMS.index(arm)}", label=arm) for arm in arms]
    for steps, marker in markers.items():
        legend.append(Line2D([], [], color="gray", linestyle="none", marker=marker, label=f"{steps} steps"))
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def of_the_widest_length(rows):
    """The rows of the number of steps that was run with the most label fractions; of several such, the smallest."""
    fractions = {}  # steps -> label fractions
    for row in rows:
        fractions.setdefault(row.steps, set()).add(row.fraction)
    widest = max(sorted(fractions), key=lambda steps: len(fractions[steps]))
    return [row for row in rows if row.steps == widest]


def runs_of_several_lengths(rows):
    """The rows with the fewest labels with which a seed of an arm has runs of several lengths; of arms and seeds that
    have all of these lengths, so that a line shows the same seeds everywhere. [] without any."""
    for fraction in sorted({row.fraction for row in rows}):
        lengths = {}  # (arm, seed) -> numbers of steps
        for row in rows:
            if row.fraction == fraction:
                lengths.setdefault((row.arm, row.seed), set()).add(row.steps)
        most = max(lengths.values(), key=len)
        if len(most) > 1:
            return [row for row in rows if row.fraction == fraction and lengths[row.arm, row.seed] == most]
    return []


def title_of(rows):
    return f"{TITLES[rows[0].modality]} {TASKS[rows[0].task]}"


def draw_lines(axis, rows, x_of, line_of, markers):
    """Draw means and standard deviations over seeds.

    x_of: a row's position. line_of: (arm, marker's key) of the line that a row belongs to.
    """
    for line in sorted({line_of(row) for row in rows}, key=lambda line: (ARMS.index(line[0]), line[1])):
        points = {}  # position -> values of all seeds
        for row in rows:
            if line_of(row) == line:
                points.setdefault(x_of(row), []).append(row.value)
        xs, shift = sorted(points), 1.03 ** (ARMS.index(line[0]) - 1.5)  # so that no arm hides another's error bar
        axis.errorbar(
            [x * shift for x in xs], [np.mean(points[x]) for x in xs],
            [np.std(points[x], ddof=1) if len(points[x]) > 1 else 0 for x in xs],
            color=f"C{ARMS.index(line[0])}", marker=markers[line[1]], markersize=4, capsize=2,
        )  # fmt: skip
    ticks = sorted(map(x_of, rows))
    axis.set(xscale="log", ylabel=rows[0].metric, ylim=(0, 1.05 * axis.get_ylim()[1]))
    axis.set(xticks=sorted(set(ticks)), xlim=(ticks[0] / 1.4, ticks[-1] * 1.4))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.5g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)


def draw_frame(out: Path, rows: list[Row], file: Path):
    """Draw one frame as each arm sees it, from above: a line of pictures per modality of detection.

    Of the runs with the fewest labels, the most steps and the first seed; drawn where `scratch` and `pretrained` exist.
    """
    lines = []
    for modality in sorted({row.modality for row in rows if row.task == "detect"}):
        of_modality = [row for row in rows if (row.task, row.modality) == ("detect", modality)]
        runs = {(row.fraction, -row.steps, row.seed) for row in of_modality if row.arm == "scratch"}
        runs &= {(row.fraction, -row.steps, row.seed) for row in of_modality if row.arm == "pretrained"}
        if runs:
            fraction, steps, seed = min(runs)
            cases = [(arm, fraction, -steps, seed) for arm in ("scratch", "pretrained")]
            files = [run_folder(out, of_modality[0], *case) / "eval-val" / "boxes_1.png" for case in cases]
            lines.append((f"{TITLES[modality]}, {100 * fraction:.3g} % of the labels, {-steps} steps", files))
    if not lines:
        return
    figure = Figure(figsize=(8, 4.1 * len(lines)), dpi=120, layout="constrained")
    axes = figure.subplots(len(lines), 2, squeeze=False)
    for (title, files), of_line in zip(lines, axes, strict=True):
        for arm, picture, axis in zip(("scratch", "pretrained"), files, of_line, strict=True):
            pixels = matplotlib.image.imread(picture)
            axis.imshow(pixels[:, : len(pixels)])  # the view from above is the square at the left
            axis.set_title(f"{title}: {arm}", fontsize=9)
            axis.axis("off")
    figure.savefig(file)


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(Args, description=__doc__))
