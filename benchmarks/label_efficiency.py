"""What pre-training gains with few labels: fine-tuning from scratch and from a pre-trained encoder.

    python -m benchmarks.label_efficiency --modality lidar                      # synthetic city, a few minutes a run
    python -m benchmarks.label_efficiency --modality camera --seeds 0 1 2
    python -m benchmarks.label_efficiency --task segment --seeds 0 1 2
    python -m benchmarks.label_efficiency --modality lidar --pretrained RUN --preset lidar-0.075-ablation --steps 7000 \
        --data-root /data/nuscenes --version v1.0-trainval      # the recipe of the paper's headline gains

Pre-trains once (or takes --pretrained), then fine-tunes twice per seed: same seed, steps and label fraction, with and
without the pre-trained encoder. Prints NDS and mAP, or mIoU and accuracies, of each run on the validation split.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Args:
    task: Literal["detect", "segment"] = "detect"  # task of fine-tuning
    modality: Literal["camera", "lidar", "fusion"] = "lidar"  # input of the encoder
    label_fraction: float = 0.2  # fraction of the training frames that fine-tuning uses
    seeds: tuple[int, ...] = (0,)  # seeds of the fine-tuning runs
    pretrained: Path | None = None  # pre-training run; None: train one with the default preset for the task
    init: Path | None = None  # ImageNet weights of the camera encoder, for pre-training and for runs from scratch
    pretrain_steps: int | None = None  # steps of pre-training; None: its preset's
    steps: int = 600  # steps of each fine-tuning run
    preset: str | None = None  # preset of fine-tuning; None: finetune.py's default (a tiny one without --data-root)
    data_root: Path | None = None  # folder of a nuScenes set; None: the synthetic city
    version: Literal["v1.0-mini", "v1.0-trainval"] = "v1.0-mini"  # version of the set
    out: Path = Path("outputs/label-efficiency")  # folder of all runs; runs finished there are not repeated


METRICS = {"detect": ("NDS", "mAP"), "segment": ("mIoU", "mAcc", "allAcc")}


def main(args: Args):
    out = args.out / (args.modality if args.task == "detect" else args.task)
    common = ["--modality", args.modality, "--version", args.version]
    common += ["--data-root", args.data_root] if args.data_root else []
    pretrained = args.pretrained or out / "pretrained"
    if not args.pretrained:
        # to detect: train.py's default preset
        preset = {"segment": "segment" if args.data_root else "segment-tiny"}.get(args.task)
        flags = ["--preset", preset] if preset else []
        flags += ["--steps", args.pretrain_steps] if args.pretrain_steps else []
        flags += ["--init", args.init] if args.init else []
        run("train.py", pretrained, *common, *flags)
    rows = []
    for seed in args.seeds:
        for start in ("scratch", "pretrained"):
            folder = out / f"{start}-{seed}"
            flags = ["--task", args.task, "--label-fraction", args.label_fraction, "--seed", seed]
            flags += ["--steps", args.steps, "--val-every", args.steps]
            flags += ["--preset", args.preset] if args.preset else []
            source = pretrained if start == "pretrained" else args.init  # --pretrained also takes ImageNet weights
            flags += ["--pretrained", source] if source else []
            run("finetune.py", folder, *common, *flags)
            rows.append((seed, start, [last(folder, f"val/{name}") for name in METRICS[args.task]]))
    print(f"\n{args.task}, {args.modality}, {args.label_fraction:.0%} of the labels")
    print(f"{'seed':>4}  {'start':<12}" + "".join(f"{name:>8}" for name in METRICS[args.task]))
    for seed, start, values in rows:
        print(f"{seed:>4}  {start:<12}" + "".join(f"{value:>8.4f}" for value in values))


def run(script, folder, *flags):
    """Run a script of this repository into `folder`, or resume a run there; exit if it fails."""
    command = [sys.executable, script, "--out", folder, "--resume", "auto", *flags]
    done = subprocess.run([str(part) for part in command])
    if done.returncode:
        sys.exit(done.returncode)


def last(folder, name):
    """The last value of a scalar in a run's log."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record][-1]


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
