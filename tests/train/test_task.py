"""Tasks: what is differentiated, what learns, what is kept; and one that has nothing to do with text."""

import json
import math
import os
import signal
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from anabranch.config import Field, configclass, from_dict, to_dict
from anabranch.errors import CheckpointError, ConfigError, DataError
from anabranch.lm import load_model
from anabranch.train import (
    Constant,
    DecoderTask,
    Examples,
    LanguageModel,
    Losses,
    RunConfig,
    Task,
    TaskRunConfig,
    TrainConfig,
    Trainer,
    checkpoints,
    read_metrics,
    read_run_config,
    read_task_run_config,
)
from anabranch.train.task import TaskContext, moved
from digits import Digits

pytest.importorskip("sklearn")


def digits_run(task=None, **train):
    settings = {"steps": 6, "batch_size": 8, "learning_rate": 1e-2, "log_every": 1, "device": "cpu"}
    return TaskRunConfig(
        task=task or Digits.Config(),
        train=TrainConfig(**{**settings, "eval_every": 3, "checkpoint_every": 3, **train}),
    )


def state_of(checkpoint):
    table = json.loads((checkpoint / "trainer.json").read_text())
    del table["progress"]["seconds"]
    return table, {file.name: load_file(file) for file in sorted(checkpoint.glob("*.safetensors"))}


def assert_same_end(one, two):
    (table, tensors), (other_table, other_tensors) = (state_of(checkpoints(out)[-1]) for out in (one, two))
    assert table == other_table
    assert tensors.keys() == other_tensors.keys() == {"model.safetensors", "optimizer.safetensors"}
    for file, values in tensors.items():
        assert values.keys() == other_tensors[file].keys()
        assert [name for name in values if not torch.equal(values[name], other_tensors[file][name])] == []


# An image classifier: its own module, its own data, no text anywhere


def test_a_classifier_learns_is_measured_and_told_in_its_own_words(tmp_path):
    events = []
    run = digits_run(steps=200, batch_size=64, learning_rate=0.03, log_every=50, eval_every=None, checkpoint_every=None)
    result = Trainer(run, tmp_path, on_event=events.append).fit()
    assert result.headline > 0.87  # one in ten by chance
    assert result.measures["accuracy"] == result.headline
    assert (result.status, result.step, result.units, result.evaluation) == ("finished", 200, 12800, None)
    assert math.isnan(result.bits_per_byte)
    train, validation = (
        next(record for record in read_metrics(tmp_path) if record["kind"] == kind) for kind in ("train", "validation")
    )
    assert list(train) == [
        "step",
        "kind",
        "loss",
        "cross_entropy",
        "auxiliary",
        "learning_rate",
        "gradient_norm",
        "skipped_steps",
        "images",
        "seconds",
        "images_per_second",
    ]
    assert train["images"] == 50 * 64
    assert train["loss"] == train["cross_entropy"]
    assert train["auxiliary"] == {}
    assert validation == {"step": 200, "kind": "validation", "accuracy": result.headline}
    assert next(event for event in events if event.kind == "step").values.keys() == {
        "loss",
        "gradient_norm",
        "learning_rate",
        "images_per_second",
    }


def test_a_classifier_that_is_interrupted_goes_on_to_the_bit(tmp_path):
    run = digits_run(accumulation=2)
    Trainer(run, tmp_path / "straight").fit()

    def interrupt(event):
        if event.kind == "step" and event.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    result = Trainer(run, tmp_path / "resumed", on_event=interrupt).fit()
    assert (result.status, result.signal, result.checkpoint.name) == ("interrupted", "SIGTERM", "step-00000004")
    assert sorted(file.name for file in result.checkpoint.iterdir()) == [
        "SHA256SUMS",
        "config.json",
        "model.safetensors",
        "optimizer.safetensors",
        "trainer.json",
    ]
    assert Trainer(run, tmp_path / "resumed", resume=True).fit().status == "finished"
    assert_same_end(tmp_path / "straight", tmp_path / "resumed")


