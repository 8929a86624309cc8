"""The signature of a kernel, and the function that checks its operands and calls it; the language is that of `binding`."""

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from anabranch.nn.kernels.operands import (
    DTYPES,
    LEAST_ADDRESS,
    PLAIN,
    is_dense,
    is_transformed,
    is_wrapped,
    lies_otherwise,
)

if TYPE_CHECKING:
    from anabranch.nn.kernels.binding import Kernel

__all__ = ["Operand", "written"]

OPERAND: Final = re.compile(r"(\w+): (\w+)\[([^]]*)\](\?)?((?: rows| out| array)*)(?: \* (\w+))?")


@dataclass(frozen=True)
class Operand:
    """One operand of a signature."""

    name: str
    dtype: str
    sizes: tuple[str, ...]
    optional: bool
    flags: frozenset[str]
    table: str | None

    @classmethod
    def of(cls, text: str) -> "Operand | None":
        """The operand that ``text`` declares; None if it declares something else."""
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


def written(kernel: "Kernel") -> tuple[str, dict[str, Any]]:
    """Source of ``call(...)``, which checks what a kernel is given and calls it, and the names that it uses."""
    return _Writer(kernel).written()


class _Writer:
    """Writes the function that checks the operands of a kernel and calls it."""

    def __init__(self, kernel: "Kernel") -> None:
        self.kernel = kernel
        self.names: dict[str, Any] = {
            "PLAIN": PLAIN,
            "LEAST": LEAST_ADDRESS,
            "Tensor": Tensor,
            "ndarray": np.ndarray,
            "pointer": ctypes.c_void_p,
            "threads": torch.get_num_threads,
            "is_dense": is_dense,
            "lies_otherwise": lies_otherwise,
            "is_transformed": is_transformed,
            "is_wrapped": is_wrapped,
        }
        reads = any("array" not in one.flags for one in kernel.operands)
        self.lines = ["transformed = is_transformed()"] if reads else []
        self.sizes: set[str] = set()  # known so far
        # Operands that all of their sizes come from.
        self.binding: set[int] = set()

    def written(self) -> tuple[str, dict[str, Any]]:
        """Its source, and the names that it uses."""
        kernel, given, passed = self.kernel, [], []
        for part in kernel.parameters:
            operand = Operand.of(part)
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

    def _bind(self, number: int, operand: Operand) -> None:
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
                f"{operand.sizes[-1]} = shape[-1]",
                f"{first} = {name}.numel() // {operand.sizes[-1]} if {operand.sizes[-1]} else 0",
                f"leading, strides = shape, {name}.stride()",
            ]
        else:
            self.lines.append(f"if len(shape) != {len(operand.sizes)}: refuse({number}, {name}, locals())")
            targets = ", ".join(part if part in new else "_" for part in operand.sizes)
            self.lines.append(f"{targets}, = shape")
        self.sizes.update(part.removesuffix("..") for part in new)

    def _check(self, number: int, operand: Operand) -> None:
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

    def _wrong(self, operand: Operand, name: str, *, with_class: bool) -> str:
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
