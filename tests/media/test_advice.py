"""What a refusal or a warning advises is tried as it is written: the options, and the commands of ffmpeg."""

from __future__ import annotations

import os
import re
import shlex
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from support.ffmpeg import ffmpeg, generated
from support.footage import KINDS, X264
from support.media import barcodes, collect, write_media

from longvid.cli.commands import main
from longvid.errors import LongvidError
from longvid.media.sources import open_source


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command in the folder; returns its exit code and the one line that it says at the end."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            code = main([str(arg) for arg in args])
        return code, capsys.readouterr().err.strip().rpartition("\n")[2]

    return run


def named(said: str, option: str) -> list[str]:
    """An option with its value, as a message has it."""
    found = re.search(rf"{option}(?: ([\w.#-]+))?", said)
    assert found is not None, said
    return [part for part in (option, found[1]) if part]


def test_a_size_that_changes(run, tmp_path):
    source = KINDS["two sizes"][0](tmp_path)
    code, said = run("encode", source, "a.zarr", "--quiet")
    assert (code, "(--size)" in said) == (3, True)
    assert run("encode", source, "a.zarr", "--quiet", "--size", "96x64")[0] == 0


def test_a_recording_that_ends_inside_a_picture(run, tmp_path):
    ffmpeg(*generated(2), *X264, "-bf", 0, "whole.ts", folder=tmp_path)
    Path("cut.ts").write_bytes(Path("whole.ts").read_bytes()[:-188])
    code, said = run("encode", "cut.ts", "a.zarr", "--quiet")
    assert code == 3
    assert run("encode", "cut.ts", "a.zarr", "--quiet", *named(said, "--on-error"))[0] == 0
    assert run("encode", "cut.ts", "b.zarr", "--quiet", "--on-error", "conceal")[0] == 0


def test_a_rate_for_a_file_that_has_times(run, tmp_path):
    ffmpeg(*generated(0.4), *X264, "a.mp4", folder=tmp_path)
    code, said = run("encode", "a.mp4", "a.zarr", "--quiet", "--assume-fps", 30)
    assert (code, "with --fps" in said) == (3, True)
    assert run("encode", "a.mp4", "a.zarr", "--quiet", "--fps", 30)[0] == 0


def test_a_stream_without_times(run, tmp_path):
    ffmpeg(*generated(0.4), *X264, "a.h264", folder=tmp_path)
    assert run("encode", "a.h264", "a.zarr")[0] == 0
    with pytest.warns(UserWarning, match="has no time stamps.*--assume-fps"):
        open_source("a.h264").close()
    assert run("encode", "a.h264", "b.zarr", "--quiet", "--assume-fps", 30)[0] == 0


@pytest.mark.parametrize("way", ["stretch", "pad"])
def test_another_aspect(run, tmp_path, way):
    ffmpeg(*generated(0.4), *X264, "a.mp4", folder=tmp_path)
    with pytest.warns(UserWarning, match=f"--fit .*{way}"):
        open_source("a.mp4", size=(96, 64)).close()
    assert run("encode", "a.mp4", "a.zarr", "--quiet", "--size", "64x96", "--fit", way)[0] == 0


@pytest.mark.parametrize("how", ["faststart", "file"])
def test_an_mp4_file_with_its_index_behind_from_a_pipe(run, tmp_path, how):
    ffmpeg(*generated(0.4), *X264, "a.mp4", folder=tmp_path)
    os.mkfifo("pipe")

    def encode(path):
        writer = threading.Thread(target=lambda: _write("pipe", Path(path).read_bytes()), daemon=True)
        writer.start()
        found = run("encode", "pipe", f"{path}.zarr", "--quiet")
        writer.join(10)
        return found

    code, said = encode("a.mp4")
    assert code == 3
    if how == "file":
        assert "write it to a file and give its path" in said
        assert run("encode", "a.mp4", "a.zarr", "--quiet")[0] == 0
        return
    options = re.search(r"\(ffmpeg (.+?)\)", said)
    assert options is not None, said
    ffmpeg("-i", "a.mp4", "-c", "copy", *shlex.split(options[1]), "b.mp4", folder=tmp_path)
    assert encode("b.mp4")[0] == 0


