"""The self-check: every op is in it, faults are told, and one that breaks its process does not harm the others."""

import importlib
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import kernels
from kernels import backend
from tests.check import launches
from tests.conftest import HAS_GPU
from unipad import selfcheck
from unipad.errors import UserError
from unipad.selfcheck import Args, Case, checks, main, results, run

FILES = [file.stem for file in Path(kernels.__path__[0]).glob("[!_]*.py")]


@pytest.fixture
def kernels_run(monkeypatch):
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    monkeypatch.setattr(backend, "interpret", not HAS_GPU)


@pytest.fixture
def here(monkeypatch):
    """Results come from this process, where ops may be replaced, on a GPU too."""
    monkeypatch.setattr(selfcheck, "results", partial(results, isolated=False))


def op_of(case):
    return case.name.split(",")[0].split()[0]


SMALL = list(checks(("small",)))
ONE_EACH = {op_of(case): case for case in reversed(SMALL)}  # the first of each op


@pytest.mark.parametrize("op", ONE_EACH)
def test_every_op_is_as_its_reference(op, kernels_run):
    with launches() as launched:
        result = run(ONE_EACH[op])
    assert result.ok, result
    assert launched or op == "unisurf_alpha", "the op took its reference, not its kernels"


def test_no_op_is_left_out():
    modules = [importlib.import_module(f"kernels.{file}") for file in FILES]
    ops = {
        name
        for module in modules
        for name, value in vars(module).items()
        if hasattr(module, f"{name}_ref") and value.__module__ == module.__name__ and name[0] != "_"
    }
    assert ops == ONE_EACH.keys() - {"unisurf_alpha"}, "each op with a reference has a case"
    assert {op_of(case) for case in checks(("recipe",))} == ONE_EACH.keys()
    names = [str(case) for case in checks()]
    assert len(set(names)) == len(names), "processes know a case by its name"


def off(**inputs):
    out, weights = ONE_EACH["composite"].ref(**inputs)
    return out * 1.001, weights


def nowhere(**inputs):
    out, weights = ONE_EACH["composite"].ref(**inputs)
    return out, weights.masked_fill(weights == weights.max(), math.nan)


def raises(**inputs):
    raise RuntimeError("PassManager::run failed")


def other_bits(**inputs):
    out, weights = ONE_EACH["composite"].ref(**inputs)
    return out + 1e-7 * torch.randn_like(out), weights


FAULTS = {
    "off": (dict(op=off), "d_alpha is off by 1.1e-03, may be by"),
    "not a number": (dict(op=nowhere), "out1: 1 of "),
    "raises": (dict(op=raises), "RuntimeError: PassManager::run failed (test_selfcheck.py:"),
    "never twice the same": (dict(op=other_bits, strict=True), "out0 differs from run to run"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told(fault, here, monkeypatch, capsys):
    """And the cases around it are judged all the same."""
    changes, message = FAULTS[fault]
    cases = [ONE_EACH["merge"], replace(ONE_EACH["composite"], **changes), ONE_EACH["clip_rays"]]
    monkeypatch.setattr(selfcheck, "checks", lambda sizes: cases)
    assert main(Args()) == 1
    told = capsys.readouterr().out
    assert told.count("  ok  ") == 2 and told.count(f"  BAD   {message}") == 2, "once as it happens, once in the end"
    assert "1 of 3 checks are BAD. Please report" in told and torch.__version__ in told


def test_a_wrong_gradient_is_told():
    def half(alpha, values):
        out, weights = ONE_EACH["composite"].ref(alpha, values)
        return out, weights + (weights - weights.detach())

    result = run(replace(ONE_EACH["composite"], op=half))
    assert not result.ok and result.message.startswith("d_alpha is off by")


def test_a_wrong_index_is_told():
    case = ONE_EACH["merge"]

    def swapped(**inputs):
        merged, order = case.ref(**inputs)
        return merged, order.flip(1)

    assert "numbers are wrong" in run(replace(case, op=swapped)).message


def test_bf16_is_not_asked_of_a_gpu_without_it(monkeypatch):
    everything = [str(case) for case in checks()]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert [str(case) for case in checks()] == [name for name in everything if not name.endswith("bf16")]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert [str(case) for case in checks()] == everything


def test_without_a_gpu_references_run(here, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(Args(ops=("merge", "rotated"))) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("There is no GPU to check") and told[-1].startswith("All 3 checks are ok")
    assert all(" small " in line for line in told[1:-1]), "recipe sizes take minutes there"
    with pytest.raises(UserError, match="no op"):
        main(Args(ops=("nothing",)))


WORKER = """
import json, os, sys
for name in json.load(sys.stdin):
    op, size, dtype = name.split(", ")
    if op == "breaks":
        os._exit(139)
    print("a library says something")
    print(json.dumps(dict(name=op, size=size, dtype=dtype, error=0, bound=1, ms=1, message="lost" * (op == "last"))))
    sys.stdout.flush()
    if op == "last":
        os._exit(0)
"""


def test_a_broken_process_takes_no_other_case_along(monkeypatch):
    """One dies without a word; one tells its result, which is that the context is lost, and ends."""
    monkeypatch.setattr(selfcheck, "_compile", lambda cases: None)
    plain = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **kw: plain([sys.executable, "-c", WORKER], **kw))
    names = ["first", "breaks", "second", "last", "third"]
    cases = [Case(name, "small", "fp32", None, None, None) for name in names]
    found = list(results(cases, isolated=True))
    assert [result.name for result in found] == names
    assert [result.ok for result in found] == [True, False, True, False, True]
    assert found[1].message == "its process ended with 139 before the result was known"


def test_a_process_of_its_own(monkeypatch):
    """The real one, as far as it goes without a GPU."""
    monkeypatch.setattr(selfcheck, "_compile", lambda cases: None)
    cases = [case for case in SMALL if case.name == "merge"]
    assert [result.ok for result in results(cases, isolated=True)] == [True]
