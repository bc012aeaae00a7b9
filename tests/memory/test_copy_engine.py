"""Host buffers and lanes: what is copied arrives, nothing is left behind, and limits are reported in words."""

import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch

from longvid.errors import MemoryBudgetError, StoreError
from longvid.memory.copy_engine import CopyEngine
from longvid.memory.host_buffer import HostBuffer

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["memory", "file", "inline"])
def copies(request, tmp_path):
    device = torch.device("meta") if request.param == "inline" else CPU  # one without streams of its own
    with CopyEngine(device, directory=tmp_path if request.param == "file" else None) as copies:
        yield copies


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_survive_the_way_out_and_back(copies, dtype):
    source = torch.randn(2, 3, 2, 50, 7).to(dtype)
    buffer = copies.host_buffer([source.nbytes, source.nbytes])
    first, second = buffer.take(source), buffer.take(source)
    out = copies.to_host(source, first)
    copies.to_host(source * 2, second).wait()
    back = torch.empty_like(source)
    copies.to_device(first, back, out).wait()
    assert torch.equal(back, source)
    assert out.started() <= out.stopped() <= time.perf_counter()


def test_a_copy_in_waits_for_the_copy_out(tmp_path):
    """The lanes are threads of their own; without the order the slot's old content would come back."""
    with CopyEngine(CPU) as copies:
        source = torch.randn(2_000_000)
        slot = copies.host_buffer([source.nbytes]).take(source)
        gate = threading.Event()
        copies.to_host(torch.zeros(1), copies.host_buffer([4]).take(torch.zeros(1))).wait()  # starts the lane
        copies._threads["to_host"].submit(gate.wait)
        out = copies.to_host(source, slot)
        back = torch.empty_like(source)
        ticket = copies.to_device(slot, back, out)
        assert ticket.stopped() is None
        gate.set()
        ticket.wait()
        assert torch.equal(back, source)


def test_leaving_waits_for_copies_and_ends_the_threads():
    source = torch.randn(1_000_000)
    with CopyEngine(CPU) as copies:
        slot = copies.host_buffer([source.nbytes]).take(source)
        copies.to_host(source, slot)
    assert torch.equal(slot.tensor, source)
    assert not [t for t in threading.enumerate() if t.name.startswith("longvid-to-")]


def test_nothing_starts_before_the_first_copy():
    with CopyEngine(CPU) as copies:
        copies.mark()
        copies.host_buffer([10])
        assert not [t for t in threading.enumerate() if t.name.startswith("longvid-to-")]


def test_an_arena_serves_the_next_video_of_its_size():
    with CopyEngine(CPU) as copies:
        first = copies.host_buffer([10_000])
        copies.release(first)
        assert copies.host_buffer([9_000]) is first
        copies.release(first)
        assert copies.host_buffer([100_000]) is not first


def test_an_arena_holds_what_it_was_made_for_and_no_more():
    sizes = [1, 4096, 4097, 12]
    buffer = HostBuffer(HostBuffer.room_for(sizes))
    slots = [buffer.take(torch.zeros(size, dtype=torch.uint8)) for size in sizes]
    for number, slot in enumerate(slots):
        slot.tensor.fill_(number)
    assert [set(slot.tensor.tolist()) for slot in slots] == [{0}, {1}, {2}, {3}]
    with pytest.raises(ValueError, match="is full"):
        buffer.take(torch.zeros(1))


def mapped_bytes(tensor):
    """Resident bytes of the mapping that a tensor lies in, as the kernel counts them; None if it is not mapped."""
    address, inside = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    return None


def test_host_memory_is_really_there_and_given_back():
    size = 32 * 2**20
    with CopyEngine(CPU) as copies:
        buffer = copies.host_buffer([size])
        slot = buffer.take(torch.empty(size, dtype=torch.uint8))
        assert mapped_bytes(slot.tensor) >= size  # before anything is written
        address = slot.tensor.data_ptr()
        copies.release(buffer)
        assert copies.spare_bytes == buffer.num_bytes
        del slot, buffer
    assert copies.spare_bytes == 0
    maps = Path("/proc/self/maps").read_text()
    assert f"{address:x}-" not in maps


def test_a_file_is_not_resident_and_has_no_name(tmp_path):
    size = 64 * 2**20
    source = torch.arange(size, dtype=torch.uint8)
    with CopyEngine(CPU, directory=tmp_path) as copies:
        slot = copies.host_buffer([size]).take(source)
        copies.to_host(source, slot).wait()
        assert mapped_bytes(slot.tensor) < 0.01 * size
        assert list(tmp_path.iterdir()) == []
        assert torch.equal(slot.tensor, source)
        assert copies.tier == str(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_is_told_before_the_run(tmp_path):
    import subprocess

    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with CopyEngine(CPU, directory=tmp_path) as copies:
            with pytest.raises(MemoryBudgetError, match=r"2\.00 MiB .*do not fit.*1\.00 MiB are free") as caught:
                copies.host_buffer([2 * 2**20])
            assert caught.value.allowed_bytes == 2**20
            copies.host_buffer([2**19])
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(StoreError, match="offload_dir") as caught:
        CopyEngine(CPU, directory=tmp_path / "none").host_buffer([10])
    assert caught.value.kind == "missing"


def test_more_than_there_is():
    with pytest.raises(MemoryBudgetError, match="could not be allocated"):
        CopyEngine(CPU).host_buffer([2**60])


def test_a_system_that_cannot_allocate_a_file_writes_it(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    source = torch.randn(700_000)
    with CopyEngine(CPU, directory=tmp_path) as copies:
        slot = copies.host_buffer([source.nbytes]).take(source)
        copies.to_host(source, slot).wait()
        assert torch.equal(slot.tensor, source)


class _PinnedCopies(CopyEngine):
    """Those of an accelerator, which cannot be here, on a system that refuses to lock memory."""

    wants_pinned = True

    def pin(self, buffer):
        return None


def test_memory_that_cannot_be_locked_falls_back_with_a_warning():
    copies = _PinnedCopies(CPU)
    with pytest.warns(UserWarning, match=r"8\.00 KiB of host memory could not be page-locked"):
        buffer = copies.host_buffer([5000])
    assert not buffer.pinned
    source = torch.randn(1000)
    slot = buffer.take(source)
    copies.to_host(source, slot).wait()
    assert torch.equal(slot.tensor, source)


def test_locked_memory_is_unlocked_before_it_is_unmapped():
    events = []

    def pin(buffer):
        address = buffer.data_ptr()
        events.append("locked")

        def unpin():
            # Still mapped: reading it would otherwise be a segmentation fault.
            import ctypes

            events.append(ctypes.string_at(address, 1))

        return unpin

    buffer = HostBuffer(4096, pin=pin)
    assert buffer.pinned
    slot = buffer.take(torch.zeros(1))
    del buffer
    assert events == ["locked"]  # a slot is still in use
    del slot
    assert events == ["locked", b"\0"]


@pytest.mark.cuda
def test_copies_on_streams_arrive_and_memory_is_locked():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda", 0)
    source = torch.randn(2**24, device=device)
    with CopyEngine(device) as copies:
        buffer = copies.host_buffer([source.nbytes])
        assert buffer.pinned
        slot = buffer.take(source)
        out = copies.to_host(source, slot)
        back = torch.empty_like(source)
        copies.to_device(slot, back, out).wait()
        assert torch.equal(back, source)
        torch.cuda.synchronize()
        assert out.stopped() > out.started()
