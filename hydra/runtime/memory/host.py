"""How much memory this process may take: what the machine has left, and what its control groups allow (v1 and v2).

Functions with a `root` read files below `root`, so that a test can build the tree it needs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 2**60  # version 1 writes the largest multiple of a page where there is no limit
SYSTEM = Path("/")


@dataclass(frozen=True)
class HostMemory:
    """What a process may take in all, its present memory included, and which file sets the bound."""

    limit_bytes: int
    source: str


def read_host_memory(root: Path = SYSTEM) -> HostMemory:
    """The tightest of the machine's available memory and the limits of every control group that this process is in."""
    own = read_own_bytes(root)
    found = [HostMemory(own + _meminfo(root)["MemAvailable"], "/proc/meminfo")]
    for directory, names in _memory_groups(root):
        room = _room_in_group(directory, names)
        if room is not None:
            found.append(HostMemory(own + max(0, room), f"/{directory.relative_to(root)}"))
    return min(found, key=lambda memory: memory.limit_bytes)


def read_memory(device: str) -> HostMemory:
    """What this process may take where its model is: `cpu`, or on `cuda` what is free and what it holds already."""
    if device == "cpu":
        return read_host_memory()
    import torch

    free_bytes, _ = torch.cuda.mem_get_info()
    return HostMemory(free_bytes + torch.cuda.memory_reserved(), torch.cuda.get_device_name())


def read_own_bytes(root: Path = SYSTEM) -> int:
    """Resident memory of this process."""
    return _status_bytes("VmRSS", root)


def read_peak_bytes(root: Path = SYSTEM) -> int:
    """The most memory that was resident in this process since `reset_peak`, or since it began."""
    return _status_bytes("VmHWM", root)


def reset_peak(root: Path = SYSTEM) -> bool:
    """Let `read_peak_bytes` (and getrusage) count from now on; False where the system does not let us."""
    try:
        (root / "proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(name: str, root: Path) -> int:
    for line in (root / "proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")


def _meminfo(root: Path) -> dict[str, int]:
    lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3}


@dataclass(frozen=True)
class _Names:
    """The files of a control group: upper bounds, present use, and the page cache that would be given up first."""

    limits: tuple[str, ...]
    usage: str
    cache: str


_VERSION_1 = _Names(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Names(("memory.max", "memory.high"), "memory.current", "inactive_file")


def _memory_groups(root: Path) -> Iterator[tuple[Path, _Names]]:
    """Directories of the memory groups of this process, from its own up to the root of the hierarchy.

    In a container the path in /proc/self/cgroup may be the host's while the mount begins at the container's own
    group: directories that are not there are passed over.
    """
    membership = root / "proc/self/cgroup"
    if not membership.is_file():
        return
    for line in membership.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", _VERSION_1
        elif number == "0" and not controllers:
            mount, names = root / "sys/fs/cgroup", _VERSION_2
        else:
            continue
        directory = mount / path.strip("/")
        for above in (directory, *directory.parents):
            if above.is_dir():
                yield above, names
            if above == mount:
                break


def _room_in_group(directory: Path, names: _Names) -> int | None:
    """Bytes that the group may still take; None where it sets no limit."""
    limits = [_read_number(directory / name) for name in names.limits]
    bounded = [limit for limit in limits if limit is not None and limit < UNLIMITED]
    usage = _read_number(directory / names.usage)
    if not bounded or usage is None:
        return None
    return min(bounded) - usage + _reclaimable(directory / "memory.stat", names.cache)


def _reclaimable(path: Path, name: str) -> int:
    if not path.is_file():
        return 0
    values = (line.split() for line in path.read_text().splitlines())
    return next((int(words[1]) for words in values if words[0] == name), 0)


def _read_number(path: Path) -> int | None:
    """The number in a file of one; None where there is no such file, or it says `max`."""
    if not path.is_file():
        return None
    text = path.read_text().strip()
    return None if text == "max" else int(text)
