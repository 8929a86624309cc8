"""The one door to the compiled kernels: a kernel is called by its declared signature, and by nothing else.

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

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from anabranch.errors import BackendError, CapacityError, InputError

__all__ = [
    "KERNELS",
    "Kernel",
    "Library",
    "address",
    "array_address",
    "is_dense",
    "is_transformed",
    "takes",
    "why_refused",
]

KERNELS: "dict[str, Kernel]" = {}  # every one that is declared, by the name of its C function

PLAIN: Final = frozenset({Tensor, nn.Parameter})  # other classes of tensors may not lie where they say, or nowhere
NO_MEMORY: Final = 1  # of failure.h
LEAST_ADDRESS: Final = 1 << 16  # below, no system puts anything: a storage that was given back
SCALARS: Final[Mapping[str, Any]] = {
    "int": ctypes.c_int, "int64": ctypes.c_int64, "float": ctypes.c_float, "double": ctypes.c_double, "handle": ctypes.c_void_p,
}  # fmt: skip
RESULTS: Final[Mapping[str, Any]] = {
    "none": None, "status": ctypes.c_int, "int": ctypes.c_int, "int64": ctypes.c_int64, "handle": ctypes.c_void_p,
}  # fmt: skip
DTYPES: Final = {
    name: getattr(torch, name) for name in ("float32", "bfloat16", "bool", "uint8", "int32", "int64")
}  # of tensors; arrays have them by the same names
OPERAND = re.compile(r"(\w+): (\w+)\[([^]]*)\](\?)?((?: rows| out| array)*)(?: \* (\w+))?")


def takes(*values: Tensor) -> bool:
    """Whether a kernel can read these now, whatever their dtypes and shapes: plain tensors on the CPU, and no graph is made of them.

    A subclass may lie elsewhere, a negative view lies with the other sign, and the tangents of dual tensors and the batches of
    ``torch.func`` lie beside what a kernel reads. All that, torch computes by itself. Operands of which only the first is on the CPU are
    an error, which the door tells better than torch: they are let through to it.
    """
    if torch.compiler.is_compiling() or is_transformed():
        return False
    for value in values:
        if type(value) not in PLAIN or value.is_neg():
            return False
    return not values or values[0].is_cpu


def why_refused(**values: Tensor) -> str | None:
    """Why `takes` says no to these, each by its name; None if it says yes."""
    for name, value in values.items():
        if not value.is_cpu:
            return f"the native kernels run on the CPU, and {name} is on {value.device}"
        if type(value) not in PLAIN or value.is_neg():
            return f"the native kernels take plain tensors, and {name} is {_said(value)}"
    return None if takes() else "the native kernels are not differentiated forward, batched by torch.func or compiled"


def is_transformed() -> bool:
    """Whether torch carries more than values through operators now: tangents (forward mode), or the levels of ``torch.func``."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _is_wrapped(value: Tensor) -> bool:
    """Whether it carries more than its values; asked where `is_transformed`."""
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None


