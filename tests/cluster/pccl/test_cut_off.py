"""A machine that is cut off without a word: its connections end, though silence alone would be waited out for ten minutes."""

import pytest

from namespaces import can_make_hosts, do, python_in, two_hosts

MASTER = """
import time
from anabranch.cluster.pccl import master as module
module.CUT_OFF_S = 2.0
with module.Master("10.79.0.1:0", secret="", dead_s=600.0) as master:
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
@pytest.mark.skipif(not can_make_hosts(), reason="needs root and ip")
def test_both_ends_find_that_the_cable_is_cut():
    with two_hosts("10.79.0") as (here, there):
        running = [python_in(here, MASTER)]
        try:
            address = running[0].stdout.readline().strip()
            assert address, running[0].stderr.read()
            running.append(python_in(there, PEER, address))
            assert running[1].stdout.readline().strip() == "in", running[1].stderr.read()
            do("ip", "-n", there, "link", "set", "cable", "down")
            assert running[0].communicate(timeout=120)[0].strip() == "gone"
            assert "is gone" in running[1].communicate(timeout=120)[0]
        finally:
            for process in running:
                process.kill()
                process.communicate()
