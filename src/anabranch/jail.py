"""`jail`: the command in front of a program of Python that runs code nobody trusts, so that it sees and reaches nothing of this machine.

The walls are bubblewrap's (https://github.com/containers/bubblewrap): namespaces of its own for users, processes, network, IPC and mounts,
of which the whole ends with it; the Python that it needs, an empty /tmp, nothing that can be written, no environment, no capability. A
filter of system calls, which holds for root too, leaves it no further process or thread, no socket but pairs of its own, nothing that
others broke out through, and nothing of what a machine has once for all namespaces. Limits of time and memory are for the program to set
before it runs what it is given.
"""

import __future__

import os
import platform
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from anabranch.sandbox import SandboxError

__all__ = ["filter_of", "inside", "jail", "python"]

# --clearenv is of 0.5; --disable-userns, of 0.8, is left out where it is unknown, since the filter denies as much.
INSTALL = "install bubblewrap 0.5 or newer (apt install bubblewrap, dnf install bubblewrap)"

_TRIAL_S = 20.0
_QUIET: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}

# What the kernel calls a machine.
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Numbers of system calls on x86_64 and aarch64; None where a machine has no such call.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # Further processes, threads, namespaces and mounts.
    "clone": (56, 220),
    "fork": (57, None),
    "vfork": (58, None),
    "clone3": (435, 435),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "fsopen": (430, 430),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "mount_setattr": (442, 442),
    # A network namespace does not hold every family: AF_VSOCK reaches the machine and what it runs on, AF_ALG the kernel's ciphers.
    "socket": (41, 198),
    # Other processes, the first one of its own namespace among them.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    # What others broke out through.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "open_by_handle_at": (304, 265),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Memory that no limit counts.
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    # What a machine or its user has once for all namespaces: the kernel's log, who opens which library, and counts that others need.
    "syslog": (103, 116),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "io_setup": (206, 0),
}
# F_SETLEASE and F_NOTIFY, by which files that others open as well hold them up or tell of them; F_SETPIPE_SZ, which a user has so much of.
_DENIED_FCNTL = (1024, 1026, 1031)
_FCNTL, _SOCKETPAIR = (72, 25), (53, 199)
_AF_UNIX = 1
# From here on x86_64 has a second table of the same calls.
_X32 = 0x40000000
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _KILL, _EPERM = 0x7FFF0000, 0x80000000, 0x00050001

# Says which libraries Python and its modules were linked from: the dynamic loader's own answer, whatever the distribution.
_LIBRARIES = """
import importlib, os, sys
for folder in sys.path:
    for name in sorted(os.listdir(folder)) if folder.endswith("lib-dynload") else ():
        name = name.partition(".")[0]
        if not name.startswith(("_test", "_ctypes_test", "xx", "_xx", "_tkinter", "readline", "nis", "ossaudiodev", "spwd", "audioop")):
            try:
                importlib.import_module(name)
            except ImportError:
                pass
with open("/proc/self/maps") as file:
    found = {line.split(maxsplit=5)[5].strip() for line in file if ".so" in line}
print("\\n".join(sorted(path for path in found if path.startswith("/"))))
"""


