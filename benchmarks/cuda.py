"""Everything that needs a GPU, tests and short benchmarks, in one table and under eight minutes: `make test-cuda`.

Each file of tests and each check of `_cuda_checks` runs in a process of its own, so that one which crashes or hangs takes nothing
along. Exit code 0 if all passed, 1 if something failed or there was no time for it, 2 without a GPU.

    python benchmarks/cuda.py --json runs/cuda.json
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as Tree
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 450.0  # of all; eight minutes with what starting takes
TESTS_SECONDS, CHECK_SECONDS = 150.0, 75.0  # of one file, of one check
SAID = 1500  # characters of what a failure said
# What a file, or the conftest.py of its folder, names if it has tests that run on a GPU.
_ON_GPU = re.compile(r"\bDEVICES\b|\bNEEDS_GPU\b|\bmark\.cuda\b")
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Row:
    """A row of the table: ``said`` is what a failure said."""

    check: str
    result: str
    seconds: float
    figure: str
    said: str = ""


@dataclass(frozen=True)
class Job:
    """A process: its row's name, the command, where it leaves its result, how long it may take, and how its end is read."""

    name: str
    command: tuple[str, ...]
    output: Path
    seconds: float
    read: Callable[[int, Path], tuple[str, str, str]]  # (exit code, output) to (result, figure, said)


def files_of_tests(tests: Path) -> list[Path]:
    """Files of tests that may have some for a GPU."""

    def speaks_of_it(path: Path) -> bool:
        return path.is_file() and bool(_ON_GPU.search(path.read_text(encoding="utf-8")))

    found = sorted(tests.rglob("test_*.py"))
    return [
        path
        for path in found
        if speaks_of_it(path) or (path.parent != tests and speaks_of_it(path.parent / "conftest.py"))
    ]


def jobs(scratch: Path, device: str = "cuda") -> list[Job]:
    """Checks first: a minute in, there are figures."""
    from _cuda_checks import CHECKS

    made = [
        Job(
            name,
            (
                sys.executable,
                str(Path(__file__)),
                "--one",
                name,
                "--device",
                device,
                "--json",
                str(scratch / f"{name}.json"),
            ),
            scratch / f"{name}.json",
            CHECK_SECONDS,
            read_check,
        )
        for name in CHECKS
    ]
    for path in files_of_tests(ROOT / "tests"):
        name = str(path.relative_to(ROOT))
        output = scratch / f"{name.replace('/', '.')}.xml"
        options = (
            "-m",
            "cuda",
            "--junitxml",
            str(output),
            "--timeout",
            "60",
            "-p",
            "no:cacheprovider",
            "--durations=0",
        )
        made.append(Job(name, (sys.executable, "-m", "pytest", *options, name), output, TESTS_SECONDS, read_tests))
    return made


def read_check(code: int, output: Path) -> tuple[str, str, str]:
    """Result, figure and words of a check that has ended."""
    if code == 0 and output.exists():
        return PASSED, json.loads(output.read_text(encoding="utf-8"))["figure"], ""
    return FAILED, ended(code), ""


def read_tests(code: int, output: Path) -> tuple[str, str, str]:
    """Result, counts and the failures of a file of tests."""
    if code == 5:  # pytest's for: none of them is for a GPU
        return SKIPPED, "no test for a GPU", ""
    if not output.exists():
        return FAILED, ended(code), ""
    cases = list(Tree.parse(output).getroot().iter("testcase"))
    bad = {case: case.find(kind) for case in cases for kind in ("failure", "error") if case.find(kind) is not None}
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(bad) - skipped
    counts = {PASSED: passed, FAILED: len(bad), SKIPPED: skipped}
    figure = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or ended(code)
    said = "\n".join(
        f"{case.get('name')}: {((found.get('message') if found is not None else '') or '').strip()}"
        for case, found in bad.items()
    )
    if bad or code not in (0, 5):
        return FAILED, figure, said
    return (PASSED if passed else SKIPPED), figure, ""


def ended(code: int) -> str:
    """How a process ended that left no result."""
    return f"killed by signal {-code}" if code < 0 else f"ended with code {code}"


def run(job: Job, left: float) -> Row:
    """Run a job for at most ``left`` seconds."""
    if left < 1:
        return Row(job.name, FAILED, 0.0, "not run: no time left")
    allowed, begin = min(job.seconds, left), time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(
            job.command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", timeout=allowed
        )
    except subprocess.TimeoutExpired as error:
        said = error.stderr or error.stdout or b""
        said = said.decode(errors="replace") if isinstance(said, bytes) else said
        return Row(job.name, FAILED, allowed, f"did not end within {allowed:.0f} s", said[-SAID:])
    result, figure, said = job.read(done.returncode, job.output)
    if result == FAILED and not said:
        said = (done.stderr or done.stdout).strip()
    return Row(job.name, result, time.monotonic() - begin, figure, said[-SAID:])


def summary(rows: Sequence[Row], device: str) -> str:
    """The last line."""
    counts = {name: sum(row.result == name for row in rows) for name in (PASSED, FAILED, SKIPPED)}
    listed = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{listed or 'nothing to run'} in {sum(row.seconds for row in rows):.0f} s on {device}"


def show(rows: Sequence[Row], device: str) -> None:
    """The table, what failed, and a line that sums up."""
    from anabranch.cli.output import table, visible

    cells = [[row.check, row.result, row.figure, f"{row.seconds:.1f} s"] for row in rows]
    table(["check", "result", "figure", "time"], cells, text_columns=3)
    for row in rows:
        if row.result == FAILED and row.said:
            print(f"\n{row.check}:\n{visible(row.said)}")
    print(f"\n{summary(rows, device)}")


def all_of(wanted: Sequence[Job], total: float = TOTAL_SECONDS) -> list[Row]:
    """Run one after the other, each telling on stderr when it is done; files without a test for a GPU leave no row."""
    rows, begin = [], time.monotonic()
    for job in wanted:
        row = run(job, total - (time.monotonic() - begin))
        print(f"{row.check}: {row.result} in {row.seconds:.1f} s, {row.figure}", file=sys.stderr, flush=True)
        if row.figure != "no test for a GPU":
            rows.append(row)
    return rows


def no_gpu() -> str | None:
    """Why nothing can run here; None where it can."""
    from anabranch.cli.doctor import examine

    found = examine()["gpu"]
    return None if found["usable"] else found["reason"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name contains this")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)  # a check, in the process that is its own
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        from _cuda_checks import CHECKS

        options.json.write_text(json.dumps({"figure": CHECKS[options.one](options.device)}), encoding="utf-8")
        return 0
    reason = no_gpu() if options.device == "cuda" else None
    if reason is not None:
        print(f"nothing was run: {reason}", file=sys.stderr)
        return 2
    import torch

    from anabranch import native

    native.load()  # the CPU is what results are held against: its kernels are compiled before anything is timed
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    with tempfile.TemporaryDirectory() as scratch:
        rows = all_of([job for job in jobs(Path(scratch), options.device) if options.only in job.name])
    show(rows, name)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"device": name, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return 1 if not rows or any(row.result == FAILED for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