def _write(path, content):
    try:
        with open(path, "wb") as pipe:
            pipe.write(content)
    except BrokenPipeError:
        pass


def test_a_missing_number(run, tmp_path):
    os.mkdir("in")
    ffmpeg(*generated(0.4), "in/p%03d.png", folder=tmp_path)
    os.remove("in/p004.png")
    code, said = run("encode", "in/p%03d.png", "a.zarr", "--quiet", "--fps", 25)
    assert code == 3
    folder = re.search(r"name the folder, (\S+),", said)
    assert folder is not None, said
    assert run("encode", folder[1], "a.zarr", "--quiet", "--fps", 25)[0] == 0


def test_recordings_of_which_some_pictures_are_not_found(tmp_path):
    for name in "abc":
        ffmpeg(*generated(0.4), *X264, f"{name}.flv", folder=tmp_path)
    joined = tmp_path / "joined.flv"
    joined.write_bytes(b"".join((tmp_path / f"{name}.flv").read_bytes() for name in "abc"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        collect(open_source(joined))
    said = next(str(one.message) for one in caught if "ffmpeg -f concat" in str(one.message))
    assert "another recording begins" in said
    (tmp_path / "list.txt").write_text("".join(f"file {name}.flv\n" for name in "abc"))
    ffmpeg("-f", "concat", "-i", "list.txt", "-c", "copy", "whole.flv", folder=tmp_path)
    frames, _ = collect(open_source(tmp_path / "whole.flv"))
    assert len(frames) == 30


def test_fields_that_the_decoder_does_not_mark(tmp_path):
    interlaced = ["-vf", "interlace=lowpass=0", "-c:v", "utvideo", "-flags", "+ildct+ilme", "-field_order", "tt"]
    ffmpeg(*generated(0.4, rate=50), *interlaced, "a.mkv", folder=tmp_path)
    with pytest.warns(UserWarning, match="ffmpeg -vf bwdif first"):
        open_source(tmp_path / "a.mkv").close()
    ffmpeg("-i", "a.mkv", "-vf", "bwdif", "-c:v", "utvideo", "-field_order", "progressive", "b.mkv", folder=tmp_path)
    open_source(tmp_path / "b.mkv").close()


def test_a_growing_file(run, tmp_path):
    ffmpeg(*generated(1), *X264, "-bf", 0, "whole.ts", folder=tmp_path)
    whole = Path("whole.ts").read_bytes()
    half = len(whole) // 2 // 188 * 188
    growing = Path("a.ts")
    growing.write_bytes(whole[:half])
    with pytest.raises(LongvidError, match=r"Run the same command again .*--follow"), open_source(growing) as video:
        for number, _ in enumerate(video.blocks()):
            if number == 2:
                growing.write_bytes(whole)
    assert run("encode", "a.ts", "a.zarr", "--quiet")[0] == 0
    assert run("encode", "a.ts", "b.zarr", "--quiet", "--follow", "--follow-seconds", 0.3)[0] == 0


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["a.mp4", "--codec", "ffv1"], r"use (\.mkv)"),
        (["a.mp4", "--codec", "prores"], r"use (\.mov)"),
        (["a.webm", "--codec", "h264"], r"--codec (vp9)|one of (vp9)"),
        (["a.mp4", "--pix-fmt", "rgb24"], r"--pix-fmt (yuv420p)"),
        (["a.mp4", "--crf", "60"], r"give (0)"),
        (["a.avi"], r"use (\.mp4)"),
    ],
)
def test_what_an_output_does_not_take(run, options, advice):
    write_media(Path("in.mp4"), np.ascontiguousarray(barcodes(9)))
    assert run("encode", "in.mp4", "a.zarr", "--quiet")[0] == 0
    code, said = run("decode", "a.zarr", *options, "--quiet")
    assert code != 0
    found = re.search(advice, said)
    assert found is not None, said
    value = next(group for group in found.groups() if group)
    changed = [f"a{value}", *options[1:]] if value.startswith(".") else [*options[:-1], value]
    assert run("decode", "a.zarr", *changed, "--quiet")[0] == 0
