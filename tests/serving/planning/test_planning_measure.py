"""The profile of this machine: figures that hang together, whatever they are."""

import pytest
import torch

from anabranch.errors import BackendError
from anabranch.serving.planning.hardware import Hardware
from anabranch.serving.planning.measure import measure, measure_shares

QUICK = {"seconds": 0.01, "stream_bytes": 1 << 20}


def test_a_profile_is_whole_and_read_back(tmp_path):
    found = measure("cpu", **QUICK)
    assert found.name.startswith("cpu")
    assert found.memory_bytes > 2**28
    assert 0 < found.efficiency.attention <= 1
    assert 0 < found.efficiency.launch_s < 0.1
    found.save(tmp_path / "cpu.json")
    assert Hardware.load(tmp_path / "cpu.json") == found


@pytest.mark.parametrize("cores", [1, 2])
def test_share_tables_are_monotone_and_threads_put_back(cores):
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        table = measure_shares(**QUICK)
        assert torch.get_num_threads() == cores
    finally:
        torch.set_num_threads(before)
    assert table.speed("memory", 0.0) == 0
    assert table.speed("memory", 1.0) == 1
    speeds = [table.speed("memory", share / 20) for share in range(21)]
    assert speeds == sorted(speeds)
    assert table.source == f"measured on {cores} threads"


def test_a_device_that_is_not_there():
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="no CUDA device"):
            measure("cuda")
