"""Tensors that are the same on every peer, to the bit: `SharedState`, and how one peer fetches from another what differs.

state = SharedState({"weight": weight, "momentum": momentum})
while ...:
    state.revision += 1
    peers.sync_shared_state(state)          # sends nothing where all agree
"""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from anabranch.bounds import shown
from anabranch.cluster.pccl.elections import MOST_DIMS, MOST_NAMES
from anabranch.cluster.pccl.hashing import bytes_of, tensor_hash
from anabranch.cluster.pccl.links import LinkError, Place, call_peer
from anabranch.cluster.pccl.times import HANDSHAKE_S, Times
from anabranch.cluster.pccl.wire import (
    Kind,
    WireError,
    is_plain,
    number,
    packed,
    receive_exactly,
    receive_frame,
    send_all,
)
from anabranch.errors import InputError

__all__ = ["Shared", "SharedState"]

_PIECE = 1 << 20
# That one who serves waits at most for one who fetches.
_MOST_IDLE_S = 3600
_LONGEST_NAME = 256
# What an entry takes beside name and shape, at most; and all of them, with room for the rest of a message.
_ENTRY_BYTES, _MOST_TOLD = 64, 900_000


@dataclass(frozen=True)
class Shared:
    """What `Communicator.sync_shared_state` did.

    Attributes:
        revision: that all have now.
        sent_bytes, received_bytes: of tensors, by this peer. 0 in a program that computes the same everywhere.
        fetched: names of tensors that were other ones here.
        is_first: nothing was shared in this group before.
    """

    revision: int
    sent_bytes: int
    received_bytes: int
    fetched: tuple[str, ...] = ()
    is_first: bool = False


