"""docs/kernels.md: its examples run as they are, its commands exist, and no op is missing."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
TEXT = (REPO / "docs/kernels.md").read_text()
# Title of a section that begins with an example -> its code
EXAMPLES = dict(re.findall(r"^## ([^\n]*)\n\n```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("title", EXAMPLES)
def test_example_runs(title):
    exec(compile(EXAMPLES[title], title, "exec"), {})


def test_all_examples_are_found():
    assert len(EXAMPLES) == TEXT.count("```python") == 3


def test_modules_of_the_commands_exist():
    commands = re.findall(r"python -m ([\w.]+)", TEXT)
    assert len(commands) > 10 and all(find_spec(module) for module in commands)


def test_every_op_is_in_a_table():
    """An op is a function `name` that has a reference `name_ref`."""
    ops = set()
    for file in (REPO / "kernels").glob("*.py"):
        functions = {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}
        ops |= {name for name in functions if f"{name}_ref" in functions and name[0] != "_"}
    assert len(ops) > 15
    missing = {op for op in ops if not re.search(rf"^\|.*`{op}`", TEXT, re.MULTILINE)}
    assert missing == {"trilinear_value", "voxel_keys"}  # internal parts of `trilinear` and `sort_voxels`
