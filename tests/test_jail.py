"""The walls in front of code nobody trusts: what they let be seen and done, and what is said where there are none."""

import ast
import contextlib
import os
import platform
import struct
import subprocess
import sys

import pytest

from anabranch import jail as module
from anabranch.jail import _program, filter_of, inside, jail
from anabranch.sandbox import SandboxError
from jailed import needs_jail

ALLOW, EPERM, KILL = 0x7FFF0000, 0x50001, 0x80000000
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def judged(program, machine, number, *arguments):
    """What a filter says of a system call: the kernel's rules for such programs, as far as it uses them."""
    data = struct.pack("=IIQ6Q", number, machine, 0, *arguments, *[0] * (6 - len(arguments)))
    steps = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    at = held = 0
    while True:
        code, then, otherwise, value = steps[at]
        at += 1
        if code == 0x06:
            return value
        if code == 0x20:
            held = struct.unpack_from("=I", data, value)[0]
            continue
        is_so = {0x15: held == value, 0x35: held >= value}[code]
        at += then if is_so else otherwise


# Written down here once more, from the kernel's tables: whoever takes one out of the filter says why here.
DENIED = {
    # clone fork vfork clone3 unshare setns | mount umount2 pivot_root fsopen open_tree move_mount mount_setattr | socket
    "x86_64": {56, 57, 58, 435, 272, 308, 165, 166, 155, 430, 428, 429, 442, 41}
    # ptrace process_vm_readv process_vm_writev pidfd_open pidfd_getfd | bpf perf_event_open userfaultfd io_uring_setup open_by_handle_at
    | {101, 310, 311, 434, 438, 321, 298, 323, 425, 304}
    # add_key request_key keyctl | shmget msgget semget | syslog inotify_init inotify_init1 fanotify_init io_setup
    | {248, 249, 250, 29, 68, 64, 103, 253, 294, 300, 206},
    # The same, as far as there is one.
    "aarch64": {220, 435, 97, 268, 40, 39, 41, 430, 428, 429, 442, 198}
    | {117, 270, 271, 434, 438, 280, 241, 282, 425, 265}
    | {217, 218, 219, 194, 186, 190, 116, 26, 262, 0},
}


@pytest.mark.parametrize(
    ("machine", "socketpair", "fcntl", "of_others"),
    # What code needs most is among what is allowed: read write mmap execve exit_group futex.
    [("x86_64", 53, 72, {0, 1, 9, 59, 231, 202}), ("aarch64", 199, 25, {63, 64, 222, 221, 94, 98})],
)
def test_the_filter_denies_what_is_written_here_and_nothing_else(machine, socketpair, fcntl, of_others):
    program, audit = _program(machine), AUDIT[machine]
    numbers = set(range(600)) - {socketpair, fcntl}
    assert of_others <= numbers - DENIED[machine]
    assert {number for number in numbers if judged(program, audit, number) == EPERM} == DENIED[machine]
    assert {judged(program, audit, number) for number in numbers - DENIED[machine]} == {ALLOW}
    assert judged(program, audit, 0x40000000) == EPERM  # a second table of the same calls
    assert judged(program, 0x40000003, 1) == KILL  # another machine's calls


@pytest.mark.parametrize(("machine", "socketpair", "fcntl"), [("x86_64", 53, 72), ("aarch64", 199, 25)])
def test_of_two_calls_an_argument_decides(machine, socketpair, fcntl):
    program, audit = _program(machine), AUDIT[machine]
    families = {family for family in range(64) if judged(program, audit, socketpair, family) == ALLOW}
    assert families == {1}
    commands = {command for command in range(2000) if judged(program, audit, fcntl, 7, command) == EPERM}
    # F_SETLEASE F_NOTIFY F_SETPIPE_SZ
    assert commands == {1024, 1026, 1031}
    # The upper half is not read there, nor here.
    assert judged(program, audit, socketpair, 40 | 1 << 32) == EPERM
    assert judged(program, audit, fcntl, 7, 1024 | 1 << 32) == EPERM


