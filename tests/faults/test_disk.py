"""Disks that are full, read-only, slow or broken: a typed error, a true prefix for readers, and the run can go on."""

import os
import time

import numpy as np
import pytest
import zarr
from support.fault_commands import NUM_FRAMES, OPTIONS, Bench, SmallDisk, Trial, strace_is_permitted
from support.fault_runs import SEEK, explain, published_frames

from longvid import Durability, VideoSession, open_store
from longvid.store.format import PRIVATE
from longvid.store.verify import verify

FULL, READ_ONLY = "make room and run the same command again", "choose another folder, or make this one writable"
TOO_SMALL = "make room or choose another folder"
needs_mounts = pytest.mark.skipif(not SmallDisk.is_permitted(), reason="this process may not mount anything")
needs_strace = pytest.mark.skipif(not strace_is_permitted(), reason="strace is missing or not permitted")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with Bench.open(tmp_path_factory.mktemp("bench")) as bench:
        yield bench


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    disk = SmallDisk(folder)
    yield disk
    disk.close()


# ------------------------------------------------------------------------------------------- no room


@needs_mounts
@pytest.mark.timeout(3600)
def test_a_disk_that_fills_up(bench, disk, ledger, all_faults):
    """Of every size from nothing to enough, by bytes and by files; then it grows, and the run resumes."""
    sizes = range(16, 148, 4) if all_faults else (64, 100, 136)
    nodes = range(4, 36) if all_faults else (12, 32)
    bad, in_the_middle = [], 0
    for options in (*(f"size={n}k,nr_inodes=0" for n in sizes), *(f"size=8m,nr_inodes={n}" for n in nodes)):
        disk.fresh(options)
        trial = Trial(bench, disk.path / "a.zarr")
        ran = trial.strike(words=FULL)
        if ran.code == 0:
            continue
        disk.change("size=16m,nr_inodes=0")
        trial.go_on()
        trial.add_to(ledger, "full disk")
        in_the_middle += trial.outcome.started_in_the_middle
        bad += [] if trial.outcome.ok else [(options, trial.outcome)]
    assert not bad, explain(bad)
    assert in_the_middle >= 2
    disk.fresh("size=8k")
    assert Trial(bench, disk.path / "a.zarr").strike(words=TOO_SMALL).code == 4
    disk.fresh("size=16m")
    assert Trial(bench, disk.path / "a.zarr").strike().code == 0


@needs_mounts
@pytest.mark.timeout(3600)
def test_a_disk_that_fills_up_while_a_run_is_continued(bench, disk, ledger, all_faults):
    """What is there stays, and so does what the run before has left, whatever room there is."""
    more = range(64) if all_faults else (0, 3, 30)
    bad, num_hurt = [], 0
    for number in more:
        disk.fresh("size=16m")
        trial = Trial(bench, disk.path / "a.zarr")
        trial.begin()
        there = os.statvfs(disk.path)
        pages, nodes = (there.f_blocks - there.f_bfree) * there.f_frsize // 4096, there.f_files - there.f_ffree
        by_nodes = number % 2
        room = f"size=8m,nr_inodes={nodes + number // 2}" if by_nodes else f"size={4 * (pages + number // 2)}k"
        disk.change(room)
        ran = trial.strike(words=FULL)
        if ran.code == 0:
            continue
        num_hurt += 1
        disk.change("size=16m,nr_inodes=0")
        trial.go_on()
        trial.add_to(ledger, "full disk, resumed")
        bad += [] if trial.outcome.ok and trial.outcome.started_in_the_middle else [(room, trial.outcome)]
    assert not bad, explain(bad)
    assert num_hurt >= (8 if all_faults else 2)


