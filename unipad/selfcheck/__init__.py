"""Compare every op with its PyTorch reference in fp64: `python -m unipad.selfcheck`.

cases.py        the cases: ops of cameras, boxes, rays and the renderer
lidar_cases.py  the cases of LiDAR: voxels and sparse convolutions
check.py        runs one case and compares outputs and gradients
processes.py    runs cases in worker processes, which may crash
"""

from unipad.selfcheck.cases import SIZES, checks
from unipad.selfcheck.check import Case, Result, run
from unipad.selfcheck.processes import results

__all__ = ["SIZES", "Case", "Result", "checks", "results", "run"]
