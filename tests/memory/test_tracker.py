import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from longvid.errors import MemoryBudgetError
from longvid.memory.tracker import (
    AllocationTracker,
    DeviceMeter,
    MemoryBudget,
    host_available_bytes,
    is_out_of_memory,
    peak_rss_bytes,
    rss_bytes,
    tensor_bytes,
)


@pytest.fixture(params=["cpu", "meta"])
def device(request):
    return request.param


def test_counts_storages_not_views(device):
    with AllocationTracker() as tracker:
        x = torch.zeros(1000, device=device)
        y = x.view(10, 100)[2:]
        y.add_(1)
        assert tracker.live_bytes == 4000
        z = x + 1
        assert tracker.live_bytes == 8000
        del x
        assert tracker.live_bytes == 8000  # y still looks into it
        del y, z
    assert (tracker.live_bytes, tracker.peak_bytes) == (0, 8000)


def test_a_view_of_a_weight_is_not_an_allocation(device):
    weight = torch.zeros(1000, device=device)
    with AllocationTracker() as tracker:
        row = weight.view(10, 100)[0]
        again = row[1:]
        assert tracker.live_bytes == 0
        again.clone()
    assert tracker.peak_bytes == 99 * 4


def test_a_tensor_that_dies_outside_the_mode_is_counted_out(device):
    tracker = AllocationTracker()
    with tracker:
        x = torch.zeros(10, device=device)
    assert tracker.live_bytes == 40
    del x
    assert tracker.live_bytes == 0
    with tracker:
        tracker.reset_peak()
        torch.zeros(5, device=device)
    assert tracker.peak_bytes == 20


def test_numpy_memory_is_not_the_device_s(device):
    with AllocationTracker() as tracker:
        x = torch.from_numpy(np.zeros(100, np.uint8))
        before = tracker.live_bytes
        x.to(device, copy=True)
    assert tracker.peak_bytes - before == 100


def test_meter_adds_the_weights():
    meter = DeviceMeter(torch.device("cpu"), base_bytes=1000)
    with meter.measure():
        torch.zeros(10)
    assert (meter.peak_bytes, meter.chunk_peak_bytes) == (1040, 1040)


def test_meter_looks_at_the_first_three_chunks_and_every_32nd():
    meter, seen = DeviceMeter(torch.device("cpu"), base_bytes=0), []
    for index in range(70):
        before = meter.peak_bytes
        with meter.measure():
            torch.zeros(index + 1)
        if meter.peak_bytes > before:
            seen.append(index)
    assert seen == [0, 1, 2, 32, 64]


def test_budget_names_every_part():
    MemoryBudget().check(10**15, {}, "x")
    MemoryBudget(allowed_bytes=100).check(100, {}, "x")
    with pytest.raises(MemoryBudgetError, match=r"encode needs .*weights 90 B.*100 B are allowed") as caught:
        MemoryBudget(allowed_bytes=100, reserved_bytes=1).check(100, {"weights": 90, "contexts": 10}, "encode")
    assert (caught.value.projected_bytes, caught.value.allowed_bytes) == (100, 100)
    assert sum(caught.value.parts.values()) == 100


def test_tensor_bytes_counts_shared_tensors_once():
    layer = torch.nn.Linear(3, 2)
    twice = torch.nn.ModuleList([layer, layer])
    assert tensor_bytes(twice) == (3 * 2 + 2) * 4


def test_rss_is_plausible():
    assert 10**7 < rss_bytes() <= peak_rss_bytes() < 10**12


# ------------------------------------------------------------------------------------------- limits of the host


def group(folder, limit, usage, reclaimable=0, *, version=2):
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {reclaimable}\nfile 7\n")


def test_the_tightest_group_above_a_process_counts(tmp_path):
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("0::/slurm/job/step\n")
    group(root / "slurm", "max", 900_000)
    group(root / "slurm" / "job", 1_000_000, 800_000, 50_000)
    group(root / "slurm" / "job" / "step", 5_000_000, 100_000)
    assert host_available_bytes(root, own) == 250_000
    group(root, 1_000_000, 950_000)  # the mount itself has a limit inside a container
    assert host_available_bytes(root, own) == 50_000
    group(root, 1_000_000, 2_000_000)
    assert host_available_bytes(root, own) == 0


def test_groups_of_both_versions_beside_each_other(tmp_path):
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("9:cpu:/other\n4:memory:/box\n0::/\n")
    group(root / "memory" / "box", 3_000_000, 1_000_000, version=1)
    group(root / "memory", 2**63 - 4096, 1, version=1)
    assert host_available_bytes(root, own) == 2_000_000


def test_a_path_that_the_container_does_not_show(tmp_path):
    """Without a namespace of its own a container sees the host's path, and its own group at the mount."""
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("4:memory:/docker/0123456789\n")
    group(root / "memory", 400_000, 100_000, version=1)
    assert host_available_bytes(root, own) == 300_000


def test_without_groups_it_is_the_machine(tmp_path):
    total = psutil.virtual_memory().total
    assert 0 < host_available_bytes(tmp_path, tmp_path / "none") <= total
    assert 0 < host_available_bytes() <= total


def test_a_real_group_is_seen_by_the_process_in_it():
    groups = Path("/sys/fs/cgroup/memory") if Path("/sys/fs/cgroup/memory").is_dir() else Path("/sys/fs/cgroup")
    name = "memory.limit_in_bytes" if groups.name == "memory" else "memory.max"
    folder = groups / f"longvid-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / name).write_text(str(300 * 2**20))
    except OSError as exc:
        pytest.skip(f"no control group can be made here: {exc}")
    code = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "from longvid.memory.tracker import host_available_bytes; print(host_available_bytes())"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code, folder / "cgroup.procs"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert 50 * 2**20 < int(done.stdout) < 300 * 2**20
    finally:
        folder.rmdir()


def test_what_counts_as_running_out():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    for said in (
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "GET was unable to find an engine to execute this computation",
    ):
        assert is_out_of_memory(RuntimeError(said))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(MemoryBudgetError("a budget is no device"))
