"""The self-check covers every op, reports faults, and survives a check that crashes its process."""

import importlib
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import unipad.kernels
from tests.check import launches
from tests.conftest import HAS_GPU
from unipad.errors import UserError
from unipad.kernels import backend
from unipad.selfcheck import Case, __main__, checks, processes, results, run
from unipad.selfcheck.__main__ import Args, main

FILES = [file.stem for file in Path(unipad.kernels.__path__[0]).glob("[!_]*.py")]


@pytest.fixture
def with_kernels(monkeypatch):
    """Without a GPU, ops run their kernels in Triton's interpreter instead of the references."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    monkeypatch.setattr(backend, "interpret", not HAS_GPU)


@pytest.fixture
def in_process(monkeypatch):
    """Run the checks in this process, on a GPU too, so that ops can be replaced."""
    monkeypatch.setattr(__main__, "results", partial(results, isolate=False))


def op_of(case):
    """The op in the name of a case, such as "lift, bit-equal" or "sdf_render neus"."""
    return case.name.split(",")[0].split()[0]


SMALL = list(checks(("small",)))
ONE_EACH = {op_of(case): case for case in reversed(SMALL)}  # the first of each op


@pytest.mark.parametrize("op", ONE_EACH)
def test_every_op_matches_its_reference(op, with_kernels):
    """In the first of its small cases."""
    with launches() as launched:
        result = run(ONE_EACH[op])
    assert result.status == "ok", result
    # unisurf_alpha is a sigmoid, without a kernel
    assert launched or op == "unisurf_alpha", "the op ran its reference, not its kernels"


@pytest.mark.skipif(HAS_GPU, reason="`python -m unipad.selfcheck` runs these cases with the kernels")
@pytest.mark.parametrize("op", ONE_EACH)
def test_all_small_cases_pass_with_the_references(op, monkeypatch):
    """The references are fast; what fails here is a case of impossible sizes."""
    monkeypatch.setattr(backend, "interpret", False)
    results_of_op = [run(case) for case in SMALL if op_of(case) == op]
    assert [result for result in results_of_op if result.status != "ok"] == []


def test_every_op_has_a_case():
    modules = [importlib.import_module(f"unipad.kernels.{file}") for file in FILES]
    ops = {
        name
        for module in modules
        for name, value in vars(module).items()
        if hasattr(module, f"{name}_ref") and value.__module__ == module.__name__ and name[0] != "_"
    }
    assert ops == ONE_EACH.keys() - {"unisurf_alpha"}, "an op with a reference has no case"
    assert {op_of(case) for case in checks(("recipe",))} == ONE_EACH.keys()
    names = [str(case) for case in checks()]
    assert len(set(names)) == len(names), "two cases have the same name, by which worker processes find them"


def inaccurate(**inputs):
    out, weights = ONE_EACH["composite"].ref(**inputs)
    return out * 1.001, weights


def with_nan(**inputs):
    out, weights = ONE_EACH["composite"].ref(**inputs)
    return out, weights.masked_fill(weights == weights.max(), math.nan)


def raises(**inputs):
    raise RuntimeError("PassManager::run failed")


def not_deterministic(**inputs):
    out, weights = ONE_EACH["composite"].ref(**inputs)
    return out + 1e-7 * torch.randn_like(out), weights


# Fault -> (changes of the `Case` of composite, start of the message)
FAULTS = {
    # d_alpha, since a message names the output or gradient with the largest error in relation to its bound
    "inaccurate": (dict(op=inaccurate), "d_alpha: error 1.1e-03 exceeds "),
    "not a number": (dict(op=with_nan), "out1: 1 of "),
    "raises": (dict(op=raises), "RuntimeError: PassManager::run failed (test_selfcheck.py:"),
    "not deterministic": (dict(op=not_deterministic, strict=True), "out0 differs from run to run"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported(fault, in_process, monkeypatch, capsys):
    """Cases before and after the faulty one still run."""
    changes, message = FAULTS[fault]
    cases = [ONE_EACH["merge"], replace(ONE_EACH["composite"], **changes), ONE_EACH["clip_rays"]]
    monkeypatch.setattr(__main__, "checks", lambda sizes: cases)
    assert main(Args()) == 1
    printed = capsys.readouterr().out
    assert printed.count("  ok  ") == 2
    assert printed.count(f"  FAIL  {message}") == 2, "not reported twice: as it happens and at the end"
    assert "1 of 3 checks failed. Please report" in printed and torch.__version__ in printed


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize("part", ["inputs", "ref", "op"])
def test_a_recipe_size_that_does_not_fit_into_memory_is_skipped(part, in_process, monkeypatch, capsys):
    """The GPU may be too small for it. Running out of memory at a small size is a failure."""
    small = replace(ONE_EACH["composite"], **{part: lambda *args, **inputs: out_of_memory()})
    monkeypatch.setattr(__main__, "checks", lambda sizes: [replace(small, size="recipe"), ONE_EACH["merge"]])
    assert main(Args()) == 0
    printed = capsys.readouterr().out
    assert "  skipped  needs more memory\n" in printed and "1 checks passed, 1 skipped, in " in printed
    assert run(small).status == "FAIL"


def test_a_wrong_gradient_is_reported():
    def doubled_gradient(alpha, values):
        out, weights = ONE_EACH["composite"].ref(alpha, values)
        return out, weights + (weights - weights.detach())

    result = run(replace(ONE_EACH["composite"], op=doubled_gradient))
    assert result.status == "FAIL" and result.message.startswith("d_alpha: error ")


def test_a_wrong_index_is_reported():
    case = ONE_EACH["merge"]

    def swapped(**inputs):
        merged, order = case.ref(**inputs)
        return merged, order.flip(1)

    assert "numbers are wrong" in run(replace(case, op=swapped)).message


def test_no_bf16_cases_on_a_gpu_without_it(monkeypatch):
    all_cases = [str(case) for case in checks()]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))  # Turing
    assert [str(case) for case in checks()] == [name for name in all_cases if not name.endswith("bf16")]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))  # Ampere
    assert [str(case) for case in checks()] == all_cases


def test_without_a_gpu_references_run(in_process, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(Args(ops=("merge", "rotated"))) == 0  # merge, rotated_iou_bev, rotated_nms
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("There is no GPU to check") and lines[-1].startswith("All 3 checks passed")
    assert all(" small " in line for line in lines[1:-1]), "recipe sizes ran, which take minutes on a CPU"
    with pytest.raises(UserError, match="no op"):
        main(Args(ops=("nothing",)))


# Stands in for `python -m unipad.selfcheck --worker check`
WORKER = """
import json, os, sys
for name in json.load(sys.stdin):
    op, size, dtype = name.split(", ")
    if op == "crashes":
        os._exit(139)
    print("printed by a library")
    print("[1]", '{"printed": "by a library"}', 5, sep="\\n")
    print(json.dumps(dict(name=op, size=size, dtype=dtype, status="FAIL" if op == "loses context" else "ok")))
    sys.stdout.flush()
    if op == "loses context":
        os._exit(0)
"""


def test_a_crash_does_not_affect_other_cases(monkeypatch):
    """One process exits without a result; another reports a FAIL, as for a lost CUDA context, and exits."""
    monkeypatch.setattr(processes, "_compile", lambda cases: None)
    original = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **kw: original([sys.executable, "-c", WORKER], **kw))
    names = ["first", "crashes", "second", "loses context", "third"]
    cases = [Case(name, "small", "fp32", inputs=None, op=None, ref=None) for name in names]
    reported = list(results(cases, isolate=True))
    assert [result.name for result in reported] == names
    assert [result.status for result in reported] == ["ok", "FAIL", "ok", "FAIL", "ok"]
    assert reported[1].message == "its process ended with exit code 139 before the result was known"


def test_a_case_runs_in_a_worker_process(monkeypatch):
    monkeypatch.setattr(processes, "_compile", lambda cases: None)
    cases = [case for case in SMALL if case.name == "merge"]
    assert [result.status for result in results(cases, isolate=True)] == ["ok"]
