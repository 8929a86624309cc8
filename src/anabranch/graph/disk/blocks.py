"""Blocks of the file: where an element lies in one, how one is read, and how it is seen that it is what was written.

A block is one or more pages of 4,096 bytes, which begin at a multiple of that in the file. It holds as many whole elements as fit in:

    vector    float32, padded with zeros to a multiple of 16 numbers
    label     int64, the id outside
    number    int32, of links
    links     int32, slots of neighbours; -1 behind the last

and in its last 8 bytes a digest of all others, of its number and of a number drawn for the file: one that is damaged, torn, or of another
place or file is not taken for it. Slot s is element s % (elements of a block) of block s // (elements of a block).
"""
# Shapes: U blocks, W words of 8 bytes in a block, R links of an element

import os
from typing import NamedTuple

import numpy as np
from llvmlite import ir

from anabranch.graph.hnsw.raw import LANES, cgutils, get_i32, helper, intrinsic, kernel, types

PAGE = 4096

# Bytes beside the vector and the links of an element, and of a digest.
LABEL, NUMBER, DIGEST = 8, 4, 8

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_CAN_ADVISE = hasattr(os, "posix_fadvise")
_WILL_NEED = getattr(os, "POSIX_FADV_WILLNEED", 0)

_PRIME = np.uint64(0x9E3779B97F4A7C15)
_OTHER = np.uint64(0xD6E8FEB86659FD93)
_32, _29 = np.uint64(32), np.uint64(29)


class Form(NamedTuple):
    """What kernels must know of a file, all int64.

    Attributes:
        file: its descriptor.
        place: of the first block in it.
        block: bytes of a block.
        per: elements in one.
        size: bytes of an element.
        width: numbers of a vector, with its padding.
        links: most links of an element.
        elements: how many there are.
        seed: of digests.
        cached: how many blocks, the first ones, are held in memory.
        kind: of distance, as in `hnsw.layout`: 0 squared L2, 1 for 1 - <a, b>.
        dim: numbers of a vector.
    """

    file: int
    place: int
    block: int
    per: int
    size: int
    width: int
    links: int
    elements: int
    seed: int
    cached: int
    kind: int
    dim: int


def padded_width(dim: int) -> int:
    """Numbers that a vector takes in a block."""
    return -(-dim // LANES) * LANES


def element_bytes(dim: int, links: int) -> int:
    """Bytes of an element in a block."""
    return -(-(4 * padded_width(dim) + LABEL + NUMBER + 4 * links) // 8) * 8


def block_of(dim: int, links: int) -> tuple[int, int]:
    """Bytes of a block, and how many elements lie in one."""
    size = element_bytes(dim, links)
    block = -(-(size + DIGEST) // PAGE) * PAGE
    return block, (block - DIGEST) // size


@intrinsic
def read_at(typingctx, file, to, count, offset):
    """pread: read ``count`` bytes at ``offset`` of a file to an address; how many came, -1 for an error."""

    def codegen(context, builder, signature, arguments):
        kinds = [_I32, ir.PointerType(), _I64, _I64]
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I64, kinds), "pread")
        file, to, count, offset = arguments
        return builder.call(function, [builder.trunc(file, _I32), builder.inttoptr(to, kinds[1]), count, offset])

    whole = types.int64
    return whole(whole, whole, whole, whole), codegen


@intrinsic
def ask_for(typingctx, file, offset, count):
    """posix_fadvise: begin to read so many bytes into the system's cache, and do not wait for them. Nothing where it cannot be asked."""

    def codegen(context, builder, signature, arguments):
        if _CAN_ADVISE:
            kinds = [_I32, _I64, _I64, _I32]
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I32, kinds), "posix_fadvise")
            file, offset, count = arguments
            builder.call(function, [builder.trunc(file, _I32), offset, count, ir.Constant(_I32, _WILL_NEED)])
        return context.get_dummy_value()

    whole = types.int64
    return types.void(whole, whole, whole), codegen


@helper
def digest(word_W, number, seed):
    """Of all words but the last. Whatever single word is changed, it is another one: each step can be undone."""
    start = (np.uint64(seed) ^ np.uint64(number)) * _PRIME
    a, b, c, d = start, start ^ _OTHER, start + _PRIME, start - _OTHER
    last = len(word_W) - 1
    # Four sums that do not wait for each other.
    for place in range(0, last - 3, 4):
        a = (a ^ word_W[place]) * _PRIME
        b = (b ^ word_W[place + 1]) * _PRIME
        c = (c ^ word_W[place + 2]) * _PRIME
        d = (d ^ word_W[place + 3]) * _PRIME
        a, b, c, d = a ^ (a >> _32), b ^ (b >> _32), c ^ (c >> _32), d ^ (d >> _32)
    for place in range(last - last % 4, last):
        a = (a ^ word_W[place]) * _PRIME
        a ^= a >> _32
    for other in (b, c, d):
        a = (a ^ other) * _OTHER
        a ^= a >> _29
    return a


@helper
def bring(form, cache_CW, room_W, number):
    """A block by its number, from memory or from the file into ``room_W``; and whether it is what was written."""
    if number < form.cached:
        return cache_CW[number], True
    came = read_at(form.file, np.int64(room_W.ctypes.data), form.block, form.place + number * form.block)
    return room_W, came == form.block and digest(room_W, number, form.seed) == room_W[-1]


@helper
def label_of(form, block_W, place):
    """The id of the element at a place of a block."""
    return np.int64(block_W[(place * form.size + 4 * form.width) >> 3])


@helper
def links_at(form, block, place):
    """Address of the number of links, which lie behind it, of the element at a place of the block at an address."""
    return block + place * form.size + 4 * form.width + LABEL


@helper
def are_links_sound(form, links):
    """Whether their number and all of them are such as there can be; what follows them looks at nothing."""
    number = get_i32(links, 0)
    if number < 0 or number > form.links:
        return False
    for place in range(1, number + 1):
        if get_i32(links, place) < 0 or get_i32(links, place) >= form.elements:
            return False
    return True


@kernel
def seal(block_UW, first, seed):
    """Write the digests of blocks, the first of which is number ``first`` of the file."""
    for number in range(len(block_UW)):
        block_UW[number, -1] = digest(block_UW[number], first + number, seed)


@kernel
def read_blocks(form, first, block_UW):
    """Read blocks from number ``first`` on; -1, or the number of one that is not what was written."""
    for number in range(len(block_UW)):
        _, is_right = bring(form, block_UW, block_UW[number], first + number)
        if not is_right:
            return first + number
    return -1
