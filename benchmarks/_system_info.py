"""What instructions a peer computes with, as it says itself."""

import re
import subprocess
from pathlib import Path

# Of somebody's machine.
_PATHS = re.compile(r"(?<![\w.])(?:~|/[\w.+-]+)/[\w./+-]+")


def system_info(text: str) -> str:
    """The line that llama.cpp and its kin print of the processor's features in use; empty where a text has none."""
    found = re.search(r"system_info:\s*(.+)", text)
    return " ".join(found.group(1).split()) if found else ""


def llama_instructions(program: str) -> str:
    """What llama-server computes with. It says so before it looks for its model, and only to who asks for more than it usually tells."""
    command = [program, "-m", "none.gguf", "--port", "0", "-lv", "4"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, check=False)
    return system_info(done.stdout + done.stderr)


def vllm_instructions(log: str) -> list[str]:
    """Lines of vLLM's log that name the instructions, the threads it is bound to, or its allocator."""
    kept = re.compile(
        r"AVX|AMX|ISA|instruction|auto thread-binding|OMP threads|tcmalloc|libiomp|enforce_eager|CompilationMode"
        r"|Zen|LD_PRELOAD|not found in",
        re.I,
    )
    lines = [line for line in log.splitlines() if kept.search(line)]
    return [without_paths(line)[-400:] for line in lines[:20]]


def last_error(log: Path) -> str:
    """The last line of a log that tells of an error, without paths; empty where none does."""
    return last_error_told(log.read_text(errors="replace")) if log.exists() else ""


def last_error_told(text: str) -> str:
    """`last_error` of a log's text."""
    lines = [line for line in text.splitlines() if re.search(r"error[: ]", line, re.I)]
    return without_paths(lines[-1])[-300:].strip() if lines else ""


def without_paths(text: str) -> str:
    """``text`` with PATH in the place of each absolute path."""
    return _PATHS.sub("PATH", text)
