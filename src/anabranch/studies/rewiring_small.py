"""The arm ``small`` of the study of Rewiring: a byte mixture of experts trained here, and all trials on its streams."""
# Shapes: E destinations

import gzip
import itertools
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anabranch.adapters.rewiring import Rerouter, Rewiring, RewiringState
from anabranch.data.config import text_windows
from anabranch.lm import Decoder
from anabranch.places import data_file
from anabranch.studies.harness import Metrics, Progress
from anabranch.studies.rewiring_controls import CONTROLS, fitted_control
from anabranch.train import Trainer

if TYPE_CHECKING:
    from anabranch.studies.rewiring import Size

# Of a stream: context and what follows.
Stream = tuple[list[int], list[int]]
HARSH, INTERVAL = 0.2, 128
CONTROL_RATES = (0.01, 0.05, 0.2)
STEADY, KEPT, NEAR, FIFTH = 0.005, 0.7, 0.8, 0.2


def run(size: "Size", seed: int, progress: Progress) -> Metrics:
    """Train the model, and see what its turned routers foretell."""
    torch.set_num_threads(1)
    config = size.run()
    settings = config.train.replace(seed=seed, eval_every=None, checkpoint_every=None, keep_checkpoints=1, device="cpu")
    with tempfile.TemporaryDirectory(prefix="anabranch-study-") as folder:
        progress("training")
        trainer = Trainer(config.replace(train=settings), Path(folder) / "run")
        trainer.fit()
        model = trainer.model.eval().requires_grad_(False)
        trained = _held_out(trainer, size)
        unseen = _unseen(trainer, size)
        return measured(model, trained, unseen, size, seed, progress)


def measured(
    model: Decoder,
    trained: Mapping[str, list[Stream]],
    unseen: list[Stream],
    size: "Size",
    seed: int,
    progress: Progress,
) -> Metrics:
    """All trials of one model."""
    found: Metrics = {}
    progress("unseen and trained text")
    usual = Rewiring(interval=None)
    free = usual.replace(guard=False, select="all")
    found |= main_metrics(model, trained, unseen, usual)
    before = losses(model, unseen)
    for name, config in (
        ("free", free),
        ("uncertain", free.replace(select="uncertain")),
        ("decisive", free.replace(select="decisive")),
    ):
        found[f"gain_{name}"] = _mean(before) - _mean(losses(model, unseen, config))
    found["most_gain_free"] = KEPT * found["gain_free"]
    progress("disturbed routers")
    found |= _disturbed(model, trained, free, seed)
    progress("short contexts")
    found |= _short(model, trained, usual, size)
    progress("a change of domain")
    found |= _switched(model, trained, unseen, free, size)
    progress("what else could learn")
    found |= _controls(model, unseen, before)
    found["most_control"] = NEAR * found["best_control"]
    progress("table")
    return {**found, **_sweep(model, unseen, size)}


def main_metrics(
    model: Decoder, trained: Mapping[str, list[Stream]], unseen: list[Stream], config: Rewiring
) -> Metrics:
    """With all defaults: the gain on unseen text, its standard error over streams, and the change of text like the training's."""
    gains = [old - new for old, new in zip(losses(model, unseen), losses(model, unseen, config), strict=True)]
    error = math.sqrt(sum((one - _mean(gains)) ** 2 for one in gains) / max(len(gains) - 1, 1) / len(gains))
    changes = {name: _mean(losses(model, own, config)) - _mean(losses(model, own)) for name, own in trained.items()}
    worst = max(changes.values(), key=abs)
    return {
        "loss_unseen": _mean(losses(model, unseen)),
        "gain": _mean(gains),
        "gain_error": error,
        "gain_beyond_errors": _mean(gains) - 2 * error,
        "change_trained": worst,
        "steady_trained": STEADY - abs(worst),
    }


def losses(
    model: Decoder,
    streams: Sequence[Stream],
    config: Rewiring | None = None,
    states: Sequence[RewiringState] | None = None,
) -> list[float]:
    """Mean nats of what follows each context; with ``config`` routers are fitted to the context first, on from ``states``."""
    if config is None and states is None:
        return [_nats(model, one) for one in streams]
    rerouter = Rerouter(model, config)
    states = [rerouter.new_state() for _ in streams] if states is None else states
    if config is not None:
        rerouter.adapt([context for context, _ in streams], states)
    found = []
    for stream, state in zip(streams, states, strict=True):
        with rerouter.attached(state):
            found.append(_nats(model, stream))
    return found


@torch.no_grad()
def _nats(model: Decoder, stream: Stream) -> float:
    context, follows = stream
    token_BL = torch.tensor([context + follows])
    log_p_LV = model(token_BL[:, :-1]).logits_BLV[0, len(context) - 1 :].float().log_softmax(-1)
    return float(-log_p_LV.gather(1, token_BL[0, len(context) :, None]).mean())