def test_the_last_evaluation_is_in_the_last_checkpoint(tmp_path):
    result = Trainer(digits_run(steps=4, eval_every=None), tmp_path).fit()
    progress = state_of(result.checkpoint)[0]["progress"]
    assert progress["evaluation"] == {"step": 4, "kind": "validation", "accuracy": result.headline}
    again = Trainer(digits_run(steps=4, eval_every=None), tmp_path, resume=True).fit()
    assert again.measures == result.measures
    assert [record["kind"] for record in read_metrics(tmp_path)].count("validation") == 1


def test_steps_are_those_of_a_loop_written_out(tmp_path):
    run = digits_run(steps=3, clip=None, weight_decay=0.0, schedule=Constant.Config(warmup=0), accumulation=2)
    trainer = Trainer(run, tmp_path)
    twin = Trainer(run, tmp_path / "twin")
    model, stream = twin.model, twin.stream
    trainer.fit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        image_BD, label_B = stream.next_batch(8)
        F.cross_entropy(model(image_BD), label_B).backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_callers_random_state_stays_and_weights_follow_the_seed(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, two, other = (Trainer(digits_run(seed=seed), tmp_path / str(n)) for n, seed in enumerate((1, 1, 2)))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.model[0].weight, two.model[0].weight)
    assert not torch.equal(one.model[0].weight, other.model[0].weight)


# What a task says, by the smallest ones


class Line(Task):
    """y = w x + b with a penalty on w: gradients by hand."""

    headline = "distance"

    @configclass
    class Config(Task.Config):
        """Attributes: ``penalty``, of w; ``frozen``, a parameter that does not learn."""

        penalty: float = Field(default=0.5, ge=0)
        frozen: str | None = None

    def __init__(self, config, *, model=None):
        super().__init__(config, model=model)
        self.seen, self.called = [], []

    def build_model(self, context):
        model = nn.Linear(1, 1)
        nn.init.constant_(model.weight, 2.0)
        nn.init.constant_(model.bias, 1.0)
        return model

    def learns(self, name, parameter):
        return name != self.config.frozen

    def training_data(self, context):
        return Ones()

    def validation_data(self, context):
        return {"x": torch.ones(1, 1)}

    def before_step(self, step, fraction):
        self.called.append(("before", step, fraction, float(torch.rand(()))))

    def on_step(self, step, fraction):
        self.called.append(("on", step, fraction))

    def step(self, model, batch, context):
        self.seen.append((context.step, context.fraction, context.batch_size))
        self.drawn = float(torch.rand(()))
        error = (model(batch["x"]) - 1).square().mean() / 2
        return Losses.of(
            error=error, penalty=self.config.penalty * model.weight.sum(), metrics={"three": torch.tensor(3)}
        )

    def evaluate(self, model, data, context):
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"distance": float(model(data["x"]) - 1)}

    def state_dict(self):
        return {"seen": len(self.seen)}

    def load_state_dict(self, state):
        self.seen = [None] * state["seen"]


class Ones:
    """A stream of ones, that counts."""

    def __init__(self):
        self.count = 0

    def next_batch(self, batch_size):
        self.count += 1
        return {"x": torch.ones(batch_size, 1)}

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


# Adam without momentum, clipping and decay divides the gradient by its size, so eps = 1 and small gradients show it.
PLAIN = {"betas": (0.0, 0.0), "eps": 1.0, "weight_decay": 0.0, "clip": None, "schedule": Constant.Config(warmup=0)}


def line_run(steps=1, frozen=None, **train):
    return digits_run(Line.Config(frozen=frozen), steps=steps, **{**PLAIN, **train})


def test_the_sum_of_the_terms_is_what_is_differentiated(tmp_path):
    trainer = Trainer(line_run(learning_rate=1.0), tmp_path)
    trainer.fit()
    # x = 1: error = (2 + 1 - 1)^2 / 2 = 2, its gradient 2 for both; the penalty adds 0.5 to that of w
    record = read_metrics(tmp_path)[0]
    assert (record["error"], record["auxiliary"], record["loss"], record["three"]) == (2.0, {"penalty": 1.0}, 3.0, 3.0)
    assert record["gradient_norm"] == pytest.approx(math.hypot(2.5, 2.0))
    assert trainer.model.weight.item() == pytest.approx(2 - 2.5 / 3.5)
    assert trainer.model.bias.item() == pytest.approx(1 - 2 / 3)


