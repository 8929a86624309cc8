"""The compiled CPU kernels as a library: which processor they are for, where one lies, how one is built. Knows no torch.

`anabranch.nn.kernels` says what the functions of the library take. A library is named after its sources, its flags and the
instructions it uses, and never after the compiler: where one lies, none is needed.
"""

from anabranch.native.builder import build, compile_kernels
from anabranch.native.compiler import Compiler, find_compiler
from anabranch.native.isa import LEVELS, NATIVE, Isa, best_level, processor_features
from anabranch.native.loader import Status, is_switched_off, load, status
from anabranch.native.stored import SHIPPED, Library, find, opened

__all__ = [
    "LEVELS",
    "NATIVE",
    "SHIPPED",
    "Compiler",
    "Isa",
    "Library",
    "Status",
    "best_level",
    "build",
    "compile_kernels",
    "find",
    "find_compiler",
    "is_switched_off",
    "load",
    "opened",
    "processor_features",
    "status",
]
