"""Network namespaces as hosts of one machine, where it lets a test make them."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager


def can_make_hosts():
    """Whether this machine lets us make network namespaces."""
    if not all(map(shutil.which, ("ip", "tc"))) or os.geteuid() != 0:
        return False
    name = f"anabranch-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "delete", name], capture_output=True).returncode == 0


def do(*words):
    subprocess.run(words, check=True, capture_output=True)


@contextmanager
def two_hosts(network):
    """Names of two of them, at ``network``.1 and .2, with a cable ``cable`` in between."""
    names = [f"anabranch-{side}-{os.getpid()}" for side in "xy"]
    made = []
    try:
        for name in names:
            do("ip", "netns", "add", name)
            made.append(name)
        do("ip", "link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, 1):
            do("ip", "-n", name, "address", "add", f"{network}.{number}/24", "dev", "cable")
            do("ip", "-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name in made:
            do("ip", "netns", "delete", name)


def python_in(name, script, *words):
    """A process of Python in a host."""
    return subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, "-c", script, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
