"""A decoder that hangs: the waiting thread gets an error, and the process can end."""

import subprocess
import sys
import threading
import time

import pytest
from support.clock import Clock
from support.media import barcodes, write_media

from longvid import SourceError
from longvid.media.decoding.watchdog import Watchdog
from longvid.media.limits import Limits
from longvid.media.sources import open_source


def test_results_and_errors_come_through():
    dog = Watchdog("a.mp4", 60)
    assert dog.run(lambda: 3) == 3
    with pytest.raises(KeyError, match="x"):
        dog.run(lambda: {}["x"])
    assert dog.run(threading.get_ident) != threading.get_ident()
    dog.close()
    dog.close()


def test_a_step_that_hangs_is_left_behind():
    dog, release = Watchdog("a.mp4", 0.2), threading.Event()
    with pytest.raises(SourceError, match=r"delivered nothing for 0.2 s") as caught:
        dog.run(release.wait)
    assert caught.value.kind == "stalled"
    with pytest.raises(SourceError, match="delivered nothing"):  # what it works on is not touched again
        dog.run(lambda: 3)
    release.set()
    dog.close()


def test_a_step_that_shows_progress_may_take_its_time(monkeypatch):
    clock = Clock(time.monotonic)
    monkeypatch.setattr(time, "monotonic", clock)
    dog = Watchdog("a.mp4", Clock.JUMP)

    def steady():
        for _ in range(6):
            clock.jump(0.5)
            dog.beat()
        return "done"

    assert dog.run(steady) == "done"
    dog.close()


def test_a_stalled_file_ends_the_run_and_not_the_program(tmp_path, monkeypatch):
    path = write_media(tmp_path / "a.mp4", barcodes(30))
    release = threading.Event()
    with open_source(path, limits=Limits(stall_seconds=3)) as video:
        packets = iter(video._reader._decoder._packets)

        def hanging():
            for count, packet in enumerate(packets):
                if count == 10:
                    release.wait()
                yield packet

        monkeypatch.setattr(video._reader._decoder, "_packets", hanging())
        with pytest.raises(SourceError) as caught:
            list(video.blocks())
        assert caught.value.kind == "stalled"
        release.set()


def test_a_process_ends_although_its_decoder_hangs():
    code = (
        "import time; from longvid.media.decoding.watchdog import Watchdog\n"
        "dog = Watchdog('a.mp4', 0.2)\n"
        "try: dog.run(lambda: time.sleep(600))\n"
        "except OSError as e: print(e.kind)\n"
        "dog.close()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "stalled\n"
