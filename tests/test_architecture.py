"""The house: rooms import in one direction, modules of a room form no cycle, heavy libraries stay in their rooms."""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import longvid

ROOT = Path(longvid.__file__).parent
ROOMS = ["leaves", "store", "media", "memory", "models", "planning", "runtime", "reporting", "cli"]
MAY_NOT_SEE = {"memory": {"store", "media"}, "runtime": {"reporting"}, "reporting": set(ROOMS[1:7])}
APPLICATIONS = {"demo", "train"}
"""programs that use the package; nothing imports them"""
NO_TORCH = {"leaves", "store", "media", "reporting", "cli"}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
    for path in ROOT.rglob("*.py")
    if path.relative_to(ROOT).parts not in {("__init__.py",), ("__main__.py",)}
}


def room(module):
    return module.split(".")[0] if "." in module else "leaves"


def imports(tree, *, top_level=False):
    """Names of modules in import statements that run; those for type checkers are left out."""
    guarded = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    skipped = {id(n) for block in guarded for n in ast.walk(block)}
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in skipped:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and id(node) not in skipped:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def edges():
    for module, tree in MODULES.items():
        for name in imports(tree):
            target = name.removeprefix("longvid.")
            if name != target and target in MODULES and target != module:
                yield module, target


def test_rooms_import_in_one_direction():
    for module, target in edges():
        a, b = room(module), room(target)
        if a not in APPLICATIONS:
            assert b in ROOMS[: ROOMS.index(a) + 1], f"{module} imports {target}"
            assert b not in MAY_NOT_SEE.get(a, ()), f"{module} imports {target}"


def test_no_cycle():
    graph = {}
    for module, target in edges():
        graph.setdefault(module, set()).add(target)
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_rooms_files_and_functions_stay_small():
    rooms = Counter(path.parent for path in ROOT.rglob("*.py"))
    assert {str(path): number for path, number in rooms.items() if number > 14} == {}
    for module, tree in MODULES.items():
        longest = max((node.end_lineno or 0 for node in ast.walk(tree) if hasattr(node, "end_lineno")), default=0)
        assert longest <= 450, module
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{module}.{node.name}"


def test_torch_stays_in_its_rooms():
    for module, tree in MODULES.items():
        if room(module) in NO_TORCH:
            assert not any(name.split(".")[0] == "torch" for name in imports(tree, top_level=True)), module


def test_every_module_says_what_it_is():
    assert [module for module, tree in MODULES.items() if not ast.get_docstring(tree)] == []


def test_public_names_are_sorted_and_real():
    assert longvid.__all__ == sorted(longvid.__all__)
    for name in longvid.__all__:
        assert getattr(longvid, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = longvid.no_such_name


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, longvid.cli.commands as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'zarr', 'av'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("[]")