class SharedState:
    """Named tensors with a revision.

    Args:
        tensors: by name; they are written in place.
        revision: counts calls of `Communicator.sync_shared_state`: one more before each.
        progress: what was done since, in any unit of the program. Where nothing was shared before, and several begin at one revision, who
            has done most is whose state counts.
        settings: texts by name that must be the same on all peers and are not fetched: who has others gets `Mismatch`, which names them.

    Raises InputError for names that are too long, values that are no tensors, and more of both than a message holds.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        revision: int = 0,
        settings: Mapping[str, str] | None = None,
        *,
        progress: int = 0,
    ) -> None:
        self.tensors, self.revision, self.settings = dict(tensors), revision, dict(settings or {})
        self.progress = progress
        self.check()

    def check(self) -> None:
        """Raises InputError for what cannot be shared; asked again before it is, as its parts may have been put there since."""
        for name in ("revision", "progress"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 2**62:
                raise InputError(f"the {name} is {shown(value)}; use a whole number from 0")
        for name, value in self.settings.items():
            if not _is_word(name) or not _is_word(value) or name in self.tensors:
                raise InputError(
                    f"the setting {shown(name)} with value {shown(value)} is none; use texts of 1 to {_LONGEST_NAME} letters, and a name "
                    "that no tensor has"
                )
        for name, tensor in self.tensors.items():
            if not _is_word(name):
                raise InputError(f"the tensor's name {shown(name)} is none; use a text of 1 to {_LONGEST_NAME} letters")
            if not isinstance(tensor, Tensor):
                raise InputError(f"{shown(name)} is a {type(tensor).__name__}; share tensors")
            why = not_written(tensor) or ("a view of negated numbers" if tensor.is_neg() else "")
            if not why and tensor.dim() > MOST_DIMS:
                why = f"a tensor of {tensor.dim()} dimensions"
            if why:
                raise InputError(f"{shown(name)} is {why}, which cannot be shared; share a dense clone")
        told = sum(len(json.dumps(name)) + 20 * tensor.dim() + _ENTRY_BYTES for name, tensor in self.tensors.items())
        told += sum(len(json.dumps([name, value])) + _ENTRY_BYTES for name, value in self.settings.items())
        if len(self.tensors) + len(self.settings) > MOST_NAMES or told > _MOST_TOLD:
            raise InputError(
                f"a state of {len(self.tensors)} tensors is more than a message holds; share up to {MOST_NAMES} with short names, "
                "or join some"
            )

    def entries(self) -> list[list[Any]]:
        """``[name, dtype, shape, hash]`` of each, in order of names; of settings ``[name, value, [], ""]``, so that no bytes differ."""
        tensors = [
            [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), tensor_hash(tensor)]
            for name, tensor in self.tensors.items()
        ]
        return sorted(tensors + [[name, value, [], ""] for name, value in self.settings.items()])

    def digest(self) -> str:
        """Of all names, forms and bytes."""
        text = repr(self.entries()).encode()
        return tensor_hash(torch.frombuffer(bytearray(text), dtype=torch.uint8))


def _is_word(text: Any) -> bool:
    return isinstance(text, str) and 0 < len(text) <= _LONGEST_NAME and is_plain(text)


def has_no_numbers(tensor: Tensor) -> str:
    """What a tensor is that has no memory of its form, so that nobody can read it; nothing where it has."""
    if is_lazy(tensor):
        return "a parameter that is not initialised"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.device.type == "meta":
        return "a tensor on the meta device"
    if tensor.layout == torch.strided and tensor.numel():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if (tensor.storage_offset() + last + 1) * tensor.element_size() > tensor.untyped_storage().nbytes():
            return "a tensor whose memory was freed"
    return ""


def not_written(tensor: Tensor) -> str:
    """Why nothing can be written into a tensor in place, byte by byte; nothing where it can."""
    if why := has_no_numbers(tensor):
        return why
    if tensor.layout != torch.strided or tensor.is_quantized:
        return (
            f"a tensor of layout {tensor.layout}" if tensor.layout != torch.strided else f"a tensor of {tensor.dtype}"
        )
    if tensor.is_conj():
        return "a conjugate view"
    if tensor.is_inference():
        return "a tensor of inference mode"
    if any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return "an expanded tensor, whose elements share their memory"
    return ""


class Sharing:
    """The side that serves: for as long as peers may ask, a state lies here."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state: SharedState | None = None
        self._revision, self.sent_bytes = -1, 0

    def offer(self, state: SharedState | None, revision: int = -1) -> None:
        """Serve ``state`` as what was elected under ``revision``; None for nothing."""
        with self._lock:
            self._state, self._revision = state, revision
            if state is not None:
                self.sent_bytes = 0

    def serve(self, sock: socket.socket, hello: dict[str, Any]) -> None:
        """Send a caller what it asks for."""
        with sock:
            idle_s = number(hello, "idle_s", _MOST_IDLE_S)
            state = self._awaited(number(hello, "revision"), idle_s)
            send_all(sock, packed(Kind.WELCOME), time.monotonic() + idle_s)
            asked = receive_frame(sock, time.monotonic() + idle_s)
            names = asked.body.get("names") if asked.kind == Kind.FETCH else None
            if not isinstance(names, list) or not all(
                isinstance(name, str) and name in state.tensors for name in names
            ):
                raise WireError("tensors that are not shared")
            for name in names:
                for view in _pieces(_flat(state.tensors[name])):
                    # Ahead of sending: once it has come, the call it belongs to may be over.
                    with self._lock:
                        self.sent_bytes += len(view)
                    send_all(sock, view, time.monotonic() + idle_s)

    def _awaited(self, revision: int, idle_s: float) -> SharedState:
        # The caller may have heard of the plan before this peer has.
        deadline = time.monotonic() + min(idle_s, HANDSHAKE_S)
        while True:
            with self._lock:
                state, held = self._state, self._revision
            if state is not None and held == revision:
                return state
            if time.monotonic() > deadline:
                raise WireError(f"revision {revision} is not shared here")
            time.sleep(0.01)


def fetch(
    place: Place,
    entries: list[list[Any]],
    state: SharedState,
    revision: int,
    *,
    secret: bytes,
    run: str,
    times: Times,
) -> dict[str, Tensor]:
    """Tensors of another peer, on the CPU, whose bytes are those that were elected. Raises LinkError, which accuses it."""
    idle_s = times.idle_limit_s
    # In whole seconds of the other side: a part of one is one, and more than it would wait is the most.
    theirs = min(math.ceil(idle_s), _MOST_IDLE_S)
    hello = {"purpose": "state", "run": run, "revision": revision, "idle_s": theirs}
    sock, _ = call_peer(place, secret, run, hello, time.monotonic() + times.fetch_s)
    found = {}
    with sock:
        try:
            # After both have proved themselves: before it, a message may not be so long.
            asked = packed(Kind.FETCH, {"names": [entry[0] for entry in entries]})
            send_all(sock, asked, time.monotonic() + idle_s)
            for name, _, _, digest in entries:
                held = state.tensors[name]
                came = torch.empty(held.numel(), dtype=held.dtype)
                for view in _pieces(came):
                    receive_exactly(sock, view, time.monotonic() + idle_s)
                if tensor_hash(came) != digest:
                    raise LinkError(f"peer {place.peer} sent another {name!r} than was elected", place.peer)
                found[name] = came.reshape(held.shape)
        except OSError as error:
            raise LinkError(f"peer {place.peer} stopped sending: {error}", place.peer) from None
    return found


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous().reshape(-1)


def _pieces(flat: Tensor) -> list[memoryview]:
    data = bytes_of(flat)
    return [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]
