"""Nothing is opened but what was named: no socket, no other file, whatever a file or a name asks for."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.bad_media import clip, noisy

from longvid.errors import SourceError
from longvid.media.sources import open_source

CHILD = """
import json, os, sys
import numpy, longvid.media.video_file, longvid.media.sources
from longvid.media.sources import open_source

folder, names = sys.argv[1], json.loads(sys.argv[2])
os.chdir(folder)
opened, sockets = [], []

def watch(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        opened.append(os.path.abspath(os.fsdecode(args[0])))
    elif event.startswith("socket."):
        sockets.append(event)

sys.addaudithook(watch)
kinds = {}
for name in names:
    try:
        with open_source(name) as video:
            kinds[name] = sum(len(block.pts_T) for block in video.blocks())
    except OSError as exc:
        kinds[name] = getattr(exc, "kind", repr(exc))
print(json.dumps({"kinds": kinds, "opened": sorted(set(opened)), "sockets": sockets}))
"""
NOT_TOUCHED = ("other.mp4", "secret.ts", "target.mp4")


class Listener:
    """Counts who calls on a port of this machine."""

    def __init__(self):
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.num_calls = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                call, _ = self._server.accept()
            except OSError:
                return
            self.num_calls += 1
            call.close()

    def close(self):
        self._server.close()


@pytest.fixture
def listener():
    listener = Listener()
    yield listener
    listener.close()


@pytest.fixture
def tricks(tmp_path, listener):
    """Files and names, with the kind of error that each has; files that no trick may lead to lie beside them."""
    web = f"http://127.0.0.1:{listener.port}"
    for name in ("ok.mp4", "other.mp4", "target.mp4"):
        clip(tmp_path, name, noisy(4))
    shutil.copy(clip(tmp_path, "part.ts", noisy(4)), tmp_path / "secret.ts")
    written = {
        "web.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\n{web}/a.ts\n#EXT-X-ENDLIST\n",
        "web.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\n{web}/a.ts\n#EXT-X-ENDLIST\n",
        "beside.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n",
        "absolute.ts": f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n",
        "key.m3u8": f'#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{web}/key"\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n',
        "list.mp4": "ffconcat version 1.0\nfile other.mp4\n",
        "list.mkv": f"ffconcat version 1.0\nfile '{web}/a.mp4'\n",
        "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "manifest.mpd": f'<?xml version="1.0"?>\n<MPD><BaseURL>{web}/</BaseURL></MPD>\n',
    }
    for name, content in written.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "dangling.mp4").symlink_to("nowhere.mp4")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pipe.mp4").symlink_to("pipe")  # a link that is named is followed to a regular file only
    (tmp_path / "link.mp4").symlink_to(".")
    names = [
        f"{web}/a.mp4", f"httpproxy:{web}/a.mp4", f"tcp://127.0.0.1:{listener.port}", f"cache:{web}/a.mp4",
        f"crypto:{web}/a.mp4", f"rtmp://127.0.0.1:{listener.port}/a", f"udp://127.0.0.1:{listener.port}",
        f"ftp://127.0.0.1:{listener.port}/a.mp4", "concat:other.mp4|other.mp4", "concatf:list.mp4", "file:other.mp4",
        f"file://{tmp_path}/other.mp4", "subfile,,start,0,end,0,,:other.mp4", "data:video/mp4;base64,AAAA", "pipe:0",
        "fd:0", "async:other.mp4", "link.mp4", "dangling.mp4", "pipe.mp4",
    ]  # fmt: skip
    expected = {
        **dict.fromkeys([*written, *names], "refused"),
        "link.mp4": "not-video",
        ".": "not-video",
        "none.mp4": "missing",
        "ok.mp4": 4,
    }
    if os.path.exists("/dev/zero"):
        expected["/dev/zero"] = "refused"
    return expected


def run_child(folder, names, *before):
    command = [*before, sys.executable, "-c", CHILD, str(folder), json.dumps(names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_no_trick_opens_a_socket_or_another_file(tmp_path, tricks, listener, ledger):
    found = run_child(tmp_path, list(tricks))
    for name, kind in tricks.items():
        ledger.add("media: trick", survived=found["kinds"].get(name) == kind and not found["sockets"])
    assert found["kinds"] == tricks
    assert found["sockets"] == []
    assert listener.num_calls == 0
    inside = {Path(name).name for name in found["opened"] if Path(name).parent == tmp_path}
    assert not inside & set(NOT_TOUCHED)
    assert inside <= {Path(name).name for name in tricks}


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_nor_does_ffmpeg_below_python(tmp_path, tricks, listener):
    log = tmp_path / "strace.log"
    strace = ("strace", "-f", "-qq", "-o", str(log), "-e", "trace=openat,open,connect,sendto")
    try:
        found = run_child(tmp_path, list(tricks), *strace)
    except subprocess.CalledProcessError as exc:
        if "ptrace" in exc.stderr.lower():
            pytest.skip("strace may not trace here")
        raise
    assert found["kinds"] == tricks
    assert listener.num_calls == 0
    lines = log.read_text(errors="replace").splitlines()
    assert any("/proc/self/fd/" in line for line in lines), "the opener itself should be seen"
    assert not [line for line in lines if re.search(r"connect\(|sendto\(", line) and "AF_INET" in line]
    succeeded = [line for line in lines if "open" in line and "= -1" not in line]
    assert not [line for line in succeeded if any(name in line for name in NOT_TOUCHED)]


def test_the_listener_would_have_heard(tmp_path, tricks, listener):
    """The control: FFmpeg does dial out when it is handed a playlist as plain PyAV is."""
    code = "import av, sys\ntry: av.open(open(sys.argv[1], 'rb'))\nexcept Exception as exc: print(exc)"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "web.m3u8")], capture_output=True, timeout=60, check=True
    )
    assert listener.num_calls > 0


def test_a_file_that_is_replaced_while_it_is_read_is_read_on(tmp_path):
    path = clip(tmp_path, "a.mp4")
    with open_source(path) as video:
        print_before = video.fingerprint()
        blocks = video.blocks()
        first = next(blocks)
        os.replace(clip(tmp_path, "b.mp4", noisy(4)), path)
        count = len(first.pts_T) + sum(len(block.pts_T) for block in blocks)
        assert count == 24
        assert video.fingerprint() == print_before


def test_nothing_stays_open(tmp_path):
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("needs /proc")
    path = clip(tmp_path, "a.mp4", noisy(4))
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video" * 100)

    def held():
        return [name for name in map(os.path.realpath, descriptors.iterdir()) if name in (str(path), str(bad))]

    video = open_source(path)
    assert held()
    video.close()
    with pytest.raises(SourceError):
        open_source(bad)
    assert not held()


def test_a_link_in_the_folders_above_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    clip(tmp_path / "real", "a.mp4", noisy(4))
    (tmp_path / "folder").symlink_to("real")
    with open_source(tmp_path / "folder" / "a.mp4") as video:
        assert sum(len(block.pts_T) for block in video.blocks()) == 4
