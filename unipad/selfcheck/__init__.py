"""Compare every op with its PyTorch reference, mostly in fp64: `python -m unipad.selfcheck`.

A case (called a check in the output) is one op with given inputs, in one dtype.

cases.py        all cases; defines those of the ops of cameras, boxes, rays and the renderer
lidar_cases.py  the cases of LiDAR: voxels and sparse convolutions
check.py        runs one case and compares outputs and gradients
processes.py    runs cases in worker processes, which may crash
"""

from unipad.selfcheck.cases import SIZES, checks
from unipad.selfcheck.check import Case, Result, run
from unipad.selfcheck.processes import results

__all__ = ["SIZES", "Case", "Result", "checks", "results", "run"]
