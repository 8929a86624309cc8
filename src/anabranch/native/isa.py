"""Instruction sets: what this processor has, and which compiled kernels run on it."""

import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["LEVELS", "NATIVE", "Isa", "best_level", "processor_features"]


@dataclass(frozen=True)
class Isa:
    """An instruction set that kernels are compiled for.

    Attributes:
        name: part of a library's name.
        flags: that make a compiler use it.
        machine: the family of processors, as `platform.machine` calls it; empty for this very machine.
        needs: features that a processor must have, as Linux calls them.
    """

    name: str
    flags: tuple[str, ...]
    machine: str = ""
    needs: frozenset[str] = frozenset()

    def runs_here(self) -> bool:
        """Whether this processor has what is needed."""
        return self.machine in ("", platform.machine()) and self.needs <= processor_features()


# What this machine has, to the last instruction: for libraries that are built where they run.
NATIVE = Isa("native", ("-march=native",))

_V3 = frozenset("avx avx2 bmi1 bmi2 f16c fma abm movbe".split())
_V4 = _V3 | frozenset("avx512f avx512bw avx512cd avx512dq avx512vl".split())
# What a wheel carries, best first.
LEVELS = (
    Isa(
        "x86-64-v4-amx",
        ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16"),
        "x86_64",
        _V4 | {"avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16"},
    ),
    Isa(
        "x86-64-v4-bf16",
        ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"),
        "x86_64",
        _V4 | {"avx512_bf16", "avx512_vnni"},
    ),
    Isa("x86-64-v4", ("-march=x86-64-v4",), "x86_64", _V4),
    Isa("x86-64-v3", ("-march=x86-64-v3",), "x86_64", _V3),
    Isa("x86-64", ("-march=x86-64",), "x86_64"),
    Isa("armv8-a", ("-march=armv8-a",), "aarch64"),
    Isa("armv8-a", ("-march=armv8-a",), "arm64"),
)

# Names of features that a compiler uses of its own accord; the rest (power, virtual machines, mended flaws) change with the kernel
# of a system and must not make a library useless.
_USED = re.compile(
    r"s?sse.*|pni|avx.*|amx.*|fma.*|f16c|bmi.|abm|movbe|popcnt|gfni|adx|cx16|lahf_lm|sha.*|v?aes|v?pclmulqdq|apx.*"
)


@cache
def processor_features() -> frozenset[str]:
    """The instructions of this processor that compiled code may use, as Linux calls them; empty where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return frozenset()
    found = re.search(r"^(flags|Features)\s*:(.*)$", text, re.MULTILINE)
    if found is None:
        return frozenset()
    return frozenset(name for name in found[2].split() if found[1] == "Features" or _USED.fullmatch(name))


def best_level() -> Isa | None:
    """The best of `LEVELS` that this processor has; None for a family of processors that is not among them."""
    return next((isa for isa in LEVELS if isa.runs_here()), None)
