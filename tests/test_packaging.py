"""pyproject.toml: what the wheel contains, which dependencies it declares, and the version of ruff."""

import ast
import re
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions

import pytest

from tests.scripts import REPO

PROJECT = (REPO / "pyproject.toml").read_text()
SCRIPTS = ["train.py", "finetune.py", "eval.py"]


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory):
    """Names of the files in the wheel, which is built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    # links, since a build writes next to its sources
    for name in ("pyproject.toml", "README.md", "LICENSE", "unipad", "kernels"):
        (folder / name).symlink_to(REPO / name)
    command = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(folder / done.stdout.split()[-1]).namelist()


def test_wheel_has_no_top_level_kernels(wheel_files):
    """Another distribution (Hugging Face's) has a package of that name."""
    assert {name.split("/")[0] for name in wheel_files if ".dist-info/" not in name} == {"unipad"}


def test_wheel_has_every_module(wheel_files):
    modules = {str(file.relative_to(REPO)) for file in REPO.glob("unipad/**/*.py")}
    modules |= {f"unipad/kernels/{file.name}" for file in REPO.glob("kernels/*.py")}
    assert modules == {name for name in wheel_files if name.endswith(".py")}


def test_every_import_is_declared():
    # the required dependencies, one per line, come before the optional ones
    declared = {name.lower() for name in re.findall(r'^    "([\w-]+)', PROJECT.split("[project.optional")[0], re.M)}
    optional = {"triton", "skimage"}  # GPU builds of torch depend on Triton, CPUs do not need it; skimage: extra `mesh`
    files = [*REPO.glob("unipad/**/*.py"), *REPO.glob("kernels/*.py"), *(REPO / name for name in SCRIPTS)]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) - {"unipad"} - optional
    provided_by = packages_distributions()
    missing = {name for name in imported if not declared & {d.lower() for d in provided_by.get(name, [name])}}
    assert "torch" in imported and not missing


def test_pre_commit_uses_the_ruff_version_of_pyproject():
    versions = re.findall(r"ruff==([\d.]+)", PROJECT)
    assert versions and f"rev: v{versions[0]} " in (REPO / ".pre-commit-config.yaml").read_text()
