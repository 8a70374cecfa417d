"""Published networks on unipad.spconv give what they gave on spconv 2.3.8: outputs, gradients, and after a step.

`python -m tests.spconv.record --write` recorded spconv's CPU wheel in fp64.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import unipad.spconv as spconv
from tests.spconv.layers import points_to_voxels
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


def test_voxels_that_are_off_by_one_are_found():
    found, _ = results(spconv, "VoxelBackBone8x", torch.float32)
    with np.load(FOLDER / "VoxelBackBone8x.npz") as file:
        expected = dict(file)
    for key, axis in (("voxels/conv2", 1), ("grid/conv2", 0)):
        changed = found[key].copy()
        changed.T[axis] += 1
        with pytest.raises(AssertionError, match=key):
            differences(found | {key: changed}, expected)


def test_points_match_spconv():
    found = points_to_voxels(spconv.PointToVoxel)
    with np.load(FOLDER / "PointToVoxel.npz") as file:
        expected = dict(file)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype.kind == value.dtype.kind and np.array_equal(found[key], value), key


def test_the_step_changes_the_outputs():
    """More than the tolerance, so that `after/` tests it."""
    for name in NETWORKS:
        with np.load(FOLDER / f"{name}.npz") as arrays:
            outputs = [key[4:] for key in arrays.files if key.startswith("out/")]
            changes = [np.abs(arrays[f"out/{k}"] - arrays[f"after/{k}"]).max() for k in outputs]
            assert max(changes) > 5e-3, name
