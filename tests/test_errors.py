import builtins
import pickle

import pytest

from longvid import errors


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ScheduleError", "ValueError"),
        ("ModelError", "ValueError"),
        ("MemoryBudgetError", "MemoryError"),
        ("CacheError", "RuntimeError"),
        ("SessionStateError", "RuntimeError"),
        ("SourceError", "OSError"),
        ("StoreError", "OSError"),
    ],
)
def test_each_error_is_also_the_builtin_that_callers_expect(name, builtin):
    kind = getattr(errors, name)
    assert issubclass(kind, errors.LongvidError)
    assert issubclass(kind, getattr(builtins, builtin))
    assert str(kind("what was asked")) == "what was asked"


def test_the_tree_is_the_one_in_the_docstring():
    kinds = {n for n in errors.__all__ if n != "LongvidError"}
    assert kinds == {w for line in errors.__doc__.splitlines() for w in line.split()[1:2] if w.endswith("Error")} - {
        "LongvidError"
    }


def test_kind_and_numbers_travel():
    assert errors.SourceError("x", kind="truncated").kind == "truncated"
    error = errors.MemoryBudgetError("x", projected_bytes=9, allowed_bytes=5, parts={"weights": 9})
    assert (error.projected_bytes, error.allowed_bytes, error.parts) == (9, 5, {"weights": 9})
    assert str(pickle.loads(pickle.dumps(errors.StoreError("gone", kind="missing")))) == "gone"
