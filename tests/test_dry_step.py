"""A training step on a GPU that is not there neither waits nor crosses devices, and all it launches compiles.

The main recipes here; `python -m tests.dry_step --all` takes every recipe, its variants and every target.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import dry_step

pytest.importorskip("triton", reason="Triton has wheels for Linux only")


def run(code):
    """The JSON lines of a program that runs without Triton's interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"from tests.dry_step import *; {code}"]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_main_recipes_run_dry_and_their_launches_compile():
    lines = run("sys.exit(main())")
    assert [line["step"] for line in lines if "step" in line] == list(dry_step.MAIN)
    assert len([line for line in lines if "kernel" in line]) >= 12


def test_a_hundred_scenes_compile_no_more_than_ten():
    """Counts of voxels differ from step to step, and compiling would stop a run for seconds each time."""
    ((of_ten, of_all),) = run("print(json.dumps(variants(100)))")
    assert of_all == of_ten and len(of_all) >= 10
    assert max(n for kernel, n in of_all.items() if kernel != "_gather_gemm_kernel") <= 5


def test_every_recipe_is_a_step():
    recipes = [recipe for presets in (dry_step.PRETRAIN, dry_step.DETECT, dry_step.SEGMENT)
               for named in presets.values() for recipe in named.values()]  # fmt: skip
    run_dry = [step.recipe for step in dry_step.steps()]
    assert all(recipe in run_dry for recipe in recipes)
    assert {r.render.method for r in run_dry if hasattr(r, "render")} == {"neus", "volsdf", "unisurf"}
    assert {r.camera.view for r in run_dry if r.camera} == {"gather", "pool"}


def test_seeded_faults_are_found():
    found = {line["seeded"]: line["found"] for line in run("seeded()")}
    assert found == {
        "a tensor left on the CPU": "FakeTensorDeviceMismatchError",
        "a kernel on what the CPU has": "Crosses",
        "a generator of the CPU": "Crosses",
        "item": "Waits",
        "tolist": "Waits",
        "a condition": "Waits",
        "a mask": "Waits",
        "a mask that is written": "Waits",
        "nonzero": "Waits",
        "unique": "Waits",
        "new_tensor": "Waits",
        "tensor": "Waits",
        "a copy back": "Waits",
        "no fault": None,
        "a size that is specialised": ["_composite_fwd_kernel by S"],
        "a size that is not": None,
        "more than 99 KB": "shared",
        "less than 99 KB": None,
    }
