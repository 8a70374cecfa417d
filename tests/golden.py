"""Records of the original UniPAD: `tests/golden/<name>.npz` with arrays, `<name>.json` with what was called and how.

Array names: `state/<key>` weights under the original state_dict keys, `in/<name>` inputs, `out/<name>` outputs,
`grad/<name>` gradients of the total that the sidecar names.
"""

import json
from pathlib import Path

import numpy as np
import torch

from unipad.names import from_original

FOLDER = Path(__file__).parent / "golden"
watched = None  # a list while `tests.faithfulness` watches: names of records, and (error, tolerance) of comparisons


def load(name):
    """One record: (dict array name -> CPU tensor, sidecar dict)."""
    if watched is not None:
        watched.append(name)
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    return arrays, json.loads((FOLDER / f"{name}.json").read_text())


def under(arrays, prefix):
    """The arrays whose names start with `prefix`, without it; `under(arrays, "state/img_neck.")` is a state dict."""
    return {key[len(prefix) :]: value for key, value in arrays.items() if key.startswith(prefix)}


def weights(arrays, part, kind="state/"):
    """The arrays below `kind` in the names and layouts of ours; those of `part` of the model, without its name."""
    return under(from_original(under(arrays, kind))[0], part)


def assert_close_to_max(actual, expected, rel, name=""):
    """Every entry of `actual` is within `rel` of the largest |entry| of `expected`; shapes agree, all is finite."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    if not expected.numel():
        return
    actual, expected = actual.detach().double(), expected.double()
    error, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    if watched is not None:
        watched.append((error / largest if largest else error, rel))
    assert error <= rel * largest, f"{name}: off by {error:.2e}, allowed {rel:g} of the largest entry {largest:.2e}"
