"""Equal flows over several real paths: two network namespaces of Linux, joined by veth pairs of a given rate.

One namespace is a leaf with its hosts' addresses, the other likewise; each veth pair stands for a spine. Pinned flows have a source address
whose routing rule names their pair; hashed ones leave the choice to the kernel (a route with several next hops, hashed over addresses and
ports). The bytes are sent by `anabranch.cluster.fabric.sending`, four connections at a time, and the time is that of the last.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from anabranch.cluster.fabric.sending import SplitReceiver, SplitSender
from anabranch.studies.harness import Metrics, Progress

PORT, FIRST_SOURCE_PORT = 18_500, 20_000
TOOLS = ("ip", "tc", "sysctl")
# Seconds for one transfer; at 200 Mbit/s one of 32 MB over a single path takes 1.3.
PATIENCE_S = 120.0


class NoNamespacesError(Exception):
    """The kernel, or whoever runs us, does not allow them."""


def measure(spines: int, mbit: int, flow_bytes: int, rounds: int, seed: int, progress: Progress) -> Metrics:
    """Shares of the capacity of all paths: ``pinned_share``, and ``hashed_share`` as the mean over ``rounds`` sets of source ports.

    Both are None, and ``why`` says why, where namespaces cannot be made.
    """
    try:
        with namespaces(spines, mbit) as (here, there):
            seconds = _run(here, there, spines, flow_bytes, rounds, seed)
    except NoNamespacesError as error:
        progress(f"not run: {error}")
        return {"pinned_share": None, "hashed_share": None, "why": str(error)}
    # Each path could carry one of the flows in this time.
    least = 8 * flow_bytes / (mbit * 1e6)
    hashed = [least / one for one in seconds["hashed"]]
    return {
        "pinned_share": least / seconds["pinned"],
        "hashed_share": float(np.mean(hashed)),
        "hashed_worst": min(hashed),
        "hashed_best": max(hashed),
    }


@contextmanager
def namespaces(spines: int, mbit: int) -> Iterator[tuple[str, str]]:
    """Names of two namespaces joined by ``spines`` veth pairs, which are taken away in the end. Raises NoNamespacesError."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise NoNamespacesError(f"there is no {missing[0]} here")
    here, there = f"anabranch-a-{os.getpid()}", f"anabranch-b-{os.getpid()}"
    try:
        for name in (here, there):
            _do("ip", "netns", "add", name)
        for number, name in enumerate((here, there), start=1):
            _inside(name, "ip", "link", "set", "lo", "up")
            _inside(name, "ip", "address", "add", f"10.78.{number}.1/32", "dev", "lo")
            _inside(name, "sysctl", "-q", "-w", "net.ipv4.fib_multipath_hash_policy=1")
        for spine in range(spines):
            _join(here, there, spine, mbit)
        for name, own, other in ((here, 1, 2), (there, 2, 1)):
            hops = [word for p in range(spines) for word in ("nexthop", "via", f"10.77.{p}.{other}", "dev", f"p{p}")]
            _inside(name, "ip", "route", "add", f"10.78.{other}.0/24", "src", f"10.78.{own}.1", *hops)
        yield here, there
    finally:
        for name in (here, there):
            # One that could not be made is not there.
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _join(here: str, there: str, spine: int, mbit: int) -> None:
    """A veth pair of a rate, and the rule that what comes from its address goes over it."""
    _do("ip", "link", "add", f"p{spine}", "netns", here, "type", "veth", "peer", "name", f"p{spine}", "netns", there)
    for name, own in ((here, 1), (there, 2)):
        device = f"p{spine}"
        _inside(name, "ip", "address", "add", f"10.77.{spine}.{own}/24", "dev", device)
        _inside(name, "ip", "link", "set", device, "up")
        shape = ("rate", f"{mbit}mbit", "burst", "256kb", "latency", "30ms")
        _inside(name, "tc", "qdisc", "add", "dev", device, "root", "tbf", *shape)
    table = str(100 + spine)
    _inside(here, "ip", "route", "add", "10.78.2.0/24", "via", f"10.77.{spine}.2", "dev", f"p{spine}", "table", table)
    _inside(here, "ip", "rule", "add", "from", f"10.77.{spine}.1", "table", table)


def _inside(name: str, *words: str) -> None:
    _do("ip", "netns", "exec", name, *words)


def _do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        told = (done.stderr or done.stdout).strip().splitlines()
        raise NoNamespacesError(f"{' '.join(words)}: {told[-1] if told else f'exit code {done.returncode}'}")


def _run(here: str, there: str, spines: int, flow_bytes: int, rounds: int, seed: int) -> dict[str, Any]:
    """Seconds of the pinned transfer and of each hashed one."""
    module = [sys.executable, "-m", "anabranch.studies.packet_spraying_kernel"]
    job = json.dumps({"spines": spines, "flow_bytes": flow_bytes, "rounds": rounds, "seed": seed})
    receiver = subprocess.Popen(
        ["ip", "netns", "exec", there, *module, "receive", job], stdout=subprocess.PIPE, text=True
    )
    try:
        assert receiver.stdout is not None
        if receiver.stdout.readline().strip() != "ready":
            raise RuntimeError("the receiver did not start")
        sent = subprocess.run(
            ["ip", "netns", "exec", here, *module, "send", job], stdout=subprocess.PIPE, text=True, check=True
        )
        receiver.wait(PATIENCE_S)
    finally:
        receiver.kill()
        receiver.communicate()
    return json.loads(sent.stdout)


def receive(spines: int, flow_bytes: int, rounds: int) -> None:
    """In its namespace: take every transfer, one after the other."""
    held = np.zeros(spines * flow_bytes, np.uint8)
    with SplitReceiver(("10.78.2.1", PORT)) as receiver:
        print("ready", flush=True)
        for _ in range(rounds + 1):
            receiver.receive(held, PATIENCE_S)


def send(spines: int, flow_bytes: int, rounds: int, seed: int) -> dict[str, Any]:
    """In its namespace: one pinned transfer, then hashed ones from other ports each time."""
    held = np.zeros(spines * flow_bytes, np.uint8)
    pieces = [(path, path * flow_bytes, flow_bytes) for path in range(spines)]

    def seconds(paths: Sequence[tuple[str, int]]) -> float:
        with SplitSender(("10.78.2.1", PORT), paths, timeout_s=PATIENCE_S) as sender:
            begin = time.perf_counter()
            sender.send(held, pieces)
            return time.perf_counter() - begin

    pinned = seconds([(f"10.77.{path}.1", 0) for path in range(spines)])
    hashed = []
    for round_ in range(rounds):
        first = FIRST_SOURCE_PORT + (seed * rounds + round_) * spines % 30_000
        hashed.append(seconds([("10.78.1.1", first + path) for path in range(spines)]))
    return {"pinned": pinned, "hashed": hashed}


if __name__ == "__main__":
    asked = json.loads(sys.argv[2])
    if sys.argv[1] == "send":
        print(json.dumps(send(**asked)))
    else:
        asked.pop("seed")
        receive(**asked)
