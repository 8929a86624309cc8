"""`AdaptTask`: a frozen model learns tasks by an adapter, from rows of questions and answers.

    loss = mean over rows of (mean over the answer's tokens of -log p(token | prompt, answer so far)) + what layers add

Only what was put on learns and is kept in checkpoints; the base is read again from where it lies, and looked at whether it is the same.
"""
# Shapes: B rows, L positions, M tokens of answers, R rows of a pass

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from anabranch.adapters.adapt.answers import IGNORED, Answers, batch_of
from anabranch.adapters.adapt.checkpoint import NUMBERS, check_begun, digest_of_model, layers_in, write_checkpoint
from anabranch.adapters.adapt.choices import encoded_choices, lesson_of_choices
from anabranch.adapters.adapt.evaluation import Evaluation
from anabranch.adapters.adapt.lesson import Lessons, Seen
from anabranch.adapters.adapt.method import Method, Written
from anabranch.adapters.adapt.prompts import DEFAULT, check_template, common_template, write_template
from anabranch.adapters.adapt.rows import Encoded, Row, digest_of, encoded, parted, read_rows, spread_rows
from anabranch.adapters.folder_files import check_writable, staged_adapter
from anabranch.adapters.own_folder import load_numbers
from anabranch.adapters.put_on import check_room
from anabranch.adapters.tasks import numbers_of
from anabranch.config import Field, Size, configclass
from anabranch.data import Tokenizer
from anabranch.errors import ConfigError, DataError, InputError, TokenizerError
from anabranch.files import check_no_file
from anabranch.lm.checkpoint import load_model, save_model
from anabranch.lm.decoder import Decoder
from anabranch.lm.folder import check_replaceable
from anabranch.lm.generate import evaluating
from anabranch.nn.nf4 import quantize_nf4
from anabranch.train.evaluate import autocast, evaluation_mode
from anabranch.train.examples import Examples
from anabranch.train.language_model import decoder_parts
from anabranch.train.optimizer import Speed
from anabranch.train.task import Losses, Task, TaskContext

__all__ = ["AdaptTask"]

