"""The README's commands do what they say, at small sizes."""

import re
import shlex
import subprocess
import sys

import pytest

import finetune
import train
from tests.test_train import REPO, environment

README = (REPO / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.strip().splitlines()]

QUICK = "--device cpu --preset tiny --steps 2 --workers 0"
FEW_RAYS = "--rays.per-view 8 --val-samples 1 --picture-stride 16"
# What stands in for the sizes, folders and launchers of the README
SMALLER = [
    (r"^pip install .* && ", ""),
    (r"^python ", "{python} "),
    (r"^torchrun --nproc-per-node 8", "{python} -m torch.distributed.run --standalone --nproc-per-node 2"),
    (r"--data-root /data/nuscenes --version v1.0-trainval", "--data-root data/synthetic"),
    (r"--batch-size 8", "--batch-size 2"),
    (r"(train\.py --modality.*)$", rf"\1 {QUICK} {FEW_RAYS}"),
    (r"--preset segment(?:-tiny)?(.*) --preset tiny", r"--preset segment-tiny\1"),
    (r"(finetune\.py .*)$", rf"\1 {QUICK}"),
    (r"(eval\.py .*)$", r"\1 --device cpu --workers 0"),
    (r"(eval\.py .*)--picture-stride 4", r"\1--picture-stride 16"),
    (r"(eval\.py .*--mesh)", r"\1 --mesh-cell 4 --picture-stride 16"),
    (r"-m unipad\.selfcheck$", "-m unipad.selfcheck --ops voxelize"),
    (r"--seeds 0 1 2", "--seeds 0 --steps 1 --pretrained outputs/train-lidar"),
    (r"--scenes 10 --keyframes 4 --image-size 900 1600", "--scenes 2 --keyframes 2 --image-size 64 96"),
]


def test_every_kind_of_command_is_met():
    assert sum("train.py" in c for c in COMMANDS) >= 4
    assert [c for c in COMMANDS if "pytest" in c] == ["pip install -e '.[test]' && pytest"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "pytest" not in c and "tensorboard" not in c])
def test_command_runs(command, city, tmp_path):
    for name in ("train.py", "finetune.py", "eval.py", "unipad", "kernels", "benchmarks"):
        (tmp_path / name).symlink_to(REPO / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "synthetic").symlink_to(city)
    for pattern, smaller in SMALLER:
        command = re.sub(pattern, smaller, command)
    command = command.format(python=sys.executable)
    scripts = {"train": (train, FEW_RAYS.split()), "finetune": (finetune, [])}
    for name, modality in re.findall(r"outputs/(train|finetune)-(\w+)", command):  # runs that it goes on from
        script, flags = scripts[name]
        what = ["--modality", modality]
        if modality == "segment":
            what = ["--modality", "lidar", "--preset", "segment-tiny"] if script is train else ["--task", "segment"]
        out = tmp_path / f"outputs/{name}-{modality}" / "run"
        flags = ["--preset", "tiny", "--data-root", city, "--device", "cpu", "--workers", 0, "--steps", 1, *flags]
        script.main(script.parse([*flags, *what, "--out", out]))
    done = subprocess.run(shlex.split(command), cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    if " train.py" in command:
        assert list(tmp_path.glob("outputs/train-*/*/images/val_000002.png"))


def test_the_tree_names_every_file():
    tree = README.split("## Tree")[1]
    for file in [*REPO.glob("*.py"), *REPO.glob("unipad/**/*.py"), *REPO.glob("kernels/*.py")]:
        if file.name != "__init__.py":
            assert file.name in tree, f"{file.relative_to(REPO)} is missing from the README's tree"
