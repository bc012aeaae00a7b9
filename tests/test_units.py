import pytest

from longvid.units import format_bytes, parse_bytes, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GiB", 8 * 2**30), ("500 MB", 500 * 10**6), ("1.5kib", 1536), ("42", 42), (7, 7), ("3TB", 3 * 10**12)],
)
def test_parse_bytes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "8 GiBs", "0", "1e9", 0, -5])
def test_parse_bytes_refuses(text):
    with pytest.raises(ValueError, match="size in bytes"):
        parse_bytes(text)


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
    with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
        parse_size(text)
