import re
from functools import partial

import pytest

from longvid import OptionError, VideoSession, make_plan
from longvid.cli.commands import main
from longvid.units import format_bytes, parse_bytes, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GiB", 8 * 2**30), ("500 MB", 500 * 10**6), ("1.5kib", 1536), (7, 7), ("3TB", 3 * 10**12)],
)
def test_parse_bytes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "8 GiBs", "8 gigs", "0B", "1e9", 0, -5, 8e9, True, None])
def test_parse_bytes_refuses(text):
    with pytest.raises(OptionError, match=f"{text!r} is not a .*size in bytes.*such as 8GiB") as caught:
        parse_bytes(text)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("option", ["memory", "offload", "reserved"])
def test_a_size_in_words_needs_a_unit(option):
    """512 bytes were meant by nobody."""
    for call in (VideoSession, partial(make_plan, height=16, width=16)):
        with pytest.raises(OptionError, match=r"'512' is not .*unit.*such as"):
            call("tiny", **{option: "512"})
        call("tiny", **{option: 512})


@pytest.mark.parametrize("option", ["--memory", "--offload", "--reserved"])
def test_a_size_without_a_unit_is_wrong_usage(option, capsys):
    with pytest.raises(SystemExit) as usage:
        main(["plan", "--size", "16x16", option, "512"])
    assert usage.value.code == 2
    assert re.search(r"'512' is not .*unit.*such as (512MiB|8GiB)", capsys.readouterr().err)


def test_format_bytes():
    assert [format_bytes(n) for n in (0, 1023, 1024, 3 * 2**29, 5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "1.50 GiB",
        "5.00 TiB",
    ]


def test_parse_size_gives_height_first():
    assert parse_size("720x480") == (480, 720)


@pytest.mark.parametrize("text", ["720", "720x", "0x480", "-1x5", "720*480", "a x b"])
def test_parse_size_refuses(text):
    with pytest.raises(OptionError, match="WIDTHxHEIGHT"):
        parse_size(text)