@needs_mounts
def test_negative_control_plain_zarr_on_a_full_disk(disk, ledger, all_faults):
    """Appending makes the array longer first, and then finds no room for the rows: they read as zeros."""
    rows = np.random.default_rng(6).standard_normal((12, 1500)).astype(np.float32)
    wrong = 0
    for size in range(8, 72, 4):
        disk.fresh(f"size={size}k")
        with pytest.raises(OSError, match="No space left"):
            array = zarr.create_array(
                disk.path / "a.zarr", shape=(0, 1500), chunks=(2, 1500), dtype="float32", compressors=None
            )
            for start in range(0, 12, 2):
                array.append(rows[start : start + 2])
        try:
            shown = zarr.open_array(disk.path / "a.zarr", mode="r")[:]
        except FileNotFoundError:
            shown = rows[:0]
        is_wrong = not (shown == rows[: len(shown)]).all()
        ledger.add("full disk", survived=not is_wrong, silently_wrong=is_wrong, who="plain zarr")
        wrong += is_wrong
    assert wrong


@pytest.mark.timeout(3600)
def test_files_that_may_not_grow(bench, tmp_path, ledger, all_faults):
    """A limit on the size of files needs no permission, and the kernel refuses the write for real."""
    sizes = range(0, 19_000, 500) if all_faults else (0, 100, 4_000, 10_000, 17_500)
    trials = {(size, begun): Trial(bench, tmp_path / f"{size}-{begun}.zarr") for size in sizes for begun in (0, 1)}

    def attempt(which):
        size, begun = which
        if begun:
            trials[which].begin()
        if trials[which].strike(words=FULL, limits={"RLIMIT_FSIZE": size}).code != 0:
            trials[which].go_on()

    bench.commands.each(attempt, trials)
    hurt = {which: trial for which, trial in trials.items() if trial.hurt.code != 0}
    for trial in hurt.values():
        trial.add_to(ledger, "file-size limit")
    bad = [(which, trial.outcome) for which, trial in hurt.items() if not trial.outcome.ok]
    assert not bad, explain(bad)
    assert len(hurt) >= len(trials) - 10
    assert all(trial.outcome.started_in_the_middle == begun for (_, begun), trial in hurt.items())


# ------------------------------------------------------------------------------------------- no writing


@needs_mounts
def test_a_disk_that_cannot_be_written(bench, disk, ledger):
    """Before the first run, after one that was cut short, and when all is done; reading still works."""
    store = disk.path / "a.zarr"
    disk.fresh("size=16m,ro")
    fresh = Trial(bench, store)
    assert fresh.strike(words=READ_ONLY).code == 4
    disk.change("rw")
    there = fresh.begin()
    assert 0 < there < NUM_FRAMES
    disk.change("ro")
    started = Trial(bench, store)
    assert started.strike(words=READ_ONLY).code == 4
    assert open_store(store).num_frames == there
    assert verify(store).ok
    disk.change("rw")
    started.go_on()
    assert started.outcome.started_in_the_middle
    disk.change("ro")
    assert bench.commands.run("encode", bench.video, store, *OPTIONS).report["resumed_from_frame"] == NUM_FRAMES
    assert verify(store).ok
    for trial in (fresh, started):
        trial.ran = started.ran
        trial.add_to(ledger, "read-only disk")
        assert trial.outcome.ok, trial.outcome


def test_few_open_files(bench, tmp_path, ledger):
    trial = Trial(bench, tmp_path / "a.zarr")
    assert trial.strike(limits={"RLIMIT_NOFILE": 64}).computed == NUM_FRAMES
    trial.go_on()
    trial.add_to(ledger, "64 open files")
    assert trial.outcome.ok, trial.outcome


