"""Training of routers: many small fits on features that were computed once, with the paper's optimiser.

The routers of different blocks share nothing, so a few blocks learn at a time, in the memory that they are given; all of them see the same
batches in the same order.
"""
# Shapes: L blocks, N questions, B of them, W windows, D width, C decisions

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from anabranch.bounds import Seed
from anabranch.config import Config, Field, configclass, to_dict
from anabranch.depth.dr_llm.bank import BankConfig, RouterBank
from anabranch.depth.dr_llm.features import Features, collect_features
from anabranch.depth.dr_llm.labels import CHOICES, Labels
from anabranch.depth.dr_llm.loss import class_balance, routing_loss
from anabranch.depth.dr_llm.settings import seed_of
from anabranch.depth.stack import BlockStack
from anabranch.errors import NotFiniteError
from anabranch.lm.generate import evaluating
from anabranch.train.schedule import Cosine

__all__ = ["FitConfig", "FitReport", "Quality", "fit_routers", "quality", "train_routers"]


@configclass
class FitConfig(Config):
    """How routers learn, with the paper's defaults.

    Attributes:
        epochs: 25.
        batch_size: questions of a step (16).
        learning_rate: the peak (1e-3), of AdamW.
        weight_decay: 0.01.
        warmup: steps of the linear rise (500), at most a tenth of all; then a cosine to 0.
        gamma: of the focal loss (2); 0 is weighted cross-entropy.
        beta: of the weights of decisions (0.999).
        balance: whether decisions are weighted by how rare they are.
        windows: W (8).
        hidden: width of a router (128).
        features: what a router sees, see `BankConfig`.
        held_out: share of the questions that only measure.
        memory: bytes of features at a time.
        seed: of first weights, order and what is held out.
    """

    epochs: int = Field(default=25, ge=1)
    batch_size: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: int = Field(default=500, ge=0)
    gamma: float = Field(default=2.0, ge=0)
    beta: float = Field(default=0.999, ge=0, lt=1)
    balance: bool = True
    windows: int = Field(default=8, ge=1, le=65_536)
    hidden: int = Field(default=128, ge=1, le=65_536)
    features: Literal["previous", "first"] = "previous"
    held_out: float = Field(default=0.1, ge=0, lt=1)
    memory: int = Field(default=32 * 2**20, ge=1)
    seed: Seed = 0


@dataclass(frozen=True)
class Quality:
    """How often routers say what the labels say, on label paths.

    Attributes:
        accuracy: over blocks and questions.
        macro_f1: mean of F1 over decisions that occur, as label or as choice.
        by_block: accuracy of each router.
        confusion: rows are labels, columns choices.
    """

    accuracy: float
    macro_f1: float
    by_block: list[float]
    confusion: list[list[int]]


@dataclass(frozen=True)
class FitReport:
    """What came out.

    Attributes:
        questions: that were learned from.
        counts: how often each decision (skip, run, repeat) is a label of them.
        alpha: weight of each.
        steps: of the optimiser.
        loss: mean over the last epoch and all blocks.
        learned: on what was learned.
        held_out: on what was not; None where nothing was held out.
        feature_bytes: of the mapped file.
    """

    questions: int
    counts: list[int]
    alpha: list[float]
    steps: int
    loss: float
    learned: Quality
    held_out: Quality | None
    feature_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


