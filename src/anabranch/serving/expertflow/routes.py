"""`Routes`: recorded routes, a token's choices of all layers as packed bits, with the token ids. What predictors learn from.

with record_routing(model) as recorder:
    model(token_BL)
routes = Routes.from_trace(recorder.trace())          # the same trace feeds `anabranch.routing.consistency`
routes.save("routes.npz")
"""
# Shapes: N tokens (sequence after sequence, in order), L routed layers, E experts of the widest layer, K choices, S sequences, T tokens

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

import numpy as np

from anabranch.errors import DataError
from anabranch.files import atomic_file
from anabranch.routing.trace import RoutingTrace

VERSION = 1


@dataclass(frozen=True)
class Routes:
    """Routes of several sequences.

    Attributes:
        bits_NLP: uint8, destinations as bits (`numpy.packbits`).
        token_N: int32, -1 where unknown.
        sequence_N: int64, ascending.
        position_N: int32, ascending within a sequence.
        num_experts: destinations of each layer.
        top_k: most experts of a token in each layer.
    """

    bits_NLP: np.ndarray
    token_N: np.ndarray
    sequence_N: np.ndarray
    position_N: np.ndarray
    num_experts: tuple[int, ...]
    top_k: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.num_experts)

    def __len__(self) -> int:
        return len(self.token_N)

    @classmethod
    def from_trace(cls, trace: RoutingTrace) -> Self:
        """Of a recording in which every layer routes every token. Raises DataError for another."""
        bits, places = [], None
        for layer in trace.layers:
            decisions = trace.decisions(layer.layer)
            order = np.lexsort((decisions.position_N, decisions.item_N))
            found = (decisions.item_N[order], decisions.position_N[order], decisions.token_N[order])
            if places is not None and not all(map(np.array_equal, places, found)):
                raise DataError(f"layer {layer.layer} of the trace did not route the same tokens as the first one")
            places = found
            chosen_NE = np.zeros((len(order), max(other.num_destinations for other in trace.layers) + 1), bool)
            # -1 is the last column.
            np.put_along_axis(chosen_NE, decisions.index_NK[order].astype(np.int64), True, axis=1)
            bits.append(np.packbits(chosen_NE[:, :-1], axis=1))
        if places is None or not len(places[0]):
            raise DataError("the trace is empty, so it holds no routes")
        item_N, position_N, token_N = places
        sizes = (tuple(layer.num_destinations for layer in trace.layers), tuple(layer.top_k for layer in trace.layers))
        return cls(np.stack(bits, 1), token_N.astype(np.int32), item_N, position_N.astype(np.int32), *sizes)

    @classmethod
    def concatenate(cls, parts: Sequence["Routes"]) -> "Routes":
        """Several recordings of one model; sequences are numbered anew. Raises DataError if they are of different models."""
        first = parts[0]
        if any((part.num_experts, part.top_k) != (first.num_experts, first.top_k) for part in parts):
            raise DataError("these routes are of models of different shapes")
        sequence, start = [], 0
        for part in parts:
            number_N = np.unique(part.sequence_N, return_inverse=True)[1]
            sequence.append(number_N + start)
            start += int(number_N[-1]) + 1
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("bits_NLP", "token_N", "position_N")
        }
        sizes = {"num_experts": first.num_experts, "top_k": first.top_k}
        return cls(**joined, sequence_N=np.concatenate(sequence), **sizes)  # type: ignore[arg-type]

    def chosen(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """bool chosen_NLE of these tokens."""
        return np.unpackbits(self.bits_NLP[rows], axis=-1, count=max(self.num_experts)).astype(bool)

    @cached_property
    def starts(self) -> np.ndarray:
        """First row of each sequence, and one past the last."""
        changes = np.flatnonzero(np.diff(self.sequence_N)) + 1
        return np.concatenate(([0], changes, [len(self)]))

    def sequences(self) -> Iterator[slice]:
        """Rows of each sequence."""
        for begin, end in zip(self.starts[:-1], self.starts[1:], strict=True):
            yield slice(int(begin), int(end))

    def take(self, sequences: Sequence[int] | np.ndarray) -> "Routes":
        """Some sequences, by their place."""
        rows = np.concatenate([np.arange(self.starts[number], self.starts[number + 1]) for number in sequences])
        columns = (self.bits_NLP[rows], self.token_N[rows], self.sequence_N[rows], self.position_N[rows])
        return Routes(*columns, self.num_experts, self.top_k)

    def index_STK(self, layer: int) -> np.ndarray:
        """The choices of a layer as `anabranch.routing.cache_policy` takes them: -1 where a sequence has ended or a choice is unused."""
        longest = int(np.diff(self.starts).max())
        index_STK = np.full((len(self.starts) - 1, longest, self.top_k[layer]), -1, np.int64)
        for number, rows in enumerate(self.sequences()):
            token, expert = np.nonzero(self.chosen(rows)[:, layer])
            place = np.arange(len(token)) - np.searchsorted(token, token)
            index_STK[number, token, place] = expert
        return index_STK

    def save(self, path: str | Path) -> None:
        """Write an ``.npz``, all or nothing."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, version=VERSION, **fields)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read one back. Raises DataError if it is not there or of another kind."""
        try:
            with np.load(path) as file:
                if int(file["version"]) != VERSION:
                    raise DataError(f"{path} holds routes of version {int(file['version'])}; this is {VERSION}")
                values = {name: file[name] for name in cls.__dataclass_fields__}
        except (OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile, zlib.error) as error:
            raise DataError(f"{path} does not hold recorded routes: {error}") from None
        sizes = {name: tuple(values.pop(name).tolist()) for name in ("num_experts", "top_k")}
        return cls(**values, **sizes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Accuracy:
    """How well a batch's experts were predicted, mean over layers (and batches).

    Attributes:
        recall: the paper's batch-level accuracy B_acc, |R and R^| / |R|, R the union of the batch's routes, R^ the predicted one.
        precision: |R and R^| / |R^|.
        wanted, predicted: |R| and |R^|.
    """

    recall: float
    precision: float
    wanted: float
    predicted: float


def batch_accuracy(chosen_BLE: np.ndarray, predicted_BLE: np.ndarray) -> Accuracy:
    """Of one batch of B tokens, both bool."""
    return union_accuracy(np.any(chosen_BLE, axis=0, keepdims=True), np.any(predicted_BLE, axis=0, keepdims=True))


def union_accuracy(wanted_XLE: np.ndarray, predicted_XLE: np.ndarray) -> Accuracy:
    """Of X batches whose unions are given; layers without a wanted (for precision: predicted) expert do not count."""
    both_XL = (wanted_XLE & predicted_XLE).sum(-1)
    wanted_XL, predicted_XL = wanted_XLE.sum(-1), predicted_XLE.sum(-1)
    recall = both_XL[wanted_XL > 0] / wanted_XL[wanted_XL > 0]
    precision = both_XL[predicted_XL > 0] / predicted_XL[predicted_XL > 0]
    right, precise = (float(values.mean()) if values.size else float("nan") for values in (recall, precision))
    return Accuracy(right, precise, float(wanted_XL.mean()), float(predicted_XL.mean()))