def test_a_slow_disk_does_not_fill_the_memory(tmp_path, monkeypatch, all_faults):
    """How far the source is ahead of what is published stays the same, however long the video is."""
    seconds = 0.05 if all_faults else 0.001
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (time.sleep(seconds), real(fd))[0])
    monkeypatch.setattr("longvid.store.latent_writer.TARGET_CHUNK_BYTES", 2 * 16 * 2 * 2 * 2)
    ahead = []

    def source(store, num_blocks):
        for number in range(num_blocks):
            ahead.append(8 * number - published_frames(store))
            yield np.full((8, 16, 16, 3), number, np.uint8)

    largest = {}
    with VideoSession("tiny", device="cpu", dtype="float32") as session:
        for num_blocks in (40, 80) if all_faults else (48,):
            ahead.clear()
            store = tmp_path / f"{num_blocks}.zarr"
            durability = Durability(publish_seconds=0)
            session.encode(source(store, num_blocks), store, durability=durability)
            largest[num_blocks] = max(ahead)
    # two queues of two chunks, and a chunk in each of three hands; the videos are longer
    assert max(largest.values()) <= 8 * 32, largest


# ------------------------------------------------------------------------------------------- system calls

ROOT, LOCK = ".zarr.json.partial", f"{PRIVATE}/lock"
RENAME = "/^rename(at2?)?$"


def injections(all_faults):
    """Faults in strace's words, and the files in the store that they are for; all, if there are none."""
    some = [
        ("fsync:error=EIO:when=5", ()),
        ("fsync:error=EIO:when=17", ()),
        (f"{RENAME}:error=ENOSPC:when=9", ()),
        ("openat:error=EMFILE:when=2", (ROOT,)),
        ("write:error=ENOSPC:when=2", (ROOT,)),
        ("write:error=ENOSPC:when=2", (SEEK,)),
    ]
    if not all_faults:
        return some
    # strace counts the calls of every thread by itself
    every = [(f"fsync:error=EIO:when={n}", ()) for n in range(1, 60)]
    every += [(f"{RENAME}:error={error}:when={n}", ()) for error in ("ENOSPC", "EIO") for n in range(1, 40)]
    places = (ROOT, LOCK, SEEK, "latents", "digest/.c.0.0.0.partial", "t/.c.0.partial", "t/.zarr.json.partial", "")
    every += [(f"openat:error=EMFILE:when={n}", (place,)) for place in places for n in range(1, 7)]
    every += [(f"write:error={e}:when={n}", (place,)) for e in ("ENOSPC", "EIO") for place in places for n in (1, 2, 5)]
    every += [(f"/^unlink(at)?$:error=EIO:when={n}", ()) for n in range(1, 12)]
    every += [(f"/^mkdir(at)?$:error=ENOSPC:when={n}", ()) for n in range(1, 12)]
    return every


@needs_strace
@pytest.mark.timeout(3600)
def test_system_calls_that_fail(bench, tmp_path, ledger, all_faults):
    """A run that is hit ends with exit code 4, or does without what it did not get; the next one finishes it.

    Runs that begin a store, and runs that resume one that was stopped in the middle.
    """
    faults = [(False, *fault) for fault in injections(all_faults)]
    faults += [(True, *fault) for _, *fault in (faults if all_faults else faults[:3])]

    def attempt(number):
        begun, inject, places = faults[number]
        store, trace = tmp_path / f"{number}.zarr", tmp_path / f"{number}.trace"
        trial = Trial(bench, store)
        if begun:
            trial.begin()
        ran = trial.strike(inject=inject, only=tuple(store / place for place in places), trace=trace)
        is_hurt = "(INJECTED)" in trace.read_text()
        if not is_hurt and ran.code != 0:
            trial.outcome.failed.append(ran.complained)
        trial.go_on()
        return is_hurt, trial

    tried = bench.commands.each(attempt, range(len(faults)))
    hurt = {fault: trial for fault, (is_hurt, trial) in zip(faults, tried, strict=True) if is_hurt}
    for fault, trial in hurt.items():
        trial.add_to(ledger, f"system call: {fault[1].split(':')[0].strip('/^$').split('(')[0]}")
    bad = [(fault, trial.outcome) for fault, (_, trial) in zip(faults, tried, strict=True) if not trial.outcome.ok]
    assert not bad, explain(bad)
    assert len(hurt) >= 5
    assert sum(trial.hurt.code == 4 for trial in hurt.values()) >= 5