# Rows that a method looks at before the first step, one by one.
_LOOKED_AT = 32


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
        template: what is written around prompts.
        num_learning: numbers that learn at any time of the training, once the model is built.

    Raises DataError for rows that are none, ConfigError for a method that does not fit the model, TokenizerError for a model without
    tokenizer, CheckpointError as `load_model`.
    """

    headline: ClassVar[str] = "nats_per_token"
    better: ClassVar[Literal["lower", "higher"] | None] = "lower"
    holds_out: ClassVar[str] = (
        "give some with --eval-data (task.evaluation), mark them with a split, or set task.held_out above 0"
    )
    unit: ClassVar[str] = "tokens"
    material: ClassVar[str] = "rows"

    @configclass
    class Config(Task.Config):
        """What is adapted, to what, how.

        Attributes:
            model: whatever `anabranch.lm.load_model` reads.
            data: a file of rows, see `anabranch.adapters.adapt.read_rows`.
            evaluation: one of rows that are held out (those whose ``split`` says so, where some do); None takes them from ``data``, whose
                rows that say so are not learned either way.
            method: how.
            sequence_length: tokens of a row, at most.
            template: what is written around a prompt, ``{prompt}``; or ``chat``, the base's own form of a chat with the prompt as what a
                user says: what `anabranch chat` and a server's chats give the model. None for what the adapters learned that the method
                begins from, else the prompt and a new line.
            held_out: share of each task's rows that is held out where they do not say; 0 for none.
            label_smoothing: weight of the uniform distribution in what is learned.
            unlikelihood: factor of the loss that makes wrong choices of a row unlikely, see `choices`; T-Few's is 1.
            length_normalized: factor of the loss that prefers the answer to its wrong choices; T-Few's is 1.
            most_choices: wrong ones of a row, at most, of which each costs as much as the row itself.
            dtype: type of the base's weights; None as stored. The adapter is float32.
            quantize: ``nf4`` keeps matrices of the base in 4 bits while the adapter learns (QLoRA, `anabranch.nn.nf4`); None as stored.
            double_quantize: their scales in 8 bits too, as in the paper.
        """

        model: str = Field(min_length=1)
        data: str = Field(min_length=1)
        evaluation: str | None = None
        method: Method.Config
        sequence_length: Size = Field(default=512, ge=2)
        template: str | None = None
        held_out: float = Field(default=0.1, ge=0, lt=1)
        label_smoothing: float = Field(default=0.0, ge=0, lt=1)
        unlikelihood: float = Field(default=0.0, ge=0)
        length_normalized: float = Field(default=0.0, ge=0)
        most_choices: Size = Field(default=8, ge=1)
        dtype: Literal["float32", "bfloat16", "float16"] | None = None
        quantize: Literal["nf4"] | None = None
        double_quantize: bool = True

        def __post_init__(self) -> None:
            if self.template is not None:
                check_template(self.template)

        @property
        def learns_choices(self) -> bool:
            """Whether wrong choices of rows are looked at."""
            return self.unlikelihood > 0 or self.length_normalized > 0

    config: Config

    def __init__(self, config: Config, *, model: Decoder | None = None, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(config, model=model)
        self.method: Method = config.method.build()
        self.template = template_of(config)
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
        self._base_digest = digest_of_model(model)
        if config.quantize is not None:
            if self.method.trains_base:
                raise ConfigError(
                    f"quantize is {config.quantize!r}, in which nothing learns, and {self.method.name} trains the base; leave it out, or "
                    "take a method whose layers stand beside it"
                )
            quantize_nf4(model, double=config.double_quantize)
        self.most_tokens = min(config.sequence_length, model.config.max_positions)
        self.learned = self._encoded(learned)
        self.held_out = self._encoded(held_out) if held_out else None
        self.choices = self._choices(learned), self._choices(held_out)
        self.num_cut = self.learned.num_cut + (self.held_out.num_cut if self.held_out else 0)
        self.num_learning = 0
        self.before: dict[str, Any] | None = None
        # Told how many of how many rows an evaluation has gone over.
        self.on_rows: Callable[[int, int], None] = lambda done, total: None
        # Of folders that the method began from, by content.
        self._began_from: dict[str, str] = {}
        self._answers: Answers | None = None
        self._context: TaskContext | None = None

    def _rows(self) -> tuple[list[Row], list[Row]]:
        config, needs = self.config, self.method.needs_labels
        rows = read_rows(config.data, needs_task=needs)
        if config.learns_choices and not any(row.wrong for row in rows):
            raise DataError(
                f"no row of {config.data} has wrong choices, of which task.unlikelihood and task.length_normalized are losses; give rows "
                '"choices": [...], or leave both 0'
            )
        if config.evaluation is not None:
            measured = read_rows(config.evaluation, needs_task=needs)
            # As rows say in either file: what is not to be learned is not, and what is to be learned is not measured beside the rest.
            return parted(rows, 0.0)[0], [row for row in measured if row.is_held_out] or measured
        return parted(rows, config.held_out)

    def _encoded(self, rows: Sequence[Row]) -> Encoded:
        numbers = []
        for row in rows:
            try:
                numbers += numbers_of([row.task], self.names, "error" if self.method.needs_task else "average")
            except InputError as error:
                raise DataError(f"{row.where}: {error}") from None
        return encoded(rows, numbers, self.tokenizer, self.template, self.most_tokens)

    def _choices(self, rows: Sequence[Row]) -> tuple[Tensor, ...]:
        """The tensors of the wrong choices of ``rows``; none where nothing is learned of them."""
        config = self.config
        if not config.learns_choices or not rows:
            return ()
        return encoded_choices(rows, self.tokenizer, self.most_tokens, config.most_choices).tensors

    # What it learns

    def build_model(self, context: TaskContext) -> nn.Module:
        """The base with the method's layers on it."""
        layers, seed = layers_in(context.checkpoint), context.settings.seed
        if layers is None:
            self.method.begin(self.base, self.names, seed=seed)
        else:
            self.method.go_on(self.base, self.names, layers, seed=seed)
        self._began_from = self.method.began_from()
        self.num_learning = sum(each.numel() for each in self.base.parameters() if each.requires_grad)
        if context.settings.optimizer == "adamw" and not self.method.trains_base:
            # A gradient and two moments of each.
            check_room(self.num_learning, of_each=12)
        self._answers = Answers(self.base)
        if layers is None:
            self.method.look(self.base, self._first_losses(context))
        return self._answers

    def _first_losses(self, context: TaskContext) -> Iterator[Tensor]:
        """-log p(answer) of each of the rows that are learned first, the same in all processes and however steps are cut up."""
        assert self._answers is not None, "it is made by now"
        count = min(_LOOKED_AT, len(self.learned.tensors[0]))
        rows = Examples(*self.learned.tensors, seed=context.settings.seed).next_batch(count)
        device = self.base.embedding.weight.device
        # Nothing is drawn, balanced or counted by a look.
        with evaluating(self._answers):
            for row in range(count):
                given = self._given(tensor[row : row + 1].to(device) for tensor in rows)
                nats_M, *_ = self._answers(**given)
                yield nats_M.sum()

    def routing(self) -> dict[str, Any]:
        """What the routers have come to on the rows that are measured, or on as many that are learned where none are held out.

        ``tasks`` are the names of the tasks, whose places are the numbers in ``by_task``.
        """
        found = self.method.routing(self.base, self._passes())
        return {**found, "tasks": list(self.names)} if "routers" in found else found

    def _passes(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        context, rows = self._context, self.held_out or self.learned
        assert context is not None, "a trainer has asked for data"
        row_N = spread_rows(rows, context.settings.eval_tokens)
        none = self.names.index("") if "" in self.names else -1
        for token_BL, mask_BL, task_B in rows.passes(row_N, context.batch_size, self.base.embedding.weight.device):
            # A row that names no task has no number.
            yield token_BL, mask_BL, torch.where(task_B == none, -1, task_B)

    def _given(self, rows: Iterable[Tensor], fraction: float | None = None) -> dict[str, Any]:
        """The arguments of a pass over ``rows`` (token, start, length, task); see `Method.state` for ``fraction``."""
        given = batch_of(*rows)
        task_B = given.pop("task_B")
        return {**given, "state": self.method.state(task_B, given["token_BL"].shape[1], fraction)}

    def sharded_parts(self, model: nn.Module) -> Iterable[nn.Module]:
        """As of a decoder. Whoever goes over them is told by ConfigError of numbers that several parts learn."""
        assert isinstance(model, Answers)
        parts, seen = list(decoder_parts(model.decoder)), set[int]()
        for part in parts:
            own = {id(parameter) for parameter in part.parameters() if parameter.requires_grad}
            if own & seen:
                raise ConfigError(
                    f"method {self.method.name} learns numbers that blocks share, which cannot be spread over processes block by block; "
                    "use train.parallel=ddp"
                )
            seen |= own
        yield from parts

    def speed(self, name: str, parameter: nn.Parameter) -> Speed | None:
        """As the method says."""
        return self.method.speed(name, parameter)

    # From what

    def training_data(self, context: TaskContext) -> Examples:
        """Rows, each once an epoch."""
        place = {"rank": context.rank, "world_size": context.world_size}
        return Examples(*self.learned.tensors, *self.choices[0], seed=context.settings.seed, **place)

    def validation_data(self, context: TaskContext) -> tuple[Tensor, ...] | None:
        """Rows that are held out, about ``train.eval_tokens`` of them spread over the tasks, in every process."""
        self._context = context
        if self.held_out is None:
            return None
        row_N = spread_rows(self.held_out, context.settings.eval_tokens)
        return tuple(tensor[row_N] for tensor in (*self.held_out.tensors, *self.choices[1]))

    def units_per_item(self, context: TaskContext) -> int:
        """Tokens of a row, on average."""
        return max(1, round(float(self.learned.length_N.float().mean())))

    def fingerprint(self) -> str:
        """Of all rows by content."""
        return self._digest

    # How

    def step(self, model: nn.Module, batch: tuple[Tensor, ...], context: TaskContext) -> Losses:
        """The loss of the answers, what layers add, and what is learned besides."""
        lessons, task_B = self._lessons(batch), batch[3]
        told, again = lessons.told, lessons.again
        given = self._given(told, context.fraction)
        if again is not None:
            given["state"] = given["state"] | again(*given["token_BL"].shape)
        nats_M, spread_M, added, metrics, apart_M = model(**given, twice=again is not None)
        row_M = (given["target_BL"] != IGNORED).nonzero()[: len(nats_M), 0]
        seen = Seen.of(nats_M, apart_M, row_M, len(lessons.rows[0]))
        answer_B, smooth = seen.nats_R[: len(task_B)], self.config.label_smoothing
        if smooth:
            answer_B = (1 - smooth) * answer_B + smooth * seen.mean_R(spread_M)[: len(task_B)]
        terms = {"answer": answer_B.mean(), **added, **lessons.losses(seen)}
        mean_of = dict.fromkeys([*added, *metrics], "tokens") | {name: name for name in self.method.loss_counts(task_B)}
        return Losses.of(metrics=metrics, mean_of={name: mean_of[name] for name in [*added, *metrics]}, **terms)

    def _lessons(self, batch: tuple[Tensor, ...]) -> Lessons:
        """What a step learns of a batch: what the method says, and of wrong choices."""
        config = self.config
        token_BL, start_B, length_B, task_B, *choices = batch
        rows = token_BL, start_B, length_B, task_B
        lessons = [*self.method.lessons(rows)]
        if choices:
            factors = (config.unlikelihood, config.length_normalized)
            lessons.append(
                lesson_of_choices(rows, choices[0], choices[1], factors, self.most_tokens, config.most_choices)
            )
        return Lessons(rows, lessons)

    def counts(self, batch: tuple[Tensor, ...], context: TaskContext) -> dict[str, float]:
        """The tokens that layers see, of which losses that they add are means, and what others of these are means of."""
        _, _, length_R, task_R = self._lessons(batch).rows
        return {"tokens": float((length_R - 1).sum()), **self.method.loss_counts(task_R)}

    def evaluate(self, model: Any, data: tuple[Tensor, ...], context: TaskContext) -> dict[str, Any]:
        """Nats per token of answers, of all and by task, and how many are preferred to wrong choices; see `Evaluation.measured`."""
        rows = Evaluation(model, self._given, batch_size=context.batch_size, most_tokens=self.most_tokens)
        return rows.measured(data, self.names, self.on_rows)

    def before_step(self, step: int, fraction: float) -> None:
        """As the method says."""
        self.method.before_step(self.base, step, fraction)

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
        write_checkpoint(folder, self.config, self.base.config.linears, tensors, names)

    def load(self, folder: Path, model: nn.Module) -> None:
        """The numbers of the adapter."""
        assert isinstance(model, Answers)
        load_numbers(model.decoder, folder / NUMBERS, prefix="decoder.", names=self.method.kept(model.decoder))

    def state_dict(self) -> dict[str, Any]:
        """The base and what the method began from by content, and the evaluation before the first step."""
        return {"base": self._base_digest, "began_from": self._began_from, "before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError where the base is another now, or an adapter that the method reads again."""
        check_begun(state, self.config.model, self._base_digest, self.method.began_from())
        self.before = state["before"]

    @staticmethod
    def check_place(config: Config, folder: Path) -> None:
        """Before the work: whether `write` may replace what lies at ``folder``.

        Raises DataError for a file, the working directory and a folder that holds more than an adapter and what may lie beside one, and
        CheckpointError where a model is written, and the folder holds anything but one that we saved.
        """
        if config.method.build().trains_base:
            check_no_file(folder, advice="move it elsewhere")
            check_replaceable(folder, advice="move it elsewhere")
        else:
            check_writable(folder)

    def write(self, folder: Path) -> Written:
        """Write the adapter as others use it, see `Method.write`; the whole model where parameters of the base have learned.

        Args:
            folder: not there, empty, or with an adapter, in either form, which is replaced at once; what people said of it stays, gates of
                other numbers are set aside, see `anabranch.adapters.folder_files`.

        Raises as `Method.write` and, for what lies there, as `check_place`.
        """
        if self.method.trains_base:
            save_model(folder, self.base, self.tokenizer)
            return Written(folder, "model", "parameters of the base have learned, so this is a model of its own")
        # A method may write in several steps, none of which anybody is to see alone.
        with staged_adapter(folder) as place:
            written = self.method.write(place, self.base, self.config.model)
            write_template(place, self.template)
        return replace(written, folder=folder)


def template_of(config: AdaptTask.Config) -> str:
    """How prompts of a run are written: as it says, else as the adapters that it begins from learned them, else `prompts.DEFAULT`.

    Raises CheckpointError for a note of one of these that says nothing.
    """
    return config.template or common_template(config.method.build().begins_from()) or DEFAULT