def test_what_is_missing_is_named_with_what_installs_it(monkeypatch, tmp_path):
    find = jail.__wrapped__
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="no bwrap on the path; install bubblewrap"):
        find()
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    with pytest.raises(SandboxError, match="cannot do it here: bwrap: No permissions to create new namespace"):
        find()
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: Unknown option --clearenv' >&2\nexit 1\n")
    with pytest.raises(SandboxError, match=r"Unknown option --clearenv \(it must be 0\.5 or newer"):
        find()
    (tmp_path / "bwrap").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(SandboxError, match="ended with code 3"):
        find()
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(SandboxError, match="on x86_64 or aarch64; this is linux, riscv64"):
        find()


LOOK = """
import os, sys
seen = {"root": sorted(os.listdir("/")), "env": dict(os.environ), "uid": os.getuid(), "pids": os.getpid() < 10, "tmp": os.listdir(".")}
seen["packages"] = [name for folder in sys.path for name in ("site-packages", "dist-packages")
                    if os.path.isdir(os.path.join(folder, name)) and os.listdir(os.path.join(folder, name))]
# 0 is one outside, whose terminal it could write to.
seen["session"] = os.getsid(0)
print(seen)
"""


@contextlib.contextmanager
def command(code, tmp_path, is_filtered=True):
    """What runs `code` behind the walls, and the descriptor that it must be given."""
    (tmp_path / "code.py").write_text(code)
    rules = filter_of()
    try:
        made = inside(jail(), rules, str(tmp_path / "code.py"))
        if not is_filtered:
            at = made.index("--seccomp")
            del made[at : at + 2]
        yield made, rules
    finally:
        os.close(rules)


def said_inside(code, tmp_path, is_filtered=True):
    """What `code` prints last behind the walls."""
    with command(code, tmp_path, is_filtered) as (made, rules):
        done = subprocess.run(made, pass_fds=(rules,), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout.splitlines()[-1])


@needs_jail
def test_nothing_of_the_machine_is_seen_but_a_python(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "sk-1")
    seen = said_inside(LOOK, tmp_path)
    # Of a Python that lies elsewhere the way to it.
    way = module.python().split("/")[1]
    assert set(seen["root"]) <= {"dev", "lib", "lib64", "usr", "tmp", "program.py", way}
    assert "SECRET" not in seen["env"]
    assert set(seen["env"]) <= {"PWD", "LC_CTYPE"}
    assert (seen["uid"], seen["pids"], seen["packages"]) == (65534, True, [])
    assert seen["tmp"] == [] or way == "tmp"
    assert seen["session"] in (1, 2)


WRITE = """
import os, socket, sys
def tried(do, *arguments):
    try:
        do(*arguments)
    except OSError as error:
        return type(error).__name__
    return "done"
folders = [top for top, _, _ in os.walk("/") if top.count("/") < 5 or top.endswith("-packages")]
made = [folder + "/made" for folder in folders]
said = set()
for path in made:
    said |= {tried(open, path, "w"), tried(os.mkdir, path), tried(os.symlink, "x" * 100, path), tried(os.mkfifo, path)}
    said |= {tried(os.link, "/program.py", path), tried(os.mknod, path)}
for path in (os.__file__, sys.executable, "/program.py"):
    said |= {tried(open, path, "a"), tried(os.unlink, path), tried(os.chmod, path, 0o777), tried(os.utime, path)}
ours, theirs = socket.socketpair()
said |= {tried(ours.bind, path) for path in made}
print((folders, sorted(said)))
"""


@needs_jail
def test_nothing_can_be_written_so_that_no_number_of_files_fills_the_memory(tmp_path):
    folders, said = said_inside(WRITE, tmp_path)
    assert {"/", "/tmp", "/dev"} <= set(folders)
    assert any(folder.endswith("-packages") for folder in folders)
    assert set(said) <= {"OSError", "PermissionError"}


FAMILIES = """
import socket
def tried(do, *arguments):
    try:
        do(*arguments)
    except OSError as error:
        return error.errno
    return 0
kinds = (1, 2, 3, 4, 5, 6, 10)
said = {(family, kind): tried(socket.socket, family, kind) for family in range(64) for kind in kinds}
pairs = {family for family in range(64) if not all(tried(socket.socketpair, family, kind) for kind in kinds)}
import asyncio
async def work():
    await asyncio.sleep(0)
    return 7
print((sorted({one for one in said if said[one] != 1}), pairs, asyncio.run(work())))
"""


