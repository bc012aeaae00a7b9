import builtins
import multiprocessing
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


def every_error():
    """One of each class, with all that it can carry."""
    carried = {
        "MemoryBudgetError": {"projected_bytes": 9, "allowed_bytes": 5, "parts": {"weights": 9}},
        "NonFiniteError": {"chunk": 3},
        "SourceError": {"kind": "truncated"},
        "StoreError": {"kind": "missing"},
    }
    for name in errors.__all__:
        error = getattr(errors, name)("what was asked", **carried.get(name, {}))
        error.add_note("what to do")
        yield name, error, carried.get(name, {})


def check(error, kind, carried):
    assert type(error) is kind
    assert str(error) == "what was asked"
    assert error.__notes__ == ["what to do"]
    assert {name: getattr(error, name) for name in carried} == carried


def test_every_error_survives_pickling():
    for name, error, carried in every_error():
        check(pickle.loads(pickle.dumps(error)), getattr(errors, name), carried)


def fail_with(name):
    raise next(error for found, error, _ in every_error() if found == name)


@pytest.mark.timeout(120)
def test_every_error_comes_out_of_a_worker():
    """A worker whose error cannot be read again would hang its pool."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for name, _, carried in every_error():
            with pytest.raises(getattr(errors, name)) as caught:
                pool.apply(fail_with, (name,))
            check(caught.value, getattr(errors, name), carried)
