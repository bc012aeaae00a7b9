import pytest

from longvid.errors import MemoryBudgetError
from longvid.memory.budget import MemoryBudget


def test_budget_names_every_part():
    MemoryBudget().check(10**15, {}, "x")
    MemoryBudget(allowed_bytes=100).check(100, {}, "x")
    with pytest.raises(MemoryBudgetError, match=r"encode needs .*weights 90 B.*100 B are allowed") as caught:
        MemoryBudget(allowed_bytes=100, reserved_bytes=1).check(100, {"weights": 90, "contexts": 10}, "encode")
    assert (caught.value.projected_bytes, caught.value.allowed_bytes) == (100, 100)
    assert sum(caught.value.parts.values()) == 100