class Library:
    """The loaded library, whose functions only the kernels of this module call."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._free = loaded
        # Calls that are over at once: letting go of the interpreter would hand it to whoever waits for it, for much longer.
        self._holding = ctypes.PyDLL(loaded._name)


@dataclass(frozen=True)
class _Operand:
    name: str
    dtype: str
    sizes: tuple[str, ...]
    optional: bool
    flags: frozenset[str]
    table: str | None

    @classmethod
    def of(cls, text: str) -> "_Operand | None":
        found = OPERAND.fullmatch(text)
        if found is None:
            return None
        name, dtype, sizes, optional, flags, table = found.groups()
        parts = tuple(part.strip() for part in sizes.split(",") if part.strip())
        return cls(name, dtype, parts, optional is not None, frozenset(flags.split()), table)

    def wanted(self, sizes: Mapping[str, int], dtypes: str) -> str:
        """What is taken, in words."""
        symbols = dict.fromkeys(re.findall(r"[A-Za-z]\w*", " ".join(self.sizes)))
        known = ", ".join(f"{symbol} = {sizes[symbol]}" for symbol in symbols if symbol in sizes)
        piece = "its last size in one piece" if "rows" in self.flags else "in one piece"
        kind = "an array of " if "array" in self.flags else ""
        place = "" if kind else ", on the CPU"
        return f"{kind}{dtypes} [{', '.join(self.sizes)}]{f' with {known}' if known else ''}, {piece}{place}"


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
        self.operands = [made for part in self.parameters if (made := _Operand.of(part)) is not None]
        self.variables = list(dict.fromkeys(one.dtype for one in self.operands if one.dtype not in DTYPES))
        self.name = self.symbol.removeprefix("anabranch_")
        self._call: Callable[..., Any] = self._first
        KERNELS[self.symbol] = self

    def __call__(self, *values: Any) -> Any:
        """See the class."""
        return self._call(*values)

    def bound_to(self, library: Library) -> Callable[..., Any]:
        """The same kernel of another library."""
        source, names = _Writer(self).written()
        function = getattr(library._holding if self.holds_interpreter else library._free, self.symbol)
        function.argtypes, function.restype = self.c_types(), RESULTS[self.result]
        scope = {**names, "function": function, "refuse": self._refuse, "unfit": self._unfit, "failed": self._failed}
        exec(
            compile(source, f"<{self.symbol}>", "exec"), scope
        )  # as dataclasses are made: the checks, without a loop over them
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
        from anabranch.nn import kernels  # which imports this module

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
            f"{operand.name} of kernel {self.name} is {_said(value)}; it takes {operand.wanted(sizes, dtypes)}"
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


class _Writer:
    """Writes the function that checks the operands of a kernel and calls it."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.names: dict[str, Any] = {
            "PLAIN": PLAIN, "LEAST": LEAST_ADDRESS, "Tensor": Tensor, "ndarray": np.ndarray,
            "pointer": ctypes.c_void_p, "threads": torch.get_num_threads, "is_dense": is_dense, "lies_otherwise": _lies_otherwise,
            "is_transformed": is_transformed, "is_wrapped": _is_wrapped,
        }  # fmt: skip
        reads = any("array" not in one.flags for one in kernel.operands)
        self.lines = ["transformed = is_transformed()"] if reads else []
        self.sizes: set[str] = set()  # known so far
        self.binding: set[int] = set()  # operands that all of their sizes come from

    def written(self) -> tuple[str, dict[str, Any]]:
        """Its source, and the names that it uses."""
        kernel, given, passed = self.kernel, [], []
        for part in kernel.parameters:
            operand = _Operand.of(part)
            if operand is not None:
                given.append(operand.name)
                passed.append(f"p_{operand.name}")
            elif part.startswith("given "):
                given.append(part.removeprefix("given "))
                self.sizes.add(given[-1])
            elif part.startswith("strides("):
                names = [name.strip() for name in part[8:-1].split(",")]
                count = sum(len(one.sizes) - 1 for one in kernel.operands if one.name in names)
                self.names["Strides"] = ctypes.c_int64 * count
                passed.append(f"Strides({', '.join(f'*s_{name}[:-1]' for name in names)})")
            elif ": " in part:
                given.append(part.partition(": ")[0])
                passed.append(given[-1])
                if part.endswith(": handle"):
                    self.lines.append(f"if not {given[-1]}: unfit('an open handle', {{}})")
                if given[-1].isupper():
                    self.sizes.add(given[-1])
            else:
                passed.append("threads()" if part == "threads" else part)
        for number, operand in enumerate(kernel.operands):
            self._bind(number, operand)
        self._types()
        for number, operand in enumerate(kernel.operands):
            self._check(number, operand)
        self.lines += [f"if not ({condition}): unfit({condition!r}, locals())" for condition in kernel.where]
        self.lines.append(
            f"{'return ' if kernel.result not in ('status', 'none') else 'status = '}function({', '.join(passed)})"
        )
        if kernel.result == "status":
            self.lines.append("if status: failed(status)")
        return f"def call({', '.join(given)}):\n" + "\n".join("    " + line for line in self.lines), self.names

    def _bind(self, number: int, operand: _Operand) -> None:
        """Symbols that this operand is the first to have."""
        if operand.optional or operand.table:
            if operand.table and operand.table not in self.sizes:
                self.lines.append(f"{operand.table} = len({operand.name})")
                self.lines.append(
                    f"if not {operand.table} or type({operand.name}[0]) not in PLAIN: refuse({number}, {operand.name}, locals())"
                )
                self.sizes.add(operand.table)
                if operand.dtype not in DTYPES and number == self.kernel.first_of(operand.dtype):
                    self.lines.append(f"t_{operand.dtype} = {operand.name}[0].dtype")
            return
        name, new = (
            operand.name,
            [
                part
                for part in operand.sizes
                if part.removesuffix("..").isidentifier() and part.removesuffix("..") not in self.sizes
            ],
        )
        is_array = "array" in operand.flags
        self.lines.append(
            f"if {f'type({name}) is not ndarray' if is_array else f'type({name}) not in PLAIN'}: refuse({number}, {name}, locals())"
        )
        if operand.dtype not in DTYPES and number == self.kernel.first_of(operand.dtype):
            self.lines.append(f"t_{operand.dtype} = {name}.dtype")
        if not new:
            return
        if len(new) == len(set(operand.sizes)) == len(operand.sizes):
            self.binding.add(number)
        self.lines.append(f"shape = {name}.shape")
        if operand.sizes[0].endswith(".."):
            first = operand.sizes[0].removesuffix("..")
            self.lines += [
                f"if len(shape) < {len(operand.sizes) - 1}: refuse({number}, {name}, locals())",
                f"{operand.sizes[-1]} = shape[-1]", f"{first} = {name}.numel() // {operand.sizes[-1]} if {operand.sizes[-1]} else 0",
                f"leading, strides = shape, {name}.stride()",
            ]  # fmt: skip
        else:
            self.lines.append(f"if len(shape) != {len(operand.sizes)}: refuse({number}, {name}, locals())")
            targets = ", ".join(part if part in new else "_" for part in operand.sizes)
            self.lines.append(f"{targets}, = shape")
        self.sizes.update(part.removesuffix("..") for part in new)

    def _check(self, number: int, operand: _Operand) -> None:
        """Everything else that is asked of it, and its address."""
        name, indent = operand.name, ""
        if operand.optional:
            self.lines += [f"p_{name} = None", f"if {name} is not None:"]
            indent = "    "
        if operand.table:
            self.lines.append(f"for one in {name}:")
            self.lines.append(f"    if {self._wrong(operand, 'one', with_class=True)}: refuse({number}, one, locals())")
            self.lines.append(f"if len({name}) != {operand.table}: refuse({number}, {name}, locals())")
            self.lines.append(f"a_{name} = [one.data_ptr() for one in {name}]")
            self.lines.append(f"p_{name} = (pointer * {operand.table})(*a_{name})")
            gone = f"next(one for one in {name} if one.data_ptr() < LEAST)"
            self.lines.append(f"if min(a_{name}) < LEAST and one.numel(): refuse({number}, {gone}, locals())")
            return
        is_array = "array" in operand.flags
        if "rows" in operand.flags:
            self.lines.append(f"s_{name} = {name}.stride()")
        self.lines.append(
            f"{indent}if {self._wrong(operand, name, with_class=operand.optional)}: refuse({number}, {name}, locals())"
        )
        self.lines.append(f"{indent}p_{name} = {f'{name}.ctypes.data' if is_array else f'{name}.data_ptr()'}")
        if not is_array:
            self.lines.append(f"{indent}if p_{name} < LEAST and {name}.numel(): refuse({number}, {name}, locals())")

    def _wrong(self, operand: _Operand, name: str, *, with_class: bool) -> str:
        """The condition under which it is refused."""
        wrong = []
        is_array, number = "array" in operand.flags, self.kernel.operands.index(operand)
        if with_class:
            wrong.append(f"type({name}) is not ndarray" if is_array else f"type({name}) not in PLAIN")
        if operand.dtype in self.kernel.variables:
            if number != self.kernel.first_of(operand.dtype) or operand.table:
                wrong.append(f"{name}.dtype is not t_{operand.dtype}")
        else:
            self.names[f"{'a' if is_array else 'd'}_{operand.dtype}"] = (
                np.dtype(operand.dtype) if is_array else DTYPES[operand.dtype]
            )
            wrong.append(f"{name}.dtype != a_{operand.dtype}" if is_array else f"{name}.dtype is not d_{operand.dtype}")
        if is_array:
            wrong += [] if number in self.binding else [f"{name}.shape != ({', '.join(operand.sizes)},)"]
            wrong.append(f"not {name}.flags.c_contiguous")
            wrong += [f"not {name}.flags.writeable"] if "out" in operand.flags else []
            return " or ".join(wrong)
        wrong.append(f"not {name}.is_cpu or {name}.is_neg() or transformed and is_wrapped({name})")
        if operand.sizes[0].endswith(".."):
            if number in self.binding:
                wrong.append(f"not ({name}.is_contiguous() or is_dense({name}))")
            else:
                wrong.append(
                    f"{name}.shape != leading or {name}.stride() != strides and lies_otherwise({name}, strides)"
                )
        else:
            wrong += [] if number in self.binding else [f"{name}.shape != ({', '.join(operand.sizes)},)"]
            wrong.append(
                f"s_{name}[-1] != 1 and {name}.shape[-1] > 1"
                if "rows" in operand.flags
                else f"not {name}.is_contiguous()"
            )
            wrong += [f"0 in s_{name}"] if {"rows", "out"} <= operand.flags else []
        return " or ".join(wrong)

    def _types(self) -> None:
        variables = self.kernel.variables
        if not variables:
            return
        codes = {tuple(DTYPES[name] for name in names): code for names, code in self.kernel.types.items()}
        several = len(variables) > 1
        self.names["TYPES"] = codes if several else {key[0]: code for key, code in codes.items()}
        key = ", ".join(f"t_{name}" for name in variables)
        first = self.kernel.first_of(variables[-1])
        self.lines.append(f"types = TYPES.get({f'({key})' if several else key})")
        self.lines.append(f"if types is None: refuse({first}, {self.kernel.operands[first].name}, locals())")


