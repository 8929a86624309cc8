"""`AdaptTask`: a frozen model learns tasks by an adapter, from rows of questions and answers.

    loss = mean over rows of (mean over the answer's tokens of -log p(token | prompt, answer so far)) + what layers add

Only what was put on learns and is kept in checkpoints; the base is read again from where it lies, and looked at whether it is the same.
"""
# Shapes: B rows, L positions, M tokens of answers, V vocabulary

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from anabranch.adapters.adapt.method import Method, Written
from anabranch.adapters.adapt.rows import Encoded, Row, digest_of, encoded, parted, read_rows, spread_rows
from anabranch.adapters.by_row import check_told, told_rows
from anabranch.adapters.own_folder import load_numbers
from anabranch.adapters.tasks import numbers_of, told_tasks
from anabranch.config import Field, Size, configclass, to_dict
from anabranch.data import Tokenizer
from anabranch.errors import ConfigError, DataError, InputError, TokenizerError
from anabranch.files import atomic_write_json
from anabranch.lm.checkpoint import load_model, save_model
from anabranch.lm.decoder import Decoder
from anabranch.lm.shards import write_file
from anabranch.nn.linear import takes_context
from anabranch.train.evaluate import autocast, evaluation_mode
from anabranch.train.examples import Examples
from anabranch.train.language_model import decoder_parts
from anabranch.train.optimizer import Speed
from anabranch.train.task import FORMAT, Losses, Task, TaskContext

__all__ = ["AdaptTask", "Answers", "batch_of"]

NUMBERS = "adapter.safetensors"
_IGNORED = -100
# Numbers of each tensor by which a base is known again.
_SAMPLED = 512


