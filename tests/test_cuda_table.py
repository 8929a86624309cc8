"""The table of ``make test-cuda``: what passes, fails, hangs, crashes or finds nothing, told the same without a GPU."""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
JUNIT = """<testsuites><testsuite>
<testcase name="test_a[cuda]"/><testcase name="test_b[cuda]"><failure message="AssertionError: 3 is not 4">trace</failure></testcase>
<testcase name="test_c[cuda]"><skipped message="no second GPU"/></testcase>
<testcase name="test_d[cuda]"><error message="CUDA error: an illegal memory access"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return load("cuda")


def load(name, folder=ROOT / "benchmarks"):
    spec = importlib.util.spec_from_file_location(f"table_{name}", folder / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def job(cuda, tmp_path):
    """A job that runs some Python and is read as a check."""

    def make(code, name="one", seconds=20.0, read=None):
        output = tmp_path / f"{name}.json"
        code = f"output = {str(output)!r}\n{code}"
        return cuda.Job(name, (sys.executable, "-c", code), output, seconds, read or cuda.read_check)

    return make


def test_a_check_that_passes(cuda, job):
    row = cuda.run(job("open(output, 'w').write('{\"figure\": \"5 GB/s\"}')"), 30)
    assert (row.result, row.figure, row.said) == ("passed", "5 GB/s", "")
    assert row.seconds > 0


def test_a_check_that_fails_tells_why(cuda, job):
    row = cuda.run(job("raise SystemExit('the product differs')"), 30)
    assert (row.result, row.figure, row.said) == ("failed", "ended with code 1", "the product differs")


def test_a_check_without_a_result_has_not_passed(cuda, job):
    assert cuda.run(job("pass"), 30).result == "failed"


def test_a_check_that_crashes(cuda, job):
    row = cuda.run(job("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"), 30)
    assert (row.result, row.figure) == ("failed", f"killed by signal {int(signal.SIGSEGV)}")


@pytest.mark.parametrize(("seconds", "left"), [(1.0, 30), (20.0, 1.0)])
def test_a_check_that_hangs_is_ended(cuda, job, seconds, left):
    row = cuda.run(job("import time; print('busy', flush=True); time.sleep(30)", seconds=seconds), left)
    assert (row.result, row.figure) == ("failed", "did not end within 1 s")


def test_what_there_is_no_time_for_has_failed(cuda, job):
    rows = cuda.all_of([job("open('never', 'w')")], total=0.0)
    assert [(row.result, row.figure) for row in rows] == [("failed", "not run: no time left")]
    assert not Path("never").exists()


def test_a_file_of_tests(cuda, tmp_path):
    output = tmp_path / "junit.xml"
    output.write_text(JUNIT)
    result, figure, said = cuda.read_tests(1, output)
    assert (result, figure) == ("failed", "1 passed, 2 failed, 1 skipped")
    assert said.splitlines() == [
        "test_b[cuda]: AssertionError: 3 is not 4",
        "test_d[cuda]: CUDA error: an illegal memory access",
    ]
    output.write_text('<testsuite><testcase name="a"/><testcase name="b"/></testsuite>')
    assert cuda.read_tests(0, output) == ("passed", "2 passed", "")
    output.write_text('<testsuite><testcase name="a"><skipped/></testcase></testsuite>')
    assert cuda.read_tests(0, output) == ("skipped", "1 skipped", "")
    output.write_text("<testsuite/>")
    assert cuda.read_tests(5, output) == ("skipped", "no test for a GPU", "")
    assert cuda.read_tests(2, output)[:2] == ("failed", "ended with code 2")
    output.unlink()
    assert cuda.read_tests(-11, output) == ("failed", "killed by signal 11", "")


def test_the_whole_table(cuda, job, monkeypatch, capsys, tmp_path):
    made = [
        job("open(output, 'w').write('{\"figure\": \"1,234 tokens/s\"}')", "decode"),
        job("raise SystemExit('streams differ')", "nanoflow"),
        job("raise SystemExit(5)", "tests/a.py", read=cuda.read_tests),
    ]
    monkeypatch.setattr(cuda, "jobs", lambda scratch, device: made)
    assert cuda.main(["--device", "cpu", "--json", str(tmp_path / "out" / "cuda.json")]) == 1
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "check result figure time"
    assert lines[1].startswith("decode passed 1,234 tokens/s ")
    assert lines[2].startswith("nanoflow failed ended with code 1 ")
    assert lines[3:6] == ["", "nanoflow:", "streams differ"]
    assert lines[-1].startswith("1 passed, 1 failed in ")
    assert "tests/a.py" not in out
    rows = json.loads((tmp_path / "out" / "cuda.json").read_text())["rows"]
    assert [row["result"] for row in rows] == ["passed", "failed"]
    assert cuda.main(["--device", "cpu", "--only", "decode"]) == 0
    assert cuda.main(["--device", "cpu", "--only", "nothing of that name"]) == 1


def test_without_a_gpu_one_line_says_so(cuda, monkeypatch, capsys):
    monkeypatch.setattr(
        "anabranch.cli.doctor.examine", lambda: {"gpu": {"usable": False, "reason": "no NVIDIA GPU found"}}
    )
    monkeypatch.setattr(cuda, "jobs", lambda *arguments: pytest.fail("nothing may run"))
    assert cuda.main([]) == 2
    assert capsys.readouterr() == ("", "nothing was run: no NVIDIA GPU found\n")


def test_every_file_that_speaks_of_a_gpu_is_there(cuda):
    names = {str(path.relative_to(ROOT)) for path in cuda.files_of_tests(ROOT / "tests")}
    assert "tests/serving/nanoflow/test_nanoflow_runtime.py" in names  # a mark
    assert "tests/serving/sampling/test_serving_sampler.py" in names  # DEVICES
    assert "tests/serving/elasticmoe/test_elasticmoe_memory.py" in names  # fixtures of its conftest.py
    assert "tests/test_files.py" not in names


def test_what_runs_on_cuda_is_marked():
    hook = load("conftest", ROOT / "tests").pytest_collection_modifyitems
    marked = []

    def item(name, **parameters):
        return SimpleNamespace(
            nodeid=name,
            callspec=SimpleNamespace(params=parameters),
            add_marker=lambda mark: marked.append((name, mark.name)),
        )

    plain = SimpleNamespace(nodeid="d")
    hook([item("a", device="cuda"), item("b", device="cpu"), item("c", text="cuda:77"), plain])
    assert marked == [("a", "cuda")]


@pytest.mark.slow
@pytest.mark.parametrize("name", "matmul moe_layer train decode expertflow elasticmoe nanoflow graphs".split())
def test_checks_pass_on_a_cpu(cuda, name, tmp_path, monkeypatch):
    """All but their speed, and what is made for GPUs alone."""
    monkeypatch.setenv("ANABRANCH_CACHE", os.environ.get("ANABRANCH_CACHE", str(tmp_path)))
    checks = load("_cuda_checks").CHECKS
    assert set(checks) == {"matmul", "moe_layer", "train", "decode", "expertflow", "elasticmoe", "nanoflow", "graphs"}
    assert checks[name]("cpu")


def test_a_check_that_finds_something_wrong_says_so(cuda):
    import torch

    checks = load("_cuda_checks")
    x = torch.ones(3, 4)
    checks._close("y", x, x * (1 + 1e-5), 1e-3)
    with pytest.raises(checks.WrongError, match=r"y differs by 1\.0e\+00, more than 1e-03"):
        checks._close("y", 2 * x, x, 1e-3)
    with pytest.raises(checks.WrongError, match="y is not finite"):
        checks._close("y", x / 0, x, 1e-3)
