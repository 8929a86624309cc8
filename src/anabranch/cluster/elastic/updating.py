"""A step of the optimizer on slices, beside them: what was there stays, so a step that is taken back is forgotten.

A parameter without a part in a step stays as it is, moments, count of steps and all, as torch's optimizers leave one without a gradient.
"""
# Shapes: N numbers of a layer

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.cluster.elastic.state import PARAM, Slice, apart, together
from anabranch.errors import ConfigError, InputError

__all__ = ["Groups", "OptimizerFactory", "Updater"]

# Of parameters; or, where runs of numbers learn otherwise, of groups of them, as torch's optimizers take both.
OptimizerFactory = Callable[[list[Any]], torch.optim.Optimizer]
# By layer, (first, end, options of the optimizer's group) of runs of its numbers that learn alike.
Groups = Mapping[int, Sequence[tuple[int, int, dict[str, Any]]]]


@dataclass
class _Run:
    """Numbers that learn alike: what they have before the step, and then after it; their parameter of the optimizer, and its gradient."""

    part: Slice
    options: dict[str, Any]
    parameter: nn.Parameter
    gradient: Tensor


@dataclass(frozen=True)
class _Piece:
    """A slice, or what it has of one parameter. Without runs it stays as it is."""

    part: Slice
    runs: list[_Run]


