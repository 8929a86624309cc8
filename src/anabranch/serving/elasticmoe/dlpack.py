"""Tensors over addresses that others manage, on any device, without a copy: a DLPack capsule made by hand.

DLPack is how array libraries hand memory to one another (https://dmlc.github.io/dlpack/latest/c_api.html, version 0.x: an unversioned
capsule named ``dltensor``). Torch wraps host and CUDA memory alike that way; its own `torch.frombuffer` knows host memory alone.
"""

import ctypes

import torch
from torch import Tensor

__all__ = ["tensor_over"]

_UINT = 1  # kDLUInt

# The capsule keeps a pointer to it.
_NAME = b"dltensor"


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [
        ("tensor", _Tensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("size", ctypes.c_int64),
    ]


_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_libc.free.restype, _libc.free.argtypes = None, [ctypes.c_void_p]
_FREE = ctypes.cast(_libc.free, ctypes.c_void_p).value
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def tensor_over(address: int, size: int, place: tuple[int, int]) -> Tensor:
    """uint8 ``[size]`` over the memory at ``address``, which must outlive every use of it.

    Args:
        address: where it begins, of the device that ``place`` names.
        size: in bytes.
        place: kind and number of the device, see `anabranch.serving.elasticmoe.backend.Range.place`.
    """
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    # The C library's own `free` lets go of the description when torch is done with it: a callback into Python could come after the
    # interpreter has ended.
    where = _libc.malloc(ctypes.sizeof(_Managed))
    managed = _Managed.from_address(where)
    managed.size, managed.manager_ctx, managed.deleter = size, None, _FREE
    shape = ctypes.cast(where + _Managed.size.offset, ctypes.POINTER(ctypes.c_int64))
    # Without strides: the numbers are next to each other.
    managed.tensor = _Tensor(address, *place, 1, _UINT, 8, 1, shape, None, 0)
    return torch.from_dlpack(_new_capsule(where, _NAME, None))
