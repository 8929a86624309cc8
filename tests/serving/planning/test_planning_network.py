"""Collectives that are really measured, between processes on this machine."""

import pytest
import torch

from anabranch.errors import BackendError
from anabranch.serving.planning.cost import Workload, estimate
from anabranch.serving.planning.measure import measure
from anabranch.serving.planning.network import measure_network
from anabranch.serving.planning.shape import find_shape

QUICK = {"seconds": 0.01, "stream_bytes": 1 << 20}


@pytest.mark.slow
def test_two_processes_have_a_network_and_share_the_processor():
    both, one = measure("cpu", num_devices=2, **QUICK), measure("cpu", **QUICK)
    assert both.num_devices == 2
    assert 1e6 < both.network_bandwidth < 1e12
    assert 0 < both.efficiency.collective_s < 1
    assert both.memory_bytes == one.memory_bytes / 2
    found = estimate(find_shape("llama-3-8b"), both.replace(memory_bytes=1e12), Workload(dense_batch=256))
    assert found.t_net_s > 0
    assert one.network_bandwidth == 0


def test_devices_that_are_not_there():
    count = torch.cuda.device_count() + 2
    with pytest.raises(BackendError, match=f"{count} devices were asked for"):
        measure_network(count, "cuda")
