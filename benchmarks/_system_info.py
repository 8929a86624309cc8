"""What instructions a peer computes with, as it says itself."""

import re
from pathlib import Path

# Of somebody's machine.
_PATHS = re.compile(r"(?<![\w.])(?:~|/[\w.+-]+)/[\w./+-]+")


def system_info(log: Path) -> str:
    """The line that llama.cpp and its kin print of the processor's features in use; empty where a log has none."""
    if not log.exists():
        return ""
    text = log.read_text(errors="replace")
    found = re.search(r"system_info:\s*(.+)|^((?:AVX|SSE3|NEON)\S* = \d.*)$", text, re.MULTILINE)
    return " ".join((found.group(1) or found.group(2)).split()) if found else ""


def vllm_instructions(log: str) -> list[str]:
    """Lines of vLLM's log that name the instructions, the threads it is bound to, or its allocator."""
    kept = re.compile(
        r"AVX|AMX|ISA|instruction|auto thread-binding|OMP threads|tcmalloc|libiomp|enforce_eager|CompilationMode", re.I
    )
    lines = [line for line in log.splitlines() if kept.search(line)]
    return [_PATHS.sub("PATH", line)[-400:] for line in lines[:20]]


def last_error(log: Path) -> str:
    """The last line of a log that tells of an error, without paths; empty where none does."""
    if not log.exists():
        return ""
    lines = [line for line in log.read_text(errors="replace").splitlines() if re.search(r"error[: ]", line, re.I)]
    return _PATHS.sub("PATH", lines[-1])[-300:].strip() if lines else ""