class Updater:
    """Steps an optimizer on slices, without changing them.

    Args:
        factory: makes the optimizer of a list of flat parameters, or of groups of them where there are ``groups``. It must treat each
            number by itself (SGD, Adam, AdamW, RMSprop, ... do), or slices would not be the whole.
        learning_rate: factor of the factory's learning rate, by committed steps; default 1.
        groups: runs of numbers with options of their own, such as a weight decay; a layer that is not there has none.
        sizes: by layer, the numbers of each of its parameters; of layers of which in each step all have a part they need not be known.

    Raises ConfigError for an optimizer that gives slices other results than the whole.
    """

    def __init__(
        self,
        factory: OptimizerFactory,
        learning_rate: Callable[[int], float] | None = None,
        groups: Groups | None = None,
        sizes: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self._factory, self._learning_rate = factory, learning_rate
        self._groups: Groups = {}
        self._sizes: Mapping[int, Sequence[int]] = {}
        self._check()
        self._groups, self._sizes = groups or {}, sizes or {}

    def next_slices(
        self,
        slices: Mapping[int, Slice],
        gradients: Mapping[int, Tensor],
        version: int,
        *,
        layers: Mapping[int, int] | None = None,
        without: Mapping[int, AbstractSet[int]] | None = None,
    ) -> dict[int, Slice]:
        """The slices after one more step.

        Args:
            slices: by layer; or by any number, where ``layers`` says of what layer each is.
            gradients: likewise, of each slice.
            version: committed steps.
            without: by layer, which of its parameters have no part in the step; default: none.

        Raises InputError for a layer whose parameters are not all in the step and whose sizes are not known.
        """
        pieces: dict[int, list[_Piece]] = {}
        for key, own in sorted(slices.items()):
            layer = key if layers is None else layers[key]
            pieces[key] = self._pieces(layer, own, gradients[key], (without or {}).get(layer, frozenset()))
        learning = [run for of in pieces.values() for piece in of for run in piece.runs]
        if learning:
            self._step(learning, version)
        return {key: self._whole(slices[key], of) for key, of in pieces.items()}

    def _pieces(self, layer: int, own: Slice, gradient: Tensor, without: AbstractSet[int]) -> "list[_Piece]":
        """The slice as one piece; or one of each parameter, where they have not all had a part in the same steps."""
        if not without and not any(value.ndim for value in own.scalars.values()):
            return [_Piece(own, self._runs(layer, own, own, gradient))]
        if layer not in self._sizes:
            raise InputError(
                f"of layer {layer} some parameters have no part in a step, and it is not known which it has"
            )
        return [
            _Piece(part, [] if number in without else self._runs(layer, part, own, gradient))
            for number, part in enumerate(apart(own, self._sizes[layer]))
        ]

    def _runs(self, layer: int, part: Slice, own: Slice, gradient: Tensor) -> "list[_Run]":
        """A part's numbers that learn alike. An empty part is one run, as the group has it in which it lies."""
        groups = self._groups.get(layer, ((0, part.end, {}),))
        cut = [(max(first, part.first), min(end, part.end), options) for first, end, options in groups]
        at = [run for run in cut if run[0] < run[1]] or [
            (part.first, part.end, next((o for first, end, o in groups if first <= part.first < end), {}))
        ]
        found = []
        for first, end, options in at:
            here = part.piece(first, end)
            value = gradient[first - own.first : end - own.first] if first < end else gradient[:0]
            found.append(_Run(here, options, nn.Parameter(here.tensors[PARAM].clone()), value))
        return found

    def _step(self, runs: "Sequence[_Run]", version: int) -> None:
        """Make a step of an optimizer of all runs."""
        # Where nothing learns otherwise they are parameters, as a plain function takes them.
        groups = [{"params": [run.parameter], **run.options} for run in runs]
        optimizer = self._factory(groups if self._groups else [run.parameter for run in runs])
        for run in runs:
            kept = {**run.part.tensors, **run.part.scalars}
            state = {name: value.clone() for name, value in kept.items() if name != PARAM}
            if state:
                optimizer.state[run.parameter] = state
            run.parameter.grad = run.gradient.to(run.parameter.dtype)
        if self._learning_rate is not None:
            for group in optimizer.param_groups:
                # Not in place: a rate may be a tensor, which the factory gives each time.
                group["lr"] = group["lr"] * self._learning_rate(version)
        optimizer.step()
        for run in runs:
            run.part = self._after(run.part.first, run.part.end, run.parameter, optimizer)

    @staticmethod
    def _whole(own: Slice, pieces: "Sequence[_Piece]") -> Slice:
        """The slice of what became of its pieces."""
        made = [
            Slice.joined(piece.part.first, piece.part.end, [run.part for run in piece.runs])
            if piece.runs
            else piece.part
            for piece in pieces
        ]
        return made[0] if len(made) == 1 else together(own.first, own.end, made)

    def _after(self, first: int, end: int, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Slice:
        tensors, scalars = {PARAM: parameter.detach()}, {}
        for name, value in optimizer.state[parameter].items():
            kept = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
            if kept.shape == parameter.shape and kept.ndim == 1:
                tensors[name] = kept
            elif kept.ndim == 0:
                scalars[name] = kept
            elif value is not None:
                raise ConfigError(
                    f"{type(optimizer).__name__} keeps {name!r} of shape {list(kept.shape)} for {list(parameter.shape)} numbers; "
                    "an optimizer of slices must treat each number by itself"
                )
        return Slice(first, end, tensors, scalars)

    def _check(self) -> None:
        """Two steps on seven numbers, whole and in two slices."""
        generator = torch.Generator().manual_seed(0)
        value, *gradients = (torch.randn(7, generator=generator) for _ in range(3))
        whole, cut = (
            {0: Slice(0, 7, {PARAM: value})},
            {0: Slice(0, 3, {PARAM: value[:3]}), 1: Slice(3, 7, {PARAM: value[3:]})},
        )
        try:
            for gradient in gradients:
                whole = self.next_slices(whole, {0: gradient}, 0)
                cut = self.next_slices(cut, {0: gradient[:3], 1: gradient[3:]}, 0)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"optimizer_factory does not make an optimizer of a flat slice: {type(error).__name__}: {error}"
            ) from error
        joined = torch.cat([cut[0].tensors[PARAM], cut[1].tensors[PARAM]])
        if not torch.equal(whole[0].tensors[PARAM], joined):
            raise ConfigError(
                "optimizer_factory makes an optimizer that does not treat each number by itself, so slices are not the whole"
            )
