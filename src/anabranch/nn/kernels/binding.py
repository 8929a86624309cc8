"""The one binding of the compiled kernels: a kernel is called by its declared signature, and by nothing else.

A `Kernel` is declared once, beside the function that calls it, by the parameters of its C function in their order:

    NORM = Kernel(
        "anabranch_norm_forward",
        "types, x: item[N.., D], weight: float32[D], y: item[N.., D] out, scale: float32[N]? out, N, D, eps: float, threads",
        types={("float32",): 0, ("bfloat16",): 1},
    )
    NORM(x, weight, y, None, 1e-5)

What Python gives are the operands and the numbers (all ``name: kind``), in this order. Sizes, codes of types, strides and the number of
threads follow from them, so they cannot disagree with what they are sizes of. Each operand is looked at before its address is taken:
a plain tensor on the CPU, of this dtype, of this shape, in one piece, of memory that is there. Otherwise InputError says what came and what
is taken. Who has another way asks `takes` before. A kernel for which there is not enough memory raises CapacityError, one that finds an
index out of range InputError.

Operands, ``name: dtype[sizes]`` and after that:

    dtype       one of torch's or a variable, bound by its first operand; ``types`` holds the combinations that there are and their codes
    sizes       symbols, bound by the first operand that has one alone; products such as ``2*F``; numbers; ``N..`` is any number of leading
                sizes whose product is N, of operands that all lie in memory alike and as densely
    ?           None is allowed, a null pointer
    rows        only the last size is in one piece, and the C function is told the other strides (``strides(x, y)``)
    out         written to
    array       a NumPy array
    * C         a sequence of C such tensors, in C a table of addresses

The other parameters: ``int``, ``int64``, ``float``, ``double``, ``handle`` (an address that a kernel gave), the name of a structure's class
in ``structures``, and ``given K``, a size that only Python knows. A number whose name is a capital is a size as well.
"""

import ctypes
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from anabranch.errors import BackendError, CapacityError, InputError
from anabranch.nn.kernels.operands import DTYPES, described
from anabranch.nn.kernels.signature import Operand, written

__all__ = ["KERNELS", "Kernel", "Library"]

# Every one that is declared, by the name of its C function.
KERNELS: "dict[str, Kernel]" = {}

NO_MEMORY: Final = 1  # of failure.h
SCALARS: Final[Mapping[str, Any]] = {
    "int": ctypes.c_int,
    "int64": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "handle": ctypes.c_void_p,
}
RESULTS: Final[Mapping[str, Any]] = {
    "none": None,
    "status": ctypes.c_int,
    "int": ctypes.c_int,
    "int64": ctypes.c_int64,
    "handle": ctypes.c_void_p,
}


class Library:
    """The loaded library, whose functions only the kernels of this module call."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._free = loaded
        # Calls that are over at once: letting go of the interpreter would hand it to whoever waits for it, for much longer.
        self._holding = ctypes.PyDLL(loaded._name)


@dataclass
class Kernel:
    """A C function and what it takes; see above. Calling it raises InputError, CapacityError, or BackendError where there is no library.

    Attributes:
        symbol: the C function.
        signature: its parameters.
        types: codes of the combinations of dtypes, in the order in which variables are bound.
        where: what must hold of the sizes beside.
        structures: classes of the structures in the signature, by name; they are passed by address.
        result: ``none``, ``status`` (0 for success), ``int``, ``int64`` or ``handle``.
        holds_interpreter: do not let go of the interpreter's lock, for calls that are over at once.
    """

    symbol: str
    signature: str
    types: Mapping[tuple[str, ...], int] = field(default_factory=dict)
    where: Sequence[str] = ()
    structures: Mapping[str, Any] = field(default_factory=dict)
    result: str = "none"
    holds_interpreter: bool = False

    def __post_init__(self) -> None:
        parts = re.split(r",\s*(?![^[(]*[\])])", " ".join(self.signature.split()))
        self.parameters = [part for part in parts if part]
        self.operands = [made for part in self.parameters if (made := Operand.of(part)) is not None]
        self.variables = list(dict.fromkeys(one.dtype for one in self.operands if one.dtype not in DTYPES))
        self.name = self.symbol.removeprefix("anabranch_")
        self._call: Callable[..., Any] = self._first
        KERNELS[self.symbol] = self

    def __call__(self, *values: Any) -> Any:
        """See the class."""
        return self._call(*values)

    def bound_to(self, library: Library) -> Callable[..., Any]:
        """The same kernel of another library."""
        source, names = written(self)
        function = getattr(library._holding if self.holds_interpreter else library._free, self.symbol)
        function.argtypes, function.restype = self.c_types(), RESULTS[self.result]
        scope = {**names, "function": function, "refuse": self._refuse, "unfit": self._unfit, "failed": self._failed}
        # As dataclasses are made: the checks, without a loop over them.
        exec(compile(source, f"<{self.symbol}>", "exec"), scope)
        return scope["call"]

    def c_types(self) -> list[Any]:
        """ctypes of the C function's parameters."""
        found: list[Any] = []
        for part in self.parameters:
            kind = part.partition(": ")[2]
            if part.startswith("given "):
                continue
            if part in ("types", "threads"):
                found.append(ctypes.c_int)
            elif kind in SCALARS:
                found.append(SCALARS[kind])
            elif kind in self.structures:
                found.append(ctypes.POINTER(self.structures[kind]))
            elif part.isidentifier():
                found.append(ctypes.c_int64)
            else:
                found.append(ctypes.c_void_p)
        return found

    def first_of(self, variable: str) -> int:
        """The operand that binds a variable of dtypes."""
        return next(number for number, one in enumerate(self.operands) if one.dtype == variable)

    def _first(self, *values: Any) -> Any:
        # Which imports this module.
        from anabranch.nn import kernels

        library = kernels.load()
        if library is None:
            raise BackendError("the compiled kernels could not be built here, or ANABRANCH_NO_KERNELS is set")
        self._call = self.bound_to(library)
        return self._call(*values)

    def _refuse(self, number: int, value: Any, known: Mapping[str, Any]) -> None:
        operand = self.operands[number]
        if operand.dtype in DTYPES:
            dtypes = operand.dtype
        elif f"t_{operand.dtype}" in known and number != self.first_of(operand.dtype):
            dtypes = str(known[f"t_{operand.dtype}"]).removeprefix("torch.")
        else:
            place = self.variables.index(operand.dtype)
            dtypes = " or ".join(dict.fromkeys(names[place] for names in self.types))
        sizes = {name: size for name, size in known.items() if isinstance(size, int)}
        raise InputError(
            f"{operand.name} of kernel {self.name} is {described(value)}; it takes {operand.wanted(sizes, dtypes)}"
        )

    def _unfit(self, condition: str, known: Mapping[str, Any]) -> None:
        values = ", ".join(f"{symbol} = {known[symbol]}" for symbol in dict.fromkeys(re.findall(r"[A-Z]", condition)))
        raise InputError(f"kernel {self.name} takes {condition}{f'; here {values}' if values else ''}")

    def _failed(self, status: int) -> None:
        if status == NO_MEMORY:
            raise CapacityError(
                f"not enough memory for what kernel {self.name} works out on its way; use smaller batches"
            )
        raise InputError(f"kernel {self.name} was given an index out of range")
