"""Predictors without a network of their own: TLP, SLP, frequency, router look-ahead, and the oracle."""
# Shapes: T tokens of a step, N recorded tokens, L routed layers, E experts of the widest layer, V vocabulary, D width

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from anabranch.bounds import LARGEST_FLOAT, shown
from anabranch.errors import ConfigError, DataError
from anabranch.routing.context import RoutingContext
from anabranch.serving.expertflow.predictors import files
from anabranch.serving.expertflow.predictors.base import NOTHING, Fingerprint, RoutePredictor, Row
from anabranch.serving.expertflow.routes import Routes


def named(index_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """float32 [T, E], 1 where a token names an expert."""
    prob_TE = np.zeros((len(index_TK), num_experts + 1), np.float32)
    # -1 is the last column.
    np.put_along_axis(prob_TE, index_TK, 1.0, axis=1)
    return prob_TE[:, :-1]


class Tlp(RoutePredictor):
    """Token-level: a sequence's last token goes where the one before went (the paper's baseline TLP)."""

    kind = "tlp"
    is_calibrated = True
    observes = True

    def __init__(self, fingerprint: Fingerprint) -> None:
        self.fingerprint = fingerprint
        # Of each sequence: expert numbers by layer.
        self._last: dict[Hashable, dict[int, np.ndarray]] = {}

    def predict(self, token_T: np.ndarray, rows: Sequence[Row]) -> np.ndarray | None:
        """Where the sequence was sent in the step before; nothing for a new one."""
        num_layers, num_experts = len(self.fingerprint.num_experts), max(self.fingerprint.num_experts)
        parts = []
        for row in rows:
            prob_LE = np.zeros((num_layers, num_experts), np.float32)
            for layer, index_K in self._last.get(row.key, {}).items():
                prob_LE[layer] = named(index_K[None], num_experts)[0]
            parts.append(np.broadcast_to(prob_LE, (row.num_new, *prob_LE.shape)))
        # Sequences without a name cannot be forgotten by it.
        here = {row.key for row in rows}
        self._last = {key: last for key, last in self._last.items() if isinstance(key, str) or key in here}
        return np.concatenate(parts) if parts else None

    def observe(self, layer: int, index_TK: np.ndarray, rows: Sequence[Row]) -> None:
        """Keep where the last token of each sequence went."""
        if sum(row.num_new for row in rows) != len(index_TK):
            # Padding, or streams: rows do not stand for tokens.
            return
        end = 0
        for row in rows:
            end += row.num_new
            self._last.setdefault(row.key, {})[layer] = index_TK[end - 1]

    def forget(self, key: Hashable) -> None:
        """Drop a sequence."""
        self._last.pop(key, None)


class Slp(RoutePredictor):
    """Sequence of layers: a layer's experts are those of the layer before, by number (the paper's baseline SLP)."""

    kind = "slp"
    is_calibrated = True
    refines = True
    knows_steps = False

    def __init__(self, fingerprint: Fingerprint) -> None:
        self.fingerprint = fingerprint

    def refine(
        self, layer: int, x_TD: Tensor, index_TK: Tensor, carry: Mapping[str, Tensor] = NOTHING
    ) -> tuple[int, np.ndarray] | None:
        """The next layer's."""
        sizes = self.fingerprint.num_experts
        if layer + 1 >= len(sizes):
            return None
        index = index_TK.cpu().numpy()
        return layer + 1, named(np.where(index < sizes[layer + 1], index, -1), sizes[layer + 1])


class Frequency(RoutePredictor):
    """How often each token id was sent to each expert; ids that were not seen get the mean. Without ids: the mean alone.

    Args:
        fingerprint: of the model.
        vocab_size: V.
        weight: of the mean, in tokens.
    """

    kind = "frequency"
    is_calibrated = True

    def __init__(self, fingerprint: Fingerprint, vocab_size: int, weight: float = 1.0) -> None:
        self.fingerprint, self.vocab_size, self.weight = fingerprint, vocab_size, weight
        self.prob_VLE: np.ndarray | None = None

    def fit(self, routes: Routes) -> Self:
        """Count."""
        chosen_NLE = routes.chosen()
        mean_LE = chosen_NLE.mean(0, dtype=np.float32)
        count_VLE = np.zeros((self.vocab_size, *mean_LE.shape), np.float32)
        np.add.at(count_VLE, routes.token_N[routes.token_N >= 0], chosen_NLE[routes.token_N >= 0])
        seen_V11 = np.bincount(routes.token_N[routes.token_N >= 0], minlength=self.vocab_size)[:, None, None]
        self.prob_VLE = ((count_VLE + self.weight * mean_LE) / (seen_V11 + self.weight)).astype(np.float32)
        return self

    def predict(self, token_T: np.ndarray, rows: Sequence[Row]) -> np.ndarray | None:
        """By id; nothing for ids that the table does not have. Raises ConfigError if it was not fitted."""
        if self.prob_VLE is None:
            raise ConfigError("the frequency predictor has seen no routes; fit it first")
        most = len(self.prob_VLE)
        prob_TLE = self.prob_VLE[np.minimum(token_T, most - 1)]
        prob_TLE[token_T >= most] = 0
        return prob_TLE

    def save(self, path: str | Path) -> None:
        """Write the table."""
        tensors = {"prob_VLE": files.as_tensor(self.prob_VLE)}
        files.write(path, self.kind, self.fingerprint, tensors, weight=self.weight, vocab_size=self.vocab_size)

    @classmethod
    def restore(cls, fingerprint: Fingerprint, state: dict[str, Any]) -> Self:
        """From what was written. Raises DataError for what is no table of probabilities of these layers."""
        prob_VLE, weight, sizes = state.get("prob_VLE"), state.get("weight"), fingerprint.num_experts
        if not state.keys() <= {"prob_VLE", "weight", "vocab_size"} or not isinstance(prob_VLE, Tensor):
            raise DataError(f"it has {', '.join(sorted(state))[:200]}; there must be prob_VLE and its weight")
        # Files of before do not say how many tokens there are.
        wanted = (state.get("vocab_size", max(1, len(prob_VLE) if prob_VLE.dim() else 0)), len(sizes), max(sizes))
        if tuple(prob_VLE.shape) != wanted or not bool(((prob_VLE >= 0) & (prob_VLE <= 1)).all()):
            raise DataError(f"prob_VLE of shape {list(prob_VLE.shape)} is no table of probabilities {shown(wanted)}")
        if not isinstance(weight, float | int) or isinstance(weight, bool) or not 0 < weight < LARGEST_FLOAT:
            raise DataError(f"weight is {shown(weight)}; it must be a number above 0")
        made = cls(fingerprint, len(prob_VLE), weight)
        made.prob_VLE = prob_VLE.numpy()
        return made


class RouterLookahead(RoutePredictor):
    """The next layer's router on this layer's input (common elsewhere): knows one layer ahead, needs no training.

    Args:
        fingerprint: of the model.
        layers: its routed layers, in order.
    """

    kind = "router_lookahead"
    refines = True
    knows_steps = False

    def __init__(self, fingerprint: Fingerprint, layers: Sequence[Any]) -> None:
        self.fingerprint, self._layers = fingerprint, list(layers)

    @torch.no_grad()
    def refine(
        self, layer: int, x_TD: Tensor, index_TK: Tensor, carry: Mapping[str, Tensor] = NOTHING
    ) -> tuple[int, np.ndarray] | None:
        """The next layer's scores."""
        if layer + 1 >= len(self._layers):
            return None
        score = self._layers[layer + 1].router.score
        score_TE = score.activate(score.project(x_TD, RoutingContext(carry=dict(carry))))
        return layer + 1, score_TE.float().cpu().numpy()


class Oracle(RoutePredictor):
    """Knows recorded routes: of a sequence's tokens so far, and of those to come.

    Args:
        fingerprint: of the model.
        routes: recorded with ids, every token of each sequence.
        steps_ahead: further steps that it tells (where the recording goes on).
    """

    kind = "oracle"
    is_calibrated = True

    def __init__(self, fingerprint: Fingerprint, routes: Routes, steps_ahead: int = 1) -> None:
        self.fingerprint, self.steps_ahead, self._routes = fingerprint, steps_ahead, routes
        self._row: dict[bytes, int] = {}
        self._next: dict[int, int] = {}
        for rows in routes.sequences():
            digest = hashlib.blake2b(digest_size=16)
            for row in range(rows.start, rows.stop):
                digest.update(int(routes.token_N[row]).to_bytes(4, "little", signed=True))
                self._row.setdefault(digest.digest(), row)
                if row + 1 < rows.stop:
                    self._next.setdefault(row, row + 1)

    def predict(self, token_T: np.ndarray, rows: Sequence[Row]) -> np.ndarray | None:
        """What was recorded; nothing for sequences that were not."""
        found = [place for row in rows for place in self._places(row)]
        return self._of(found)

    def predict_ahead(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """What was recorded of the tokens after these."""
        places, ahead = [self._places(row)[-1] for row in rows], []
        for _ in range(self.steps_ahead):
            places = [None if place is None else self._next.get(place) for place in places]
            ahead.append(self._of(places))
        return ahead

    def _places(self, row: Row) -> list[int | None]:
        digest, places = hashlib.blake2b(digest_size=16), []
        for token in row.ids:
            digest.update(int(token).to_bytes(4, "little", signed=True))
            places.append(self._row.get(digest.digest()))
        return places[len(places) - row.num_new :]

    def _of(self, places: Sequence[int | None]) -> np.ndarray:
        sizes = self.fingerprint.num_experts
        prob_TLE = np.zeros((len(places), len(sizes), max(sizes)), np.float32)
        known = [number for number, place in enumerate(places) if place is not None]
        prob_TLE[known] = self._routes.chosen(np.array([places[number] for number in known], np.int64))
        return prob_TLE
