"""What the host allows, read from trees of files as Linux writes them."""

import mmap
from pathlib import Path

import pytest

from hydra.runtime.memory.host import read_host_memory, read_own_bytes, read_peak_bytes, reset_peak
from hydra.runtime.memory.plan import allowed_memory

GIB = 2**30
OWN = 100 * 1024


def build(root: Path, files: dict[str, str]) -> Path:
    always = {
        "proc/self/status": "Name:\tpython\nVmHWM:\t     200 kB\nVmRSS:\t     100 kB\n",
        "proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable: {8 * GIB // 1024} kB\nHugePages_Total: 0\n",
    }
    for name, text in {**always, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_machine_alone(tmp_path: Path) -> None:
    memory = read_host_memory(build(tmp_path, {}))
    assert (memory.limit_bytes, memory.source) == (8 * GIB + OWN, "/proc/meminfo")


def test_version_2_takes_the_tightest_group_above(tmp_path: Path) -> None:
    top = "sys/fs/cgroup"
    files = {
        "proc/self/cgroup": "0::/system.slice/job.scope\n",
        f"{top}/system.slice/job.scope/memory.max": "max\n",
        f"{top}/system.slice/job.scope/memory.current": f"{GIB}\n",
        f"{top}/system.slice/memory.max": f"{4 * GIB}\n",
        f"{top}/system.slice/memory.high": f"{3 * GIB}\n",
        f"{top}/system.slice/memory.current": f"{2 * GIB}\n",
        f"{top}/system.slice/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
    }
    memory = read_host_memory(build(tmp_path, files))
    assert memory.limit_bytes == 3 * GIB - 2 * GIB + GIB // 2 + OWN
    assert memory.source == "/sys/fs/cgroup/system.slice"


def test_version_1_in_a_container_whose_mount_begins_at_its_own_group(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/docker/abc\n",
        f"{top}/memory.limit_in_bytes": f"{2 * GIB}\n",
        f"{top}/memory.usage_in_bytes": f"{GIB}\n",
        f"{top}/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 4}\n",
    }
    memory = read_host_memory(build(tmp_path, files))
    assert (memory.limit_bytes, memory.source) == (GIB + GIB // 4 + OWN, "/sys/fs/cgroup/memory")


def test_version_1_without_a_limit_and_both_versions_at_once(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/memory/a"
    files = {
        "proc/self/cgroup": "4:memory:/a\n0::/\n",
        f"{top}/memory.limit_in_bytes": "9223372036854771712\n",
        f"{top}/memory.usage_in_bytes": "5\n",
        "sys/fs/cgroup/memory.max": f"{GIB}\n",
        "sys/fs/cgroup/memory.current": f"{2 * GIB}\n",
    }
    memory = read_host_memory(build(tmp_path, files))
    assert (memory.limit_bytes, memory.source) == (OWN, "/sys/fs/cgroup")  # nothing is left beside what it has


def test_the_limit_that_is_asked_for_and_the_share_that_is_kept_free(tmp_path: Path) -> None:
    host = read_host_memory(build(tmp_path, {}))
    assert allowed_memory(host, 0).limit_bytes == int(0.9 * host.limit_bytes)
    assert allowed_memory(host, 1000).limit_bytes == 1000 * 2**20
    assert allowed_memory(host, 1000).source == "memory_limit_mib"
    assert allowed_memory(host, 10**6) == allowed_memory(host, 0)


def test_this_machine() -> None:
    assert read_host_memory().limit_bytes > read_own_bytes() > 0
    if not reset_peak():
        pytest.skip("this system does not let a process reset its peak")
    quiet = read_peak_bytes()
    with mmap.mmap(-1, 64 * 2**20) as taken:
        for _ in range(64):  # not in one piece: its bytes would come from the heap, which may keep what is freed
            taken.write(b"1" * 2**20)
    assert read_peak_bytes() > quiet + 60 * 2**20
    reset_peak()
    assert read_peak_bytes() < quiet + 30 * 2**20