def _disturbed(model: Decoder, trained: Mapping[str, list[Stream]], config: Rewiring, seed: int) -> Metrics:
    """How much of what a disturbance costs is undone, over all trained domains."""
    streams = list(itertools.chain(*trained.values()))
    generator = torch.Generator().manual_seed(seed)
    zero = Rerouter(model, config).new_state()
    noise = [torch.randn(delta_E.shape, generator=generator, dtype=delta_E.dtype) for delta_E in zero.delta]

    def disturbed() -> list[RewiringState]:
        return [RewiringState([each.clone() for each in noise]) for _ in streams]

    clean, harmed = _mean(losses(model, streams)), _mean(losses(model, streams, None, disturbed()))
    mended = _mean(losses(model, streams, config, disturbed()))
    # A disturbance that costs nothing has nothing to undo.
    undone = (harmed - mended) / (harmed - clean) if harmed > clean else 0.0
    return {"damage": harmed - clean, "undone": undone}


def _short(model: Decoder, trained: Mapping[str, list[Stream]], usual: Rewiring, size: "Size") -> Metrics:
    """Harm of harsh steps on short contexts."""
    streams = [(context[-size.short :], follows) for context, follows in itertools.chain(*trained.values())]
    before = _mean(losses(model, streams))
    harsh = usual.replace(eta=HARSH, scale_step=False)
    harm = {
        name: _mean(losses(model, streams, config)) - before
        for name, config in (("guard", harsh), ("free", harsh.replace(guard=False, select="all")))
    }
    return {
        "harm_guard": harm["guard"],
        "harm_free": harm["free"],
        "spared_guard": -harm["guard"],
        "fifth_spared_free": -FIFTH * harm["free"],
    }


def _switched(
    model: Decoder, trained: Mapping[str, list[Stream]], unseen: list[Stream], config: Rewiring, size: "Size"
) -> Metrics:
    """A text of a trained domain that goes on as an unseen one: fitted to its first part once, or again and again."""
    half = size.context // 2
    first = next(iter(trained.values()))
    once: list[float] = []
    again: list[float] = []
    for (old, _), (new, follows) in zip(first, unseen, strict=False):
        text = old[:half] + new[: size.context - half] + follows
        rerouter = Rerouter(model, config)
        kept, going = rerouter.new_state(), rerouter.new_state()
        every = min(INTERVAL, half)
        for start in range(every, len(text), every):
            context, coming = text[:start], text[start : start + every]
            if start == every:
                rerouter.adapt([context], [kept])
            rerouter.adapt([context], [going])
            if start >= half and coming:
                for state, found in ((kept, once), (going, again)):
                    with rerouter.attached(state):
                        found.append(_nats(model, (context, coming)))
    return {"gain_continuous": _mean(once) - _mean(again)}


def _controls(model: Decoder, unseen: list[Stream], before: Sequence[float]) -> Metrics:
    """The gain of other things that learn from the context, each with its best step size."""
    found: Metrics = {}
    for name in CONTROLS:
        gains = []
        for rate in CONTROL_RATES:
            after = []
            for context, follows in unseen:
                with fitted_control(model, name, context, rate=rate, steps=Rewiring().steps):
                    after.append(_nats(model, (context, follows)))
            gains.append(_mean(before) - _mean(after))
        found[f"gain_{name}"] = max(gains)
    return {**found, "best_control": max(found.values())}


def _sweep(model: Decoder, unseen: list[Stream], size: "Size") -> Metrics:
    """Gains without guard and scaled steps, for the table."""
    found: Metrics = {}
    for length in size.sweep_contexts:
        streams = [(context[-length:], follows) for context, follows in unseen]
        before = _mean(losses(model, streams))
        for steps, eta in itertools.product(size.sweep_steps, size.sweep_etas):
            config = Rewiring(interval=None, guard=False, select="all", scale_step=False, steps=steps, eta=eta)
            found[f"sweep_{length}_{steps}_{eta:g}"] = before - _mean(losses(model, streams, config))
    return found


def _held_out(trainer: Any, size: "Size") -> dict[str, list[Stream]]:
    """Streams of each domain's held-out text."""
    data, length = trainer.data, size.context + size.follows
    many = size.streams * len(data.domains) * 8
    found: dict[str, list[Stream]] = {name: [] for name in data.domains}
    for batch in data.validation(sequence_length=length, batch_size=1, num_windows=many):
        own = found[data.domains[int(batch.domain_B[0])]]
        ids = batch.token_BL[0].tolist()
        if len(ids) == length and len(own) < size.streams:
            own.append((ids[: size.context], ids[size.context :]))
    return found


def _unseen(trainer: Any, size: "Size") -> list[Stream]:
    texts = _tasks() if size.real else [text[::-1] for text in _library()]
    length = size.context + size.follows
    found = []
    for batch in text_windows(texts, trainer.data.tokenizer, length, batch_size=1, num_windows=size.streams * 2):
        ids = batch.token_BL[0].tolist()
        if len(ids) == length:
            found.append((ids[: size.context], ids[size.context :]))
    return found[: size.streams]


def _tasks() -> list[str]:
    """BIG-Bench-Hard as text, a task each."""
    from anabranch.studies.rewiring import UNSEEN

    with gzip.open(data_file(UNSEEN), "rt", encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file if line.strip()]
    return ["\n".join(f"{one['input']}\n{one['target']}\n" for one in task["examples"]) for task in tasks]


def _library() -> list[str]:
    """Text of the standard library, for the size that needs no data."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