def address(value: Tensor, dtype: str | Sequence[str] | None = None, *sizes: int | None) -> int:
    """Where a tensor lies, for a structure that a kernel reads; ``value`` must outlive it.

    Args:
        value: a plain tensor on the CPU, in one piece.
        dtype: one it may have, or several; None for any dtype and shape.
        sizes: its shape; None for any size.

    Raises:
        InputError: it is not so.
    """
    if not _is_exactly(value, dtype, sizes):
        names = () if dtype is None else (dtype,) if isinstance(dtype, str) else dtype
        fits = dtype is None or (_has_shape(value.shape, sizes) and any(value.dtype is DTYPES[name] for name in names))
        if not fits or not _is_readable(value):
            what = f"{' or '.join(names)} {_in_words(sizes)}, " if names else "what is "
            raise InputError(f"a kernel was given {_said(value)}; it takes {what}in one piece, on the CPU")
    place = value.data_ptr()
    if place < LEAST_ADDRESS and value.numel():
        raise InputError(f"a kernel was given {_said(value)}, whose memory was given back")
    return place


def _is_exactly(value: Tensor, dtype: str | Sequence[str] | None, sizes: tuple[int | None, ...]) -> bool:
    """The quick answer for what steps pass: one dtype, all sizes known."""
    return _is_readable(value) and isinstance(dtype, str) and value.dtype is DTYPES[dtype] and value.shape == sizes