@needs_jail
def test_there_is_no_socket_of_any_family_but_pairs_of_its_own(tmp_path):
    """A network namespace does not hold AF_VSOCK, which reaches the machine and the one that it runs on."""
    made, pairs, seven = said_inside(FAMILIES, tmp_path)
    assert (made, pairs, seven) == ([], {1}, 7)


SHARED = """
import ctypes, errno, fcntl, os, platform
at = ["x86_64", "aarch64"].index(platform.machine())
library = ctypes.CDLL(None, use_errno=True)
def asked(numbers, *arguments):
    return 0 if library.syscall(numbers[at], *arguments) >= 0 else ctypes.get_errno()
def told(handle, how, value):
    try:
        fcntl.fcntl(handle, how, value)
    except OSError as error:
        return error.errno
    return 0
handle, (read, write) = os.open(os.__file__, os.O_RDONLY), os.pipe()
context = ctypes.c_ulong(0)
said = {
    "lease": told(handle, 1024, fcntl.F_RDLCK),
    "notify": told(os.open("/", os.O_RDONLY), 1026, 1),
    "pipe": told(write, 1031, 1 << 20),
    "inotify": asked((294, 26), 0),
    "fanotify": asked((300, 262), 0x200, 0),
    "aio": asked((206, 0), 1000, ctypes.byref(context)),
    "log": asked((103, 116), 3, ctypes.create_string_buffer(99), 99),
    "first": asked((434, 434), 1, 0),
    "key": asked((250, 219), 0, -3, 0),
    "handle": asked((304, 265), handle, ctypes.create_string_buffer(99), 0),
}
print((said, fcntl.fcntl(handle, fcntl.F_GETFD) >= 0))
"""


@needs_jail
def test_what_a_machine_has_once_for_all_namespaces_is_out_of_reach(tmp_path):
    """Files that others open as well cannot be held up or watched, nor counts used up that others of the machine need."""
    said, still_works = said_inside(SHARED, tmp_path)
    assert set(said.values()) == {1}, said
    assert still_works


WAIT = "print(0, flush=True)\ninput()"


@needs_jail
def test_all_namespaces_are_its_own_and_no_capability_is_left(tmp_path):
    kinds = ("user", "ipc", "pid", "net", "uts", "mnt")
    with command(WAIT, tmp_path) as (made, rules):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        running = subprocess.Popen(made, pass_fds=(rules,), **pipes)
        try:
            assert running.stdout.readline() == b"0\n"
            [first] = children(running.pid)
            [last] = children(first)
            here, there = ({kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in kinds} for pid in ("self", last))
            with open(f"/proc/{last}/status") as file:
                status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        finally:
            running.communicate(b"\n")
    assert [kind for kind in kinds if here[kind] == there[kind]] == []
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")


UNSHARE = "import ctypes\nprint(ctypes.CDLL(None).unshare(0x10000000))"


@needs_jail
def test_without_the_filter_too_there_is_no_further_user_namespace(tmp_path):
    if b"--disable-userns" not in subprocess.run([jail()[0], "--help"], capture_output=True).stdout:
        pytest.skip("bubblewrap 0.8 is the first that can")
    assert said_inside(UNSHARE, tmp_path, is_filtered=False) == -1


@needs_jail
def test_an_older_bubblewrap_does_what_it_knows(tmp_path, monkeypatch):
    """0.5 to 0.7 have no --disable-userns and no --size, of which the filter denies the one, and nothing needs the other."""
    real, old = jail()[0], tmp_path / "bwrap"
    old.write_text(
        "#!/bin/sh\nfor one; do case $one in --help) exit 0;; --) break;;"
        ' --disable-userns|--size) echo "bwrap: Unknown option $one" >&2; exit 1;; esac; done\n'
        f'exec {real} "$@"\n'
    )
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    front = jail.__wrapped__()
    assert front[0] == str(old)
    assert "--disable-userns" not in front


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]
