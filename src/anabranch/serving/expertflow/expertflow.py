"""ExpertFlow: a mixture of experts in a small fast memory, by predicting whole routes, regrouping tokens, and prefetching experts.

"ExpertFlow: Efficient Mixture-of-Experts Inference via Predictive Expert Caching and Token Scheduling", He et al., arXiv 2410.17954 (v2).

    paper                                  here
    Routing Path Predictor (RPP)           `predictors.encdec.EncoderDecoder`; TLP and SLP in `predictors.plain`
    batch-level accuracy B_acc             `routes.batch_accuracy`
    Token Scheduler, Merge, Reindex        `token_scheduler`; the dual-batch pipeline in `dual_batch`
    Expert Cache Engine: PLEC              `plan`, `policy.Plec`
    real-time correction                   `cache.ExpertCache`
    Cache-MoE, SE-MoE                      `policy.CacheMoe`, `policy.SeMoe`

    model, tokenizer = load_model("runs/a")
    with offload(model, "2GiB") as engine:              # from here on the experts come when they are wanted
        generate(model, prompts)
        engine.stats().counters["expert_hits"]

Predictions only move weights; the model's own routers decide, so outputs do not change.
"""
# Shapes: N items, K choices, T tokens of a step, L routed layers, E experts, D width

import hashlib
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.nn.moe import MoE
from anabranch.nn.pool import ExpertPool
from anabranch.serving.core.batch import Batch, Sampled
from anabranch.serving.core.client import EngineStats
from anabranch.serving.expertflow.arena import Arena
from anabranch.serving.expertflow.cache import Audit, Counters, ExpertCache
from anabranch.serving.expertflow.history import BatchHistory, call_rows
from anabranch.serving.expertflow.layout import Expert
from anabranch.serving.expertflow.native_mover import make_mover
from anabranch.serving.expertflow.pairs import Pairs
from anabranch.serving.expertflow.policy import Policy, make_policy
from anabranch.serving.expertflow.pools import Pools, pools_of, sketches, weights_of
from anabranch.serving.expertflow.predictors import find_predictor
from anabranch.serving.expertflow.predictors.base import Fingerprint, Naming, RoutePredictor, Row, new_ids
from anabranch.serving.expertflow.predictors.plain import RouterLookahead
from anabranch.serving.expertflow.tiers import CudaTier, DequantTier, MemoryTier, Tier, write_experts
from anabranch.serving.expertflow.token_scheduler import TokenScheduler
from anabranch.sizes import parse_bytes

logger = logging.getLogger(__name__)

TIERS = ("memory", "file", "int8", "int4")
PROBE = "The quick brown fox: 0123456789 += naïve façade, 東京\n\tdef __init__(self): return None"
TierName = Literal["memory", "file", "int8", "int4"]


