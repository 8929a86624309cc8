"""Clocks of processors (DVFS): what a plan wants of a stage's ranks, and who sets it.

    clock = StageClock(frequency_control("nvml"))       # looks and tells, sets nothing
    clock.follow(1.25)                                  # a quarter above the usual, as far as the device goes
    clock.release()

A stage that lost ranks and is still the slowest when samples and layers have moved runs faster, others may run slower
(`anabranch.cluster.elastic.planner.frequencies`). `FrequencyControl` is all that this needs of a device: `SimulatedFrequency` is one that
there is not, `NvmlFrequency` a GPU's by NVIDIA's management library, which sets clocks for root alone, and here only where it is told to.
"""

from __future__ import annotations

import ctypes
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

from anabranch.errors import AnabranchError, ConfigError

__all__ = [
    "CLOCKS",
    "ClockName",
    "FrequencyControl",
    "NvmlFrequency",
    "SimulatedFrequency",
    "StageClock",
    "frequency_control",
]

log = logging.getLogger(__name__)

ClockName = Literal["none", "simulated", "nvml", "nvml-set"]
CLOCKS: tuple[ClockName, ...] = ("none", "simulated", "nvml", "nvml-set")
_LIBRARY = "libnvidia-ml.so.1"
# Of NVML's return values and kinds of clocks.
_OK, _NOT_SUPPORTED, _NO_PERMISSION = 0, 3, 4
_GRAPHICS = 0
_MOST_CLOCKS = 1024


class ClockError(AnabranchError):
    """A device does not tell of its clock, or does not take one."""


class FrequencyControl(ABC):
    """The clock of the processor that a rank computes on; all in MHz.

    Attributes:
        usual: at which it runs where nobody sets it.
        sets: whether `set` changes how fast this processor works.
    """

    usual: float
    sets: bool

    @abstractmethod
    def get(self) -> float:
        """At which it runs now. Raises ClockError where the device does not say."""

    @abstractmethod
    def range(self) -> tuple[float, float]:
        """The least and the most that can be set."""

    @abstractmethod
    def set(self, mhz: float) -> None:
        """Run at a clock within `range`. Raises ClockError where the device does not take it."""

    @abstractmethod
    def reset(self) -> None:
        """Run as if nobody had set anything. Raises ClockError likewise."""


class SimulatedFrequency(FrequencyControl):
    """A clock that there is not: it keeps what was set.

    Args:
        usual, least, most: of it.
        sets: whether whoever made it lets work last as long as it says.
    """

    def __init__(
        self, *, usual: float = 1000.0, least: float = 500.0, most: float = 1500.0, sets: bool = False
    ) -> None:
        if not 0 < least <= usual <= most:
            raise ConfigError(
                f"a clock of {usual:g} MHz is not within {least:g} to {most:g} MHz; give least, usual, most in order"
            )
        self.usual, self.sets = usual, sets
        self._least, self._most, self._now = least, most, usual

    def get(self) -> float:
        """What was set last."""
        return self._now

    def range(self) -> tuple[float, float]:
        """As it was made."""
        return self._least, self._most

    def set(self, mhz: float) -> None:
        """Keep it. Raises ClockError for one out of range, as a device does."""
        if not self._least <= mhz <= self._most:
            raise ClockError(f"{mhz:g} MHz is not within {self._least:g} to {self._most:g} MHz")
        self._now = mhz

    def reset(self) -> None:
        """The usual one."""
        self._now = self.usual


