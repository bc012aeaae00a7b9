"""When results are safe, as a value."""

import math

import pytest

from longvid import Durability, StoreError
from longvid.store.durability import parse_durability


@pytest.mark.parametrize(
    "wrong",
    [{"mode": "hope"}, {"publish_seconds": -1}, {"publish_seconds": math.nan}, {"publish_units": 0}],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(StoreError) as caught:
        Durability(**wrong)
    assert caught.value.kind == "format"


def test_a_name_is_enough():
    assert parse_durability("rename") == Durability(mode="rename")
    assert parse_durability(Durability(publish_units=3)) == Durability(publish_units=3)
    assert Durability().syncs
    assert not Durability(mode="rename").syncs


def test_commits_by_time_and_by_count():
    assert Durability(publish_seconds=0).commit_due(seconds=0, units=1)
    assert not Durability(publish_seconds=2).commit_due(seconds=1.9, units=99)
    assert Durability(publish_seconds=2, publish_units=4).commit_due(seconds=0, units=4)
