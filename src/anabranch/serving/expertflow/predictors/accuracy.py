"""How well routes that nobody learned from are predicted, in lock-step decoding as an engine does it: the paper's B_acc."""
# Shapes: B sequences of a batch, S recorded tokens, L routed layers, E experts, K choices

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from anabranch.errors import DataError
from anabranch.serving.expertflow.layout import Expert, Layout
from anabranch.serving.expertflow.predictors.base import Naming, RoutePredictor, Row
from anabranch.serving.expertflow.routes import Accuracy, Routes, union_accuracy

__all__ = ["decode_accuracy"]


def decode_accuracy(
    predictor: RoutePredictor,
    routes: Routes,
    *,
    prompt: int,
    batch: int = 4,
    naming: Naming = Naming(),  # noqa: B008
) -> Accuracy:
    """Of the experts that batches want, how many were named before their layer ran; means over layers and decoding steps.

    Sequences are put together by length; ``batch`` of them (all, if there are fewer) decode from their ``prompt``-th token on (from the
    middle of those that end before) until the first ends. What is predicted before a step counts, and what is corrected within it
    (`RoutePredictor.refine`). A predictor that looks at what layers compute (router look-ahead) cannot be judged on routes.

    Raises DataError if no two tokens of ``batch`` sequences follow each other.
    """
    layout = Layout.plain(routes.num_experts, routes.top_k)
    rows = sorted(routes.sequences(), key=lambda one: one.stop - one.start)
    size = min(batch, len(rows))
    wanted, named = [], []
    for first in range(0, len(rows) - size + 1, size):
        group = rows[first : first + size]
        for step in _Decoding(predictor, routes, layout, group, prompt, naming):
            wanted.append(step[0])
            named.append(step[1])
    if not wanted:
        raise DataError("no recorded sequence has two tokens, so there is no step to predict")
    return union_accuracy(np.stack(wanted), np.stack(named))


class _Decoding:
    """One batch, from its prompts on. Iterated it gives (wanted_LE, named_LE) of each decoding step."""

    def __init__(
        self,
        predictor: RoutePredictor,
        routes: Routes,
        layout: Layout,
        group: Sequence[slice],
        prompt: int,
        naming: Naming,
    ) -> None:
        self._predictor, self._layout, self._naming = predictor, layout, naming
        shortest = group[0].stop - group[0].start
        self._prompt = prompt if prompt < shortest else max(shortest // 2, 1)
        self._ids = [routes.token_N[one][:shortest] for one in group]
        self._chosen_BSLE = np.stack([routes.chosen(one)[:shortest] for one in group])
        self._top_k = routes.top_k

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        keys = [f"row-{number}" for number in range(len(self._ids))]
        self._run(keys, 0, self._prompt)
        for end in range(self._prompt + 1, self._chosen_BSLE.shape[1] + 1):
            yield self._run(keys, end - 1, end)
        for key in keys:
            self._predictor.forget(key)

    def _run(self, keys: Sequence[str], begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        predictor, new = self._predictor, end - begin
        rows = [Row(key, ids[:end], new, self._prompt) for key, ids in zip(keys, self._ids, strict=True)]
        prob_TLE = predictor.predict(np.concatenate([ids[begin:end] for ids in self._ids]), rows)
        num_layers = self._layout.num_layers
        named: list[list[Expert]] = [[] for _ in range(num_layers)]
        if prob_TLE is not None:
            named = self._naming.step(prob_TLE, self._layout, predictor.is_calibrated)
        chosen_TLE = self._chosen_BSLE[:, begin:end].reshape(-1, *self._chosen_BSLE.shape[2:])
        for layer in range(num_layers):
            index_TK = _indices(chosen_TLE[:, layer], self._top_k[layer])
            if predictor.observes:
                predictor.observe(layer, index_TK, rows)
            found = predictor.refine(layer, torch.empty(len(index_TK), 0), torch.from_numpy(index_TK))
            if found is not None:
                later, prob_TE = found
                named[later] = self._naming.layer(prob_TE, self._layout, later, predictor.is_calibrated)
        named_LE = np.zeros(chosen_TLE.shape[1:], bool)
        for layer, experts in enumerate(named):
            named_LE[layer, [expert.number for expert in experts]] = True
        return np.any(chosen_TLE, axis=0), named_LE


def _indices(chosen_TE: np.ndarray, num_choices: int) -> np.ndarray:
    """int64 [T, K], the chosen experts of each token; -1 where there are fewer."""
    index_TK = np.full((len(chosen_TE), num_choices), -1, np.int64)
    token, expert = np.nonzero(chosen_TE)
    index_TK[token, np.arange(len(token)) - np.searchsorted(token, token)] = expert
    return index_TK
