"""Train one language model and measure it: what studies and comparisons run for an arm and a seed."""

import contextlib
import gc
import itertools
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anabranch.errors import ConfigError
from anabranch.lm import Decoder
from anabranch.machine import give_back_freed
from anabranch.routing import Router, RoutingTrace, record_routing
from anabranch.routing.consistency import srp
from anabranch.routing.measure import (
    aligned,
    chance_reuse,
    foreign_share,
    idle_fraction,
    max_violation,
    pool_load,
    reuse_rate,
)
from anabranch.studies.harness import Metrics, Progress
from anabranch.train import Event, RunConfig, Trainer, evaluate

CURVE_POINTS = 6
CURVE_TOKENS = 16_384

# Of validation text, the same for every arm and seed.
FINAL_TOKENS = 131_072
TOLD_EVERY_S = 15.0

# Tokens: the paper's m at which models are compared.
SRP_WINDOW = 16


def train_and_measure(
    config: RunConfig,
    seed: int,
    progress: Progress,
    *,
    model: Decoder | None = None,
    also: Callable[[Trainer], Metrics] | None = None,
) -> Metrics:
    """Train ``config`` with ``seed`` (weights, data order, masks) in a folder that is then removed, and measure the model.

    Metrics: ``bits_per_byte`` and ``nats_per_token`` on held-out text at the end; ``curve`` (step, bits per byte, and the same with the
    candidates then open where a schedule closes some); ``max_violation_layer`` and ``_mean`` over routers, ``max_violation_pool`` and
    ``idle_fraction`` of experts (loads of all layers that share them added up); ``foreign_share`` of choices of experts that other
    layers own; ``srp`` (local routing consistency over 16 tokens, mean over layers); ``same_expert_rate`` at neighbouring layers of a pool
    and its ``same_expert_chance``; sizes; ``tokens_per_second`` by the clock and ``tokens_per_cpu_second``; ``peak_memory_bytes`` of the
    process; ``warnings`` that the library logged. ``model`` is trained on instead of a fresh one; ``also`` measures more of the trained
    model.

    Raises ConfigError, before it trains, where no text is held out to measure on.
    """
    check_held_out(config)
    counts = config.model.count(config.data.sequence_length)
    settings = config.train.replace(
        seed=seed,
        eval_every=max(config.train.steps // CURVE_POINTS, 1),
        eval_tokens=CURVE_TOKENS,
        checkpoint_every=None,
        keep_checkpoints=1,
    )
    _reset_peak_memory()
    with tempfile.TemporaryDirectory(prefix="anabranch-study-") as folder, _warnings() as warned:
        observer = _Observer(progress)
        trainer = Trainer(config.replace(train=settings), Path(folder) / "run", on_event=observer, model=model)
        observer.trainer = trainer
        result = trainer.fit()
        if result.status != "finished":
            raise KeyboardInterrupt
        final = {**_measure(trainer), **(also(trainer) if also is not None else {})}
    return {
        **final,
        "curve": observer.curve,
        "parameters": counts.parameters,
        "active_parameters": counts.active,
        "flops_per_token": counts.flops,
        "tokens": result.tokens,
        "tokens_per_second": result.tokens_per_second,
        "tokens_per_cpu_second": result.tokens / max(observer.step_cpu_seconds, 1e-9),
        "peak_memory_bytes": result.peak_memory_bytes,
        "skipped_steps": result.skipped_steps,
        "warnings": warned,
    }


def check_held_out(config: RunConfig) -> None:
    """Raise ConfigError if ``config`` holds no text out, so that nothing could be measured on what it trains."""
    if config.data.validation_fraction == 0:
        raise ConfigError(
            "data.validation_fraction is 0, so there would be no held-out text to measure on; "
            "set it above 0, e.g. to 0.05"
        )


@dataclass
class _Observer:
    """Follows a training: tells how far it is, keeps the curve, and adds up the processor time of its steps."""

    progress: Progress
    trainer: Trainer | None = None
    curve: list[list[float | None]] = field(default_factory=list)
    step_cpu_seconds: float = 0.0
    _cpu: float = field(default_factory=time.process_time)
    _told: float = field(default_factory=time.perf_counter)
    _started: float = field(default_factory=time.perf_counter)

    def __call__(self, event: Event) -> None:
        if event.kind == "step":
            self.step_cpu_seconds += time.process_time() - self._cpu
            self._tell(event)
        elif event.kind == "evaluation":
            assert self.trainer is not None
            self.curve.append([event.step, event.values["bits_per_byte"], _with_current_candidates(self.trainer)])
        self._cpu = time.process_time()

    def _tell(self, event: Event) -> None:
        now = time.perf_counter()
        if now - self._told > TOLD_EVERY_S:
            self._told = now
            left = (event.steps - event.step) * (now - self._started) / event.step
            self.progress(f"step {event.step} of {event.steps}, loss {event.values['loss']:.3f}, {left:.0f} s left")


def _with_current_candidates(trainer: Trainer) -> float | None:
    """Bits per byte with the candidates that are open at this step; None if all are."""
    routers = [module for module in trainer.model.modules() if isinstance(module, Router)]
    schedules: list[Any] = [router.candidates for router in routers if hasattr(router.candidates, "open_E")]
    if all(bool(schedule.open_E.all()) for schedule in schedules):
        return None
    before = [schedule.config for schedule in schedules]
    for schedule in schedules:
        schedule.config = schedule.config.replace(evaluate="current")
    try:
        return evaluate(trainer.model, _windows(trainer, CURVE_TOKENS)).bits_per_byte
    finally:
        for schedule, config in zip(schedules, before, strict=True):
            schedule.config = config


def _measure(trainer: Trainer) -> Metrics:
    windows = _windows(trainer, FINAL_TOKENS)
    if not any(isinstance(module, Router) for module in trainer.model.modules()):
        evaluation = evaluate(trainer.model, windows)
        return {"bits_per_byte": evaluation.bits_per_byte, "nats_per_token": evaluation.nats_per_token}
    with record_routing(trainer.model) as recorder:
        evaluation = evaluate(trainer.model, windows)
    return {
        "bits_per_byte": evaluation.bits_per_byte,
        "nats_per_token": evaluation.nats_per_token,
        **measure_routing(recorder.trace()),
    }


def _windows(trainer: Trainer, tokens: int) -> Any:
    length = trainer.config.data.sequence_length
    return trainer.data.validation(batch_size=8, num_windows=max(tokens // length, 1))


def measure_routing(trace: RoutingTrace) -> Metrics:
    """Balance of routers and of pools, and how much layers use each other's experts; see `train_and_measure`."""
    by_layer = [float(max_violation(trace.load_E(layer.layer))) for layer in trace.layers]
    pools = [pool_load(trace, pool) for pool in trace.pools]
    rates, chances = [], []
    for layers in trace.pools.values():
        for first, second in itertools.pairwise(layers):
            rates.append(reuse_rate(*aligned(trace.decisions(second.layer), trace.decisions(first.layer))))
            chances.append(chance_reuse(second.top_k, second.num_destinations))
    return {
        "max_violation_layer": max(by_layer),
        "max_violation_mean": float(np.mean(by_layer)),
        "max_violation_pool": max(float(max_violation(load)) for load in pools),
        "idle_fraction": _weighted([(float(idle_fraction(load)), len(load)) for load in pools]),
        "foreign_share": float(np.mean([foreign_share(trace, layer.layer) for layer in trace.layers])),
        "srp": float(srp(trace, SRP_WINDOW).value.mean()),
        "same_expert_rate": float(np.mean(rates)) if rates else None,
        "same_expert_chance": float(np.mean(chances)) if chances else None,
    }


def _weighted(values: list[tuple[float, int]]) -> float:
    return math.fsum(value * weight for value, weight in values) / sum(weight for _, weight in values)


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """Warnings that the library logs meanwhile."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler, logger = Keep(logging.WARNING), logging.getLogger("anabranch")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def _reset_peak_memory() -> None:
    """Let the process's peak memory start anew, so that each run of a comparison has its own (Linux; elsewhere it is the peak so far)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    give_back_freed()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
