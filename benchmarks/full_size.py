"""Run one training step of each full-size preset as a user would, and print time, peak memory and loss.

    python -m benchmarks.full_size                        # all presets except the tiny ones, on the CPU
    python -m benchmarks.full_size camera-0.1 --task train
    python -m benchmarks.full_size --device cuda

Generates a synthetic city of 900 x 1600 images once (data/full-size) and runs train.py or finetune.py on it, with batch
size 1 and, for camera and fusion recipes, activation checkpointing of the ConvNeXt. Seconds are those of the whole
process, including imports, data loading and validation. Memory (in GiB) is the peak until the end of the step: on the
GPU, or of the process on the CPU.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from unipad.checkpoint import write_checkpoint
from unipad.data.synthetic import generate
from unipad.model.encoder import Encoder
from unipad.recipes import DETECT, OCCUPANCY, PRETRAIN, SEGMENT

CITY = Path("data/full-size")
COMMON = ["--steps", "1", "--batch-size", "1", "--workers", "0", "--data-root", str(CITY)]
# task -> script, presets by modality, flag for initial weights, other flags (those of train.py shorten its validation)
SCRIPTS = {
    "train": ("train.py", PRETRAIN, "--init", ["--val-samples", "1", "--picture-stride", "64"]),
    "finetune": ("finetune.py", DETECT, "--pretrained", []),
    "segment": ("finetune.py", SEGMENT, "--pretrained", ["--task", "segment"]),
    "occupancy": ("finetune.py", OCCUPANCY, "--pretrained", ["--task", "occupancy"]),
}


@dataclass(frozen=True)
class Args:
    presets: tyro.conf.Positional[tuple[str, ...]] = ()  # names of presets (default: all except the tiny ones)
    task: Literal["train", "finetune", "segment", "occupancy"] | None = None  # default: all
    device: Literal["cpu", "cuda"] = "cpu"  # device of the step


def main(args: Args):
    if not CITY.exists():
        generate(CITY, scenes=2, keyframes=2, image_size=(900, 1600), camera_sweeps=2)
    print(f"{'script':<12}{'modality':<10}{'preset':<24}{'seconds':>9}{'peak GB':>9}  loss", flush=True)
    for task, (script, by_modality, init_flag, flags) in SCRIPTS.items():
        for modality, presets in by_modality.items():
            for name, recipe in presets.items():
                if "tiny" not in name.split("-") and name in (args.presets or presets) and task == (args.task or task):
                    checkpointing = ["--checkpointing"] if modality != "lidar" else []
                    preset = ["--modality", modality, "--preset", name, "--device", args.device]
                    cells = measure(script, [*flags, *checkpointing, *preset], recipe, init_flag)
                    print(f"{script:<12}{modality:<10}{name:<24}{cells}", flush=True)


def measure(script, flags, recipe, init_flag):
    """Run one step of a script; returns its seconds, peak memory and loss as cells of the table, in one string.

    init_flag: the script's flag for initial weights, without which it refuses a camera encoder with frozen stages. The
        weights given here are random.
    """
    with tempfile.TemporaryDirectory() as folder:
        if recipe.camera is not None:
            weights = Encoder(recipe).state_dict(prefix="encoder.")
            write_checkpoint({"model": weights}, Path(folder, "init.pt"))
            flags = [*flags, init_flag, f"{folder}/init.pt"]
        begin = time.perf_counter()
        command = [sys.executable, script, *COMMON, *flags, "--out", f"{folder}/run"]
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - begin
        if done.returncode:
            return f"{seconds:9.0f}  failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
        records = [json.loads(line) for line in Path(folder, "run", "log.jsonl").read_text().splitlines()]
    step = next(record for record in records if "train/loss" in record)
    peak = step.get("train/gpu_mem_mb", step.get("train/mem_mb")) / 1024
    return f"{seconds:9.0f}{peak:9.1f}  {step['train/loss']:.3g}"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
