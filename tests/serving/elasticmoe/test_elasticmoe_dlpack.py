"""Tensors over memory of others."""

import ctypes
import gc
import mmap
import os

import pytest
import torch

from anabranch.serving.elasticmoe.backend import CPU, CUDA
from anabranch.serving.elasticmoe.dlpack import tensor_over


def test_a_tensor_is_the_memory():
    memory = (ctypes.c_ubyte * 16)(*range(16))
    tensor = tensor_over(ctypes.addressof(memory), 16, (CPU, 0))
    assert (tensor.dtype, tensor.shape, tensor.device.type) == (torch.uint8, (16,), "cpu")
    assert tensor.data_ptr() == ctypes.addressof(memory)
    assert tensor.tolist() == list(range(16))
    memory[3] = 99
    assert tensor[3] == 99
    tensor[4] = 7
    assert memory[4] == 7
    assert tensor[8:].view(torch.int32).tolist() == [0x0B0A0908, 0x0F0E0D0C]


def test_views_outlive_the_tensor_and_nothing_is_freed():
    memory = (ctypes.c_ubyte * 64)(*range(64))
    view = tensor_over(ctypes.addressof(memory), 64, (CPU, 0))[10:20]
    gc.collect()
    assert view.tolist() == list(range(10, 20))
    del view
    gc.collect()
    assert list(memory) == list(range(64))


def test_of_no_bytes():
    assert tensor_over(0, 0, (CPU, 0)).shape == (0,)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc")
def test_descriptions_are_given_back():
    memory = (ctypes.c_ubyte * 8)()
    for turn in range(2):  # the first takes what is taken once
        before = resident_bytes()
        for _ in range(50_000):  # 100 bytes each
            tensor_over(ctypes.addressof(memory), 8, (CPU, 0))
        assert turn == 0 or resident_bytes() - before < 2_000_000


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_of_a_gpu_where_torch_has_none():
    with pytest.raises((RuntimeError, AssertionError)):
        tensor_over(1 << 40, 8, (CUDA, 0))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_of_a_gpu():
    memory = torch.arange(16, dtype=torch.uint8, device="cuda")
    tensor = tensor_over(memory.data_ptr(), 16, (CUDA, memory.device.index))
    assert tensor.device == memory.device
    memory[3] = 99
    assert tensor.tolist() == memory.tolist()
