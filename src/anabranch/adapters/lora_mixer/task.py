"""What LoRA-Mixer trains: labelled rows, and the task that leads experts and routers through the stages."""
# Shapes: N rows, B of a batch, L positions, E experts, V vocabulary

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.adapters.beside import passing
from anabranch.adapters.fresh import BESIDE
from anabranch.adapters.lora_mixer.load import mixed_layers
from anabranch.adapters.lora_mixer.mixture_file import Mixture
from anabranch.adapters.lora_mixer.stages import Stages
from anabranch.adapters.mixture_report import Rows, mixture_report
from anabranch.config import configclass
from anabranch.data import Tokenizer
from anabranch.errors import ConfigError, DataError, InputError
from anabranch.lm.checkpoint import load_weights, write_model
from anabranch.lm.decoder import Decoder
from anabranch.train import Examples, Losses, Task, TaskContext
from anabranch.train.examples import fingerprint

__all__ = ["Labelled", "MixtureTask"]

# Positions that count for no loss.
IGNORED = -100
_POOL, _ROUTER = ".pool.", ".router."
# What losses are means of, where not of tokens.
_MEAN_OF = {"cross_entropy": "asked", "task_alignment": "labelled"}


@dataclass(frozen=True, eq=False)
class Labelled:
    """Rows of several tasks, each with the expert of its task.

    Attributes:
        token_NL: int64.
        target_NL: int64, what is to follow each token; -100 where nothing is asked.
        expert_N: int64, -1 for a row of no expert's task.
        mask_NL: bool, False for padding, which stands on the left.
    """

    token_NL: Tensor
    target_NL: Tensor
    expert_N: Tensor
    mask_NL: Tensor

    def __post_init__(self) -> None:
        shape = self.token_NL.shape
        if len(shape) != 2 or self.target_NL.shape != shape or self.mask_NL.shape != shape:
            raise DataError(
                f"tokens, targets and mask have shapes {list(shape)}, {list(self.target_NL.shape)} and {list(self.mask_NL.shape)}; they "
                "must be one [rows, length]"
            )
        if self.expert_N.shape != shape[:1]:
            raise DataError(f"there are {len(self.expert_N)} labels for {shape[0]} rows; give one for each")
        if not len(self.token_NL):
            raise DataError("there are no rows to learn from")

    @classmethod
    def of(
        cls, rows: Sequence[tuple[Sequence[int], Sequence[int], str | None]], experts: Sequence[str], *, pad: int = 0
    ) -> "Labelled":
        """Of (ids of a prompt, ids of its answer, name of its task's expert, or None): the answer is what is learned.

        Raises InputError for a name that is not one of ``experts``, DataError for a row without an answer or of fewer than two tokens, and
        where there are none.
        """
        known = {name: number for number, name in enumerate(experts)}
        length = max((len(prompt) + len(answer) - 1 for prompt, answer, _ in rows), default=0)
        token_NL = torch.full((len(rows), length), pad)
        target_NL = torch.full((len(rows), length), IGNORED)
        mask_NL = torch.zeros(len(rows), length, dtype=torch.bool)
        labels = []
        for number, (prompt, answer, name) in enumerate(rows):
            if not answer or len(prompt) + len(answer) < 2:
                raise DataError(
                    f"row {number} has {len(prompt)} tokens and an answer of {len(answer)}; nothing can be learned from it"
                )
            if name is not None and name not in known:
                raise InputError(
                    f"row {number} is of task {name!r}, which has no expert; there are {', '.join(map(repr, known))}"
                )
            ids = [*prompt, *answer]
            asked = [IGNORED] * (len(prompt) - 1) + list(answer) if prompt else list(answer[1:])
            start = length - (len(ids) - 1)
            token_NL[number, start:] = torch.tensor(ids[:-1])
            target_NL[number, start:] = torch.tensor(asked)
            mask_NL[number, start:] = True
            labels.append(-1 if name is None else known[name])
        return cls(token_NL, target_NL, torch.tensor(labels, dtype=torch.int64), mask_NL)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All, in the order of the attributes."""
        return self.token_NL, self.target_NL, self.expert_N, self.mask_NL

    def batches(self, size: int) -> Iterator[Rows]:
        """(token_BL, mask_BL, expert_B) in order, for `mixture_report`."""
        for start in range(0, len(self.token_NL), size):
            part = slice(start, start + size)
            yield self.token_NL[part], self.mask_NL[part], self.expert_N[part]


class MixtureTask(Task, kind="lora_mixer"):
    """The next token of labelled rows, learned by experts, routers, or both.

    Stages follow from how far the training is. While it is *hard*, labels choose, and experts learn, each from its own task; while it is
    *soft*, routers choose and learn, and experts are frozen, held by the preservation loss, or free.

    It is for rows of tokens, and for modules that are not ours too; its loss is the mean over all tokens that are asked, and a checkpoint
    is the whole model. For rows of text on a decoder of ours there is `anabranch.adapters.adapt.mixtures.LoraMixer`, whose loss is the mean
    over rows and which keeps the adapter alone; stages, losses of layers and reports of routers are the same in both.

    Args:
        config: the stages.
        model: with mixed layers; a `Decoder`, or a module that is called with ``input_ids`` and gives ``logits``.
        data: what is learned.
        held_out: what is measured; None for nothing.
        tokenizer: saved beside a model of ours.

    Raises ConfigError for a model without mixed layers, or one whose own checkpointing is on; InputError for labels that name no expert.
    """

    headline: ClassVar[str] = "nats_per_token"
    better: ClassVar[Literal["lower", "higher"] | None] = "lower"
    unit: ClassVar[str] = "tokens"
    material: ClassVar[str] = "labelled rows"

    @configclass
    class Config(Stages, Task.Config):
        """The stages."""

    config: Config

    def __init__(
        self,
        config: Config,
        *,
        model: nn.Module,
        data: Labelled,
        held_out: Labelled | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(config, model=model)
        self.data, self.held_out, self.tokenizer = data, held_out, tokenizer
        self.layers = mixed_layers(model)
        # Before anything learns: what is counted in training, as the bias of a base's router, is as it was read.
        self.mixture = Mixture.of(model)
        number = next(iter(self.layers.values())).pool.num_experts
        for rows in (data, held_out):
            if rows is not None and int(rows.expert_N.max()) >= number:
                raise InputError(f"label {int(rows.expert_N.max())} names no expert; there are 0 to {number - 1}")
        if config.needs_labels and bool((data.expert_N < 0).any()):
            raise InputError(
                f"row {int((data.expert_N < 0).nonzero()[0])} has no label, by which stage 'hard' chooses; leave it out, or train 'soft'"
            )
        if config.experts == "preserved" and not all(layer.config.preserved for layer in self.layers.values()):
            raise ConfigError(
                "experts is 'preserved', and the model keeps nothing of them; load_mixture(..., preserved=True)"
            )
        if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
            raise ConfigError(
                "the model's own gradient checkpointing is on, which runs parts again without labels; switch it off"
            )

    def learns(self, name: str, parameter: nn.Parameter) -> bool:
        """Routers, but where labels alone choose and nothing aligns them; and experts, where they learn at any time."""
        if BESIDE not in name:
            return False
        if _ROUTER in name:
            return self.config.routers_learn
        return _POOL in name and self.config.experts_learn

    def before_step(self, step: int, fraction: float) -> None:
        """Freeze and free experts as the stage wants, and note what they are where they are preserved from now on."""
        self.config.enter(self.layers.values(), step, fraction)

    def training_data(self, context: TaskContext) -> Examples:
        """Rows in an order drawn anew for each epoch."""
        return Examples(
            *self.data.tensors, seed=context.settings.seed, rank=context.rank, world_size=context.world_size
        )

    def validation_data(self, context: TaskContext) -> Any:
        """Batches of the held-out rows."""
        if self.held_out is None:
            return None
        return [
            tuple(tensor[start : start + context.batch_size] for tensor in self.held_out.tensors)
            for start in range(0, len(self.held_out.token_NL), context.batch_size)
        ]

    def units_per_item(self, context: TaskContext) -> int:
        """L."""
        return self.data.token_NL.shape[1]

    def fingerprint(self) -> str:
        """Of the rows."""
        held = () if self.held_out is None else self.held_out.tensors
        return fingerprint(*self.data.tensors, *held)

    def step(self, model: nn.Module, batch: Any, context: TaskContext) -> Losses:
        """Cross-entropy of what is asked, and what layers emit, the preservation loss among it."""
        token_BL, target_BL, expert_B, mask_BL = batch
        layers = len(self.layers)
        labels = self.config.state(expert_B, token_BL.shape[1], context.fraction, num_layers=layers)
        main, auxiliary, metrics = self._losses(model, token_BL, target_BL, mask_BL, labels)
        terms = {"cross_entropy": main, **auxiliary}
        mean_of = {name: _MEAN_OF.get(name, "tokens") for name in (*terms, *metrics) if name != "preservation"}
        return Losses(sum(auxiliary.values(), start=main), terms, metrics, mean_of)

    def counts(self, batch: Any, context: TaskContext) -> dict[str, float]:
        """Tokens, those that are asked, and rows with a label: rows differ in all three."""
        _, target_BL, expert_B, mask_BL = batch
        return {
            "tokens": float(mask_BL.sum()),
            "asked": float((target_BL != IGNORED).sum()),
            "labelled": float(((expert_B >= 0) & mask_BL.any(1)).sum()),
        }

    def _losses(
        self, model: nn.Module, token_BL: Tensor, target_BL: Tensor, mask_BL: Tensor, labels: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """(cross-entropy, auxiliary losses, metrics)."""
        if isinstance(self.model, Decoder):
            output = model(token_BL, target_BL, token_mask_BL=mask_BL, state=dict(labels))
            auxiliary = dict(output.terms)
            return auxiliary.pop("cross_entropy"), auxiliary, dict(output.metrics)
        with passing(model, mask_BL=mask_BL, labels=labels) as seen:
            logits_BLV = cast(Any, model)(input_ids=token_BL, attention_mask=mask_BL.long()).logits
            main = _cross_entropy(logits_BLV, target_BL)
            losses = seen.losses()
        return main, losses, seen.context.mean_metrics()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, data: Any, context: TaskContext) -> dict[str, Any]:
        """Nats per asked token, the share of them that is right, and what routers do (`mixture_report`)."""
        nats, right, asked = 0.0, 0, 0
        for token_BL, target_BL, _, mask_BL in data:
            logits_BLV = self._logits(model, token_BL, mask_BL).float()
            is_asked_BL = target_BL != IGNORED
            nats += float(
                F.cross_entropy(logits_BLV.flatten(0, 1), target_BL.flatten(), ignore_index=IGNORED, reduction="sum")
            )
            right += int((logits_BLV.argmax(-1) == target_BL)[is_asked_BL].sum())
            asked += int(is_asked_BL.sum())
        assert self.model is not None
        report = mixture_report(self.model, [(token, mask, expert) for token, _, expert, mask in data])
        return {
            "nats_per_token": nats / max(asked, 1),
            "accuracy": right / max(asked, 1),
            "active_experts": report.mean("active"),
            "routing_nats": report.mean("nats"),
            "task_information": report.mean("information"),
            "load": [list(facts.load) for facts in report.routers],
        }

    def _logits(self, model: nn.Module, token_BL: Tensor, mask_BL: Tensor) -> Tensor:
        if isinstance(self.model, Decoder):
            return model(token_BL, token_mask_BL=mask_BL).logits_BLV
        with passing(model, mask_BL=mask_BL):
            return cast(Any, model)(input_ids=token_BL, attention_mask=mask_BL.long()).logits

    def save(self, folder: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """A model folder where the model is ours; else all tensors. Beside it is whose numbers these are."""
        if isinstance(model, Decoder):
            write_model(folder, model, self.tokenizer, state=tensors)
        else:
            super().save(folder, model, tensors)
        self.mixture.write(folder)

    def load(self, folder: Path, model: nn.Module) -> None:
        """What `save` wrote. Raises CheckpointError also where it is of other experts, or of another base; see `Mixture.check`."""
        self.mixture.check(folder)
        if isinstance(model, Decoder):
            load_weights(model, folder)
        else:
            super().load(folder, model)


def _cross_entropy(logits_BLV: Tensor, target_BL: Tensor) -> Tensor:
    return F.cross_entropy(logits_BLV.float().flatten(0, 1), target_BL.flatten(), ignore_index=IGNORED)
