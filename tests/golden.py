"""Records of runs of the original UniPAD: `tests/golden/<name>.npz` has arrays, `<name>.json` says what was called.

Array names: `state/<key>` weights, by their keys in the original state_dict, `in/<name>` inputs, `out/<name>` outputs,
`grad/<name>` gradients of the scalar that the JSON file defines (mostly in "call"), w.r.t. <name>.
"""

import json
from pathlib import Path

import numpy as np
import torch

from unipad.names import from_original

FOLDER = Path(__file__).parent / "golden"
# While a test runs under `tests.faithfulness`: names of loaded records and (error, tolerance) of comparisons, in order
log = None


def load(name):
    """A record: (dict array name -> CPU tensor, dict of the JSON file)."""
    if log is not None:
        log.append(name)
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    return arrays, json.loads((FOLDER / f"{name}.json").read_text())


def strip_prefix(arrays, prefix):
    """The arrays whose names start with `prefix`, under the rest of their names."""
    return {key[len(prefix) :]: value for key, value in arrays.items() if key.startswith(prefix)}


def recorded(arrays, prefix, kind="state/"):
    """The recorded weights of our model's module at `prefix`, such as "project.", as a state dict.

    kind: start of the array names: "state/", or that of other arrays of the same keys, such as "grad/" for gradients.
    """
    ours, _ = from_original(strip_prefix(arrays, kind))
    return strip_prefix(ours, prefix)


def assert_close_to_max(actual, expected, rel, name=""):
    """Assert that `actual` differs from `expected` by at most `rel` times the largest |entry| of `expected`."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    if not expected.numel():
        return
    actual, expected = actual.detach().double(), expected.double()
    error, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    if log is not None:
        log.append((error / largest if largest else error, rel))
    assert error <= rel * largest, f"{name}: off by {error:.2e}, allowed is {rel:g} of the largest entry {largest:.2e}"