def _is_readable(value: Tensor) -> bool:
    """Whether all of its values stand where it lies, in one piece."""
    if type(value) not in PLAIN or not value.is_cpu or not value.is_contiguous() or value.is_neg():
        return False
    return not is_transformed() or not _is_wrapped(value)


def array_address(value: np.ndarray, dtype: str, *sizes: int | None) -> int:
    """The same of a NumPy array."""
    is_right = type(value) is np.ndarray and value.dtype == dtype and value.flags.c_contiguous
    if not is_right or not _has_shape(value.shape, sizes):
        raise InputError(
            f"a kernel was given {_said(value)}; it takes an array of {dtype} {_in_words(sizes)}, in one piece"
        )
    return value.ctypes.data


def _has_shape(shape: Sequence[int], sizes: Sequence[int | None]) -> bool:
    if len(shape) != len(sizes):
        return False
    for have, want in zip(shape, sizes, strict=True):
        if have != want and want is not None:
            return False
    return True


def _in_words(sizes: Sequence[int | None]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in sizes)}]"


def _said(value: Any) -> str:
    """What came, in words."""
    if isinstance(value, Tensor):
        kind = "" if type(value) in PLAIN else f"a {type(value).__name__} of "
        kind += "a negative view of " if value.is_neg() else ""
        if is_transformed() and _is_wrapped(value):
            return f"{kind}{str(value.dtype).removeprefix('torch.')} {list(value.shape)} that torch differentiates forward or batches"
        gone = type(value) in PLAIN and value.is_cpu and value.numel() and value.data_ptr() < LEAST_ADDRESS
        lies = "" if value.is_meta or value.is_contiguous() else f" with strides {list(value.stride())}"
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{kind}{dtype} {list(value.shape)}{lies} on {value.device}{', its memory given back' if gone else ''}"
    if isinstance(value, np.ndarray):
        lies = "" if value.flags.c_contiguous else f" with strides {value.strides}"
        return f"an array of {value.dtype} {list(value.shape)}{lies}{'' if value.flags.writeable else ', read-only'}"
    return f"{len(value)} of them" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


def is_dense(x: Tensor) -> bool:
    """Whether the last dimension is in one piece and rows follow one another without gaps, in whatever order."""
    if x.stride(-1) != 1:
        return False
    reached = x.shape[-1]
    for stride, size in sorted(zip(x.stride()[:-1], x.shape[:-1], strict=True)):
        if size == 1:
            continue
        if stride != reached:
            return False
        reached *= size
    return True


def _lies_otherwise(x: Tensor, strides: Sequence[int]) -> bool:
    """Whether its strides are others, where that makes a difference."""
    return any(size > 1 and own != wanted for size, own, wanted in zip(x.shape, x.stride(), strides, strict=True))