def python() -> str:
    """The Python that runs in it: this one, but not a virtual environment's link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@cache
def jail() -> tuple[str, ...]:
    """The walls, tried out once, as the front of a command that `inside` completes.

    Raises SandboxError, with what to install or allow, where this machine cannot.
    """
    if not sys.platform.startswith("linux") or platform.machine() not in _AUDIT:
        raise SandboxError(
            f"code of others is run on Linux alone, on {' or '.join(_AUDIT)}; this is {sys.platform}, {platform.machine()}"
        )
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxError(
            f"code of others is run inside bubblewrap alone, and there is no bwrap on the path; {INSTALL}"
        )
    path = os.path.realpath(found)
    further = ("--disable-userns",) if "--disable-userns" in _output(path, "--help") else ()
    front = (path, *_WALLS, *further, *_mounts())
    said = _try(front)
    if said:
        raise SandboxError(
            f"code of others is run inside bubblewrap alone, and {found} cannot do it here: {said} "
            "(it must be 0.5 or newer, a container must allow user namespaces, and a kernel unprivileged ones)"
        )
    return front


def inside(front: Sequence[str], rules: int, program: str) -> list[str]:
    """The command that runs a program of Python behind walls.

    Args:
        front: `jail`.
        rules: file descriptor of `filter_of`, which the process is given.
        program: path of its file, all of the program that is to be seen there.
    """
    return [
        *(*front, "--ro-bind", program, _PROGRAM, "--remount-ro", "/", "--seccomp", str(rules)),
        *("--", python(), "-I", "-S", _PROGRAM),
    ]


_PROGRAM = "/program.py"
_WALLS = (
    *("--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
    *("--uid", "65534", "--gid", "65534", "--hostname", "nowhere", "--cap-drop", "ALL"),
    *("--die-with-parent", "--new-session", "--clearenv"),
)


def _mounts() -> list[str]:
    """All that is to be seen there."""
    folders = {sysconfig.get_path("stdlib"), *(path for path in sys.path if path.endswith("lib-dynload"))}
    folders |= {str(Path(library).parent) for library in _output(python(), "-I", "-S", "-c", _LIBRARIES).splitlines()}
    made: list[str] = []
    for top in ("/lib", "/lib64", "/usr/lib64"):
        # The dynamic loader's own name lies there, and is written into programs.
        if os.path.islink(top):
            made += ["--symlink", os.readlink(top), top]
        elif top.endswith("64"):
            folders.add(top)
    # Where one lies within another, that one holds it.
    bound: list[str] = []
    for folder in sorted(os.path.realpath(folder) for folder in folders if os.path.isdir(folder)):
        if not any(folder == one or folder.startswith(f"{one}/") for one in bound):
            bound.append(folder)
            made += ["--ro-bind", folder, folder]
    made += ["--ro-bind", python(), python()]
    for packages in _packages(folders):
        # What else was installed is not to be seen.
        made += ["--tmpfs", packages, "--remount-ro", packages]
    # No limit of a tmpfs that can be set here counts its files, which are the kernel's memory: there is none to write to.
    return [*made, "--dev-bind", os.devnull, os.devnull, "--dir", "/tmp", "--chdir", "/tmp"]


def _packages(folders: set[str]) -> list[str]:
    names = ("site-packages", "dist-packages", "python3/dist-packages")
    stdlib = sysconfig.get_path("stdlib")
    there = {os.path.realpath(os.path.join(folder, name)) for folder in (*folders, stdlib) for name in names}
    there |= {
        os.path.realpath(path) for folder in folders for path in map(str, Path(folder).glob("python3*/*-packages"))
    }
    return sorted(path for path in there if os.path.isdir(path))


def _try(front: Sequence[str]) -> str:
    """Why it cannot be done; "" if it can."""
    rules = filter_of()
    # A program of Python's own that does nothing.
    command = inside(front, rules, str(__future__.__file__))
    try:
        done = subprocess.run(command, pass_fds=(rules,), env={}, timeout=_TRIAL_S, **_QUIET)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    finally:
        os.close(rules)
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    return lines[-1][:300] if lines else f"it ended with code {done.returncode}"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, env={}, timeout=_TRIAL_S, **_QUIET)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SandboxError(
            f"code of others is run behind walls alone, for which {command[0]} cannot be asked: {error}"
        ) from None
    return done.stdout


def filter_of() -> int:
    """A file descriptor to read the filter from; whoever gives it to a process closes it."""
    read, write = os.pipe()
    try:
        os.write(write, _program(platform.machine()))
    finally:
        os.close(write)
    return read


def _program(machine: str) -> bytes:
    """The filter, as the kernel's classic BPF: all is allowed but what is named.

    Threads are denied as processes are: a limit of their number does not hold for root.
    """
    answers = {"allow": _ALLOW, "eperm": _EPERM, "kill": _KILL}
    at_machine = list(_AUDIT).index(machine)
    numbers = (of_machines[at_machine] for of_machines in _DENIED.values())
    # A question jumps to one of two answers, or over so many steps; behind the last step stands the first answer.
    steps: list[tuple[int, str | int, str | int, int]] = [
        (_LOAD, 0, 0, 4),
        (_IF_EQUAL, 0, "kill", _AUDIT[machine]),
        (_LOAD, 0, 0, 0),
        (_IF_AT_LEAST, "eperm", 0, _X32),
        *((_IF_EQUAL, "eperm", 0, number) for number in numbers if number is not None),
        # Of these an argument decides: what follows is passed over where it is another call.
        (_IF_EQUAL, 0, 2, _SOCKETPAIR[at_machine]),
        (_LOAD, 0, 0, _argument(0)),
        (_IF_EQUAL, "allow", "eperm", _AF_UNIX),
        (_IF_EQUAL, 0, "allow", _FCNTL[at_machine]),
        (_LOAD, 0, 0, _argument(1)),
        *((_IF_EQUAL, "eperm", 0, command) for command in _DENIED_FCNTL),
    ]
    place = {name: len(steps) + at for at, name in enumerate(answers)}
    made = b""
    for at, (code, then, otherwise, value) in enumerate(steps):
        jumps = [place[where] - at - 1 if isinstance(where, str) else where for where in (then, otherwise)]
        made += struct.pack("=HBBI", code, *jumps, value)
    return made + b"".join(struct.pack("=HBBI", _RETURN, 0, 0, value) for value in answers.values())


def _argument(number: int) -> int:
    """Where a call's argument lies, of which the kernel reads the lower half alone: it is an ``int`` there."""
    return 16 + 8 * number
