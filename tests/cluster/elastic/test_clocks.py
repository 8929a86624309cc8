"""Clocks that follow a plan: a simulated one, NVML's by a library that tests make, and ranks of a training."""

import ctypes
import logging
import threading

import pytest
import torch
from torch import nn

from anabranch.cluster.elastic import Coordinator, ElasticTrainer, NvmlFrequency, Policy, SimulatedFrequency
from anabranch.cluster.elastic.clocks import CLOCKS, ClockError, StageClock, frequency_control
from anabranch.errors import ConfigError
from waiting import until

CLOCKS_MHZ = (1980, 1965, 1200, 345)


class Library:
    """NVML as far as it is called: one GPU, whose calls are kept.

    ``refuses``: by name, what a function gives instead of 0.
    """

    def __init__(self, **refuses):
        self.refuses, self.calls, self.locked = refuses, [], None

    def __getattr__(self, name):
        if self.refuses.get(name) == "missing" or not name.startswith("nvml"):
            raise AttributeError(name)

        def call(*given):
            self.calls.append(name)
            code = self.refuses.get(name, 0)
            return code if code else getattr(self, f"_{name.removeprefix('nvml')}")(*given)

        return call

    def _Init_v2(self):
        return 0

    def _DeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = 7
        return 0 if index.value < 2 else 2

    def _DeviceGetHandleByUUID(self, name, handle):
        handle._obj.value = 7
        return 0 if name.value == b"GPU-a1" else 6

    def _DeviceGetMaxClockInfo(self, handle, kind, found):
        found._obj.value = CLOCKS_MHZ[0]
        return 0

    def _DeviceGetDefaultApplicationsClock(self, handle, kind, found):
        found._obj.value = 1200
        return 0

    def _DeviceGetClockInfo(self, handle, kind, found):
        found._obj.value = self.locked or 1500
        return 0

    def _DeviceGetSupportedMemoryClocks(self, handle, count, found):
        count._obj.value, found[0], found[1] = 2, 810, 2619
        return 0

    def _DeviceGetSupportedGraphicsClocks(self, handle, memory, count, found):
        assert memory.value == 2619
        count._obj.value = len(CLOCKS_MHZ)
        for place, clock in enumerate(CLOCKS_MHZ):
            found[place] = clock
        return 0

    def _DeviceSetGpuLockedClocks(self, handle, least, most):
        assert isinstance(handle, ctypes.c_void_p)
        assert handle.value == 7
        assert least.value == most.value
        self.locked = least.value
        return 0

    def _DeviceResetGpuLockedClocks(self, handle):
        self.locked = None
        return 0


def test_a_simulated_clock_keeps_what_is_set_and_takes_what_it_can():
    clock = SimulatedFrequency(usual=1000, least=600, most=1300)
    assert (clock.get(), clock.range(), clock.sets) == (1000, (600, 1300), False)
    clock.set(1300)
    assert clock.get() == 1300
    with pytest.raises(ClockError, match="1301 MHz is not within 600 to 1300"):
        clock.set(1301)
    clock.reset()
    assert clock.get() == 1000
    with pytest.raises(ConfigError, match="2000 MHz is not within 500 to 1500"):
        SimulatedFrequency(usual=2000)


def test_nvml_is_read_and_sets_nothing_unless_told_to():
    library = Library()
    clock = NvmlFrequency(library=library)
    assert (clock.usual, clock.range(), clock.get(), clock.sets) == (1200, (345, 1980), 1500, False)
    clock.set(1400)
    assert (clock.wanted, library.locked) == (1400, None)
    clock.reset()
    assert clock.wanted is None
    assert not {"nvmlDeviceSetGpuLockedClocks", "nvmlDeviceResetGpuLockedClocks"} & set(library.calls)


def test_nvml_that_is_told_to_sets_and_takes_back():
    library = Library()
    library.locked = 345
    clock = NvmlFrequency(library=library, sets=True)
    # What a process that was killed has left.
    assert library.locked is None
    clock.set(1400.4)
    assert (library.locked, clock.get()) == (1400, 1400)
    clock.reset()
    assert library.locked is None


def test_a_gpu_without_an_own_clock_runs_at_its_most():
    assert NvmlFrequency(library=Library(nvmlDeviceGetDefaultApplicationsClock=3)).usual == 1980


@pytest.mark.parametrize(
    ("refuses", "sets", "said"),
    [
        ({"nvmlInit_v2": 9}, False, "the clock of GPU 0 cannot be read: nvmlInit_v2 gave 9"),
        ({"nvmlDeviceGetMaxClockInfo": "missing"}, False, "this driver has no nvmlDeviceGetMaxClockInfo"),
        ({"nvmlDeviceResetGpuLockedClocks": 4}, True, "cannot be set: root alone may set it"),
    ],
)
def test_a_device_that_cannot_is_told_early(refuses, sets, said):
    with pytest.raises(ConfigError, match=said):
        NvmlFrequency(library=Library(**refuses), sets=sets)


