"""What a record says of where it was measured: processor, instructions in use, threads, commit."""

import datetime
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Best first: what decides which of the kernels' ways a processor takes.
SWITCHES = ("ANABRANCH_NO_KERNELS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")


def here(threads: int | None = None) -> dict[str, Any]:
    """Fields of a record, with the day in UTC. ``threads``: of the contestants, where they have a number in common."""
    cpu, isa = processor()
    count = f"{os.cpu_count()} cores" if threads is None else f"{threads} of {os.cpu_count()} threads"
    return {
        "device": ", ".join(filter(None, (cpu, isa, count))),
        "cpu": cpu,
        "isa": isa,
        "threads": threads,
        "switches": {name: os.environ[name] for name in SWITCHES if name in os.environ},
        "commit": COMMIT,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": told([Path(sys.executable).name, *sys.argv]),
    }


def told(words: Sequence[str]) -> str:
    """A command as a record tells it: of absolute paths the last part, since folders of one's own say nothing to others."""
    return " ".join(re.sub(r"(^|=)[/~]\S*/", r"\1", word) for word in words)


def version_in(python: str, package: str) -> str:
    """Of a package of another environment, by its interpreter; "not known" where that cannot say."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return "not known"
    return done.stdout.strip() if done.returncode == 0 else "not known"


def processor() -> tuple[str, str]:
    """Its name, and the best of `INSTRUCTIONS` that it has; empty where the system does not say. `SWITCHES` may have ruled them out."""
    name, features = platform.processor() or platform.machine(), set()
    information = Path("/proc/cpuinfo")
    if information.exists():
        text = information.read_text(errors="replace")
        fields = dict(re.findall(r"^(model name|flags|Features)\s*: (.*)$", text, re.MULTILINE))
        name = fields.get("model name", name)
        features = set(fields.get("flags", fields.get("Features", "")).split())
    return name, next((feature for feature in INSTRUCTIONS if feature in features), "")


def commit() -> str:
    """The work tree's; "-dirty" behind it where tracked files differ from it, other than records, which runs write and do not measure."""

    def said(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    name = said("describe", "--always", "--abbrev=10", "--exclude=*")
    return (
        f"{name}-dirty"
        if said("status", "--porcelain", "-uno", "--", ":/", ":(exclude,top)benchmarks/results")
        else name
    )


# When a run begins: what is committed meanwhile is not what it measures.
COMMIT = commit()
