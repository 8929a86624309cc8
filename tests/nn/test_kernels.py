"""The kernels under a model: built once by any number of processes, and never required (see tests/native)."""

import os
import subprocess
import sys
import textwrap

import pytest

from anabranch.nn import kernels

SMALL = textwrap.dedent(
    """
    import logging, torch
    logging.basicConfig(level=logging.WARNING)
    from anabranch.nn.kernels import load
    from anabranch.nn.pool import ExpertPool
    from anabranch.routing.decision import Routing
    g = torch.Generator().manual_seed(0)
    pool = ExpertPool(4, 16, 16, generator=g)
    x, index = torch.randn(5, 16, generator=g), torch.tensor([[0], [1], [2], [0], [1]])
    y = pool(x, Routing(index, torch.ones(5, 1), torch.zeros(5, 4)))
    y.sum().backward()
    print(load() is not None, f"{y.double().sum().item():.9f} {pool.w13.grad.double().abs().sum().item():.6f}")
    """
)


def run(cache, **environment):
    environment = {**os.environ, "ANABRANCH_CACHE": str(cache), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, "-c", SMALL], env=environment, stdout=-1, stderr=-1, text=True)


def finish(process):
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    compiled, _, numbers = out.strip().partition(" ")
    return compiled == "True", [float(number) for number in numbers.split()], err


@pytest.mark.skipif(kernels.load() is None, reason="no compiled kernels on this machine")
@pytest.mark.slow
def test_racing_processes_build_one_library_and_all_agree(tmp_path):
    racers = [finish(process) for process in [run(tmp_path), run(tmp_path)]]
    plain = finish(run(tmp_path, ANABRANCH_NO_KERNELS="1"))
    assert [compiled for compiled, *_ in [*racers, plain]] == [True, True, False]
    assert racers[0][1] == racers[1][1] == pytest.approx(plain[1], rel=1e-4)
    assert sum("compiling the CPU kernels" in err for _, _, err in racers) == 1
    assert sorted(file.suffix for file in (tmp_path / "kernels").iterdir()) == [".json", ".so"]


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/nowhere/c++", "cannot run the C++ compiler '/nowhere/c++'"),
        ("false", "false could not compile the kernels"),
    ],
)
def test_without_a_working_compiler_everything_still_runs(tmp_path, compiler, reason):
    compiled, numbers, err = finish(run(tmp_path, CXX=compiler))
    assert not compiled
    assert numbers[1] > 0
    assert f"running in plain PyTorch: {reason}" in err
    assert not list(tmp_path.rglob("*.so"))
