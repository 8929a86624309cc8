"""As much of CUDA's driver interface as memory needs, through ctypes: no torch, no toolkit, only the driver's library.

The virtual memory part takes allocation and addresses apart: a handle is memory without an address, a reservation is addresses without
memory, a mapping joins them, and access is granted to each GPU after that. Handles of other processes come and go as file descriptors.

Signatures and layouts are those of ``cuda.h`` since CUDA 11.0, the names those of the entry points that the library exports (``_v2`` where
the header renames them). Source: CUDA Driver API, "Virtual Memory Management", "Memory Management", "Primary Context Management".
"""

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from ctypes import POINTER, byref, c_int, c_size_t, c_ubyte, c_uint, c_ushort, c_void_p
from ctypes import c_uint64 as c_u64
from typing import Any

from anabranch.errors import BackendError, CapacityError

__all__ = ["LIBRARY", "Driver"]

LIBRARY = "ANABRANCH_LIBCUDA"
"""Environment variable with the driver's library, where it is not the system's ``libcuda.so.1``."""

_OUT_OF_MEMORY = 2

# Allocation type, location type, handle type, access.
_PINNED, _ON_DEVICE, _AS_FD, _READ_WRITE = 1, 1, 1, 3

# Attributes of a device.
_HAS_VIRTUAL_MEMORY, _EXPORTS_FDS = 102, 103

# Attribute of a pointer, and its value for main memory.
_MEMORY_TYPE, _HOST_MEMORY = 2, 1

# A stream that does not wait for the default one.
_NON_BLOCKING = 1


class _Location(ctypes.Structure):
    _fields_ = [("type", c_int), ("id", c_int)]


class _Flags(ctypes.Structure):
    _fields_ = [
        ("compression", c_ubyte),
        ("rdma", c_ubyte),
        ("usage", c_ushort),
        ("reserved", c_ubyte * 4),
    ]


class _Properties(ctypes.Structure):
    _fields_ = [
        ("type", c_int),
        ("handle_types", c_int),
        ("location", _Location),
        ("win32_metadata", c_void_p),
        ("flags", _Flags),
    ]


