"""A training step neither waits for the device unmarked nor mixes devices, and all it launches compiles.

On a simulated GPU, for the main recipes; `python -m tests.dry_step --all` covers all recipes, variants and targets.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import dry_step

pytest.importorskip("triton", reason="Triton has wheels for Linux only")


PROGRAM = """
from tests.dry_step import *
main()
print(json.dumps(dict(zip(("of_few", "of_all"), count_specializations(20, first=10)))))
print_seeded_faults()
"""


@pytest.fixture(scope="module")
def lines():
    """What a process without Triton's interpreter prints, as dicts."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_main_recipes_pass_a_dry_run_and_their_launches_compile(lines):
    assert not [line for line in lines if "fault" in line]
    assert [line["step"] for line in lines if "step" in line] == list(dry_step.MAIN)
    assert len([line for line in lines if "kernel" in line]) >= 12


def test_more_scenes_compile_no_more_kernels(lines):
    """The number of voxels differs from step to step, and each compilation would stall a run for seconds."""
    (counts,) = [line for line in lines if "of_all" in line]
    assert counts["of_all"] == counts["of_few"] and len(counts["of_all"]) >= 10
    assert max(n for kernel, n in counts["of_all"].items() if kernel != "_gather_gemm_kernel") <= 5


def test_every_recipe_is_covered():
    recipes = [recipe for presets in (dry_step.PRETRAIN, dry_step.DETECT, dry_step.SEGMENT)
               for named in presets.values() for recipe in named.values()]  # fmt: skip
    covered = [step.recipe for step in dry_step.steps()]
    assert all(recipe in covered for recipe in recipes)
    assert {r.render.method for r in covered if hasattr(r, "render")} == {"neus", "volsdf", "unisurf"}
    assert {r.camera.view for r in covered if r.camera} == {"gather", "pool"}


def test_seeded_faults_are_detected(lines):
    found = {line["seeded"]: line["found"] for line in lines if "seeded" in line}
    assert found == {
        "a tensor left on the CPU": "FakeTensorDeviceMismatchError",
        "a CPU tensor in a launch": "DeviceMismatch",
        "a CPU generator": "DeviceMismatch",
        "item": "UnnamedWait",
        "tolist": "UnnamedWait",
        "a condition": "UnnamedWait",
        "a mask": "UnnamedWait",
        "a write under a mask": "UnnamedWait",
        "nonzero": "UnnamedWait",
        "unique": "UnnamedWait",
        "new_tensor": "UnnamedWait",
        "tensor": "UnnamedWait",
        "a copy back": "UnnamedWait",
        "no fault": None,
        "a specialized size": ["_composite_fwd_kernel on S"],
        "a varying size": None,
        "more than 99 KB": "shared",
        "less than 99 KB": None,
    }
