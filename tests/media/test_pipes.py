"""Standard input and FIFOs as sources that are read once: what is read, what is refused, and what is said."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress

import imageio_ffmpeg
import numpy as np
import pytest
from support.ffmpeg import ffmpeg, generated

from longvid import SourceError, StoreError, VideoSession, load_model, open_store
from longvid.media.limits import Limits
from longvid.media.sources import open_source

KINDS = {
    "a.mkv": ["-c:v", "libx264", "-qp", "12", "-bf", "2"],
    "a.webm": ["-c:v", "libvpx", "-threads", "1", "-b:v", "1M"],
    "a.ts": ["-c:v", "libx264", "-qp", "12", "-bf", "2"],
    "a.y4m": [],
    "a.gif": [],
    "a.avi": ["-c:v", "mpeg4", "-q:v", "2"],
    "fragments.mp4": ["-c:v", "libx264", "-qp", "12", "-movflags", "frag_keyframe+empty_moov"],
    "front.mp4": ["-c:v", "libx264", "-qp", "12", "-bf", "2", "-movflags", "+faststart"],
}


def made(folder, name):
    path = folder / name
    pix_fmt = [] if name.endswith(".gif") else ["-pix_fmt", "yuv420p"]
    ffmpeg(*generated(1), *KINDS.get(name, ["-c:v", "libx264", "-qp", "12"]), *pix_fmt, path)
    return path


@pytest.fixture
def fifo(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def write_later(path, content, *, pause=0.0, stop=None):
    """A thread that writes to a FIFO as another program does."""

    def write():
        with suppress(BrokenPipeError), open(path, "wb", buffering=0) as file:
            for start in range(0, len(content), 5000):
                file.write(content[start : start + 5000])
                time.sleep(pause)
            if stop is not None:
                stop.wait(20)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


def read(source, **options):
    with open_source(source, **options) as video:
        blocks = list(video.blocks())
        return (
            np.concatenate([block.frames_THWC for block in blocks]),
            np.concatenate([block.pts_T for block in blocks]),
            video.info,
        )


@pytest.mark.parametrize("name", KINDS)
def test_a_pipe_gives_the_frames_and_times_of_the_file(tmp_path, fifo, name):
    path = made(tmp_path, name)
    frames, pts, info = read(path)
    write_later(fifo, path.read_bytes())
    piped, piped_pts, piped_info = read(fifo)
    np.testing.assert_array_equal(piped, frames)
    np.testing.assert_array_equal(piped_pts, pts)
    assert (piped_info.time_base, piped_info.kind) == (info.time_base, "pipe")
    assert len(piped) == 25


def test_a_window_of_a_pipe(tmp_path, fifo):
    path = made(tmp_path, "a.mkv")
    frames, _, _ = read(path, start=7, frames=5)
    write_later(fifo, path.read_bytes())
    np.testing.assert_array_equal(read(fifo, start=7, frames=5)[0], frames)


def test_a_slow_writer_is_waited_for(tmp_path, fifo):
    path = made(tmp_path, "a.ts")
    write_later(fifo, path.read_bytes(), pause=0.4)
    assert len(read(fifo, limits=Limits(stall_seconds=1.5))[0]) == 25


@pytest.mark.parametrize("written", [0, 3000])
def test_a_writer_that_hangs_is_given_up(tmp_path, fifo, written):
    stop = threading.Event()
    write_later(fifo, made(tmp_path, "a.ts").read_bytes()[:written], stop=stop)
    with pytest.raises(SourceError, match=r"nothing was written to .* for 0.5 s") as caught:
        read(fifo, limits=Limits(stall_seconds=0.5))
    stop.set()
    assert caught.value.kind == "stalled"


def test_a_fifo_without_a_writer_is_given_up(fifo):
    with pytest.raises(SourceError, match="nothing was written"):
        read(fifo, limits=Limits(stall_seconds=0.3))


def test_an_empty_pipe_is_no_video(fifo):
    write_later(fifo, b"")
    with pytest.raises(SourceError, match="is empty"):
        read(fifo)


@pytest.mark.parametrize("name", ["a.mkv", "front.mp4", "a.y4m"])
def test_a_pipe_that_ends_early_is_cut_short(tmp_path, fifo, name):
    content = made(tmp_path, name).read_bytes()
    write_later(fifo, content[: len(content) * 2 // 3])
    frames = 0
    with open_source(fifo) as video, pytest.raises(SourceError) as caught:
        for block in video.blocks():
            frames += len(block.pts_T)
    assert caught.value.kind == "truncated"
    assert 0 < frames < 25


def test_an_index_behind_is_refused_before_the_pictures_are_read(tmp_path, fifo):
    content = made(tmp_path, "behind.mp4").read_bytes()
    write_later(fifo, content[:2000], stop=threading.Event())
    with pytest.raises(SourceError, match=r"index stands behind.*mkv, webm, ts, fragmented mp4 and y4m") as caught:
        read(fifo, limits=Limits(stall_seconds=20))
    assert caught.value.kind == "not-video"


def test_what_is_no_video_is_refused(fifo):
    write_later(fifo, b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/a.ts\n")
    with pytest.raises(SourceError, match="playlist") as caught:
        read(fifo)
    assert caught.value.kind == "refused"


def test_the_limit_of_bytes_holds(tmp_path, fifo):
    write_later(fifo, made(tmp_path, "a.y4m").read_bytes())
    with pytest.raises(SourceError) as caught:
        read(fifo, limits=Limits(max_bytes=20000))
    assert caught.value.kind == "limit"


def encode(*arguments, **process):
    command = [sys.executable, "-m", "longvid", "encode", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=60, check=False, **process)


def test_standard_input_of_the_command(tmp_path):
    path = made(tmp_path, "a.mkv")
    with VideoSession(device="cpu") as session:
        session.encode(path, tmp_path / "file.zarr")
    with path.open("rb") as file:
        done = encode("-", tmp_path / "pipe.zarr", "--device", "cpu", stdin=file)
    assert done.returncode == 0, done.stderr
    assert b"standard input can be read once only: this run cannot be resumed" in done.stderr
    piped, filed = open_store(tmp_path / "pipe.zarr"), open_store(tmp_path / "file.zarr")
    np.testing.assert_array_equal(piped.latents[:], filed.latents[:])
    np.testing.assert_array_equal(piped.frame_pts, filed.frame_pts)
    assert piped.metadata.origin is None
    again = encode("-", tmp_path / "pipe.zarr", "--device", "cpu", input=path.read_bytes())
    assert again.returncode == 4
    assert b"--overwrite" in again.stderr
    repaired = subprocess.run(
        [sys.executable, "-m", "longvid", "repair", str(tmp_path / "pipe.zarr"), "--source", "-"],
        capture_output=True, timeout=60, check=False, input=b"",
    )  # fmt: skip
    assert repaired.returncode in (0, 3)


def test_the_command_behind_ffmpeg(tmp_path):
    writer = subprocess.Popen(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *generated(1), "-c:v", "ffv1", "-f", "matroska", "-"],
        stdout=subprocess.PIPE,
    )
    done = encode("-", tmp_path / "a.zarr", "--device", "cpu", "--quiet", stdin=writer.stdout)
    writer.stdout.close()
    assert (writer.wait(), done.returncode) == (0, 0), done.stderr
    assert open_store(tmp_path / "a.zarr").num_frames == 25


def test_what_needs_the_end_in_advance_is_refused(tmp_path, fifo):
    content = made(tmp_path, "a.mkv").read_bytes()
    for options in ({"part": (1, 2)}, {"chunk_plan": "reference"}):
        write_later(fifo, content)
        with (
            VideoSession(load_model("cogvideox-nano", random_weights=1), device="cpu")
            if "chunk_plan" in options
            else VideoSession(device="cpu") as session,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            with pytest.raises(SourceError, match=r"read in one pass.*write it to a file"):
                session.encode(fifo, tmp_path / "a.zarr", **options)
        assert not (tmp_path / "a.zarr").exists()


def test_a_stopped_run_of_a_pipe_is_not_resumed(tmp_path, fifo):
    content = made(tmp_path, "a.mkv").read_bytes()
    write_later(fifo, content)
    stopping = VideoSession(device="cpu", callbacks=[lambda event: stopping.stop()])
    with stopping as session, pytest.warns(UserWarning, match="cannot be resumed"):
        assert not session.encode(fifo, tmp_path / "a.zarr").complete
    write_later(fifo, content)
    with VideoSession(device="cpu") as session, pytest.warns(UserWarning, match="cannot be resumed"):
        with pytest.raises(StoreError) as caught:
            session.encode(fifo, tmp_path / "a.zarr")
        assert caught.value.kind == "exists"
        write_later(fifo, content)
        assert session.encode(fifo, tmp_path / "a.zarr", overwrite=True).complete


def test_a_stop_is_heard_while_the_writer_hangs(tmp_path, fifo):
    stop, timer = threading.Event(), None
    write_later(fifo, made(tmp_path, "a.y4m").read_bytes()[: 96 * 64 * 2 * 12], stop=stop)
    with VideoSession(device="cpu") as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timer = threading.Timer(1.0, session.stop)
        timer.start()
        began = time.monotonic()
        report = session.encode(fifo, tmp_path / "a.zarr")
    stop.set()
    assert not report.complete
    assert time.monotonic() - began < 10