def test_a_gpu_is_that_of_cuda(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, GPU-a1,GPU-b2")
    NvmlFrequency(0, library=Library())
    NvmlFrequency(1, library=Library())
    with pytest.raises(ConfigError, match="nvmlDeviceGetHandleByUUID gave 6"):
        NvmlFrequency(2, library=Library())
    with pytest.raises(ConfigError, match="there is no GPU 3"):
        NvmlFrequency(3, library=Library())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(ConfigError, match="nvmlDeviceGetHandleByIndex_v2 gave 2"):
        NvmlFrequency(5, library=Library())


def test_a_stage_s_clock_follows_as_far_as_the_device_goes():
    control = SimulatedFrequency(usual=1000, least=600, most=1300, sets=True)
    clock = StageClock(control)
    clock.follow(1.2)
    assert (control.get(), clock.factor) == (1200, 1.2)
    clock.follow(2.0)
    assert (control.get(), clock.factor) == (1300, 1.3)
    clock.follow(0.1)
    assert (control.get(), clock.factor) == (600, 0.6)
    assert clock.to_dict() == {
        "mhz": 600,
        "usual_mhz": 1000,
        "least_mhz": 600,
        "most_mhz": 1300,
        "wanted": 0.1,
        "factor": 0.6,
        "sets": True,
    }
    clock.release()
    assert (control.get(), clock.factor) == (1000, 1.0)


def test_a_clock_that_sets_nothing_makes_nothing_faster():
    clock = StageClock(SimulatedFrequency())
    clock.follow(1.2)
    assert (clock.control.get(), clock.factor) == (1200, 1.0)
    nothing = StageClock(None)
    nothing.follow(1.2)
    assert (nothing.to_dict(), nothing.factor) == (None, 1.0)


def test_a_device_that_takes_no_clock_any_more_ends_no_training(caplog):
    library = Library()
    clock = StageClock(NvmlFrequency(library=library, sets=True))
    clock.follow(1.1)
    assert (library.locked, clock.factor) == (1320, 1.1)
    library.refuses["nvmlDeviceSetGpuLockedClocks"] = 15
    with caplog.at_level(logging.WARNING):
        clock.follow(1.2)
        clock.follow(1.3)
    # Other tests may have had more told.
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "the clock stays as it is: nvmlDeviceSetGpuLockedClocks gave 15"
    ]
    assert clock.factor == 1.1
    library.refuses["nvmlDeviceGetClockInfo"] = 15
    assert clock.to_dict()["mhz"] is None


def test_names_of_clocks(monkeypatch):
    assert frequency_control("none") is None
    assert isinstance(frequency_control("simulated"), SimulatedFrequency)
    monkeypatch.setattr("anabranch.cluster.elastic.clocks._LIBRARY", "libno-such-library.so.1")
    for name in ("nvml", "nvml-set"):
        with pytest.raises(ConfigError, match="needs NVIDIA's driver, and libno-such"):
            frequency_control(name)
    with pytest.raises(ConfigError, match=r"clock is 'nvidia'; use one of none, simulated, nvml, nvml-set"):
        frequency_control("nvidia")
    assert len(CLOCKS) == 4


def test_ranks_of_the_slowest_stage_run_faster_and_leave_their_clock_as_it_was():
    """Two stages of one rank; the first layer takes thrice as long, and stays where it is: its rank is to run as fast as it may."""
    clocks, told, over = [SimulatedFrequency(), SimulatedFrequency()], {}, threading.Barrier(2)

    def train(number, host):
        layers = [nn.Linear(2, 2), nn.Linear(2, 1)]
        for layer in layers:
            for parameter in layer.parameters():
                nn.init.constant_(parameter, 0.5)
        made = ElasticTrainer(
            layers,
            global_batch=2,
            optimizer_factory=torch.optim.SGD,
            loss=nn.functional.mse_loss,
            coordinator=host.address,
            wish=number,
            clock=clocks[number],
        )
        with made as rank:
            rank.step((torch.ones(2, 2), torch.zeros(2, 1)))
            told[number] = rank.status()["clock"]
            over.wait(60)

    policy = Policy(max_frequency=1.25, power_save=True, min_frequency=0.5)
    with Coordinator(replicas=1, stages=2, layer_costs=[3.0, 1.0], policy=policy) as host:
        threads = [threading.Thread(target=train, args=(number, host)) for number in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: not any(thread.is_alive() for thread in threads))
    # The first at a quarter more; the second, which still waits for it, at the least.
    assert [told[number]["mhz"] for number in range(2)] == [1250, 500]
    assert [clock.get() for clock in clocks] == [1000, 1000]
