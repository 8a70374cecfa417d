"""Imports: kernels import nothing else of unipad, the sparse library only kernels, data and model do not import each
other; there are no cycles and no private names of other files.
"""

import ast
from functools import cache
from pathlib import Path

REPO = Path(__file__).parent.parent
FILES = [file.relative_to(REPO) for folder in ("unipad", "kernels") for file in sorted((REPO / folder).rglob("*.py"))]


def module_of(file):
    """The name that a file is imported as; the folder `kernels` is `unipad.kernels`."""
    parts = file.with_suffix("").parts
    parts = ("unipad", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


@cache
def imports(module):
    """{(imported module of this project, name imported from it or None)} for all imports of a module.

    Relative imports are not found: the project has none.
    """
    tree = ast.parse((REPO / MODULES[module]).read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "unipad":
            for name in (alias.name for alias in node.names):
                inner = f"{node.module}.{name}"
                imported.add((inner, None) if inner in MODULES else (node.module, name))
        elif isinstance(node, ast.Import):
            imported |= {(alias.name, None) for alias in node.names if alias.name in MODULES}
    return imported


def test_kernels_data_and_model_are_separate():
    def inside(module, folder):
        return f"{module}.".startswith(f"unipad.{folder}.")

    assert len(MODULES) > 50
    for module, source in [(importer, source) for importer in MODULES for source, _ in imports(importer)]:
        assert inside(source, "kernels") or not inside(module, "kernels"), f"{module} imports {source}"
        assert any(inside(source, f) for f in ("kernels", "spconv")) or not inside(module, "spconv"), module
        for here, there in (("data", "model"), ("model", "data")):
            assert not (inside(module, here) and inside(source, there)), f"{module} imports {source}"


def test_no_cycles():
    done = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for source, _ in imports(module):
                visit(source, [*path, module])
            done.add(module)

    for module in MODULES:
        visit(module, [])


def test_no_private_names_are_imported():
    private = [(m, source, name) for m in MODULES for source, name in imports(m) if (name or "").startswith("_")]
    assert not private
