"""`jail`: the command in front of a program of Python that runs code nobody trusts, so that it sees and reaches nothing of this machine.

The walls are bubblewrap's (https://github.com/containers/bubblewrap): namespaces of its own for users, processes, network, IPC and mounts,
of which the whole ends with it; read-only the Python that it needs, a /tmp of its own, no environment, no capability. A filter of system
calls, which holds for root too, leaves it no further process or thread, and nothing that others broke out through. Limits of time and
memory are for the program to set before it runs what it is given.
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

INSTALL = "install bubblewrap (apt install bubblewrap, dnf install bubblewrap)"

# Bytes of all that may lie in its /tmp.
TMP_BYTES = 16 << 20

_TRIAL_S = 20.0
_QUIET: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}

# By machine: what the kernel calls it, and numbers of system calls: clone fork vfork | unshare setns mount umount2 pivot_root ptrace
# process_vm_readv process_vm_writev bpf perf_event_open userfaultfd add_key request_key keyctl | shmget msgget semget, whose memory no
# limit counts | on both clone3 io_uring_setup fsopen open_tree move_mount mount_setattr.
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ON_BOTH = (435, 425, 430, 428, 429, 442)
_DENIED = {
    "x86_64": (56, 57, 58, 272, 308, 165, 166, 155, 101, 310, 311, 321, 298, 323, 248, 249, 250, 29, 68, 64, *_ON_BOTH),
    "aarch64": (220, 97, 268, 40, 39, 41, 117, 270, 271, 280, 241, 282, 217, 218, 219, 194, 186, 190, *_ON_BOTH),
}
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
    front = (os.path.realpath(found), *_WALLS, *_mounts())
    said = _try(front)
    if said:
        raise SandboxError(
            f"code of others is run inside bubblewrap alone, and {found} cannot do it here: {said} "
            "(a container must allow user namespaces, and a kernel unprivileged ones)"
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
    *("--uid", "65534", "--gid", "65534", "--hostname", "nowhere", "--cap-drop", "ALL", "--disable-userns"),
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
        made += ["--perms", "0555", "--size", "4096", "--tmpfs", packages, "--remount-ro", packages]
    return [*made, "--dev-bind", os.devnull, os.devnull, "--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"]


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
        raise SandboxError(f"the libraries of Python cannot be listed: {error}") from None
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
    # A question jumps to one of two answers; where it names none, the next question is asked, and behind the last stands the first answer.
    steps: list[tuple[int, str, str, int]] = [
        (_LOAD, "", "", 4),
        (_IF_EQUAL, "", "kill", _AUDIT[machine]),
        (_LOAD, "", "", 0),
        (_IF_AT_LEAST, "eperm", "", _X32),
        *((_IF_EQUAL, "eperm", "", number) for number in _DENIED[machine]),
    ]
    place = {name: len(steps) + at for at, name in enumerate(answers)}
    made = b""
    for at, (code, then, otherwise, value) in enumerate(steps):
        jumps = [place[name] - at - 1 if name else 0 for name in (then, otherwise)]
        made += struct.pack("=HBBI", code, *jumps, value)
    return made + b"".join(struct.pack("=HBBI", _RETURN, 0, 0, value) for value in answers.values())