def offload(
    model: Decoder,
    budget_bytes: int | str | None,
    *,
    policy: str | Policy = "plec",
    tier: TierName | Tier = "memory",
    predictor: str | RoutePredictor | None = "router_lookahead",
    folder: str | Path | None = None,
    drop_cache: bool = False,
    tokenizer: Any = None,
    naming: Naming = Naming(),  # noqa: B008
    workers: int = 3,
    device: torch.device | str | None = None,
    audit: Audit | None = None,
    keep: bool | None = None,
    insist: bool = True,
) -> "OffloadEngine":
    """Replace the expert pools of a loaded model by pools of ``budget_bytes`` that load experts when they are wanted.

    Args:
        model: a decoder with `MoE` layers (ReXMoE's and other designs on it too); shared experts and dense layers stay as they are. Of one
            without, adapters of mixtures beside its matrices (`RoutedLowRank`, LoRA-Mixer's too) are the experts.
        budget_bytes: of experts in fast memory, as a number or "2GiB"; None for all of them.
        policy: see `anabranch.serving.expertflow.policy`.
        tier: where the experts go: they stay in ``memory``; a ``file`` in ``folder`` (a temporary one by default); ``int8`` or
            ``int4`` in memory, which changes the model's outputs to those of its quantised experts; or a tier of one's own.
        predictor: a name, a fitted one, or None. Policies that need no reference string run without.
        folder: of the file.
        drop_cache: do not let the system's page cache keep what was read of the file.
        tokenizer: of the model; a predictor made for another one is refused.
        naming: which of the predicted experts are loaded ahead.
        workers: threads that load.
        device: of the slots; None for that of the model.
        audit: called at every event of the cache.
        keep: hold on to the model's own pools, so that `OffloadEngine.restore` can give them back. None does so where they stay in
            memory anyway.
        insist: refuse a fitted predictor that was made for other weights of the routers; False warns and takes ``router_lookahead``.

    Raises ConfigError for a model without experts, an unknown name, or a budget that is too small (with the least that suffices);
    DataError for a file that holds no predictor; CheckpointError for a predictor that was made for another model: of other numbers of
    experts, another tokenizer, or other weights of the routers (of files that do not say of which, it is told that they do not).
    """
    found = pools_of(model)
    weights = list(map(weights_of, found.pools))
    if tier in ("int8", "int4") and not all(isinstance(pool, ExpertPool) for pool in found.pools):
        why = "the experts are in few bits already" if found.predicts else f"the experts are {found.what}"
        raise ConfigError(f"tier is {tier!r}, and {why}; use 'memory' or 'file'")
    budget = found.layout.total_bytes if budget_bytes is None else parse_bytes(budget_bytes)
    # Refuse before anything is written.
    found.slots(budget, policy)
    engine = OffloadEngine(
        model,
        found,
        budget,
        _tier(tier, weights, folder, drop_cache),
        policy=policy,
        predictor=predictor,
        fingerprint=found.fingerprint(tokenizer_fingerprint(tokenizer, model)),
        naming=naming,
        workers=workers,
        device=device,
        audit=audit,
        insist=insist,
    )
    if not (keep if keep is not None else tier == "memory" or not isinstance(tier, str)):
        for pool in found.pools:
            pool.to_empty(device="meta")
    return engine


def _tier(
    tier: TierName | Tier, weights: Sequence[tuple[Tensor, Tensor]], folder: str | Path | None, drop_cache: bool
) -> Tier:
    if not isinstance(tier, str):
        return tier
    if tier == "memory":
        return MemoryTier(weights)
    if tier in ("int8", "int4"):
        return DequantTier(weights, int(tier[3:]))
    if tier != "file":
        raise ConfigError(f"no tier {tier!r}; known: {', '.join(TIERS)}")
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="anabranch-experts-") as name:
            # Open files outlive their names.
            written = write_experts(Path(name) / "experts.bin", weights)
    else:
        Path(folder).mkdir(parents=True, exist_ok=True)
        written = write_experts(Path(folder) / "experts.bin", weights)
    written.drop_cache = drop_cache
    return written


def tokenizer_fingerprint(tokenizer: Any, model: Decoder) -> str:
    """Says which tokenizer a model's ids are of, by what it makes of a text; the vocabulary's size where there is none."""
    size = f"vocab:{model.config.vocab_size}"
    if tokenizer is None:
        return size
    ids = ",".join(map(str, tokenizer.encode(PROBE)))
    return f"{size}:{hashlib.sha256(ids.encode()).hexdigest()[:16]}"


