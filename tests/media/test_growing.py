"""Files that change while they are read are noticed; files that grow are followed, and continued."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
import zarr
from support.ffmpeg import ffmpeg, generated

from longvid import SourceError, StoreError, VideoSession, open_store
from longvid.media.sources import open_source

KINDS = {
    "a.ts": ["-c:v", "libx264", "-qp", "12", "-bf", "2", "-g", "10"],
    "a.mkv": ["-c:v", "libx264", "-qp", "12", "-bf", "2", "-g", "10"],
    "a.webm": ["-c:v", "libvpx", "-threads", "1", "-b:v", "1M"],
    "a.mp4": ["-c:v", "libx264", "-qp", "12", "-movflags", "frag_keyframe+empty_moov", "-g", "10"],
    "a.h264": ["-c:v", "libx264", "-qp", "12", "-bf", "0"],
}


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the video ends there"),
    pytest.mark.filterwarnings("ignore:.*has no time stamps"),
]


@pytest.fixture(autouse=True)
def _small_units(monkeypatch):
    monkeypatch.setattr("longvid.store.latent_writer.TARGET_CHUNK_BYTES", 6000)


def made(folder, name):
    path = folder / name
    ffmpeg(*generated(3), *KINDS[name], "-pix_fmt", "yuv420p", path)
    return path.read_bytes()


def encode(source, store, *callbacks, **options):
    with VideoSession(device="cpu", callbacks=callbacks) as session:
        return session.encode(source, store, durability="rename", **options)


def arrays(path):
    return {name: array[:] for name, array in zarr.open_group(path, mode="r").arrays()}


def same(a, b):
    first, second = arrays(a), arrays(b)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def grow(path, content, *, step=4000, pause=0.02):
    def write():
        for start in range(0, len(content), step):
            with path.open("ab") as file:
                file.write(content[start : start + step])
            time.sleep(pause)

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def test_growth_is_noticed(tmp_path):
    content, path = made(tmp_path, "a.ts"), tmp_path / "growing.ts"
    half = len(content) // 2 // 188 * 188
    path.write_bytes(content[:half])
    with (
        open_source(path, on_error="keep") as video,
        pytest.raises(SourceError, match=r"has grown.*--follow") as caught,
    ):
        assert video.fingerprint()["bytes"] == half
        for number, _ in enumerate(video.blocks()):
            if number == 5:
                path.write_bytes(content)
    assert caught.value.kind == "changed"


@pytest.mark.parametrize("change", ["cut", "overwritten", "overwritten and set back"])
def test_other_changes_are_noticed(tmp_path, change):
    content, path = made(tmp_path, "a.ts"), tmp_path / "b.ts"
    path.write_bytes(content)
    with open_source(path) as video, pytest.raises(SourceError) as caught:
        video.fingerprint()
        for number, _ in enumerate(video.blocks()):
            if number == 5 and change == "cut":
                os.truncate(path, 1000)
            elif number == 5:
                before = path.stat()
                with path.open("r+b") as file:
                    file.write(b"\0" * 100)
                if change != "overwritten":
                    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert caught.value.kind == "changed"


def test_a_touch_is_no_change(tmp_path):
    content, path = made(tmp_path, "a.ts"), tmp_path / "b.ts"
    path.write_bytes(content)
    with open_source(path) as video:
        video.fingerprint()
        for number, _ in enumerate(video.blocks()):
            if number == 5:
                os.utime(path, (1, 1))


@pytest.mark.parametrize("name", KINDS)
def test_a_followed_recording_is_the_finished_file(tmp_path, name):
    content = made(tmp_path, name)
    path = tmp_path / f"live-{name}"
    path.write_bytes(content[:300])
    encode(tmp_path / name, tmp_path / "whole.zarr")
    thread = grow(path, content[300:])
    report = encode(path, tmp_path / "a.zarr", follow=True, follow_seconds=1)
    thread.join()
    assert report.complete
    assert report.frames == 75
    same(tmp_path / "a.zarr", tmp_path / "whole.zarr")
    assert encode(path, tmp_path / "a.zarr").resumed_from_frame == 75


@pytest.mark.parametrize("name", ["a.ts", "a.mkv", "a.h264"])
@pytest.mark.parametrize("follow", [True, False])
def test_a_complete_store_of_a_file_that_has_grown_is_continued(tmp_path, name, follow):
    content, path = made(tmp_path, name), tmp_path / f"live-{name}"
    path.write_bytes(content[: len(content) * 2 // 3])
    encode(tmp_path / name, tmp_path / "whole.zarr")
    first = encode(path, tmp_path / "a.zarr", follow=True, follow_seconds=0.3, on_error="keep")
    assert first.complete
    assert 20 < first.frames < 75
    path.write_bytes(content)
    options = {"follow": True, "follow_seconds": 0.3} if follow else {}
    second = encode(path, tmp_path / "a.zarr", on_error="keep", **options)
    assert second.complete
    assert 0 < second.resumed_from_frame < first.frames
    same(tmp_path / "a.zarr", tmp_path / "whole.zarr")
    assert open_store(tmp_path / "a.zarr").metadata.fingerprint["source"]["bytes"] == len(content)


def test_a_stopped_run_continues_behind_a_rewritten_header(tmp_path):
    content, path = made(tmp_path, "a.mkv"), tmp_path / "live.mkv"
    live = bytearray(content)
    live[200:204] = b"\0\0\0\0"  # in the padding behind the header
    path.write_bytes(live[: len(live) // 2])
    encode(tmp_path / "a.mkv", tmp_path / "whole.zarr")
    session = VideoSession(device="cpu", callbacks=[lambda event: event.index == 1 and session.stop()])
    with session:
        assert not session.encode(path, tmp_path / "a.zarr", follow=True, follow_seconds=5).complete
    path.write_bytes(content)
    report = encode(path, tmp_path / "a.zarr")
    assert report.complete
    same(tmp_path / "a.zarr", tmp_path / "whole.zarr")


def test_another_file_is_refused(tmp_path):
    content, path = made(tmp_path, "a.ts"), tmp_path / "live.ts"
    path.write_bytes(content[: len(content) // 2])
    encode(path, tmp_path / "a.zarr", follow=True, follow_seconds=0.3, on_error="keep")
    path.write_bytes(content[: len(content) // 3] + content[len(content) // 4 :])
    with pytest.raises(StoreError) as caught:
        encode(path, tmp_path / "a.zarr", on_error="keep")
    assert caught.value.kind == "mismatch"


def test_only_files_are_followed(tmp_path):
    with pytest.raises(SourceError, match="follow=True"):
        encode(np.zeros((3, 32, 32, 3), np.uint8), tmp_path / "a.zarr", follow=True)
