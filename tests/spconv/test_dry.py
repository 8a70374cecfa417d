"""Runs tests/spconv/dry.py."""

import pytest

from tests import scripts


def test_a_dry_run_has_no_fault():
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    done = scripts.run("-m", "tests.spconv.dry", timeout=300)
    assert done.stdout.strip() == "no fault", done.stderr[-4000:]
