"""The walls in front of code nobody trusts: what they let be seen and done, and what is said where there are none."""

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


def judged(program, machine, number):
    """What a filter says of a system call: the kernel's rules for such programs, as far as it uses them."""
    data = struct.pack("=IIQ6Q", number, machine, 0, 0, 0, 0, 0, 0, 0)
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


@pytest.mark.parametrize(
    ("machine", "allowed", "denied"),
    [
        # read write mmap execve exit_group futex | clone fork vfork unshare mount ptrace shmget clone3 io_uring_setup mount_setattr
        ("x86_64", (0, 1, 9, 59, 231, 202), (56, 57, 58, 272, 165, 101, 29, 435, 425, 442)),
        ("aarch64", (63, 64, 222, 221, 94, 98), (220, 97, 40, 117, 194, 435, 425, 442)),
    ],
)
def test_the_filter_leaves_no_process_and_no_thread(machine, allowed, denied):
    program, audit = _program(machine), AUDIT[machine]
    assert {judged(program, audit, number) for number in allowed} == {ALLOW}
    assert {judged(program, audit, number) for number in denied} == {EPERM}
    assert judged(program, audit, 0x40000000) == EPERM  # a second table of the same calls
    assert judged(program, 0x40000003, 1) == KILL  # another machine's calls


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
def tried(do):
    try:
        return do() and "done"
    except OSError as error:
        return type(error).__name__
seen["write"] = [tried(lambda p=p: open(p, "w")) for p in ("/x", os.__file__, sys.executable, "/program.py")]
seen["mine"] = tried(lambda: open("/tmp/x", "w"))
seen["full"] = tried(lambda: open("/tmp/y", "wb").write(bytes(20 << 20)))
print(seen)
"""


@needs_jail
def test_nothing_of_the_machine_is_seen_but_a_python(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "sk-1")
    (tmp_path / "look.py").write_text(LOOK)
    rules = filter_of()
    command = inside(jail(), rules, str(tmp_path / "look.py"))
    try:
        done = subprocess.run(command, pass_fds=(rules,), capture_output=True, text=True, check=True)
    finally:
        os.close(rules)
    seen = eval(done.stdout)
    # Of a Python that lies elsewhere the way to it.
    way = module.python().split("/")[1]
    assert set(seen["root"]) <= {"dev", "lib", "lib64", "usr", "tmp", "program.py", way}
    assert "SECRET" not in seen["env"]
    assert set(seen["env"]) <= {"PWD", "LC_CTYPE"}
    assert (seen["uid"], seen["pids"], seen["tmp"], seen["packages"]) == (65534, True, [], [])
    assert set(seen["write"]) <= {"OSError", "PermissionError"}
    assert (seen["mine"], seen["full"]) == ("done", "OSError")