class Answers(nn.Module):
    """A decoder that is asked for the likelihood of answers alone: the head sees no other position.

    Args:
        decoder: the adapted model.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    @property
    def recompute(self) -> bool:
        """As of the decoder."""
        return self.decoder.recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        self.decoder.recompute = value

    def forward(
        self,
        token_BL: Tensor,
        target_BL: Tensor,
        *,
        mask_BL: Tensor | None = None,
        task_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """(nats_M, spread_M, losses that layers add, what they measure) of the tokens of answers, row by row.

        Args:
            token_BL: int64 ids.
            target_BL: int64 ids of answers, one position early; -100 where there is none.
            mask_BL: bool, False for padding, which stands on the left.
            task_B: the number of each row's task; None where nobody routes by it.

        ``spread_M`` is the mean over the vocabulary of -log p, for smoothed labels.
        """
        decoder = self.decoder
        # A pass that is made of its parts asks what blocks around it tell its rows.
        check_told(decoder, len(token_BL), "a pass over answers")
        state = told_rows(decoder, range(len(token_BL)), token_BL.shape[1])
        state |= {} if task_B is None else told_tasks(task_B, token_BL.shape[1])
        context = decoder.context(token_BL, token_mask_BL=mask_BL, state=state)
        x_BLD = decoder.hidden(token_BL, context)
        if decoder.streams is not None:
            x_BLD = decoder.streams.merge(x_BLD, context)
        is_asked_BL = target_BL != _IGNORED
        if decoder.head is not None and takes_context(decoder.head):
            logits_MV = decoder.logits(x_BLD, context)[is_asked_BL]
        else:
            logits_MV = decoder.logits(x_BLD[is_asked_BL])
        context.commit()
        log_p_MV = logits_MV.float().log_softmax(-1)
        nats_M = -log_p_MV.gather(1, target_BL[is_asked_BL].unsqueeze(1)).squeeze(1)
        return nats_M, -log_p_MV.mean(-1), context.mean_losses(), context.mean_metrics()


class AdaptTask(Task, kind="adapt"):
    """A frozen model, adapted by a method.

    Args:
        config: says model, rows and method.
        model: the base, adapted in place; read from ``config.model`` if None.
        tokenizer: of the base, with ``model``.

    Attributes:
        on_rows: called in an evaluation with the rows that are done, and all.
        before: the evaluation before the first step, None without rows that are held out.
        names: of the tasks, sorted; their numbers are their places.
        most_tokens: of a row: ``sequence_length``, or the model's positions where those are fewer.
        num_cut: rows that were longer.

    Raises DataError for rows that are none, ConfigError for a method that does not fit the model, TokenizerError for a model without
    tokenizer, CheckpointError as `load_model`.
    """

    headline: ClassVar[str] = "nats_per_token"
    unit: ClassVar[str] = "tokens"
    material: ClassVar[str] = "rows"

    @configclass
    class Config(Task.Config):
        """What is adapted, to what, how.

        Attributes:
            model: whatever `anabranch.lm.load_model` reads.
            data: a file of rows, see `anabranch.adapters.adapt.read_rows`.
            evaluation: one of rows that are held out; None takes them from ``data``.
            method: how.
            sequence_length: tokens of a row, at most.
            template: what is written around a prompt.
            held_out: share of each task's rows that is held out where they do not say; 0 for none.
            label_smoothing: weight of the uniform distribution in what is learned.
            dtype: type of the base's weights; None as stored. The adapter is float32.
        """

        model: str = Field(min_length=1)
        data: str = Field(min_length=1)
        evaluation: str | None = None
        method: Method.Config
        sequence_length: Size = Field(default=512, ge=2)
        template: str = "{prompt}\n"
        held_out: float = Field(default=0.1, ge=0, lt=1)
        label_smoothing: float = Field(default=0.0, ge=0, lt=1)
        dtype: Literal["float32", "bfloat16", "float16"] | None = None

        def __post_init__(self) -> None:
            if "{prompt}" not in self.template:
                raise ConfigError(f"template is {self.template!r}; {{prompt}} in it stands for what is asked")

    config: Config

    def __init__(self, config: Config, *, model: Decoder | None = None, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(config, model=model)
        self.method: Method = config.method.build()
        learned, held_out = self._rows()
        self.names = tuple(sorted({row.task for row in learned}))
        self._digest = digest_of([*learned, *held_out])
        if model is None:
            dtype = None if config.dtype is None else getattr(torch, config.dtype)
            model, tokenizer = load_model(config.model, dtype=dtype)
        if tokenizer is None:
            raise TokenizerError(
                f"{config.model} has no tokenizer, so no rows can be read for it; put tokenizer.json beside it"
            )
        if tokenizer.vocab_size > model.config.vocab_size:
            raise TokenizerError(
                f"the tokenizer of {config.model} has {tokenizer.vocab_size} tokens, but the model {model.config.vocab_size}"
            )
        self.base, self.tokenizer = model, tokenizer
        self._base_digest = _digest_of_model(model)
        self.most_tokens = min(config.sequence_length, model.config.max_positions)
        self.learned = self._encoded(learned)
        self.held_out = self._encoded(held_out) if held_out else None
        self.num_cut = self.learned.num_cut + (self.held_out.num_cut if self.held_out else 0)
        self.before: dict[str, Any] | None = None
        # Told how many of how many rows an evaluation has gone over.
        self.on_rows: Callable[[int, int], None] = lambda done, total: None
        self._answers: Answers | None = None
        self._context: TaskContext | None = None

    def _rows(self) -> tuple[list[Row], list[Row]]:
        config, needs = self.config, self.method.needs_task
        rows = read_rows(config.data, needs_task=needs)
        if config.evaluation is not None:
            return rows, read_rows(config.evaluation, needs_task=needs)
        return parted(rows, config.held_out)

    def _encoded(self, rows: Sequence[Row]) -> Encoded:
        numbers = []
        for row in rows:
            try:
                numbers += numbers_of([row.task], self.names, "error" if self.method.needs_task else "average")
            except InputError as error:
                raise DataError(f"{row.where}: {error}") from None
        return encoded(rows, numbers, self.tokenizer, self.config.template, self.most_tokens)

    # What it learns

    def build_model(self, context: TaskContext) -> nn.Module:
        """The base with the method's layers on it."""
        self.method.begin(self.base, self.names, seed=context.settings.seed)
        self._answers = Answers(self.base)
        return self._answers

    def sharded_parts(self, model: nn.Module) -> Iterable[nn.Module]:
        """As of a decoder."""
        assert isinstance(model, Answers)
        return decoder_parts(model.decoder)

    def speed(self, name: str, parameter: nn.Parameter) -> Speed | None:
        """As the method says."""
        return self.method.speed(name, parameter)

    # From what

    def training_data(self, context: TaskContext) -> Examples:
        """Rows, each once an epoch."""
        place = {"rank": context.rank, "world_size": context.world_size}
        return Examples(*self.learned.tensors, seed=context.settings.seed, **place)

    def validation_data(self, context: TaskContext) -> tuple[Tensor, ...] | None:
        """Rows that are held out, about ``train.eval_tokens`` of them spread over the tasks, in every process."""
        self._context = context
        if self.held_out is None:
            return None
        row_N = spread_rows(self.held_out, context.settings.eval_tokens)
        return tuple(tensor[row_N] for tensor in self.held_out.tensors)

    def units_per_item(self, context: TaskContext) -> int:
        """Tokens of a row, on average."""
        return max(1, round(float(self.learned.length_N.float().mean())))

    def fingerprint(self) -> str:
        """Of all rows by content."""
        return self._digest

    # How

    def step(self, model: nn.Module, batch: tuple[Tensor, ...], context: TaskContext) -> Losses:
        """The loss of the answers, what layers add, and what the method punishes."""
        given = batch_of(*batch)
        weight = self.method.unlikelihood() if self.method.needs_task else 0.0
        task_B: Any = given.pop("task_B")
        task_B = task_B if self.method.needs_task else None
        rows = len(given["token_BL"])
        if weight:
            # The same rows again, each under the task of another, in the one call that a step may make.
            given = {name: None if value is None else torch.cat([value, value]) for name, value in given.items()}
            task_B = torch.cat([task_B, task_B.roll(1)])
        nats_M, spread_M, added, metrics = model(**given, task_B=task_B)
        row_M = (given["target_BL"] != _IGNORED).nonzero()[:, 0]
        smooth = self.config.label_smoothing
        loss_M = nats_M if not smooth else (1 - smooth) * nats_M + smooth * spread_M
        loss_B = _mean_of_rows(loss_M, row_M, len(given["token_BL"]))
        terms = {"answer": loss_B[:rows].mean(), **added}
        if weight:
            # -log(1 - p), where another task is told than the row's own.
            punished_M = -torch.log1p(-(-nats_M).exp().clamp_max(1 - 1e-6))
            is_other_B = (task_B[rows:] != task_B[:rows]).float()
            punished_B = _mean_of_rows(punished_M, row_M, 2 * rows)[rows:]
            terms["unlikelihood"] = weight * (punished_B * is_other_B).mean()
        return Losses.of(metrics=metrics, mean_of=dict.fromkeys([*added, *metrics], "tokens"), **terms)

    def counts(self, batch: tuple[Tensor, ...], context: TaskContext) -> dict[str, float]:
        """The tokens that layers see, of which losses that they add are means; rows differ in length."""
        length_B = batch[2]
        return {"tokens": float((length_B - 1).sum())}

    def evaluate(self, model: Any, data: tuple[Tensor, ...], context: TaskContext) -> dict[str, Any]:
        """Nats per token of answers: of all, and of each task (``by_task``: nats_per_token, tokens, rows)."""
        # Rows of tasks that are not learned stand behind all others.
        totals = torch.zeros(3, len(self.names) + 1, dtype=torch.float64)
        done = 0
        for row_B in data[2].argsort(stable=True).split(context.batch_size):
            self.on_rows(done, len(data[2]))
            done += len(row_B)
            given = batch_of(*(tensor[row_B] for tensor in data))
            task_B = given.pop("task_B")
            nats_M, *_ = model(**given, task_B=task_B if self.method.needs_task else None)
            row_M = (given["target_BL"] != _IGNORED).nonzero()[:, 0].cpu()
            own_B = task_B.cpu() % totals.shape[1]
            totals[0].index_add_(0, own_B[row_M], nats_M.double().cpu())
            totals[1].index_add_(0, own_B[row_M], torch.ones(len(row_M), dtype=torch.float64))
            totals[2].index_add_(0, own_B, torch.ones(len(own_B), dtype=torch.float64))
        nats, tokens, _ = totals.sum(1).tolist()
        by_task = {
            name: {"nats_per_token": nats / tokens, "tokens": int(tokens), "rows": int(rows)}
            for name, (nats, tokens, rows) in zip(self.names, totals.T.tolist(), strict=False)
            if tokens and name
        }
        return {"nats_per_token": nats / max(tokens, 1), "tokens": int(tokens), "by_task": by_task}

    def on_step(self, step: int, fraction: float) -> None:
        """Measure the held-out rows before the first step, when nothing is added yet."""
        if step or self.before is not None or self.held_out is None:
            return
        context, answers = self._context, self._answers
        assert context is not None, "a trainer has asked for data"
        assert answers is not None, "a trainer has asked for the model"
        with evaluation_mode(answers), autocast(context.device, context.settings.precision):
            data = self.validation_data(context)
            assert data is not None, "there are rows that are held out"
            self.before = self.evaluate(answers, tuple(tensor.to(context.device) for tensor in data), context)

    # What is kept

    def save(self, folder: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """The numbers of the adapter, and the task's config."""
        assert isinstance(model, Answers)
        names = {f"decoder.{name}" for name in self.method.kept(model.decoder)}
        write_file(folder / NUMBERS, {name: tensor.detach() for name, tensor in tensors.items() if name in names})
        atomic_write_json(folder / "config.json", {"schema": 1, "format": FORMAT, "task": to_dict(self.config)})

    def load(self, folder: Path, model: nn.Module) -> None:
        """The numbers of the adapter."""
        assert isinstance(model, Answers)
        load_numbers(model.decoder, folder / NUMBERS, prefix="decoder.", names=self.method.kept(model.decoder))

    def state_dict(self) -> dict[str, Any]:
        """The base by content, and the evaluation before the first step."""
        return {"base": self._base_digest, "before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError where the base is another now."""
        if state["base"] != self._base_digest:
            raise DataError(
                f"{self.config.model} is another model than when the run began; bring it back, or start a new run"
            )
        self.before = state["before"]

    def write(self, folder: Path) -> Written:
        """Write the adapter as others use it, see `Method.write`; the whole model where parameters of the base have learned."""
        if self.method.trains_base:
            save_model(folder, self.base, self.tokenizer)
            return Written(folder, "model", "parameters of the base have learned, so this is a model of its own")
        return self.method.write(folder, self.base, self.config.model)


def batch_of(token_BL: Tensor, start_B: Tensor, length_B: Tensor, task_B: Tensor) -> dict[str, Any]:
    """What `Answers` is called with, of rows that are padded on the right: as long as the longest, padded on the left."""
    longest = int(length_B.max())
    place_BL = torch.arange(longest, device=token_BL.device) - (longest - length_B)[:, None]
    is_real_BL = place_BL >= 0
    id_BL = token_BL.long().gather(1, place_BL.clamp_min(0))
    target_BL = id_BL.masked_fill(place_BL < start_B[:, None], _IGNORED)
    mask_BL = None if bool(is_real_BL.all()) else is_real_BL[:, :-1]
    return {"token_BL": id_BL[:, :-1], "target_BL": target_BL[:, 1:], "mask_BL": mask_BL, "task_B": task_B}


def _mean_of_rows(value_M: Tensor, row_M: Tensor, rows: int) -> Tensor:
    """mean_B of the values of each row."""
    count_B = torch.bincount(row_M, minlength=rows).clamp_min(1)
    return value_M.new_zeros(rows).index_add(0, row_M, value_M) / count_B


def _digest_of_model(model: Decoder) -> str:
    """Of names, sizes and some numbers of each tensor: enough to tell another model, in no time."""
    hashed = hashlib.sha256()
    for name, value in model.state_dict().items():
        flat = value.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED]
        hashed.update(f"{name} {list(value.shape)} {value.dtype};".encode())
        hashed.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]
