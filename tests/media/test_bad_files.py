"""Every file of the catalogue has the outcome that is written there, under each policy, soon and in little memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from support.bad_media import CASES, UNNOTICED, clip, noisy, outcome
from support.media import indices

from longvid.errors import SourceError
from longvid.media.decoding.decoder import Decoder
from longvid.media.limits import Limits
from longvid.media.sources import open_source
from longvid.media.video_file import VideoFile

POLICIES = ("stop", "keep", "conceal")
BOMBS = [name for name in CASES if name.startswith(("bomb", "vast"))]
CONCEALED = [name for name, case in CASES.items() if "x" in case.conceal]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(name):
        if name not in made:
            make = CASES[name].make if name in CASES else UNNOTICED[name]
            made[name] = make(tmp_path_factory.mktemp("media"))
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_the_outcome_is_the_one_promised(catalogue, ledger, name):
    path = catalogue(name)
    started = time.monotonic()
    found = {policy: outcome(path, policy) for policy in POLICIES}
    seconds = time.monotonic() - started
    expected = {policy: CASES[name].expected(policy) for policy in POLICIES}
    silent = any("!" in expected[policy] and "!" not in found[policy] for policy in POLICIES)
    kind = "bad" if "!" in CASES[name].stop else "odd"
    ledger.add(f"media: {kind} file", survived=found == expected, silently_wrong=silent, seconds=seconds)
    assert found == expected


def test_the_catalogue_is_long_enough():
    assert sum("!" in case.stop for case in CASES.values()) >= 60


@pytest.mark.parametrize("name", UNNOTICED)
def test_what_nobody_notices_is_known(catalogue, name):
    assert not {"!", "~", "x"} & set(outcome(catalogue(name), "stop"))


@pytest.mark.parametrize("name", CONCEALED)
def test_concealing_is_repeatable_and_repeats_a_good_frame(catalogue, name):
    frames, pts, valid = read(catalogue(name), on_error="conceal")
    again, _, _ = read(catalogue(name), on_error="conceal")
    np.testing.assert_array_equal(frames, again)
    good = np.flatnonzero(valid)
    for place in np.flatnonzero(~valid):
        before = good[good < place]
        np.testing.assert_array_equal(frames[place], frames[before[-1] if len(before) else good[0]])
    assert (np.diff(pts) > 0).all()


@pytest.mark.parametrize("name", ["one_p.mp4", "b_reference.mp4", "mid_gop.ts", "zeroed_first.mp4"])
def test_a_concealed_run_goes_on_where_it_was(catalogue, name):
    frames, pts, valid = read(catalogue(name), on_error="conceal")
    for count in range(1, len(frames) + 1, 3):
        rest = read(catalogue(name), first=count, on_error="conceal")
        for part, all_of_it in zip(rest, (frames, pts, valid), strict=True):
            np.testing.assert_array_equal(part, all_of_it[count:])


def read(path, first=0, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open_source(path, **options) as video:
            blocks = list(video.blocks(first=first))
            height, width = video.info.height, video.info.width
    if not blocks:
        return np.zeros((0, height, width, 3), np.uint8), np.zeros(0, np.int64), np.zeros(0, np.bool_)
    return tuple(
        np.concatenate([getattr(block, part) for block in blocks]) for part in ("frames_THWC", "pts_T", "valid_T")
    )


def test_bombs_are_refused_in_little_memory(catalogue, ledger):
    """In a process of its own that can have no more than 300 MB besides what it begins with."""
    code = """
import resource, sys
import numpy
from longvid.media.video_file import VideoFile
from longvid.media.sources import open_source
def peak():  # KiB; getrusage would say what the process that started this one had
    return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])
begin = peak()
pages = int(open('/proc/self/statm').read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 300 * 2**20,) * 2)
for path in sys.argv[1:]:
    try:
        with open_source(path) as video: list(video.blocks())
        print('read', path)
    except OSError as exc:
        print(exc.kind)
        print(exc, file=sys.stderr)
print(peak() - begin)
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    paths = [str(catalogue(name)) for name in BOMBS]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True, timeout=60,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # an arena for each thread takes 64 MB of addresses, not of memory
    )  # fmt: skip
    *kinds, grown = done.stdout.split()
    for name, kind in zip(BOMBS, kinds, strict=True):
        ledger.add("media: bomb in 300 MB", survived=CASES[name].stop == f"!{kind}")
    assert kinds == [CASES[name].stop.removeprefix("!") for name in BOMBS], done.stderr
    assert int(grown) < 100 * 1024  # KiB


