"""A real limit on the memory of a command and all that it starts, and what it took of it.

The best way that the system allows is used, and says what it covers: a control group of version 2 or 1 (below the group that this
process is in), else a scope of systemd, else ``RLIMIT_DATA``, under which pages of files are not counted.
"""

import os
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

FILES_COUNT = "anonymous memory and pages of files that the group was first to touch"
GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Way:
    """How memory is limited.

    Attributes:
        name: of the mechanism.
        covers: what counts.
        parent: folder of the control group below which groups are made.
        limit, peak: files of such a group.
    """

    name: str
    covers: str
    parent: Path | None = None
    limit: str = ""
    peak: str = ""


def best_way(groups: Path = GROUPS, own: str | None = None, has_systemd: bool | None = None) -> Way:
    """The first that works here. ``own``: the text of ``/proc/self/cgroup``; ``has_systemd``: whether systemd runs."""
    own = Path("/proc/self/cgroup").read_text() if own is None else own
    places = {kinds: path for _, kinds, path in (line.split(":", 2) for line in own.splitlines())}
    candidates = []
    if "" in places:
        candidates.append(Way("cgroup v2", FILES_COUNT, groups / places[""].lstrip("/"), "memory.max", "memory.peak"))
    if "memory" in places:
        parent = groups / "memory" / places["memory"].lstrip("/")
        candidates.append(Way("cgroup v1", FILES_COUNT, parent, "memory.limit_in_bytes", "memory.max_usage_in_bytes"))
    for way in candidates:
        if _can_make(way):
            return way
    has_systemd = Path("/run/systemd/system").exists() if has_systemd is None else has_systemd
    if has_systemd and shutil.which("systemd-run"):
        return Way("systemd-run", FILES_COUNT)
    return Way(
        "RLIMIT_DATA",
        "anonymous memory of each process by itself; pages of files are not counted, nor the processes' sum",
    )


def _can_make(way: Way) -> bool:
    assert way.parent is not None
    path = way.parent / f"anabranch-try-{os.getpid()}"
    try:
        path.mkdir()
        try:
            return os.access(path / way.limit, os.W_OK)
        finally:
            path.rmdir()
    except OSError:
        return False


class Group:
    """A limit in force: `wrap` commands with it, then ask for `peak_bytes`."""

    def __init__(self, way: Way, limit_bytes: int | None, path: Path | None) -> None:
        self.way, self.limit_bytes, self.path = way, limit_bytes, path

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command that runs ``command`` under the limit."""
        if self.path is not None:
            joined = f'echo $$ > {shlex.quote(str(self.path / "cgroup.procs"))} && exec "$@"'
            return ["sh", "-c", joined, "sh", *command]
        if self.limit_bytes is None:
            return list(command)
        if self.way.name == "systemd-run":
            scope = [
                "systemd-run",
                "--scope",
                "--quiet",
                "-p",
                f"MemoryMax={self.limit_bytes}",
                "-p",
                "MemorySwapMax=0",
            ]
            return [*scope, "--", *command]
        return ["sh", "-c", f'ulimit -d {self.limit_bytes // 1024} && exec "$@"', "sh", *command]

    def peak_bytes(self) -> int | None:
        """Most that was counted at once; None where the system does not say."""
        if self.path is None:
            return None
        with suppress(OSError, ValueError):
            return int((self.path / self.way.peak).read_text())
        return None

    def held_bytes(self) -> dict[str, int]:
        """What it holds now, as ``anonymous`` memory and as pages of ``file``s; empty where the system does not say."""
        if self.path is None:
            return {}
        with suppress(OSError, ValueError):
            fields = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
            names = (("anonymous", ("anon", "total_rss", "rss")), ("file", ("file", "total_cache", "cache")))
            return {name: int(next(fields[key] for key in keys if key in fields)) for name, keys in names}
        return {}

    @contextmanager
    def watched(self, every_s: float = 0.02) -> Iterator[list[int]]:
        """A list whose one number is the most anonymous memory that was seen; 0 where the system does not say."""
        most, is_over = [0], threading.Event()

        def look() -> None:
            while not is_over.wait(every_s):
                most[0] = max(most[0], self.held_bytes().get("anonymous", 0))

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield most
        finally:
            is_over.set()
            thread.join()

    def killed(self) -> int:
        """How many processes the limit has killed, or 0 where the system does not say."""
        if self.path is None:
            return 0
        for name in ("memory.events", "memory.oom_control"):
            with suppress(OSError):
                fields = dict(line.split() for line in (self.path / name).read_text().splitlines())
                return int(fields.get("oom_kill", 0))
        return 0


@contextmanager
def limited(way: Way, limit_bytes: int | None) -> Iterator[Group]:
    """A group with this limit (None: none, but a peak), removed at the end; all that runs in it must have ended."""
    if way.parent is None:
        yield Group(way, limit_bytes, None)
        return
    path = way.parent / f"anabranch-{os.getpid()}-{time.monotonic_ns()}"
    path.mkdir()
    try:
        if limit_bytes is not None:
            (path / way.limit).write_text(str(limit_bytes))
        yield Group(way, limit_bytes, path)
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a group, whose processes may take a moment to be gone."""
    for _ in range(100):
        try:
            path.rmdir()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"processes are left in {path}: {(path / 'cgroup.procs').read_text().split()}")


def forget_pages(*paths: Path) -> bool:
    """Drop files, and those of folders, from the page cache; False where the system cannot. Pages that are mapped stay."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for top in paths:
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file():
                number = os.open(path, os.O_RDONLY)
                try:
                    # Only what is on disk can be dropped.
                    os.fsync(number)
                    os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(number)
    return True


def resident_bytes(*paths: Path) -> int | None:
    """Of files, and those of folders, what the page cache holds; None where ``fincore`` (util-linux) is not there."""
    if shutil.which("fincore") is None:
        return None
    files = [str(file) for top in paths for file in (top.rglob("*") if top.is_dir() else [top]) if file.is_file()]
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", *files]
    return sum(map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()))


def read_ahead_kb(folder: Path) -> int | None:
    """KiB that the system reads ahead of what is asked of the disk of a folder; None where it does not say."""
    top = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    number = top.stat().st_dev
    place = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    for path in (place / "queue/read_ahead_kb", place / "../queue/read_ahead_kb"):
        with suppress(OSError, ValueError):
            return int(path.read_text())
    return None


def anonymous_bytes(pid: int) -> int:
    """``RssAnon`` of a process and all that it has started."""
    total, left = 0, [pid]
    while left:
        number = left.pop()
        with suppress(OSError):
            for line in Path(f"/proc/{number}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    total += 1024 * int(line.split()[1])
            for task in Path(f"/proc/{number}/task").iterdir():
                left += map(int, (task / "children").read_text().split())
    return total
