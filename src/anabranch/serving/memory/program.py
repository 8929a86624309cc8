"""What an engine's processes take before there is a model: measured in one that has loaded the same code and the model's tokenizer.

``python -m anabranch.serving.memory.program MODEL`` prints three numbers of bytes: of a front end, of an engine, and of all helpers, the
processes that try out grammars and render chat templates. They are kept in the cache for this environment and tokenizer, so that a plan is
the same from run to run; what is measured is not, to a few MiB.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import anabranch
from anabranch.errors import AnabranchError, BackendError, DataError
from anabranch.files import atomic_write_text, parse_json
from anabranch.places import cache_folder, make_cache
from anabranch.sandbox import Refused, Sandbox, SandboxError, Work

__all__ = ["peak_bytes", "program_bytes"]

# By which what is measured may differ from what is served with, and to what is rounded up then.
MARGIN = 16 << 20
STEP = 16 << 20
TIMEOUT_S = 300.0
# Of a helper where the system does not tell.
HELPER = 32 << 20
SCHEMA = (
    '{"type":"object","properties":{"name":{"type":"string"},"number":{"type":"integer"}},"required":["name","number"]}'
)
# Of which a program that serves loads something: in both processes, in helpers, and for a tokenizer out of a GGUF file.
PACKAGES = (
    "aiohttp",
    "numpy",
    "prometheus-client",
    "pyarrow",
    "pydantic",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "typer",
    "uvloop",
    "jinja2",
    "llguidance",
    "gguf",
)
# Variables that change what processes load or how many threads have memory of their own.
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX", "LD_PRELOAD", "PYTHONPATH")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def program_bytes(model: str, *, processes: int) -> int:
    """Memory of a program that serves ``model`` without its weights, as the system counts it for each process: code in files too.

    Args:
        model: a path; its tokenizer is read.
        processes: 2 for a front end and an engine of its own, with the helpers of a server; 1 for both in one, without.

    Raises BackendError where the process that is measured cannot run.
    """
    front, engine, helpers = _kept(model) or _measured(model)
    taken = MARGIN + (engine if processes == 1 else front + engine + helpers)
    return -(-taken // STEP) * STEP


def _measured(model: str) -> tuple[int, int, int]:
    """Of a front end, an engine and all helpers; kept for the next time."""
    command = [sys.executable, "-m", "anabranch.serving.memory.program", model]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, check=False
        )
        front, engine, helpers = map(int, done.stdout.split()[-3:])
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"the memory of the program cannot be measured: {error}") from error
    # Where nothing can be written it is measured again.
    with contextlib.suppress(DataError, OSError):
        place = _place(model)
        make_cache(place.parent)
        atomic_write_text(place, json.dumps([front, engine, helpers]))
    return front, engine, helpers


def _kept(model: str) -> tuple[int, int, int] | None:
    """What was measured before with the same code and tokenizer; None if nothing was, or what is there is no such thing."""
    try:
        found = parse_json(_place(model).read_text(encoding="utf-8"))
    except (DataError, OSError, ValueError):
        return None
    if not isinstance(found, list) or len(found) != 3 or not all(type(one) is int and one >= 0 for one in found):
        return None
    return found[0], found[1], found[2]


def _place(model: str) -> Path:
    """The file of what is measured: named by all that it depends on."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(version(package))
        except PackageNotFoundError:
            versions.append("")
    code = Path(anabranch.__file__).parent
    files = [(str(path.relative_to(code)), path.stat().st_mtime_ns) for path in sorted(code.rglob("*.py"))]
    about = [
        anabranch.__version__,
        sys.version,
        platform.system(),
        platform.release(),
        platform.machine(),
        os.cpu_count(),
        sys.executable,
        str(code),
        versions,
        files,
        [os.environ.get(name) for name in _VARIABLES],
        _tokenizer_files(model),
    ]
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    return cache_folder() / "program" / f"{name}.json"


def _tokenizer_files(model: str) -> list[tuple[str, int, int]]:
    """(path, size, nanosecond of the last change) of what a tokenizer may be read from; empty where there is no such model."""
    from anabranch.lm.checkpoint import find_model

    try:
        found = find_model(model)
    except AnabranchError:
        return []
    entries = [found] if found.is_file() else sorted(found.glob("*"))
    files = [path for path in entries if path.is_file() and path.suffix not in _WEIGHTS]
    return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def peak_bytes(process: int | None = None) -> int | None:
    """The most memory that this process, or that of a number, has had at a time; None where the system does not tell of another."""
    try:
        status = Path("/proc", "self" if process is None else str(process), "status").read_text()
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) << 10
    if process is not None:
        return None
    # In KiB but on macOS; what a parent had before counts here.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def helper_bytes() -> int:
    """Of all processes that a server may have to try out grammars and to render chat templates, each after a usual request."""
    from anabranch.data import templates
    from anabranch.serving.grammar import trial

    grammar = {"grammar": json.dumps({"grammars": [{"json_schema": json.loads(SCHEMA)}]})}
    values = {"messages": [{"role": "user", "content": "hello " * 100}]}
    template = {
        "template": "{% for one in messages %}{{ one.role }}: {{ one.content }}\n{% endfor %}",
        "values": values,
    }
    return sum(_helpers(work, request) for work, request in ((trial.WORK, grammar), (templates.WORK, template)))


def _helpers(work: Work, request: dict) -> int:
    sandbox = Sandbox(work)
    try:
        sandbox.ask("", request)
        process = next(worker.process for worker in sandbox.workers if worker.process is not None)
        return len(sandbox.workers) * (peak_bytes(process.pid) or HELPER)
    except (AnabranchError, Refused, SandboxError):
        # Without the package that they need there are none.
        return 0
    finally:
        sandbox.close()


def load_code() -> None:
    """Load what both processes load."""
    # The first two are for command lines.
    import rich.table  # noqa: F401
    import typer  # noqa: F401

    import anabranch.serving.engine.worker
    import anabranch.serving.expertflow
    import anabranch.serving.http.run
    import anabranch.serving.load  # noqa: F401

    # There is none for Windows.
    with contextlib.suppress(ImportError):
        import uvloop  # noqa: F401


def main(model: str) -> None:
    """Load what both processes load, and tell what that took."""
    load_code()
    import torch

    from anabranch.nn.kernels import load
    from anabranch.serving.http.serve import read_tokenizer
    from anabranch.serving.sampling import Sampler

    try:
        tokenizer = read_tokenizer(model)
        tokenizer.encode("as whoever serves it will")
    except AnabranchError:
        tokenizer = None
    front = peak_bytes()
    load()
    torch.ones(64, 64) @ torch.ones(64, 64)
    sampler = Sampler(257 if tokenizer is None else tokenizer.vocab_size, tokenizer=tokenizer)
    sampler.warm_up()
    sampler.close()
    print(front, peak_bytes(), helper_bytes())


if __name__ == "__main__":
    main(sys.argv[1])
