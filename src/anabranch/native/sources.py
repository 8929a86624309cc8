"""The kernels' source files, how they are compiled, and what a compiled library of them is called."""

import hashlib
import platform
from pathlib import Path

from anabranch.native.isa import NATIVE, Isa, processor_features

__all__ = ["FLAGS", "HERE", "SOURCES", "flags_for", "library_name"]

HERE = Path(__file__).parent.parent / "nn" / "kernels"  # beside the Python that calls them
SOURCES = tuple(sorted(HERE.glob("*.cpp")))
# -O3 without -ffast-math: sums keep their order, NaN and infinities their meaning.
FLAGS = ("-std=gnu++17", "-O3", "-fopenmp", "-fPIC")


def flags_for(isa: Isa) -> tuple[str, ...]:
    """What a compiler is given for kernels of ``isa``."""
    return (*FLAGS, *isa.flags)


def library_name(isa: Isa) -> str:
    """``kernels-ISA-HASH.so``: of the sources, the flags and, for `NATIVE`, this processor's features.

    The compiler is no part of it: libraries of any two compute the same, and where one lies none may be installed.
    """
    parts = [path.read_bytes() for path in sorted([*SOURCES, *HERE.glob("*.h")])]
    parts += [word.encode() for word in (*flags_for(isa), platform.system(), platform.machine())]
    if isa == NATIVE:
        parts += [name.encode() for name in sorted(processor_features() or {platform.processor()})]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()
    return f"kernels-{isa.name}-{digest[:24]}.so"
