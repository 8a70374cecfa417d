"""The README's commands run at small sizes, and its file list is complete; its commands and those of docs/recipes.md
give trained weights to recipes that freeze stages of the camera encoder.
"""

import re
import shlex
import sys

import pytest

import finetune
import train
from tests import scripts
from tests.scripts import REPO
from unipad import cli
from unipad.errors import UserError

README = (REPO / "README.md").read_text()
# Not ```sh: commands that need the network, downloaded weights or a cluster
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.strip().splitlines()]

QUICK = "--device cpu --preset tiny --steps 2 --val-every 2 --save-every 9 --workers 0"
FEW_RAYS = "--rays.per-view 8 --val-samples 1 --picture-stride 16 --render.samples 12 --render.importance 4"
# Regular expression -> replacement, applied in this order: smaller sizes, folders and weights that the test has
SMALLER = [
    (r"^pip install .* && ", ""),
    (r"^python ", "{python} "),
    (
        r"^torchrun --nproc-per-node 8(.*)$",
        r"{python} -m torch.distributed.run --standalone --nproc-per-node 2\1 --batch-size 2",
    ),
    (r"--data-root /data/nuscenes --version v1.0-trainval", "--data-root data/synthetic"),
    (r"--init convnext.pt", "--init outputs/train-camera"),
    (r"(train\.py --modality.*)$", rf"\1 {QUICK} {FEW_RAYS}"),
    # the last --preset would count, but the encoder of QUICK's "tiny" is not that of segmentation
    (r"--preset segment(?:-tiny)?(.*) --preset tiny", r"--preset segment-tiny\1"),
    (r"(finetune\.py .*)$", rf"\1 {QUICK}"),
    (r"(eval\.py .*)$", r"\1 --device cpu --workers 0"),
    (r"(eval\.py .*)--picture-stride 4", r"\1--picture-stride 16"),
    (r"(eval\.py .*--mesh)", r"\1 --mesh-cell 4 --picture-stride 16"),
    (r"-m unipad\.selfcheck$", "-m unipad.selfcheck --ops voxelize"),
    (
        r"(label_efficiency .*)--fractions 0.05 --arms scratch pretrained",
        r"\1--fractions 0.5 --steps 1 --arms pretrained --pretrained outputs/train-lidar --preset tiny "
        r"--data-root data/synthetic --version v1.0-mini",
    ),
    (r"--scenes 10 --keyframes 4 --image-size 900 1600", "--scenes 2 --keyframes 2 --image-size 64 96"),
]


def test_train_and_pytest_commands_are_found():
    assert sum("train.py" in c for c in COMMANDS) >= 4
    assert [c for c in COMMANDS if "pytest" in c] == ["pip install -e '.[test]' && pytest"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if "pytest" not in c and "tensorboard" not in c])
def test_command_runs(command, city, tmp_path):
    for name in ("train.py", "finetune.py", "eval.py", "unipad", "kernels", "benchmarks"):
        (tmp_path / name).symlink_to(REPO / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "synthetic").symlink_to(city)
    for pattern, smaller in SMALLER:
        command = re.sub(pattern, smaller, command)
    command = command.format(python=sys.executable)
    prerequisites = {"train": (train, FEW_RAYS.split()), "finetune": (finetune, [])}
    # runs that the command needs; kind: a modality, "segment" or "occupancy-" and a modality
    for name, kind in re.findall(r"outputs/(train|finetune)-([\w-]+)", command):
        script, flags = prerequisites[name]
        task, _, modality = kind.rpartition("-")
        recipe_flags = ["--modality", modality] + (["--task", task] if task else [])
        if kind == "segment":
            recipe_flags = (
                ["--modality", "lidar", "--preset", "segment-tiny"] if script is train else ["--task", "segment"]
            )
        out = tmp_path / f"outputs/{name}-{kind}" / "run"
        one_step = "--preset tiny --device cpu --workers 0 --steps 1 --val-every 0".split()
        flags = [*one_step, "--data-root", city, *flags]
        script.main(script.parse([*flags, *recipe_flags, "--out", out]))
    python, *arguments = shlex.split(command)
    assert python == sys.executable
    done = scripts.run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    if " train.py" in command:
        assert list(tmp_path.glob("outputs/train-*/*/images/val_000002.png"))


def test_the_files_section_names_every_script_subpackage_kernel_file_and_page():
    files = README.split("## Files")[1]
    for path in [*REPO.glob("*.py"), *REPO.glob("unipad/*/"), *REPO.glob("kernels/*.py"), *REPO.glob("docs/*.md")]:
        if path.name not in ("__init__.py", "__pycache__"):
            assert path.name in files, f"{path.relative_to(REPO)} is missing from the README"


def paper_commands():
    """Commands of the README and of docs/recipes.md that run a recipe of the paper on nuScenes."""
    nuscenes = "--data-root /data/nuscenes --version v1.0-trainval"
    commands = [re.sub(r"^torchrun --nproc-per-node 8", "python", c) for c in COMMANDS if nuscenes in c]
    tables = "\n".join(l for l in (REPO / "docs" / "recipes.md").read_text().splitlines() if l.startswith("|"))
    rows = re.findall(r"`(python (?:train|finetune)\.py [^`]*)`", tables)
    return commands + [f"{row} {nuscenes}" for row in rows]


def test_paper_commands_start_frozen_stages_from_trained_weights():
    """Each command whose recipe freezes camera stages has --init or --pretrained."""
    commands = paper_commands()
    assert len(commands) >= 29  # 4 of the README and 25 rows of docs/recipes.md
    for command in commands:
        _, script, *flags = shlex.split(command)
        script, flag = {"train.py": (train, "--init"), "finetune.py": (finetune, "--pretrained")}[script]
        args = script.parse(flags)
        try:
            cli.check_frozen_stages(args.recipe, getattr(args, flag[2:]), flag)
        except UserError as error:
            pytest.fail(f"{command}: {error}")