def test_what_does_not_learn_stays_and_has_no_moments(tmp_path):
    trainer = Trainer(line_run(steps=3, frozen="weight"), tmp_path)
    result = trainer.fit()
    assert trainer.model.weight.item() == 2.0
    assert trainer.model.bias.item() != 1.0
    assert {name.partition("/")[0] for name in load_file(result.checkpoint / "optimizer.safetensors")} == {"bias"}
    assert load_file(result.checkpoint / "model.safetensors").keys() == {"weight", "bias"}


def test_a_step_knows_where_it_is_and_hooks_stand_around_it(tmp_path):
    trainer = Trainer(line_run(steps=2, accumulation=2), tmp_path)
    trainer.fit()
    assert trainer.task.seen == [(0, 0.0, 4), (0, 0.0, 4), (1, 0.5, 4), (1, 0.5, 4)]
    assert [call[:3] for call in trainer.task.called] == [
        ("on", 0, 0.0),
        ("before", 0, 0.0),
        ("on", 1, 0.5),
        ("before", 1, 0.5),
        ("on", 2, 1.0),
    ]
    drawn = [call[3] for call in trainer.task.called if call[0] == "before"]
    assert drawn[0] != drawn[1]
    assert trainer.task.drawn not in drawn  # what a step draws is not what hooks drew


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_step_at_no_pace_takes_its_batch_and_learns_nothing(tmp_path, log_every):
    """Steps 1 and 3 of 4 are passed over: weights and moments are those of a loop over batches 0 and 2, and the last is at half pace."""

    class Paced(Digits):
        def before_step(self, step, fraction):
            self.pace = [1.0, 0.0, 0.5, 0.0][step]

    same = {"clip": None, "weight_decay": 0.0, "schedule": Constant.Config(warmup=0), "eval_every": None}
    run = digits_run(steps=4, log_every=log_every, checkpoint_every=None, **same)
    events = []
    trainer = Trainer(run, tmp_path / "run", on_event=events.append)
    trainer.task.__class__ = Paced
    trainer._hooks.before.append(trainer.task.before_step)
    twin = Trainer(run, tmp_path / "twin")
    model, stream = twin.model, twin.stream
    trainer.fit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for pace in (1.0, 0.0, 0.5, 0.0):
        image_BD, label_B = stream.next_batch(8)
        if pace:
            optimizer.param_groups[0]["lr"] = pace * 1e-2
            F.cross_entropy(model(image_BD), label_B).backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    steps = [event.values for event in events if event.kind == "step"]
    assert [values["learning_rate"] for values in steps] == [1e-2, 0.0, 5e-3, 0.0]
    # Looked at where it is logged, and no step that failed.
    assert [math.isnan(values["loss"]) for values in steps] == [False, log_every == 4, False, False]
    lines = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert lines[-1]["skipped_steps"] == 0
    assert lines[-1]["loss"] > 0


def test_hooks_draw_the_same_when_a_step_is_done_again(tmp_path):
    straight = Trainer(line_run(steps=4, checkpoint_every=2), tmp_path / "straight")
    straight.fit()

    def interrupt(event):
        if event.kind == "step" and event.step == 3:
            raise KeyboardInterrupt

    run = line_run(steps=4, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        Trainer(run, tmp_path / "resumed", on_event=interrupt).fit()
    resumed = Trainer(run, tmp_path / "resumed", resume=True)
    resumed.fit()
    assert resumed.task.called == [("on", 2, 0.5), *straight.task.called[-4:]]
    assert len(resumed.task.seen) == 4  # two of them restored
    assert_same_end(tmp_path / "straight", tmp_path / "resumed")


def test_hooks_draw_the_same_in_all_processes_and_steps_do_not(tmp_path):
    trainer = Trainer(line_run(), tmp_path)
    drawn = []
    for rank in (0, 1):
        trainer._stepper.workers.rank = rank
        trainer._stepper.gradient(trainer.stream, replace(trainer._context, rank=rank))
        drawn.append((trainer.task.called[-1][3], trainer.task.drawn))
    assert drawn[0][0] == drawn[1][0]
    assert drawn[0][1] != drawn[1][1]


def test_a_model_that_is_given_is_where_training_starts(tmp_path):
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 7.0)

    class Given(Line):
        build_model = Task.build_model

    trainer = Trainer(digits_run(Given.Config(), steps=0), tmp_path / "a", model=model)
    assert trainer.model is model
    assert trainer.model.weight.item() == 7.0
    with pytest.raises(ConfigError, match=r"Given builds no model; give one: Trainer\(run, out, model=...\)"):
        Trainer(digits_run(Given.Config()), tmp_path / "b")


