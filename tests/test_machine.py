"""Limits of containers, read from files as the two versions of control groups write them."""

import subprocess
import sys

import pytest

from anabranch import machine
from anabranch.machine import Limits, Memory, cgroup_limits, memory

GB = 10**9
MEMINFO = (
    "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\nHugePages_Total:       0\n"
)


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_version_2_takes_the_tightest_limit_above(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/box",
            "sys/fs/cgroup/cgroup.controllers": "cpu memory",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000",
            "sys/fs/cgroup/pod/box/cpu.max": "max 100000",
            "sys/fs/cgroup/pod/memory.max": "max",
            "sys/fs/cgroup/pod/box/memory.max": str(2 * GB),
            "sys/fs/cgroup/pod/box/memory.current": str(GB),
        },
    )
    assert cgroup_limits(tmp_path) == Limits(2, 1.5, 2 * GB, GB, GB)


def test_version_2_inside_a_container_sees_its_own_group_at_the_top(tmp_path):
    files = {"cgroup.controllers": "cpu", "cpu.max": "50000 100000", "memory.max": str(GB), "memory.current": "5"}
    write(tmp_path, {"proc/self/cgroup": "0::/../../elsewhere"} | {f"sys/fs/cgroup/{k}": v for k, v in files.items()})
    assert cgroup_limits(tmp_path) == Limits(2, 0.5, GB, 5, GB - 5)


def test_version_1(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/box\n2:cpu,cpuacct:/box\n1:name=systemd:/\n0::/",
            "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "250000",
            "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": str(3 * GB),
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": str(GB),
        },
    )
    assert cgroup_limits(tmp_path) == Limits(1, 2.5, 3 * GB, GB, 2 * GB)


def test_no_groups(tmp_path):
    assert cgroup_limits(tmp_path) == Limits()


@pytest.mark.parametrize("text", ["", "nonsense", "1:2", "0::", "max", "-3 0", "100000 0"])
def test_files_that_say_something_else_are_no_limits(tmp_path, text):
    names = ("cgroup.controllers", "cpu.max", "memory.max", "memory.current", "cpu/cpu.cfs_quota_us")
    write(tmp_path, {"proc/self/cgroup": text} | {f"sys/fs/cgroup/{name}": text for name in names})
    found = cgroup_limits(tmp_path)
    assert (found.cores, found.memory_bytes) == (None, None)


def test_memory_within_limits(tmp_path):
    write(tmp_path, {"proc/meminfo": MEMINFO})
    assert memory(tmp_path) == Memory(16384000000, 8192000000, 16384000000)
    files = {"memory.max": str(2 * GB), "memory.current": str(GB // 2), "cgroup.controllers": "memory"}
    write(tmp_path, {"proc/self/cgroup": "0::/"} | {f"sys/fs/cgroup/{k}": v for k, v in files.items()})
    assert memory(tmp_path) == Memory(16384000000, 3 * GB // 2, 2 * GB)


@pytest.mark.parametrize(
    ("pod", "box", "free"),
    [
        ((8 * GB, 8 * GB - 100), (4 * GB, GB), 100),
        ((8 * GB, GB), (4 * GB, 3 * GB), GB),
        ((4 * GB, 4 * GB + 5), (8 * GB, GB), 0),
    ],
)
def test_what_is_free_is_the_least_that_any_group_leaves(tmp_path, pod, box, free):
    """A group above is shared with others, who may have filled it; one in use beyond its limit leaves nothing."""
    files = {"cgroup.controllers": "memory"}
    for folder, (limit, used) in (("pod", pod), ("pod/box", box)):
        files |= {f"{folder}/memory.max": str(limit), f"{folder}/memory.current": str(used)}
    write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/pod/box"})
    write(tmp_path, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert memory(tmp_path) == Memory(16384000000, free, min(pod[0], box[0]))


@pytest.mark.parametrize(("allowed", "cores"), [(None, 8), (0.5, 1), (1.6, 2), (64.0, 8)])
def test_usable_cores(monkeypatch, allowed, cores):
    monkeypatch.setattr(machine, "affinity", lambda: 8)
    monkeypatch.setattr(machine, "cgroup_limits", lambda: Limits(2, allowed))
    assert machine.usable_cores() == cores


def test_room_is_what_is_free_and_left_of_own_limits(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4000 kB\nMemFree: 1000 kB\nMemAvailable: 3000 kB\n")
    (tmp_path / "proc/self/status").write_text("Name:\tx\nVmSize:\t    1500 kB\nVmData:\t     100 kB\n")
    assert machine.room_bytes(tmp_path) == 3000 * 1024
    script = (
        "import resource, sys; from pathlib import Path; from anabranch import machine\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "room = machine.room_bytes()\n"
        "assert 0 < room < 2 << 30, room\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_room_is_not_limited_where_nothing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda root: machine.Memory(None, None, None))
    monkeypatch.setattr(machine, "_left_of_rlimits", lambda root: [])
    assert machine.room_bytes(tmp_path) == 2**63 - 1


@pytest.mark.parametrize("version", [1, 2])
def test_files_that_lie_in_memory_unused_are_free(tmp_path, version):
    """A large file that was read fills a container's memory, and gives way to whoever wants it."""
    used, cache = 8 * GB - 1000, 7 * GB
    if version == 2:
        files = {
            "memory.max": 8 * GB,
            "memory.current": used,
            "memory.stat": f"anon 5\ninactive_file {cache}",
            "cgroup.controllers": "memory",
        }
        groups = "0::/"
    else:
        stat = f"inactive_file 1\ntotal_inactive_file {cache}"
        files = {
            "memory/memory.limit_in_bytes": 8 * GB,
            "memory/memory.usage_in_bytes": used,
            "memory/memory.stat": stat,
        }
        groups = "4:memory:/"
    write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": groups})
    write(tmp_path, {f"sys/fs/cgroup/{name}": str(text) for name, text in files.items()})
    assert memory(tmp_path).available_bytes == cache + 1000
    assert machine.room_bytes(tmp_path) == cache + 1000
