"""GCC and clang both compile the kernels, whole, and what they make computes the same."""

import ctypes
import shutil

import pytest
import torch
import torch.nn.functional as F

from anabranch.native.compiler import Compiler
from anabranch.native.isa import NATIVE
from anabranch.native.sources import SOURCES, flags_for
from anabranch.nn.expert_call import ExpertCall
from anabranch.nn.kernels import attention, expert_mlp, packed, rows
from anabranch.nn.kernels.binding import KERNELS, Library
from anabranch.nn.packed import KINDS, Packed


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", ["g++", "clang++"])
def test_a_compiler_makes_kernels_that_compute(command, tmp_path, monkeypatch):
    if shutil.which(command) is None:
        pytest.skip(f"{command} is not installed here: what it makes of the kernels is not tried")
    target = tmp_path / "kernels.so"
    flags = [flag for flag in flags_for(NATIVE) if flag != "-O3"]
    Compiler((command,), "").make_library(
        SOURCES, [*flags, "-O1", "-Wall", "-Werror", "-Wno-psabi", "-Wno-unused-function"], target
    )
    library = Library(ctypes.CDLL(str(target)))
    for kernel in KERNELS.values():  # all of them are there
        monkeypatch.setattr(kernel, "_call", kernel.bound_to(library))
    x, weight = torch.randn(21, 64), torch.randn(64)
    _, y, scale = rows.norm(x, weight, 1e-5, keep=True)
    assert torch.allclose(y, F.rms_norm(x, (64,), weight, 1e-5), atol=1e-5)
    assert rows.norm_gradients(x, x, weight, scale)[0].isfinite().all()
    for kind in KINDS:
        matrix = Packed.pack(torch.randn(40, 64), kind)
        assert torch.allclose(packed.linear(matrix, x), x @ matrix.unpack()[0].T, atol=0.5)
    query = torch.randn(1, 2, 21, 64)
    wanted = F.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert torch.allclose(attention.forward(query, query, query)[0], wanted, atol=1e-5)
    w13, w2 = torch.randn(1, 64, 64), torch.randn(1, 64, 32)
    gate, up = (x @ w13[0].T).chunk(2, -1)
    operands = (torch.arange(21), torch.tensor([21], dtype=torch.int32), torch.ones(21, 1), w13, w2)
    found, _ = expert_mlp.forward(ExpertCall(x, *operands, False, torch.float32, "native", "swiglu"), False)
    assert torch.allclose(found, (F.silu(gate) * up) @ w2[0].T, rtol=1e-4, atol=1e-2)
