"""unipad.spconv without the dependencies of the rest of this project."""

import subprocess
import sys

from tests.scripts import REPO

ALLOWED = ("torch", "triton", "numpy", "unipad")
# Blocks what torch, Triton and numpy do not import by themselves
ALONE = f"""
import importlib.abc, sys
import torch._dynamo, numpy
try:
    import triton
except ModuleNotFoundError:
    pass
loaded = {{name.split(".")[0] for name in sys.modules}}

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in loaded and top not in sys.stdlib_module_names and top not in {ALLOWED}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Block())
import unipad.spconv as spconv
new = {{name.split(".")[0] for name in sys.modules}} - loaded - set(sys.stdlib_module_names)
assert new <= {{"unipad"}}, new
others = {{name for name in sys.modules if name.startswith("unipad.")}}
assert all(name.split(".")[1] in ("spconv", "kernels") for name in others), others
indices = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], dtype=torch.int32)
x = spconv.SparseConvTensor(torch.ones(2, 4, requires_grad=True), indices, [4, 8, 8], 1)
net = spconv.SparseSequential(spconv.SubMConv3d(4, 8, 3), spconv.SparseConv3d(8, 8, 3, 2), spconv.SparseMaxPool3d(1))
net(x).features.sum().backward()
spconv.PointToVoxel([1, 1], [0, 0, 2, 1], 3, 10, 5)(torch.zeros(2, 3))
print("works")
"""


def test_needs_only_torch_triton_and_numpy():
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.strip() == "works", done.stderr
