"""The house: a file imports from lower ranks only, heavy libraries stay in their rooms, names are exported in order."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import longvid

ROOT = Path(longvid.__file__).parent
RANKS = {
    "errors": 0, "units": 0, "events": 0, "video.frames": 0,
    "schedule": 1, "memory": 1, "pipeline": 1, "reblock": 1, "machine": 1, "zarr_gate": 1,
    "numerics": 1, "workspace": 1, "offload": 1, "arena": 1.2, "transfer": 1.3, "timeline": 1.3, "residency": 1.5,
    "video.color": 1, "video.container": 1, "video.arrays": 1, "video.reader": 1.3, "video.writer": 1.3,
    "video.sources": 2.2, "video.picture": 1,
    "durability": 1, "fingerprint": 1, "lock": 1, "staging": 1, "video.limits": 0.5, "video.watchdog": 1,
    "video.convert": 1.2, "video.decoder": 1.2,
    "store_format": 1.8, "cache": 2, "snapshot": 2, "store": 2, "store_writer": 2.5, "verify": 2.5,
    "latent_writer": 2.7, "frame_writer": 2.7,
    "models.base": 3, "models.convolution": 3, "models.triton_norm": 3,
    "models.compiled_norm": 3, "models.norms": 3.1, "models.layers": 3.2,
    "models.cogvideox": 3.5, "models.tiny": 3.5,
    "models.loading": 3.7,
    "step": 4, "dryrun": 4.3, "plan": 4.3, "planner": 4.5, "probe": 4.5, "profile": 4.7,
    "engine": 5, "push": 5.5, "feeds": 5.5, "job": 5.5, "checkpoint": 5.5, "whole": 5.8, "session": 6, "tune": 6,
    "repair": 6.5,
    "train.footage": 4, "train.fit": 5, "train.__main__": 9,
    "target": 1, "progress": 7, "recorder": 7,
    "history": 7, "report_text": 7.3, "report_charts": 7.4, "report": 7.5,
    "arguments": 7, "cli": 8, "__main__": 9, "demo.__main__": 9,
}  # fmt: skip
NO_TORCH = ("schedule", "reblock", "pipeline", "video.", "store", "arguments", "cli", "progress", "errors", "units",
            "events", "machine", "history", "target", "recorder", "report", "timeline", "offload",
            "zarr_gate")  # fmt: skip


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if not name.endswith("__init__"):
            yield name, ast.parse(path.read_text())


def imports(tree, *, top_level):
    """Modules named by import statements that run, those for type checkers left out."""
    guarded = {
        id(n)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for n in ast.walk(block)
    }
    for node in tree.body if top_level else ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize(("name", "tree"), list(modules()), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_run_downward(name, tree):
    assert name in RANKS, f"give longvid/{name} a rank"
    for target in imports(tree, top_level=False):
        inner = target.removeprefix("longvid.")
        if target.startswith("longvid.") and inner in RANKS:
            assert RANKS[inner] < RANKS[name], f"{name} imports {inner}"


@pytest.mark.parametrize(("name", "tree"), list(modules()), ids=lambda v: v if isinstance(v, str) else "")
def test_torch_stays_in_its_rooms(name, tree):
    if name.startswith(NO_TORCH):
        assert not any(t.split(".")[0] == "torch" for t in imports(tree, top_level=True))


@pytest.mark.parametrize(("name", "tree"), list(modules()), ids=lambda v: v if isinstance(v, str) else "")
def test_every_module_says_what_it_is(name, tree):
    assert ast.get_docstring(tree)


def test_public_names_are_sorted_and_real():
    assert longvid.__all__ == sorted(longvid.__all__)
    for name in longvid.__all__:
        assert getattr(longvid, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = longvid.no_such_name


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, longvid.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'zarr', 'av'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("[]")
