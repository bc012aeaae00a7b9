"""Signals to the command line at any time, and writers that meet in one store."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from support.fault_commands import OPTIONS, Bench, Trial
from support.fault_runs import explain, published_frames, read_arrays, same, spread, write_video
from support.file_operations import foreign_paths
from support.stores import frame_store

from longvid import StoreError, VideoSession
from longvid.store.durability import Durability
from longvid.store.format import PRIVATE, with_checksum
from longvid.store.lock import WriterLock
from longvid.store.verify import verify

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with Bench.open(tmp_path_factory.mktemp("bench")) as bench:
        yield bench


# ------------------------------------------------------------------------------------------- signals


@pytest.mark.timeout(3600)
def test_a_signal_at_any_point_ends_a_run_where_it_can_go_on(bench, tmp_path, ledger, all_faults):
    """The points are file operations, of whichever thread; the last of them come after the run is complete."""
    points = spread(bench.truth.points, 51 if all_faults else 6, seed=4)

    def attempt(number):
        signum = SIGNALS[number % 3]
        trial = Trial(bench, tmp_path / f"{number}.zarr")
        ran = trial.strike(code=128 + signum, signal_at=(signum, points[number]))
        trial.go_on()
        return ran.code != 0, trial

    tried = bench.commands.each(attempt, range(len(points)))
    for was_hurt, trial in tried:
        if was_hurt:
            trial.add_to(ledger, "signal at any point")
    bad = [(points[number], trial.outcome) for number, (_, trial) in enumerate(tried) if not trial.outcome.ok]
    assert not bad, explain(bad)
    assert sum(was_hurt for was_hurt, _ in tried) > len(points) // 2
    assert sum(trial.outcome.started_in_the_middle for _, trial in tried) >= len(points) // 6


def test_a_signal_commits_every_unit_that_is_whole(bench, tmp_path, ledger):
    """However rare commits are; the chunk in hand is finished before."""
    trial = Trial(bench, tmp_path / "a.zarr")
    ran = trial.strike(code=143, in_chunk=(7, [signal.SIGTERM], False), commit_seconds=3600)
    assert ran.code == 143
    assert published_frames(trial.store) == 61  # 16 of 17 latents, in units of 4
    assert trial.go_on().resumed_from == 61
    trial.add_to(ledger, "stop between two commits")
    assert trial.outcome.ok, trial.outcome
    assert trial.outcome.started_in_the_middle


def test_the_second_interrupt_does_not_wait(bench, tmp_path, ledger):
    """The first one waits for the chunk in hand, which never ends here."""
    trial = Trial(bench, tmp_path / "a.zarr")
    ran = trial.strike(code=130, in_chunk=(9, [signal.SIGINT, signal.SIGINT], True))
    assert ran.code == 130
    assert trial.go_on().resumed_from >= 45  # a few chunks may wait to be written
    trial.add_to(ledger, "second SIGINT")
    assert trial.outcome.ok, trial.outcome
    assert trial.outcome.started_in_the_middle


@pytest.mark.timeout(3600)
def test_signals_to_a_real_process(bench, tmp_path, ledger, all_faults):
    """Units are as long as in real life here, and so is the video."""
    rng, video = random.Random(5), write_video(tmp_path, 1200)
    assert bench.commands.run("encode", video, tmp_path / "truth.zarr", *OPTIONS).finished
    truth = read_arrays(tmp_path / "truth.zarr")
    for number in range(9 if all_faults else 1):
        signum, store = SIGNALS[(number + 1) % 3], tmp_path / f"{number}.zarr"
        command = [sys.executable, "-m", "longvid", "encode", str(video), str(store), *OPTIONS]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as those of the bench
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda signum=signum: signal.signal(signum, signal.SIG_DFL),
        )  # fmt: skip
        while child.poll() is None and not published_frames(store):
            time.sleep(0.005)
        time.sleep(rng.random() * 0.2)
        child.send_signal(signum)
        _, complained = child.communicate(timeout=240)
        assert child.returncode in (0, 128 + signum), complained
        assert b"Traceback" not in complained
        assert foreign_paths(store) == []
        frames = published_frames(store)
        assert frames >= 253  # of one unit
        done = subprocess.run(command, env=environment, capture_output=True, check=True)
        report, arrays = json.loads(done.stdout), read_arrays(store)
        # only the digests know of units
        is_same = verify(store).ok and all(same(arrays[name], truth[name]) for name in truth.keys() - {"digest"})
        resumed = report["resumed_from_frame"] == frames and report["frames_computed"] <= 1200 - frames + 8 * 6
        if child.returncode != 0:
            ledger.add("signal at any time", survived=is_same and resumed, silently_wrong=not is_same)
        assert is_same
        assert resumed


# ------------------------------------------------------------------------------------------- writers


def frame_writer(path, **options):
    return frame_store(path, (8, 8), durability=Durability(publish_seconds=0), **options)


def frames(value, count=64):
    return np.full((count, 8, 8, 3), value, np.uint8), np.arange(count)


def test_a_second_writer_is_told_who_the_first_one_is(bench, tmp_path, ledger):
    store, told = tmp_path / "a.zarr", []
    started = time.strftime("%Y-%m-%dT%H:", time.gmtime())

    def source():
        """Frames, and in the middle of them everybody else who wants to write."""
        for number in range(8):
            if number == 6:
                with pytest.raises(StoreError) as caught, VideoSession("tiny", device="cpu", dtype="float32") as other:
                    other.encode(frames(1)[0], store, overwrite=True, resume="never")
                assert caught.value.kind == "locked"
                told.append(str(caught.value))
                ran = bench.commands.run("encode", bench.video, store, *OPTIONS, "--overwrite", "--resume", "never")
                assert ran.code == 4
                told.append(ran.complained)
                with pytest.raises(StoreError, match="is being written") as caught:
                    verify(store)
                assert caught.value.kind == "locked"
                assert bench.commands.run("verify", store).code == 4
            yield np.full((8, 16, 16, 3), number, np.uint8)

    with VideoSession("tiny", device="cpu", dtype="float32") as session:
        report = session.encode(source(), store, durability=Durability(publish_seconds=0))
        assert report.complete
        assert report.frames == 64
        assert len(told) == 2
        for words in told:
            assert f"process {os.getpid()} on {socket.gethostname()}, since {started}" in words
            ledger.add("second writer", survived=True)
        assert verify(store).ok
        assert session.encode(frames(1)[0], store, overwrite=True, resume="never").complete  # and now it may


OWNER = """
import os, sys, time
from pathlib import Path
from longvid.store.lock import WriterLock
lock = WriterLock.acquire(Path(sys.argv[1]))
if os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(120)
"""


def test_a_lock_dies_with_its_owner_whose_fork_lives_on(tmp_path, ledger):
    (tmp_path / "a.zarr" / PRIVATE).mkdir(parents=True)
    path = tmp_path / "a.zarr" / PRIVATE / "lock"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(path)], stdout=subprocess.PIPE)
    fork = int(owner.stdout.readline())
    try:
        with pytest.raises(StoreError, match=f"is being written by process {owner.pid} on "):
            WriterLock.acquire(path)
        owner.kill()
        owner.wait()
        os.kill(fork, 0)  # is there
        WriterLock.acquire(path).release()
        assert not path.exists()
        ledger.add("owner killed, its fork lives", survived=True)
    finally:
        os.kill(fork, signal.SIGKILL)
        owner.kill()
        owner.wait()
        owner.stdout.close()


@pytest.mark.parametrize("published", [False, True])
def test_a_zombie_publishes_nothing_in_a_store_that_was_taken_over(published, tmp_path, ledger):
    """Where locks do not work, the epoch in the root metadata tells the one who was gone for long."""
    store, root = tmp_path / "a.zarr", tmp_path / "a.zarr" / "zarr.json"
    with pytest.raises(StoreError, match="taken over by another run") as caught, frame_writer(store) as zombie:
        if published:
            zombie.write(*frames(1))
        content = json.loads(root.read_bytes())
        content["attributes"]["longvid"]["epoch"] = "of another run"
        root.write_bytes(taken := with_checksum(content))
        zombie.write(*frames(2))
    assert caught.value.kind == "locked"
    assert root.read_bytes() == taken
    assert published_frames(store) == 64 * published
    with frame_writer(store) as writer:  # continues as the other one would
        writer.write(*frames(1))
        writer.write(*frames(3))
    shown = read_arrays(store)["frames"]
    ledger.add("zombie writer", survived=(ok := (shown[:64] == 1).all() and (shown[64:] == 3).all()))
    assert ok
    assert verify(store).ok
