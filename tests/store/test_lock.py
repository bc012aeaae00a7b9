"""One writer: told apart within a process and between processes, and gone with its owner."""

import os
import subprocess
import sys

import pytest
from support.clock import wait_until

from longvid import StoreError
from longvid.store.lock import WriterLock, is_locked

HOLD = (
    "import sys, time, os; from pathlib import Path; from longvid.store.lock import WriterLock\n"
    "lock = WriterLock.acquire(Path(sys.argv[1]))\n"
    "if 'fork' in sys.argv and os.fork() == 0: time.sleep(60)\n"
    "print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "a.zarr" / "digest" / ".longvid").mkdir(parents=True)
    return tmp_path / "a.zarr" / "digest" / ".longvid" / "lock"


def refused(path, pid):
    with pytest.raises(StoreError, match=rf"a\.zarr is being written by process {pid} on .*, since 20") as caught:
        WriterLock.acquire(path)
    assert caught.value.kind == "locked"


def test_a_second_one_in_the_same_process_is_refused_and_does_not_break_the_first(path):
    lock = WriterLock.acquire(path)
    for _ in range(3):
        refused(path, os.getpid())
    assert is_locked(path)
    code = "import pathlib, sys; from longvid.store.lock import is_locked as f; print(f(pathlib.Path(sys.argv[1])))"
    told = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert told.stdout == "True\n"  # POSIX would have taken it back if this process had opened the file again
    lock.release()
    lock.release()
    assert not path.exists()
    assert not is_locked(path)
    WriterLock.acquire(path).release()


@pytest.mark.parametrize("forked", [False, True])
def test_it_dies_with_its_owner_and_no_child_keeps_it(path, forked):
    command = [sys.executable, "-c", HOLD, str(path), *(["fork"] if forked else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as owner:
        try:
            assert owner.stdout.readline() == "held\n"
            refused(path, owner.pid)
            owner.kill()
            wait_until(lambda: not is_locked(path), "the lock is free")
            lock = WriterLock.acquire(path)
            lock.release()
        finally:
            os.killpg(owner.pid, 9)


def test_a_file_that_somebody_else_put_there_is_left_alone(path):
    lock = WriterLock.acquire(path)
    path.unlink()
    path.write_text("work")
    lock.release()
    assert path.read_text() == "work"
