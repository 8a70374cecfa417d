"""Compare results of this CPU and of emulated ones, with and without `benchmarks.label_efficiency --portable`.

    apt-get install qemu-user                       # version 7.2 or newer
    python -m tests.other_cpus                      # LiDAR detection, about 15 minutes
    python -m tests.other_cpus --kind segment --cpus EPYC
    python -m tests.other_cpus --record             # writes tests/portable.json, with which a test compares every CPU

Generates a small city, pre-trains, fine-tunes and evaluates, three steps each, on this CPU and on emulated ones of
Intel and AMD, and prints checksums of what each stage wrote. A stage starts from what this CPU wrote in the stage
before, so a difference shows where it arises. Exits with 1 if results differ with --portable, or if none differ without
it: then the comparison could not find what it is for.

The emulator computes exactly, so instructions whose result is up to the vendor (`rsqrtps`) differ from those of any
real CPU. It has no AVX-512.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import PIL
import scipy
import torch
import tyro
from torch.utils._pytree import tree_iter

from benchmarks.label_efficiency import PORTABLE
from tests.scripts import REPO

HERE = "this CPU"
EMULATOR = "qemu-x86_64"
STAGES = ("city", "pretrain", "finetune", "evaluate")
RECORD = REPO / "tests" / "portable.json"  # what --portable gave on one CPU: versions, and kind -> stage -> checksum
RECORDED = {"lidar": 20, "fusion": 3}  # kind -> steps
KINDS = {  # kind -> flags of train.py and of finetune.py
    "lidar": ("--modality lidar --preset tiny", "--modality lidar --preset tiny"),
    "camera": ("--modality camera --preset tiny", "--modality camera --preset tiny"),
    "fusion": ("--modality fusion --preset tiny", "--modality fusion --preset tiny"),
    "segment": ("--modality lidar --preset segment-tiny", "--task segment --preset tiny"),
}


@dataclass(frozen=True)
class Args:
    kind: Literal["lidar", "camera", "fusion", "segment"] = "lidar"  # what to train
    cpus: tuple[str, ...] = ("Haswell", "EPYC")  # CPUs to emulate, of qemu-x86_64 -cpu help; they need AVX2 and FMA
    record: bool = False  # record the results of this CPU instead, in tests/portable.json


def main(args: Args):
    if args.record:
        sums = {kind: portable_results(kind, steps) for kind, steps in RECORDED.items()}
        RECORD.write_text(json.dumps({"versions": versions(), **sums}, indent=1) + "\n")
        return
    different = {True: [], False: []}  # portable -> stages that differ between CPUs
    with tempfile.TemporaryDirectory() as folder:
        for portable in (True, False):
            for stage in STAGES:
                sums = {}
                for cpu in (HERE, *(args.cpus if portable else args.cpus[:1])):
                    out = Path(folder) / f"{cpu}-{portable}"
                    run(cpu, portable, *command(stage, args.kind, out, Path(folder) / f"{HERE}-True"))
                    sums[cpu] = checksum(out / stage)
                flag = "--portable" if portable else ""
                print(f"{stage:10}{flag:12}" + "  ".join(f"{cpu} {text}" for cpu, text in sums.items()), flush=True)
                if len(set(sums.values())) > 1:
                    different[portable].append(stage)
    sys.exit(1 if different[True] or not different[False] else 0)


def versions():
    """What the digits of `--portable` depend on."""
    packages = {"torch": torch, "numpy": np, "scipy": scipy, "opencv": cv2, "Pillow": PIL}
    return {name: package.__version__ for name, package in packages.items()} | {"libc": " ".join(platform.libc_ver())}


def portable_results(kind, steps):
    """{stage: checksum} on this CPU, each stage from what the one before wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out, sums = Path(folder), {}
        for stage in STAGES:
            run(HERE, True, *command(stage, kind, out, out, steps))
            sums[stage] = checksum(out / stage)
    return sums


def command(stage, kind, out, first, steps=3):
    """What follows `python` for a stage that writes out/stage; first: folder of the stages before it."""
    pretrain, finetune = KINDS[kind]
    # one process: the emulator does not follow a program into new ones
    few = ["--data-root", first / "city", "--workers", 0, "--steps", steps, "--val-every", 0, "--out", out / stage]
    return {
        "city": ["-m", "unipad.data.synthetic", "--scenes", 2, "--keyframes", 2, "--sweeps", 2, "--columns", 60,
                 "--workers", 1, "--out", out / stage],
        "pretrain": ["train.py", *pretrain.split(), *few],
        "finetune": ["finetune.py", *finetune.split(), "--pretrained", first / "pretrain", *few],
        "evaluate": ["eval.py", first / "finetune", "--workers", 0, "--out", out / stage],
    }[stage]  # fmt: skip


def run(cpu, portable, *arguments):
    """Run Python with `arguments` in the checkout; `cpu`: `HERE` or one to emulate. Exits if the program fails.
    Returns its output."""
    environment = {name: value for name, value in os.environ.items() if name not in PORTABLE}
    environment |= PORTABLE if portable else {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [] if cpu == HERE else [EMULATOR, "-cpu", cpu]
    done = subprocess.run(
        [*launcher, sys.executable, *map(str, arguments)],
        cwd=REPO, env=environment | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(map(str, arguments))}\nended with {done.returncode} on {cpu}:\n{done.stderr[-2000:]}")
    return done.stdout


def checksum(folder):
    """Of the weights of a training run, of the results of an evaluation, or of all files of a city."""
    digest = hashlib.sha256()
    checkpoint = folder / "checkpoints" / "last.pt"
    if checkpoint.exists():
        for value in tree_iter(torch.load(checkpoint, weights_only=False)["model"]):
            digest.update(value.numpy().tobytes())
        return digest.hexdigest()[:12]
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".png"]
    for file in sorted(file for file in files if file.name[0] != "."):  # .lock names a process
        content = file.read_bytes()
        if file.name == "metrics_summary.json":
            content = json.dumps({**json.loads(content), "eval_time": None}).encode()
        digest.update(content)
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