def train_routers(
    stack: BlockStack,
    labels: Labels,
    config: FitConfig | None = None,
    *,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> tuple[RouterBank, FitReport]:
    """Routers of a model from its label paths.

    Args:
        stack: of the model, which is in evaluation meanwhile and gets no gradient.
        labels: of `labels_of`.
        config: settings; None for the paper's.
        progress: is told how far things are.

    Raises DataError for labels of another model, NotFiniteError where states or the loss are NaN.
    """
    config = config or FitConfig()
    with evaluating(stack.module):
        found = collect_features(
            stack,
            labels,
            windows=config.windows,
            features=config.features,
            progress=lambda done, total: progress(done, total, "prompts"),
        )
    learned, held_out = _parts(labels.ids, config)
    bank_config = BankConfig(
        num_blocks=stack.num_blocks,
        width=stack.width,
        windows=config.windows,
        hidden=config.hidden,
        features=config.features,
        fingerprint=stack.fingerprint(),
    )
    bank, loss, steps = fit_routers(
        bank_config, found, config, learned, progress=lambda done, total: progress(done, total, "blocks")
    )
    counts = torch.bincount(found.decision_LN[:, learned].flatten(), minlength=CHOICES)
    report = FitReport(
        questions=len(learned),
        counts=counts.tolist(),
        alpha=[round(value, 6) for value in _alpha(counts, config).tolist()],
        steps=steps,
        loss=loss,
        learned=quality(bank, found, learned),
        held_out=quality(bank, found, held_out) if held_out else None,
        feature_bytes=found.num_bytes,
    )
    return bank.to(stack.device), report


def fit_routers(
    bank_config: BankConfig,
    features: Features,
    config: FitConfig,
    learned: Sequence[int] | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[RouterBank, float, int]:
    """(routers, mean loss of the last epoch, steps).

    Args:
        bank_config: sizes.
        features: of `collect_features`.
        config: settings.
        learned: numbers of the questions to learn from; None for all.
        progress: is told how many blocks are done.
    """
    chosen = list(range(features.decision_LN.shape[1])) if learned is None else list(learned)
    bank = RouterBank(bank_config, seed=config.seed)
    alpha_C = _alpha(torch.bincount(features.decision_LN[:, chosen].flatten(), minlength=CHOICES), config)
    per_block = len(chosen) * bank_config.windows * bank_config.width * 4
    at_once = max(1, min(bank_config.num_blocks, config.memory // max(per_block, 1)))
    batches = _batches(len(chosen), config)
    total = 0.0
    for start in range(0, bank_config.num_blocks, at_once):
        progress(start, bank_config.num_blocks)
        blocks = slice(start, min(start + at_once, bank_config.num_blocks))
        mean_LNWD = features.of_blocks(blocks)[:, chosen]
        seen = (mean_LNWD, features.weight_NW[chosen], features.decision_LN[blocks][:, chosen])
        total += _fit_blocks(bank, blocks, seen, batches, alpha_C, config) * (blocks.stop - blocks.start)
    progress(bank_config.num_blocks, bank_config.num_blocks)
    bank.requires_grad_(False).eval()
    return bank, total / bank_config.num_blocks, len(batches)


def _fit_blocks(
    bank: RouterBank,
    blocks: slice,
    seen: tuple[Tensor, Tensor, Tensor],
    batches: Sequence[list[int]],
    alpha_C: Tensor,
    config: FitConfig,
) -> float:
    """Fit the routers of some blocks, in place; gives back their mean loss in the last epoch."""
    mean_LNWD, weight_NW, decision_LN = seen
    part = RouterBank(bank.config.replace(num_blocks=blocks.stop - blocks.start))
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            parameter.copy_(bank.get_parameter(name)[blocks])
    optimizer = torch.optim.AdamW(part.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = Cosine.Config(warmup=min(config.warmup, len(batches) // 10), final=0.0).build()
    in_epoch, last = -(-weight_NW.shape[0] // config.batch_size), list[float]()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule.factor(step, len(batches))
        logit_LBC = part.logits(mean_LNWD[:, batch], weight_NW[batch])
        loss = routing_loss(logit_LBC, decision_LN[:, batch], gamma=config.gamma, alpha_C=alpha_C)
        optimizer.zero_grad(set_to_none=True)
        # The routers of each block as if they were alone: the loss is a mean over blocks.
        (loss * (blocks.stop - blocks.start)).backward()
        optimizer.step()
        if step >= len(batches) - in_epoch:
            last.append(float(loss.detach()))
    loss_of_epoch = sum(last) / len(last)
    if loss_of_epoch != loss_of_epoch:
        raise NotFiniteError(f"the loss of routers {blocks.start} to {blocks.stop - 1} is NaN; lower learning_rate")
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            bank.get_parameter(name)[blocks] = parameter
    return loss_of_epoch


def _alpha(count_C: Tensor, config: FitConfig) -> Tensor:
    return class_balance(count_C, config.beta) if config.balance else torch.ones(CHOICES)


def _batches(count: int, config: FitConfig) -> list[list[int]]:
    """The questions of every step: all of them once an epoch, in an order of its own."""
    found: list[list[int]] = []
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(seed_of(config.seed, "epoch", str(epoch)))
        order = torch.randperm(count, generator=generator).tolist()
        found += [order[start : start + config.batch_size] for start in range(0, count, config.batch_size)]
    return found


def _parts(ids: Sequence[str], config: FitConfig) -> tuple[list[int], list[int]]:
    """(questions to learn from, questions held out), by their ids; at least one is learned from."""
    order = sorted(range(len(ids)), key=lambda place: seed_of(config.seed, "held out", ids[place]))
    count = min(round(config.held_out * len(ids)), len(ids) - 1)
    return sorted(order[count:]), sorted(order[:count])


@torch.no_grad()
def quality(bank: RouterBank, features: Features, questions: Sequence[int]) -> Quality:
    """How routers decide on these questions, against their labels."""
    chosen = list(questions)
    decision_LN = features.decision_LN[:, chosen]
    found = []
    for block in range(bank.num_blocks):
        mean_1NWD = features.of_blocks(slice(block, block + 1))[:, chosen]
        logit_NC = bank.logits(mean_1NWD, features.weight_NW[chosen], slice(block, block + 1))[0]
        found.append(logit_NC.argmax(-1))
    choice_LN = torch.stack(found)
    return quality_of(decision_LN, choice_LN)


def quality_of(decision_LN: Tensor, choice_LN: Tensor) -> Quality:
    """Of labels and choices."""
    pair = decision_LN.flatten() * CHOICES + choice_LN.flatten()
    confusion_CC = torch.bincount(pair, minlength=CHOICES**2).view(CHOICES, CHOICES)
    hit_C = confusion_CC.diagonal().double()
    either_C = (confusion_CC.sum(0) + confusion_CC.sum(1)).double()
    occurs_C = either_C > 0
    f1_C = 2 * hit_C / either_C.clamp_min(1)
    same_LN = decision_LN == choice_LN
    return Quality(
        accuracy=float(same_LN.double().mean()),
        macro_f1=float(f1_C[occurs_C].mean()),
        by_block=same_LN.double().mean(1).tolist(),
        confusion=confusion_CC.tolist(),
    )


def settings_of(config: FitConfig) -> dict[str, Any]:
    """The settings, for a report."""
    return to_dict(config)