# Errors


class Broken(Line):
    """Goes wrong in a way that its config names."""

    @configclass
    class Config(Line.Config):
        """Attributes: ``how``."""

        how: str = ""

    def learns(self, name, parameter):
        return self.config.how != "all frozen"

    def step(self, model, batch, context):
        error = model(batch["x"])
        return {
            "shape": lambda: Losses.of(error=error),
            "detached": lambda: Losses.of(error=error.detach().mean()),
            "taken": lambda: Losses.of(loss=error.mean()),
            "metric": lambda: Losses.of(error=error.mean(), metrics={"step": error.mean()}),
            "none": lambda: Losses.of(),
        }.get(self.config.how, lambda: Losses.of(error=error.mean()))()

    def evaluate(self, model, data, context):
        return {
            "tensor": {"distance": torch.ones(())},
            "another": {"distance": 1.0, "length": torch.ones(())},
            "own": {"distance": 1.0, "step": 3},
        }.get(self.config.how, {"length": 1.0})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("all frozen", "no parameter of Linear learns; see which do in Task.learns"),
        ("shape", r"a step gave a loss of shape \[8, 1\]; it must be one number, such as a mean"),
        ("detached", "the loss of Broken depends on no parameter that learns"),
        ("taken", "a step gave 'loss', which the trainer logs itself; choose another name"),
        ("metric", "a step gave 'step', which the trainer logs itself"),
        ("none", "a step gave no losses"),
        ("", r"Broken\.evaluate gave length, and no number 'distance', which is its headline"),
        ("tensor", r"Broken\.evaluate gave distance, and no number 'distance'"),
        ("another", r"Broken\.evaluate gave what JSON does not hold \(.*Tensor.*\); make numbers of tensors"),
        ("own", r"Broken\.evaluate gave 'step', which the trainer logs itself"),
    ],
)
def test_a_task_that_cannot_be_trained_is_told_early(tmp_path, how, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(digits_run(Broken.Config(how=how), steps=1), tmp_path).fit()


def test_recomputation_needs_a_model_that_can(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.recompute is True, which Linear cannot do"):
        Trainer(line_run(recompute=True), tmp_path)


def test_a_run_is_resumed_by_its_own_task_and_data_alone(tmp_path, make_run):
    Trainer(digits_run(steps=1), tmp_path / "digits").fit()
    Trainer(make_run(steps=1), tmp_path / "text").fit()
    with pytest.raises(CheckpointError, match="weight"):  # both tasks have no name; their weights do not fit
        Trainer(digits_run(Line.Config(), steps=2), tmp_path / "digits", resume=True)
    with pytest.raises(DataError, match="digits holds a run of a task without a name, which goes on in Python"):
        Trainer(make_run(steps=2), tmp_path / "digits", resume=True)
    with pytest.raises(DataError, match="text holds a language model's run; read it with read_run_config"):
        Trainer(digits_run(steps=2), tmp_path / "text", resume=True)

    class Fewer(Digits):
        def __init__(self, config):
            super().__init__(config)
            self.image_ND = self.image_ND[1:]
            self.label_N = self.label_N[1:]

    with pytest.raises(DataError, match="cannot resume the examples: they, or what a tokenizer makes"):
        Trainer(digits_run(Fewer.Config(), steps=2), tmp_path / "digits", resume=True)


class Named(Line, kind="named-in-no-registry"):
    """A task whose kind nobody has registered."""


def test_a_kind_that_is_not_registered_is_no_reason_not_to_go_on(tmp_path):
    run = digits_run(Named.Config(penalty=0.25), steps=1)
    Trainer(run, tmp_path).fit()
    longer = run.replace(train=run.train.replace(steps=2))
    assert Trainer(longer, tmp_path, resume=True).fit().step == 2
    assert read_task_run_config(tmp_path, Named) == longer
    with pytest.raises(CheckpointError, match="no task of kind 'named-in-no-registry'"):
        read_task_run_config(tmp_path)
    with pytest.raises(DataError, match="a run of the task 'named-in-no-registry', not of the task 'language_model'"):
        read_task_run_config(tmp_path, LanguageModel)
    with pytest.raises(ConfigError, match=r"task\.penalty was 0\.25 and is now 0\.5"):
        Trainer(longer.replace(task=Named.Config()), tmp_path, resume=True)


@pytest.mark.parametrize("part", ["stream", "task"])
def test_state_that_the_task_did_not_store_is_told(tmp_path, part):
    path = Trainer(line_run(), tmp_path).fit().checkpoint
    table = json.loads((path / "trainer.json").read_text())
    table[part] = {}
    (path / "trainer.json").write_text(json.dumps(table))
    (path / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match=f"{part} in .*trainer.json is not what a trainer stores.*; remove "):
        Trainer(line_run(steps=2), tmp_path, resume=True)


# The language model is one of them


def test_a_run_config_is_the_language_models_task_written_short(tmp_path, make_run):
    run = make_run()
    long = TaskRunConfig(task=LanguageModel.Config(model=run.model, data=run.data), train=run.train)
    assert run.task == long.task
    assert from_dict(TaskRunConfig, json.loads(json.dumps(to_dict(long)))) == long
    ours = Trainer(long, tmp_path / "long").fit()
    theirs = Trainer(run, tmp_path / "short").fit()
    assert ours.measures == theirs.measures
    assert ours.headline == ours.nats_per_token == theirs.nats_per_token
    (one, _), (two, _) = (load_model(tmp_path / name) for name in ("long", "short"))
    assert all(torch.equal(one.state_dict()[name], value) for name, value in two.state_dict().items())
    assert read_task_run_config(tmp_path / "long") == long
    with pytest.raises(DataError, match="long holds a run of the task 'language_model', which goes on in Python"):
        read_run_config(tmp_path / "long")


def test_configs_of_before_read_as_they_did(make_run):
    table = to_dict(make_run())
    assert list(table) == ["model", "data", "train", "start", "parallel"]
    del table["start"], table["parallel"]
    assert from_dict(RunConfig, table) == make_run()


def test_a_decoder_can_learn_another_task(tmp_path, dense_model):
    """Only DecoderTask's own methods are inherited: building, saving as a model folder, loading."""

    class Zeros(DecoderTask):
        @configclass
        class Config(Task.Config):
            model: type(dense_model) = dense_model

        def training_data(self, context):
            return Ones()

        def step(self, model, batch, context):
            token_BL = batch["x"].long()
            return Losses.of(size=model(token_BL).logits_BLV.square().mean())

    run = digits_run(Zeros.Config(), steps=2)
    result = Trainer(run, tmp_path).fit()
    model, tokenizer = load_model(tmp_path)
    assert model.config == dense_model
    assert tokenizer is None
    assert result.measures == {}
    assert math.isnan(result.headline)
    assert Trainer(run, tmp_path, resume=True).fit().step == 2


def test_batches_of_any_form_are_moved():
    class Pair(tuple):
        pass

    tensor = torch.ones(2)
    found = moved({"a": (tensor, [tensor, "word"]), "b": Pair((tensor,)), "c": None}, torch.device("meta"))
    assert found["a"][0].is_meta
    assert found["a"][1][0].is_meta
    assert found["a"][1][1] == "word"
    assert isinstance(found["b"], Pair)
    assert found["b"][0].is_meta
    assert found["c"] is None
    named = moved(ImageAndLabel(tensor, 3), torch.device("meta"))
    assert isinstance(named, ImageAndLabel)
    assert named.image.is_meta
    assert named.label == 3


class ImageAndLabel(NamedTuple):
    """A batch with names."""

    image: torch.Tensor
    label: int


def test_names_of_the_trainer_are_its_own_where_they_would_stand_beside_them():
    """The first term and the metrics stand by their names in the log, the other terms under ``auxiliary``; ``loss`` is their sum."""
    one = torch.ones(())
    for terms, metrics in (
        ({"seconds": one, "size": one}, {}),
        ({"size": one, "loss": one}, {}),
        ({"size": one}, {"kind": one}),
    ):
        with pytest.raises(ConfigError, match=r"^a step gave '(seconds|loss|kind)', which the trainer logs itself"):
            Losses.of(metrics=metrics, **terms)
    assert Losses.of(size=one, seconds=one).total == 2


def test_the_share_of_a_run_of_no_steps_is_none():
    context = TaskContext(TrainConfig(steps=0), 8)
    assert context.fraction == 0
    assert replace(context, settings=TrainConfig(steps=4), step=3).fraction == 0.75


# Means of something else than items


class Ragged(Task):
    """Rows of numbers, of which the first ``length`` are real; ``x`` learns to be near them. Loss: a mean over real numbers."""

    def build_model(self, context):
        return nn.Linear(1, 1, bias=False)

    def training_data(self, context):
        length_N = torch.tensor([1, 5, 2, 5, 3, 3, 4, 1])
        return Examples(
            torch.arange(40.0).view(8, 5),
            length_N,
            seed=context.settings.seed,
            rank=context.rank,
            world_size=context.world_size,
        )

    def counts(self, batch, context):
        return {"numbers": float(batch[1].sum())}

    def step(self, model, batch, context):
        value_BL, length_B = batch
        real_BL = torch.arange(value_BL.shape[1]) < length_B[:, None]
        error_BL = (model(torch.ones(1, 1)) - value_BL).square()
        losses = {"error": (error_BL * real_BL).sum() / real_BL.sum(), "penalty": model.weight.square().sum()}
        metrics = {"value": (value_BL * real_BL).sum() / real_BL.sum()}
        return Losses.of(**losses, metrics=metrics, mean_of={"error": "numbers", "value": "numbers"})

    def evaluate(self, model, data, context):
        return {}


def gradient_of(run, out):
    """(what a step of ``run`` gave, the gradients it left)."""
    trainer = Trainer(run, out)
    found = trainer._stepper.gradient(trainer.stream, trainer._context)
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }
    trainer.close()
    return found, gradients


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_weigh_as_much_as_they_have_of_what_a_loss_is_a_mean_of(tmp_path, parts):
    whole, gradients = gradient_of(digits_run(Ragged.Config()), tmp_path / "whole")
    found, others = gradient_of(digits_run(Ragged.Config(), accumulation=parts), tmp_path / "parts")
    torch.testing.assert_close(found.total, whole.total)
    for ours, theirs in ((found.terms, whole.terms), (found.metrics, whole.metrics), (others, gradients)):
        torch.testing.assert_close(ours, theirs)


def test_parts_that_have_equally_much_are_weighed_as_ever(tmp_path, monkeypatch):
    """To the bit, whatever the number is and whether anybody counts."""
    even = lambda self, batch, context: {"numbers": 7.0}  # noqa: E731
    monkeypatch.setattr(Ragged, "counts", even)
    counted, gradients = gradient_of(digits_run(Ragged.Config(), batch_size=6, accumulation=3), tmp_path / "counted")
    monkeypatch.setattr(Ragged, "counts", Task.counts)
    step = Ragged.step
    monkeypatch.setattr(Ragged, "step", lambda *given: replace(step(*given), mean_of={}))
    plain, others = gradient_of(digits_run(Ragged.Config(), batch_size=6, accumulation=3), tmp_path / "plain")
    assert torch.equal(counted.total, plain.total)
    assert torch.equal(gradients["weight"], others["weight"])


def test_a_part_without_any_of_it_counts_nothing():
    losses = Losses.of(
        error=torch.tensor(3.0, requires_grad=True), rest=torch.tensor(1.0), mean_of={"error": "numbers"}
    )
    found = losses.weighed({"numbers": 0.0})
    assert (float(found.total.detach()), {name: float(value.detach()) for name, value in found.terms.items()}) == (
        1,
        {"error": 0, "rest": 1},
    )
    assert losses.weighed({"numbers": 1.0}) is losses


def test_units_that_nobody_counts_and_means_of_nothing_there(tmp_path, monkeypatch):
    monkeypatch.setattr(Ragged, "counts", lambda self, batch, context: {"rows": 1.0})
    with pytest.raises(
        ConfigError, match=r"is a mean of 'numbers', which Task.counts does not count; it counts \['rows'\]"
    ):
        Trainer(digits_run(Ragged.Config()), tmp_path).fit()
    with pytest.raises(ConfigError, match="mean_of has 'other', which is no term and no metric"):
        Losses.of(error=torch.ones(()), mean_of={"other": "numbers"})