class _Access(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", c_int)]


_OUT, _STREAM = c_void_p, c_void_p
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorString": (c_int, POINTER(ctypes.c_char_p)),
    "cuDeviceGetCount": (_OUT,),
    "cuDeviceGet": (_OUT, c_int),
    "cuDeviceGetAttribute": (_OUT, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_OUT, c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (_OUT,),
    "cuCtxSynchronize": (),
    "cuMemGetInfo_v2": (_OUT, _OUT),
    "cuMemGetAllocationGranularity": (_OUT, POINTER(_Properties), c_int),
    "cuMemCreate": (_OUT, c_size_t, POINTER(_Properties), c_u64),
    "cuMemRelease": (c_u64,),
    "cuMemExportToShareableHandle": (_OUT, c_u64, c_int, c_u64),
    "cuMemImportFromShareableHandle": (_OUT, c_void_p, c_int),
    "cuMemAddressReserve": (_OUT, c_size_t, c_size_t, c_u64, c_u64),
    "cuMemAddressFree": (c_u64, c_size_t),
    "cuMemMap": (c_u64, c_size_t, c_size_t, c_u64, c_u64),
    "cuMemUnmap": (c_u64, c_size_t),
    "cuMemSetAccess": (c_u64, c_size_t, POINTER(_Access), c_size_t),
    "cuPointerGetAttribute": (_OUT, c_int, c_u64),
    "cuMemHostAlloc": (_OUT, c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuStreamCreate": (_OUT, c_uint),
    "cuStreamDestroy_v2": (_STREAM,),
    "cuStreamSynchronize": (_STREAM,),
    "cuMemcpyHtoDAsync_v2": (c_u64, c_void_p, c_size_t, _STREAM),
    "cuMemcpyDtoDAsync_v2": (c_u64, c_u64, c_size_t, _STREAM),
    "cuMemcpyPeerAsync": (c_u64, c_void_p, c_u64, c_void_p, c_size_t, _STREAM),
    "cuMemsetD8Async": (c_u64, c_ubyte, c_size_t, _STREAM),
}


class Driver:
    """The driver. Thread-safe; what needs a context is called within `on`.

    Args:
        library: file name of the driver's library; None for that of ``$ANABRANCH_LIBCUDA``, else the system's.

    Attributes:
        num_gpus: how many there are.

    Raises BackendError where there is no driver, no GPU, or one without virtual memory. Every method raises BackendError with the driver's
    own words for what it refuses, and CapacityError where memory runs out.
    """

    def __init__(self, library: str | None = None) -> None:
        name = library or os.environ.get(LIBRARY) or "libcuda.so.1"
        try:
            self._library = ctypes.CDLL(name)
            for each, arguments in _SIGNATURES.items():
                getattr(self._library, each).argtypes = arguments
        except (OSError, AttributeError) as error:
            raise BackendError(
                f"there is no CUDA driver here ({error}); choose device='cpu', or say where its library is with {LIBRARY}"
            ) from None
        self._call("cuInit", 0)
        self._contexts: dict[int, int] = {}
        self._lock = threading.Lock()
        self.num_gpus = self._asked("cuDeviceGetCount", c_int)
        if not self.num_gpus:
            raise BackendError("CUDA shows no GPU here (CUDA_VISIBLE_DEVICES may hide them); choose device='cpu'")
        self._devices = [self._asked("cuDeviceGet", c_int, gpu) for gpu in range(self.num_gpus)]
        for gpu, device in enumerate(self._devices):
            for attribute, what in (
                (_HAS_VIRTUAL_MEMORY, "map memory"),
                (_EXPORTS_FDS, "share memory by file descriptor"),
            ):
                if not self._asked("cuDeviceGetAttribute", c_int, attribute, device):
                    raise BackendError(f"GPU {gpu} or its driver cannot {what}; choose device='cpu'")

    def close(self) -> None:
        """Give the contexts back."""
        with self._lock:
            for gpu in self._contexts:
                self._call("cuDevicePrimaryCtxRelease_v2", self._devices[gpu])
            self._contexts.clear()

    # Contexts

    def context(self, gpu: int) -> int:
        """The primary context, which torch uses as well."""
        with self._lock:
            if gpu not in self._contexts:
                self._contexts[gpu] = self._asked("cuDevicePrimaryCtxRetain", c_void_p, self._devices[gpu])
            return self._contexts[gpu]

    @contextlib.contextmanager
    def on(self, gpu: int) -> Iterator[None]:
        """Let calls of this thread be about a GPU; what was current before is current again after."""
        self._call("cuCtxPushCurrent_v2", self.context(gpu))
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def synchronize(self, gpu: int) -> None:
        """Wait until all that this process began on a GPU is done."""
        with self.on(gpu):
            self._call("cuCtxSynchronize")

    # Memory without addresses

    def granularity(self, gpu: int) -> int:
        """Bytes that sizes and addresses of mappings are multiples of."""
        return self._asked("cuMemGetAllocationGranularity", c_size_t, byref(self._properties(gpu)), 0)

    def create(self, gpu: int, size: int) -> int:
        """A handle of new memory that may be exported."""
        handle = c_u64()
        code = self._library.cuMemCreate(byref(handle), size, byref(self._properties(gpu)), 0)
        if code == _OUT_OF_MEMORY:
            raise CapacityError(f"no memory for {size:,} bytes on GPU {gpu}: {self.free_bytes(gpu):,} are free")
        self._check("cuMemCreate", code)
        return handle.value

    def release(self, handle: int) -> None:
        """Let go of a handle; the memory lives while it is mapped, here or elsewhere."""
        self._call("cuMemRelease", handle)

    def export(self, handle: int) -> int:
        """A new file descriptor of memory."""
        return self._asked("cuMemExportToShareableHandle", c_int, handle, _AS_FD, 0)

    def import_(self, fd: int) -> int:
        """A handle of memory that another process exported; the file may be closed after."""
        return self._asked("cuMemImportFromShareableHandle", c_u64, fd, _AS_FD)

    def free_bytes(self, gpu: int) -> int:
        """Memory that nobody has."""
        free, total = c_size_t(), c_size_t()
        with self.on(gpu):
            self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    # Addresses

    def reserve(self, size: int) -> int:
        """Addresses for ``size`` bytes."""
        return self._asked("cuMemAddressReserve", c_u64, size, 0, 0, 0)

    def free(self, address: int, size: int) -> None:
        """Give addresses back, all that one `reserve` gave; nothing may be mapped there."""
        self._call("cuMemAddressFree", address, size)

    def map(self, address: int, size: int, handle: int) -> None:
        """Put all of a handle's memory there. Nobody may touch it before `allow`."""
        # An offset into a handle is not implemented by any driver.
        self._call("cuMemMap", address, size, 0, handle, 0)

    def allow(self, address: int, size: int, gpu: int) -> None:
        """Let a GPU read and write what is mapped, whole mappings side by side. (Reading alone is not known to work everywhere.)"""
        access = _Access(_Location(_ON_DEVICE, self._devices[gpu]), _READ_WRITE)
        self._call("cuMemSetAccess", address, size, byref(access), 1)

    def unmap(self, address: int, size: int) -> None:
        """Undo one `map`."""
        self._call("cuMemUnmap", address, size)

    def is_host_memory(self, address: int) -> bool:
        """Whether the processor may use an address as well as a GPU."""
        return self._asked("cuPointerGetAttribute", c_uint, _MEMORY_TYPE, address) == _HOST_MEMORY

    # Copies; all are within `on` and done after `wait`

    def stream(self) -> int:
        """A new stream, beside all others."""
        return self._asked("cuStreamCreate", c_void_p, _NON_BLOCKING)

    def destroy(self, stream: int) -> None:
        """End a stream."""
        self._call("cuStreamDestroy_v2", stream)

    def wait(self, stream: int) -> None:
        """Until its copies are done."""
        self._call("cuStreamSynchronize", stream)

    def pin(self, size: int) -> int:
        """Main memory that GPUs read by themselves."""
        return self._asked("cuMemHostAlloc", c_void_p, size, 0)

    def unpin(self, address: int) -> None:
        """Give it back."""
        self._call("cuMemFreeHost", address)

    def copy_in(self, target: int, host: int, size: int, stream: int) -> None:
        """From pinned memory."""
        self._call("cuMemcpyHtoDAsync_v2", target, host, size, stream)

    def copy(self, target: tuple[int, int], source: tuple[int, int], size: int, stream: int) -> None:
        """Between two places (GPU, address), which need not see each other's memory."""
        if target[0] == source[0]:
            self._call("cuMemcpyDtoDAsync_v2", target[1], source[1], size, stream)
        else:
            here, there = self.context(target[0]), self.context(source[0])
            self._call("cuMemcpyPeerAsync", target[1], here, source[1], there, size, stream)

    def clear(self, target: int, size: int, stream: int) -> None:
        """Write zeros."""
        self._call("cuMemsetD8Async", target, 0, size, stream)

    def _properties(self, gpu: int) -> _Properties:
        return _Properties(_PINNED, _AS_FD, _Location(_ON_DEVICE, self._devices[gpu]), None, _Flags())

    def _asked(self, name: str, kind: Any, *arguments: Any) -> int:
        """Call what gives its result through its first argument."""
        result = kind()
        self._call(name, byref(result), *arguments)
        return result.value or 0

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._library, name)(*arguments))

    def _check(self, name: str, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, byref(text))
            words = (text.value or b"unknown error").decode()
            raise (CapacityError if code == _OUT_OF_MEMORY else BackendError)(f"CUDA: {name}: {words} (error {code})")