class OffloadEngine:
    """A model whose experts come when they are wanted; what `offload` returns. A `StepHook`, and a context manager
    that gives the model its own pools back where they are in memory.

    Attributes:
        cache: book-keeping; hold ``mover.lock`` to look at more than counters.
        predictor: names experts ahead; None for none.
        fingerprint: of the model.
        pairs: of a serving engine that forms its steps in units of two, see `pair`; None for others.
        predict_s: seconds spent on predictions.
        steps: forward passes.
    """

    def __init__(
        self,
        model: Decoder,
        found: Pools,
        budget_bytes: int,
        tier: Tier,
        *,
        policy: str | Policy,
        predictor: str | RoutePredictor | None,
        fingerprint: Fingerprint,
        naming: Naming = Naming(),  # noqa: B008
        workers: int = 3,
        device: torch.device | str | None = None,
        audit: Audit | None = None,
        insist: bool = True,
    ) -> None:
        self._insist = insist
        self.model, self.layout, self.fingerprint, self.naming = model, found.layout, fingerprint, naming
        self.cache = ExpertCache(found.layout, budget_bytes, make_policy(policy), audit)
        self.predictor = self._ready(predictor, found)
        place = torch.device(device) if device is not None else model.embedding.weight.device
        self.arena = Arena(found.kinds, self.cache.num_slots, place)
        self._found = found
        self._layers, self._originals = found.layers, list(map(found.pool_of, found.layers))
        self.mover = make_mover(
            self.cache, CudaTier(tier, place) if place.type == "cuda" else tier, self.arena, workers
        )
        self.predict_s, self.steps = 0.0, 0
        self._history, self._driven, self._closed = BatchHistory(), False, False
        self.pairs: Pairs | None = None
        self._rows: list[Row] = []
        self._last: list[list[Expert]] = [[] for _ in range(found.layout.num_layers)]
        self._replace(found)
        self._handle = model.register_forward_pre_hook(self._before_call, with_kwargs=True)

    def _ready(self, predictor: str | RoutePredictor | None, found: Pools) -> RoutePredictor | None:
        if predictor is None or not self.cache.policy.needs_reference:
            return None
        if not found.predicts:
            if predictor == RouterLookahead.kind:
                return None
            raise ConfigError(f"a predictor is given, and nobody predicts which {found.what} are wanted; leave it out")
        made = find_predictor(predictor, self.fingerprint, found.layers) if isinstance(predictor, str) else predictor
        made.fingerprint.check(self.fingerprint)
        return self._fitting(made, found.layers)

    def _fitting(self, made: RoutePredictor, layers: Sequence[MoE]) -> RoutePredictor:
        """The predictor if it is of this model's routers, as far as that is known; else what takes its place. Raises CheckpointError."""
        if self.fingerprint.routers is None or not hasattr(made, "restore"):
            return made
        if made.fingerprint.routers is None:
            logger.warning(
                "the route predictor (%s) does not say which routers it was fitted on, so whether they are this model's is not known; "
                "fit it again (anabranch experts fit-predictor)",
                made.kind,
            )
            return made
        if not made.fingerprint.has_other_routers(self.fingerprint):
            return made
        wrong = f"the route predictor ({made.kind}) was made for a model of other router weights, such as one before it was trained further"
        if self._insist:
            raise CheckpointError(
                f"{wrong}; fit one on this model's routes (anabranch experts fit-predictor), or leave it out"
            )
        logger.warning(
            "%s, and is not used: %s predicts one layer ahead; fit it again (anabranch experts fit-predictor)",
            wrong,
            RouterLookahead.kind,
        )
        return RouterLookahead(self.fingerprint, layers)

    def know_routers(self) -> None:
        """The routers' weights are there now, which were not when this was made. Raises CheckpointError for a predictor of others."""
        self.fingerprint = replace(self.fingerprint, routers=sketches(self._layers))
        if self.predictor is None:
            return
        self.predictor = self._fitting(self.predictor, self._layers)
        for layer in self._layers:
            pool: Any = layer.experts
            pool.is_watched = self.predictor.refines

    def _replace(self, found: Pools) -> None:
        is_watched = self.predictor is not None and self.predictor.refines
        for number, layer in enumerate(found.layers):
            kind = found.layout.kind_of_pool[found.layout.pool_of_layer[number]]
            found.put(layer, found.offloaded(number, self.arena.of(kind), self._waves, is_watched))
        shared: Any = getattr(self.model, "shared", {})
        gone = {id(pool) for pool in found.pools}
        self._shared = {name: pool for name, pool in shared.items() if id(pool) in gone}
        for name in self._shared:
            del shared[name]

    # steps

    def pair(self, scheduler: TokenScheduler | None) -> Pairs:
        """The dual-batch pipeline for a serving engine: its `Pairs.order` is that of `anabranch.serving.core.dual_batches`.

        ``scheduler`` None leaves requests in the order in which they came. Raises ConfigError without a predictor of whole routes.
        """
        if self.predictor is None or not self.predictor.knows_steps:
            what = "none" if self.predictor is None else self.predictor.kind
            raise ConfigError(
                f"the dual-batch pipeline needs the predicted routes of all layers before a step begins, and the predictor is {what!r}; "
                "fit one (anabranch experts fit-predictor)"
            )
        self.pairs = Pairs(self.predictor, self.layout.top_k, self._history, scheduler)
        return self.pairs

    def before_step(self, batch: Batch, tokens: Sequence[int]) -> None:
        """See `StepHook`."""
        self._forget(batch.gone)
        self._driven = True
        self.begin(self._history.rows(batch, tokens))

    def after_step(self, batch: Batch, sampled: Sequence[Sampled]) -> None:
        """See `StepHook`."""
        self._driven = False
        if self.pairs is not None:
            self._history.sampled(sampled)

    def _before_call(self, model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not self._driven:
            self.begin(call_rows(arguments, options) if self.predictor is not None else [])

    def _forget(self, ids: Sequence[str]) -> None:
        self._history.forget(ids)
        if self.pairs is not None:
            self.pairs.forget(ids)
        if self.predictor is not None:
            for id in ids:
                self.predictor.forget(id)

    def begin(self, rows: list[Row], known: list[list[Expert]] | None = None) -> None:
        """A forward pass over these rows begins: predict, and let loading begin.

        ``known``: what the layers of this pass, and of those after it, are predicted to want, where that has been found out before.
        """
        begin, self._rows = time.perf_counter(), rows
        if known is None:
            steps, certain = self._expected(rows)
        else:
            steps, certain = [*known, *known[: self.layout.num_layers]], len(known)
        self.predict_s += time.perf_counter() - begin
        self.steps += 1
        with self.mover.lock:
            self.cache.begin_step(steps, certain)
            self.mover.pump()
        self.mover.go_on()

    def _expected(self, rows: list[Row]) -> tuple[list[list[Expert]], int]:
        """What the layers of this forward pass will want and, for what is worth keeping only, those of the next."""
        if self.predictor is None:
            return [], 0
        later_TLE = None
        if self.pairs is None:
            prob_TLE = self.predictor.predict(new_ids(rows), rows)
        else:
            prob_TLE, later_TLE = self.pairs.predict(rows), self.pairs.later(rows)
            self.pairs.ran(rows)
        if prob_TLE is None:
            nothing: list[list[Expert]] = [[] for _ in self._last]
            return nothing + self._last, len(nothing)
        steps = self.named(prob_TLE)
        ahead = [self.named(prob) for prob in self.predictor.predict_ahead(rows)]
        if later_TLE is not None:
            ahead.insert(0, self.named(later_TLE))
        known = steps + [step for later in ahead for step in later]
        return known + steps, len(known)

    def named(self, prob_TLE: np.ndarray) -> list[list[Expert]]:
        """The experts that a batch with these predictions is expected to want, by layer."""
        assert self.predictor is not None
        return self.naming.step(prob_TLE, self.layout, self.predictor.is_calibrated)

    def _waves(
        self,
        layer: int,
        experts: list[int],
        x_ND: Tensor | None,
        index_NK: Tensor,
        carry: Mapping[str, Tensor],
        together: bool = False,
    ) -> Iterator[dict[int, int]]:
        """{expert: slot} of what can run now, until all ``experts`` have run; with ``together``, of all at once."""
        pool = self.layout.pool_of_layer[layer]
        wanted = [Expert(pool, index) for index in experts]
        self._last[layer] = wanted
        with self.mover.lock:
            self.mover.check()
            self.cache.begin_layer(layer, wanted)
            self.mover.pump()
        self._refine(layer, x_ND, index_NK, carry)
        left = len(wanted)
        while left:
            with self.mover.lock:
                while len(ready := self.cache.ready()) < (left if together else 1):
                    self.mover.wait()
                slot_of = {expert.number: self.cache.slot_of[expert] for expert in ready}
            self.mover.go_on()
            yield slot_of
            with self.mover.lock:
                self.cache.used(ready)
                self.mover.pump()
            left -= len(ready)
        self.mover.go_on()

    def _refine(self, layer: int, x_ND: Tensor | None, index_NK: Tensor, carry: Mapping[str, Tensor]) -> None:
        predictor = self.predictor
        if predictor is None or not (predictor.refines or predictor.observes):
            return
        begin = time.perf_counter()
        if predictor.observes and self._rows:
            predictor.observe(layer, index_NK.cpu().numpy(), self._rows)
        found = None
        if predictor.refines:
            assert x_ND is not None, "the pool is watched"
            found = predictor.refine(layer, x_ND, index_NK, carry)
        if found is not None:
            later, prob_TE = found
            experts = self.naming.layer(prob_TE, self.layout, later, predictor.is_calibrated)
            with self.mover.lock:
                self.cache.expect(later, experts)
                self.mover.pump()
        self.predict_s += time.perf_counter() - begin

    # what is known

    @property
    def budget_bytes(self) -> int:
        """What experts may take."""
        return self.cache.budget_bytes

    def stats(self) -> EngineStats:
        """Counters and gauges under the names that engines report them by."""
        with self.mover.lock:
            total = self.cache.total()
            counters = {f"expert_{name}": float(value) for name, value in counter_values(total).items()}
            counters |= {"expert_retries": float(self.mover.num_retried), "expert_predict_s": self.predict_s}
            if self.pairs is not None:
                counters |= self.pairs.counters()
            gauges = {
                "expert_resident_bytes": float(self.cache.resident_bytes),
                "expert_budget_bytes": float(self.budget_bytes),
                "expert_all_bytes": float(self.layout.total_bytes),
            }
        return EngineStats(counters=counters, gauges=gauges)

    def by_layer(self) -> list[dict[str, float]]:
        """The counters of each routed layer."""
        with self.mover.lock:
            return [counter_values(counters) for counters in self.cache.counters]

    def prometheus(self, prefix: str = "anabranch") -> str:
        """Counters of each layer and gauges as Prometheus text."""
        lines, layers, gauges = [], self.by_layer(), self.stats().gauges
        for name in layers[0]:
            unit = f"{prefix}_expert_{name.removesuffix('_s')}{'_seconds' if name.endswith('_s') else ''}_total"
            lines.append(f"# TYPE {unit} counter")
            lines += [f'{unit}{{layer="{number}"}} {values[name]:g}' for number, values in enumerate(layers)]
        for name, value in gauges.items():
            lines += [f"# TYPE {prefix}_{name} gauge", f"{prefix}_{name} {value:.0f}"]
        return "\n".join(lines) + "\n"

    # the end

    def close(self) -> None:
        """End the threads. Forward passes raise DataError from here on; see `restore`."""
        if not self._closed:
            self._closed = True
            self._handle.remove()
            self.mover.close()

    @property
    def can_restore(self) -> bool:
        """Whether the model's own pools are in memory."""
        return not any(weights_of(pool)[0].is_meta for pool in self._originals)

    def restore(self) -> None:
        """Close, and give the model its own pools back. Raises ConfigError if they are not in memory."""
        if not self.can_restore:
            raise ConfigError(
                "the experts of this model are not in memory, so there is nothing to restore; offload with keep=True"
            )
        self.close()
        for layer, pool in zip(self._layers, self._originals, strict=True):
            self._found.put(layer, pool)
        for name, pool in self._shared.items():
            self.model.shared[name] = pool

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.can_restore and not self._closed:
            self.restore()
        self.close()


def counter_values(counters: Counters) -> dict[str, float]:
    """Counters by name."""
    return {name: getattr(counters, name) for name in Counters.__slots__}
