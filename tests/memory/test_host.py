"""What the operating system says about memory: of this process, of its container and of the machine."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from longvid.memory.host import host_available_bytes, peak_rss_bytes, rss_bytes


def test_rss_is_plausible():
    assert 10**7 < rss_bytes() <= peak_rss_bytes() < 10**12


def test_the_peak_is_that_of_this_program_and_not_of_the_one_that_started_it():
    child = "from longvid.memory.host import peak_rss_bytes; print(peak_rss_bytes())"
    parent = (
        "import subprocess, sys; held = b'1' * 600_000_000\n"  # resident when it forks, which vfork would not show
        f"print(subprocess.run([sys.executable, '-c', {child!r}], preexec_fn=int, capture_output=True).stdout.decode())"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 10**6 < int(done.stdout) < 300_000_000


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
        "from longvid.memory.host import host_available_bytes; print(host_available_bytes())"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code, folder / "cgroup.procs"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert 50 * 2**20 < int(done.stdout) < 300 * 2**20
    finally:
        folder.rmdir()
