"""What this process may use of the machine: cores and memory, with the limits that containers set."""

import ctypes
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Limits",
    "Memory",
    "affinity",
    "cgroup_limits",
    "give_back_freed",
    "memory",
    "processor_name",
    "usable_cores",
]

_UNLIMITED = 1 << 60  # bytes; cgroups of version 1 write a number near 2^63 for "no limit"


@dataclass(frozen=True)
class Limits:
    """What the control groups of this process allow.

    Attributes:
        version: of the control groups that were read, 1 or 2; None where there are none.
        cores: processor time, in cores, e.g. 1.5; None without a limit.
        memory_bytes: None without a limit.
        memory_used_bytes: what is in use of that limit, caches of files included; None without a limit.
        memory_free_bytes: what is left of the limit that leaves the least, which need not be the smallest one: others
            may share a group above; None without a limit.
    """

    version: int | None = None
    cores: float | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None
    memory_free_bytes: int | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes of memory: the machine's, what is free of it without swapping, and the most that this process may have."""

    total_bytes: int | None
    available_bytes: int | None
    usable_bytes: int | None


def cgroup_limits(root: Path = Path("/")) -> Limits:
    """The tightest limits of this process's control groups and all above them, of either version.

    Args:
        root: of the file system that is read; another one in tests.
    """
    groups = _groups(root)
    base = root / "sys/fs/cgroup"
    found_2 = [_version_2(folder) for folder in _upward(base, groups.get("", "/"))]
    unified = [_version_2(folder) for folder in _upward(base / "unified", groups.get("", "/"))]
    cores_1 = [_cores_1(folder) for folder in _upward(base / "cpu", groups.get("cpu", "/"))]
    memory_1 = [_memory_1(folder) for folder in _upward(base / "memory", groups.get("memory", "/"))]
    has_2, has_1 = (base / "cgroup.controllers").exists(), (base / "memory").is_dir() or (base / "cpu").is_dir()
    memories = [pair for pair in [*(two[1] for two in [*found_2, *unified]), *memory_1] if pair is not None]
    cores = [value for value in [*(two[0] for two in [*found_2, *unified]), *cores_1] if value is not None]
    limit, used = min(memories, default=(None, None))
    free = min((max(0, limit - used) for limit, used in memories), default=None)
    return Limits(2 if has_2 else 1 if has_1 else None, min(cores, default=None), limit, used, free)


def affinity() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores() -> int:
    """Threads that can really run at once: processors of this process, or fewer where a control group allows less time."""
    allowed = cgroup_limits().cores
    return max(1, min(affinity(), round(allowed) if allowed is not None else affinity()))


def memory(root: Path = Path("/")) -> Memory:
    """How much memory there is. What the system does not say is None."""
    fields: dict[str, int] = {}
    try:
        text = (root / "proc/meminfo").read_text()
        fields = {name: 1024 * int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)}
    except OSError:
        try:
            fields["MemTotal"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return Memory(None, None, None)
    limits = cgroup_limits(root)
    total, available = fields.get("MemTotal"), fields.get("MemAvailable")
    if limits.memory_free_bytes is not None and available is not None:
        available = min(available, limits.memory_free_bytes)
    usable = min((size for size in (total, limits.memory_bytes) if size is not None), default=None)
    return Memory(total, available, usable)


def room_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: what is free without swapping, and left of control groups and of its own limits (rlimits).

    2^63 - 1 where the system says nothing.
    """
    found = memory(root)
    sizes = [size for size in (found.available_bytes, found.usable_bytes) if size is not None]
    return max(0, min([*sizes, *_left_of_rlimits(root)], default=2**63 - 1))


def whole_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process might take if it were alone here: of the machine, control groups and its own limits (rlimits).

    2^63 - 1 where the system says nothing. Unlike `room_bytes`, the same whenever it is asked.
    """
    usable = memory(root).usable_bytes
    return min([*([] if usable is None else [usable]), *(limit for _, limit in _rlimits())], default=2**63 - 1)


def processor_name() -> str:
    """As the system calls it; its family where it does not say."""
    named = re.search(r"^model name\s*: *(.+)$", _read(Path("/proc/cpuinfo")) or "", re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def _rlimits() -> list[tuple[str, int]]:
    """Of the address space and of the data of this process, where there are any, each with its name in /proc/self/status."""
    try:
        import resource
    except ModuleNotFoundError:
        return []
    limits = (("VmSize", resource.RLIMIT_AS), ("VmData", resource.RLIMIT_DATA))
    soft = [(name, resource.getrlimit(kind)[0]) for name, kind in limits]
    return [(name, limit) for name, limit in soft if limit != resource.RLIM_INFINITY]


def _left_of_rlimits(root: Path) -> list[int]:
    """Of the address space and of the data of this process."""
    held = {
        name: 1024 * int(size)
        for name, size in re.findall(r"(?m)^(Vm\w+):\s+(\d+) kB$", _read(root / "proc/self/status") or "")
    }
    return [limit - held.get(name, 0) for name, limit in _rlimits()]


def give_back_freed() -> None:
    """Give memory that was freed, and that the C library keeps for later, back to the system (glibc; elsewhere nothing is done)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _groups(root: Path) -> dict[str, str]:
    """Controller to its group, from lines ``4:cpu,cpuacct:/group``; the group of version 2 under an empty name."""
    text = _read(root / "proc/self/cgroup") or ""
    return {
        name: group
        for _, names, group in (line.split(":", 2) for line in text.splitlines() if line.count(":") >= 2)
        for name in names.split(",")
    }


def _upward(base: Path, group: str) -> list[Path]:
    """The folder of a group and those above it up to ``base``, which in a container is often the group itself."""
    parts = [part for part in group.split("/") if part not in ("", "..")]
    return [base.joinpath(*parts[:length]) for length in range(len(parts), -1, -1)]


def _version_2(folder: Path) -> tuple[float | None, tuple[int, int] | None]:
    quota, _, period = (_read(folder / "cpu.max") or "").partition(" ")
    cores = int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None
    return cores, _pair(
        _read(folder / "memory.max"), _read(folder / "memory.current"), _idle_cache(folder, "inactive_file")
    )


def _cores_1(folder: Path) -> float | None:
    quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota and period and quota.isdigit() and period.isdigit() else None


def _memory_1(folder: Path) -> tuple[int, int] | None:
    cache = _idle_cache(folder, "total_inactive_file")
    return _pair(_read(folder / "memory.limit_in_bytes"), _read(folder / "memory.usage_in_bytes"), cache)


def _idle_cache(folder: Path, field: str) -> int:
    """Bytes of files that a group holds in memory and has not used of late: counted as used, given up as soon as memory is wanted."""
    found = re.search(rf"(?m)^{field} (\d+)$", _read(folder / "memory.stat") or "")
    return int(found[1]) if found else 0


def _pair(limit: str | None, used: str | None, cache: int) -> tuple[int, int] | None:
    if not limit or not limit.isdigit() or int(limit) >= _UNLIMITED:
        return None
    return int(limit), max(0, int(used) - cache) if used and used.isdigit() else 0


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:  # this kernel has no such file, or this group has no such limit
        return None
