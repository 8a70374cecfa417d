"""docs/sparse.md: its examples and commands run, the names in it exist."""

import re
import subprocess
import sys
from importlib.util import find_spec
from unittest import mock

import pytest

import unipad.spconv as spconv
from tests.scripts import REPO

TEXT = (REPO / "docs/sparse.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
# Not ```sh, which needs the network or spconv
COMMANDS = [
    c for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE) for c in block.splitlines()
]


def run(example):
    exec(compile(example, "docs/sparse.md", "exec"), {})


def test_examples_and_commands_are_found():
    assert len(EXAMPLES) == 3 and len(COMMANDS) == 1


@pytest.mark.parametrize("example", EXAMPLES[:2])
def test_example_runs(example):
    run(example)


def test_code_that_imports_spconv_finds_it():
    with mock.patch.dict(sys.modules):
        run(EXAMPLES[2])
        import spconv.pytorch as found
        from spconv.pytorch import functional as Fsp
        from spconv.pytorch.core import SparseConvTensor
        from spconv.pytorch.utils import PointToVoxel

        assert found is spconv and Fsp is spconv.functional
        assert SparseConvTensor is spconv.SparseConvTensor and PointToVoxel is spconv.PointToVoxel


# What these projects do before they use layers
IMPORTS = dict(
    OpenPCDet="""
import spconv
if float(spconv.__version__[2:]) >= 2.2:
    spconv.constants.SPCONV_USE_DIRECT_TABLE = False
import spconv.pytorch as spconv
from spconv.pytorch.utils import PointToVoxel
""",
    CenterPoint="""
import spconv.pytorch as spconv
from spconv.pytorch import SparseConv3d, SubMConv3d, ops
""",
    VoxelNeXt="""
from spconv.core import ConvAlgo
from spconv.pytorch import functional as Fsp
from spconv.pytorch.conv import SparseConvolution
from spconv.pytorch.core import SparseConvTensor
from spconv.pytorch.modules import SparseModule
from spconv.pytorch.pool import SparseMaxPool2d
ConvAlgo.Native
""",
    Pointcept="""
import spconv.pytorch as spconv
from spconv.pytorch import modules
modules.is_spconv_module
""",
    mmdet3d="""
import spconv
assert spconv.__version__ >= '2.0.0'
from spconv.pytorch import (SparseConv2d, SparseConv3d, SparseConvTranspose2d, SparseConvTranspose3d,
    SparseInverseConv2d, SparseInverseConv3d, SparseModule, SubMConv2d, SubMConv3d)
from spconv.pytorch import SparseConvTensor, SparseSequential
""",
)


@pytest.mark.parametrize("project", IMPORTS)
def test_what_projects_import_exists(project):
    with mock.patch.dict(sys.modules):
        run(EXAMPLES[2])
        exec(IMPORTS[project], {})


@pytest.mark.parametrize("project", ["CenterPoint", "Pointcept"])
def test_what_projects_import_exists_with_the_name_replaced(project):
    exec(IMPORTS[project].replace("spconv.pytorch", "unipad.spconv"), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command):
    assert command.startswith("python ")
    done = subprocess.run(command.replace("python", sys.executable, 1), shell=True, cwd=REPO, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_modules_of_the_other_commands_exist():
    modules = re.findall(r"python -m ([\w.]+)", TEXT)
    assert len(modules) >= 3 and all(find_spec(module) for module in modules)


MISSING = {"HashTable", "SparseConv4d", "SubMConv4d"}  # which the page says


def test_public_names():
    before, encoders = TEXT.split("## Pre-trained encoders in other projects")
    _, after = encoders.split("## Other libraries")  # not the networks of other projects between them
    named = re.findall(r"`(Sp\w+|SubM\w+|\w*Table|PointToVoxel|ToDense|Identity|ConvAlgo)`", before + after)
    named = set(named) - MISSING
    assert len(named) > 15
    for name in named:
        assert hasattr(spconv, name) or all(hasattr(spconv, f"{name}{n}d") for n in (1, 2, 3)), name
    assert not any(hasattr(spconv, name) for name in MISSING)
    assert all(hasattr(spconv, name) for name in spconv.__all__)
    public = {name for name in vars(spconv) if name[0] != "_"} - {"voxels"}
    assert public == set(spconv.__all__)
