"""A machine that is cut off without a word: its connections end, though silence alone would be waited out for ten minutes."""

import subprocess
import sys

import pytest

from anabranch.testing import can_make_hosts, hosts

MASTER = """
import sys, time
from anabranch.cluster.pccl import master as module
module.CUT_OFF_S = 2.0
with module.Master(sys.argv[1], secret="", dead_s=600.0) as master:
    print(master.address, flush=True)
    while not master.state.members: time.sleep(0.05)
    while master.state.members: time.sleep(0.05)
    print("gone", flush=True)
"""
PEER = """
import sys, time
from anabranch.cluster.pccl import Communicator, MasterLost, line
line.CUT_OFF_S = 2.0
try:
    with Communicator(sys.argv[1], secret="", master_returns=False) as peers:
        print("in", flush=True)
        while True:
            peers.are_peers_pending()
            time.sleep(0.05)
except MasterLost as error:
    print(error, flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not can_make_hosts(), reason="needs root, ip and tc")
def test_both_ends_find_that_the_cable_is_cut():
    def python_on(number, script, *words):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return made.start(number, [sys.executable, "-c", script, *words], text=True, **pipes)

    with hosts(2) as made:
        running = [python_on(0, MASTER, f"{made.addresses[0]}:0")]
        try:
            address = running[0].stdout.readline().strip()
            assert address, running[0].stderr.read()
            running.append(python_on(1, PEER, address))
            assert running[1].stdout.readline().strip() == "in", running[1].stderr.read()
            made.cut(1)
            assert running[0].communicate(timeout=120)[0].strip() == "gone"
            assert "is gone" in running[1].communicate(timeout=120)[0]
        finally:
            for process in running:
                process.kill()
                process.communicate()