class NvmlFrequency(FrequencyControl):
    """A GPU's, by NVML.

    Args:
        device: its number among those that CUDA sees (CUDA_VISIBLE_DEVICES).
        sets: lock its clocks, which root alone may; False reads, and keeps for `wanted` what it would have set. A process that is killed
            leaves them locked, until another one begins here or ``nvidia-smi -rgc``.
        library: for tests; None loads NVIDIA's.

    Attributes:
        wanted: what was to be set last; None where that is the usual.

    Raises ConfigError where there is no such library or device, and where it may set nothing though it is to.
    """

    def __init__(self, device: int = 0, *, sets: bool = False, library: Any = None) -> None:
        self.sets = sets
        self.wanted: float | None = None
        self._library = library or _loaded()
        self._handle = ctypes.c_void_p()
        name = _visible(device)
        try:
            self._call("nvmlInit_v2")
            if isinstance(name, int):
                self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(name), ctypes.byref(self._handle))
            else:
                self._call("nvmlDeviceGetHandleByUUID", ctypes.c_char_p(name.encode()), ctypes.byref(self._handle))
            self._most = self._number("nvmlDeviceGetMaxClockInfo", ctypes.c_int(_GRAPHICS))
            self._least = self._lowest()
            # Of a device without one: what it rises to by itself where it has work.
            usual = self._number_or_none("nvmlDeviceGetDefaultApplicationsClock", ctypes.c_int(_GRAPHICS))
            self.usual = self._most if usual is None else usual
            if sets:
                # Also what a process before this one has left.
                self.reset()
        except ClockError as error:
            raise ConfigError(f"the clock of GPU {device} cannot be {'set' if sets else 'read'}: {error}") from None

    def get(self) -> float:
        """Of the graphics clock, now."""
        return self._number("nvmlDeviceGetClockInfo", ctypes.c_int(_GRAPHICS))

    def range(self) -> tuple[float, float]:
        """Of all that it can be set to."""
        return self._least, self._most

    def set(self, mhz: float) -> None:
        """Lock it there, where this may set."""
        self.wanted = mhz
        if self.sets:
            whole = ctypes.c_uint(round(mhz))
            self._call("nvmlDeviceSetGpuLockedClocks", self._handle, whole, whole)

    def reset(self) -> None:
        """Lock it nowhere."""
        self.wanted = None
        if self.sets:
            self._call("nvmlDeviceResetGpuLockedClocks", self._handle)

    def _lowest(self) -> float:
        """Of the graphics clocks that go with the fastest memory clock."""
        count, memory = ctypes.c_uint(_MOST_CLOCKS), (ctypes.c_uint * _MOST_CLOCKS)()
        self._call("nvmlDeviceGetSupportedMemoryClocks", self._handle, ctypes.byref(count), memory)
        fastest = max(memory[: count.value])
        count, found = ctypes.c_uint(_MOST_CLOCKS), (ctypes.c_uint * _MOST_CLOCKS)()
        self._call(
            "nvmlDeviceGetSupportedGraphicsClocks", self._handle, ctypes.c_uint(fastest), ctypes.byref(count), found
        )
        return float(min(found[: count.value]))

    def _number(self, name: str, *given: Any) -> float:
        found = ctypes.c_uint()
        self._call(name, self._handle, *given, ctypes.byref(found))
        return float(found.value)

    def _number_or_none(self, name: str, *given: Any) -> float | None:
        found = ctypes.c_uint()
        if self._function(name)(self._handle, *given, ctypes.byref(found)) == _NOT_SUPPORTED:
            return None
        return self._number(name, *given)

    def _function(self, name: str) -> Callable[..., int]:
        try:
            found: Callable[..., int] = getattr(self._library, name)
        except AttributeError:
            raise ClockError(f"this driver has no {name}") from None
        return found

    def _call(self, name: str, *given: Any) -> None:
        code = self._function(name)(*given)
        if code == _NO_PERMISSION:
            raise ClockError("root alone may set it")
        if code != _OK:
            raise ClockError(f"{name} gave {code}")


class StageClock:
    """The clock of a rank, as the plan of its stage wants it. What a device does not take is told, and training goes on at what it has.

    Args:
        control: of the device; None where no clock is looked at.

    Attributes:
        factor: over the usual clock, at which this processor works as far as this has set it.
    """

    def __init__(self, control: FrequencyControl | None) -> None:
        self.control, self.factor = control, 1.0
        self._wanted = 1.0
        self._is_told = False

    def follow(self, factor: float) -> None:
        """Work at so much over the usual clock, as far as the device goes."""
        control = self.control
        if control is None or factor == self._wanted:
            return
        least, most = control.range()
        mhz = min(max(control.usual * factor, least), most)
        try:
            if factor == 1.0:
                control.reset()
            else:
                control.set(mhz)
        except ClockError as error:
            if not self._is_told:
                log.warning("the clock stays as it is: %s", error)
            self._is_told = True
            return
        self._wanted = factor
        if control.sets:
            self.factor = 1.0 if factor == 1.0 else mhz / control.usual
        log.info(
            "the clock %s %.0f MHz (%.2f of the usual)", "is" if control.sets else "would be", mhz, mhz / control.usual
        )

    def release(self) -> None:
        """The device's own again."""
        self.follow(1.0)

    def to_dict(self) -> dict[str, Any] | None:
        """JSON-ready: at which it is, the usual, the least and the most, in MHz; what the plan wants over the usual, and what is set."""
        if self.control is None:
            return None
        least, most = self.control.range()
        try:
            now: float | None = self.control.get()
        except ClockError:
            now = None
        return {
            "mhz": now,
            "usual_mhz": self.control.usual,
            "least_mhz": least,
            "most_mhz": most,
            "wanted": self._wanted,
            "factor": self.factor,
            "sets": self.control.sets,
        }


def frequency_control(name: ClockName, device: int = 0) -> FrequencyControl | None:
    """That of a name: ``none``; ``simulated``; ``nvml``, which reads; ``nvml-set``. Raises ConfigError where there is none such here."""
    match name:
        case "none":
            return None
        case "simulated":
            return SimulatedFrequency()
        case "nvml" | "nvml-set":
            return NvmlFrequency(device, sets=name == "nvml-set")
    raise ConfigError(f"clock is {name!r}; use one of {', '.join(CLOCKS)}")


def _loaded() -> Any:
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise ConfigError(f"a GPU's clock needs NVIDIA's driver, and {_LIBRARY} is not here ({error})") from None


def _visible(device: int) -> int | str:
    """A GPU that CUDA numbers so, as NVML knows it."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in listed.split(",")] if listed.strip() else None
    if device < 0 or (names is not None and device >= len(names)):
        raise ConfigError(f"there is no GPU {device}; CUDA_VISIBLE_DEVICES is {listed!r}")
    if names is None:
        return device
    return int(names[device]) if names[device].isdigit() else names[device]
