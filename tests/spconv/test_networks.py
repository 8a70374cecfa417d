"""Published networks on unipad.spconv give what they gave on spconv 2.3.8: outputs, gradients, and after a step.

`python -m tests.spconv.record --write` recorded spconv's CPU wheel in fp64.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import unipad.spconv as spconv
from tests.spconv.networks import NETWORKS, differences, results

FOLDER = Path(__file__).parent / "golden"
TOLERANCE = 1e-5  # of the largest entry


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_matches_spconv(name, dtype):
    found, _ = results(spconv, name, dtype)
    with np.load(FOLDER / f"{name}.npz") as file:
        off = differences(found, dict(file))
    assert {key.split("/")[0] for key in off} == {"out", "grad", "after"}
    assert not {key: value for key, value in off.items() if not value <= TOLERANCE}


def test_the_step_changes_the_outputs():
    """More than the tolerance, so that `after/` tests it."""
    for name in NETWORKS:
        with np.load(FOLDER / f"{name}.npz") as arrays:
            outputs = [key[4:] for key in arrays.files if key.startswith("out/")]
            changes = [np.abs(arrays[f"out/{k}"] - arrays[f"after/{k}"]).max() for k in outputs]
            assert max(changes) > 1e-2, name
