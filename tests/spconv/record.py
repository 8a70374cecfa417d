"""Compare the networks of tests/spconv/networks.py on spconv's CPU wheel and on unipad.spconv.

    pip install spconv==2.3.8
    OMP_NUM_THREADS=1 python -m tests.spconv.record            compare; exits with 1 if they disagree
    OMP_NUM_THREADS=1 python -m tests.spconv.record --write    also record spconv's results, for test_networks.py

With more than one thread, spconv sums wrongly on a CPU. Both run in fp64 and in fp32 with the same weights; spconv's
state dicts are loaded as they are. Voxels and grids must be equal. Prints, for each network, the largest difference of
outputs, gradients and outputs after a training step, relative to the largest entry of the same array.
"""

import importlib
import sys

import numpy as np
import torch

import unipad.spconv as ours
from tests.spconv.layers import points_to_voxels
from tests.spconv.networks import NETWORKS, differences, results
from tests.spconv.test_networks import FOLDER, TOLERANCE


def main(write):
    assert torch.get_num_threads() == 1, "spconv sums wrongly on a CPU with more threads: set OMP_NUM_THREADS=1"
    theirs = importlib.import_module("spconv.pytorch")
    # its backward asks for the CUDA stream, which a CPU does not have
    importlib.import_module("spconv.pytorch.ops").get_current_stream = lambda: 0
    failed = False
    print("| network | type | outputs | gradients | after a step |\n|---|---|---|---|---|")
    for name in NETWORKS:
        for dtype in (torch.float64, torch.float32):
            expected, their_net = results(theirs, name, dtype)
            found, our_net = results(ours, name, dtype)
            our_net.load_state_dict(their_net.state_dict())  # strict
            worst = dict(out=0.0, grad=0.0, after=0.0)
            for key, value in differences(found, expected).items():
                kind = key.split("/")[0]
                worst[kind] = max(worst[kind], value)
            failed |= max(worst.values()) > TOLERANCE
            print(f"| {name} | {dtype} | " + " | ".join(f"{v:.1e}" for v in worst.values()) + " |")
            if write and dtype == torch.float64:
                FOLDER.mkdir(exist_ok=True)
                arrays = {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in expected.items()}
                np.savez_compressed(FOLDER / f"{name}.npz", **arrays)
    expected = points_to_voxels(importlib.import_module("spconv.pytorch.utils").PointToVoxel)
    found = points_to_voxels(ours.PointToVoxel)
    equal = all(np.array_equal(found[key], expected[key]) for key in expected)
    print(f"PointToVoxel: {'equal' if equal else 'NOT EQUAL'}")
    if write:
        np.savez_compressed(FOLDER / "PointToVoxel.npz", **expected)
    return int(failed or not equal)


if __name__ == "__main__":
    sys.exit(main("--write" in sys.argv))
