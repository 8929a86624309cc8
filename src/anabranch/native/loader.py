"""The library in this process, or why there is none."""

import ctypes
import logging
import os
from dataclasses import dataclass

from anabranch.errors import AnabranchError
from anabranch.native.builder import build
from anabranch.native.compiler import find_compiler
from anabranch.native.isa import NATIVE
from anabranch.native.stored import Library, find, opened, read_failure
from anabranch.places import cache_folder

__all__ = ["Status", "is_switched_off", "load", "status"]

log = logging.getLogger(__name__)

SWITCH = "ANABRANCH_NO_KERNELS"


@dataclass(frozen=True)
class Status:
    """Whether the next forward has compiled kernels.

    Attributes:
        library: that it would use; None if there is none yet.
        reason: why there is none or why it cannot be used, in a sentence; empty if all is well.
        will_build: whether it would be compiled then, for the first time or again.
    """

    library: Library | None
    reason: str = ""
    will_build: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether a library lies there and can be loaded."""
        return self.library is not None and not self.reason


def is_switched_off() -> bool:
    """Whether the user wants no compiled kernels."""
    return os.environ.get(SWITCH, "0") not in ("", "0")


def load() -> ctypes.CDLL | None:
    """The library, compiled first where there is none; None where it cannot be had, and the log says why."""
    if is_switched_off():
        return None
    try:
        found = find()
        if found is not None:
            try:
                return opened(found)
            except OSError as error:  # made for a newer system; what is compiled here fits
                log.info("the kernels that lie there cannot be loaded: %s", error)
        return opened(build())
    except (AnabranchError, OSError) as error:
        log.warning("no compiled kernels, running in plain PyTorch: %s", error)
        return None


def status() -> Status:
    """What `load` would find, without compiling anything."""
    found, fault = None, ""
    try:
        found = find()
        if is_switched_off():
            return Status(found, f"{SWITCH} is set")
        if found is not None:
            try:
                opened(found)
            except OSError as error:
                fault = f"it cannot be loaded: {error}"
            else:
                return Status(found)
        compiler, failure = find_compiler(), read_failure(cache_folder() / "kernels", NATIVE)
    except AnabranchError as error:
        return Status(found, fault or str(error))
    if failure is not None and failure.compiler == compiler.name:
        return Status(found, fault or failure.reason)
    what = f"{fault}; the first forward compiles it again" if fault else "not compiled yet; the first forward does it"
    return Status(found, f"{what}, or anabranch doctor --build", will_build=True)