def test_no_file_takes_more_than_300_megabytes(catalogue):
    """The whole catalogue, under every policy, in a process of its own."""
    code = """
import sys, warnings
from longvid.media.sources import open_source
warnings.simplefilter('ignore')
for path in sys.argv[1:]:
    for policy in ('stop', 'keep', 'conceal'):
        try:
            with open_source(path, on_error=policy) as video:
                for block in video.blocks(): pass
        except OSError:
            pass
print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    paths = [str(catalogue(name)) for name in CASES]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 300_000_000 // 1024, done.stdout  # KiB


@pytest.mark.parametrize("name", ["bomb.mp4", "one_p.mp4", "cut.ts", "whole.mp4"])
def test_an_error_keeps_no_decoder_alive(catalogue, name):
    """A decoder holds frames; it has to go when it is closed, and not when the garbage is collected some day."""
    path = catalogue(name)
    gc.collect()
    gc.disable()
    try:
        outcome(path, "stop")
        assert not [one for one in gc.get_objects() if type(one) in (Decoder, VideoFile)]
    finally:
        gc.enable()


def test_the_limit_of_pixels_can_be_raised_and_lowered(tmp_path, catalogue):
    path = clip(tmp_path, "a.mp4", noisy(4))
    assert outcome(path, "stop", limits=Limits(max_pixels=48 * 96)) == "0-3"
    assert outcome(path, "stop", limits=Limits(max_pixels=48 * 96 - 1)) == "!limit"
    assert outcome(catalogue("bomb.avi"), "stop", limits=Limits(max_pixels=9000 * 9000)) == "0"


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(max_frames=24), "0-23"),
        (Limits(max_seconds=1), "0-23"),
        (Limits(max_seconds=0.5), "0-12 !limit"),
        (Limits(max_bytes=10), "!limit"),
    ],
)
def test_a_limit_lets_through_what_lies_within(tmp_path, limits, expected):
    path = clip(tmp_path, "a.mp4")
    assert outcome(path, "stop", limits=limits).split("@")[0] == expected


@pytest.mark.parametrize("suffix", ["mkv", "ts", "h264"])
def test_a_limit_of_frames_holds_where_the_header_does_not_say(tmp_path, suffix):
    path = clip(tmp_path, f"a.{suffix}")
    assert outcome(path, "stop", limits=Limits(max_frames=5)) == "0-4 !limit"
    with open_source(path, limits=Limits(max_frames=5)) as video:
        blocks = video.blocks(first=3)
        assert [indices(next(blocks).frames_THWC) for _ in range(2)] == [[3], [4]]
        with pytest.raises(SourceError, match="max_frames is 5") as caught:
            next(blocks)
    assert caught.value.kind == "limit"


def test_a_lower_limit_of_frames_than_the_index_counts_is_told_at_once(tmp_path):
    with pytest.raises(SourceError, match="max_frames is 5"):
        open_source(clip(tmp_path, "a.mp4"), limits=Limits(max_frames=5))
    assert outcome(clip(tmp_path, "b.mp4"), "stop", limits=Limits(max_frames=5), frames=5) == "0-4"


def test_a_fingerprint_is_of_the_content_and_the_reading(tmp_path):
    path = clip(tmp_path, "a.mp4", noisy(4))
    same = tmp_path / "b.mp4"
    same.write_bytes(path.read_bytes())
    changed = tmp_path / "c.mp4"
    changed.write_bytes(path.read_bytes()[:-1] + b"?")
    prints = {}
    for name, source, options in (
        ("a", path, {}), ("same", same, {}), ("changed", changed, {}), ("start", path, {"start": 1}),
        ("frames", path, {"frames": 2}), ("size", path, {"size": (24, 48)}), ("policy", path, {"on_error": "keep"}),
    ):  # fmt: skip
        with open_source(source, **options) as video:
            prints[name] = video.fingerprint()
            list(video.blocks())
    assert prints.pop("same") == prints["a"]
    different = [repr(sorted(one.items(), key=str)) for one in prints.values()]
    assert len(set(different)) == len(different)
