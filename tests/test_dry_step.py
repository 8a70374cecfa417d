"""A training step waits for the device only in a `backend.host_wait`, and does not mix devices.

These tests dry-run the main recipes; `python -m tests.dry_step --all` runs all recipes and variants, and
compiles what they launch for all targets.
"""

import json

import pytest

from tests import dry_step, scripts

# step -> largest allowed (number of launches of our kernels, number of PyTorch operators) in the dry run, which has one
# block per encoder stage and no optimizer, but includes `Batch.to`. Each launch and operator takes host time, which
# bounds the speed of a LiDAR step with one sample. (A real GPU runs fewer operators: there one operator computes the
# norms of all gradients.)
BUDGETS = {
    "train camera-0.1": (23, 1228),
    "detect lidar-0.075": (128, 1702),
    "segment segment": (241, 459),
}

pytest.importorskip("triton", reason="Triton has wheels for Linux only")


def run(code):
    """The JSON lines that `code` prints in a process without Triton's interpreter, where tests.dry_step is imported."""
    done = scripts.run("-c", f"import sys; from tests.dry_step import *; {code}", timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_main_recipes_pass_a_dry_run():
    lines = run("sys.exit(main())")
    assert [line["step"] for line in lines if "step" in line] == list(dry_step.MAIN)
    for step, (launches, operators) in BUDGETS.items():
        (line,) = (line for line in lines if line.get("step") == step)
        assert line["launches"] <= launches and line["operators"] <= operators, line


def test_sixty_scenes_compile_no_more_than_the_first_twenty():
    """The number of voxels differs from step to step, and each compilation would stall a run for seconds.

    `count_specializations` returns {kernel: number of specializations} after 20 steps and after 60, each step with a
    scene of another size.
    """
    ((after_20, after_60),) = run("print(json.dumps(count_specializations(60, first=20)))")
    assert after_60 == after_20
    assert len(after_60) >= 10  # kernels
    # specializations per kernel; these have more: for each number of channels, norms with and without a residual, and
    # gradients of the weights of two layers, or of one where a scene of a voxel or two ends an op
    by_channels = "_gather_gemm_kernel", "_norm_relu_fwd_kernel", "_norm_relu_bwd_kernel", "_d_weight_of_groups_kernel"
    assert max(n for kernel, n in after_60.items() if kernel not in by_channels) <= 5


def test_every_recipe_is_covered():
    recipes = [recipe for presets in (dry_step.PRETRAIN, dry_step.DETECT, dry_step.SEGMENT)
               for named in presets.values() for recipe in named.values()]  # fmt: skip
    covered = [step.recipe for step in dry_step.steps()]
    assert all(recipe in covered for recipe in recipes)
    assert {r.render.method for r in covered if hasattr(r, "render")} == {"neus", "volsdf", "unisurf"}
    assert {r.camera.view for r in covered if r.camera} == {"gather", "pool"}


def test_seeded_faults_are_detected():
    """Operations with one deliberate ("seeded") fault each -> what the dry run reports; None: there is no fault.

    A report is the name of an exception; or a list of "<kernel> on <argument>", where another value of the argument
    would compile the kernel again; or "shared", where a launch needs more shared memory than a GPU with 99 KB has.
    """
    reported = {line["seeded"]: line["found"] for line in run("print_seeded_faults()")}
    assert reported == {
        "a tensor left on the CPU": "FakeTensorDeviceMismatchError",
        "a CPU tensor in a launch": "DeviceMismatch",
        "a CPU generator": "DeviceMismatch",
        "item": "UnmarkedWait",
        "tolist": "UnmarkedWait",
        "a condition": "UnmarkedWait",
        "a mask": "UnmarkedWait",
        "a write under a mask": "UnmarkedWait",
        "nonzero": "UnmarkedWait",
        "unique": "UnmarkedWait",
        "new_tensor": "UnmarkedWait",
        "tensor": "UnmarkedWait",
        "a copy back": "UnmarkedWait",
        "no fault": None,
        "a specialized size": ["_composite_fwd_kernel on S"],
        "a varying size": None,
        "more than 99 KB": "shared",
        "less than 99 KB": None,
    }
