"""MeZO: a step by hand, slopes against gradients, the same draws at both points, resumed to the bit, and in the memory of inference."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from anabranch.errors import ConfigError
from anabranch.lm import Decoder
from anabranch.testing import run_ranks
from anabranch.train import Constant, Losses, Task, TaskRunConfig, TrainConfig, Trainer, checkpoints, mezo, read_metrics
from anabranch.train.config import Parallel
from anabranch.train.mezo import _DIRECTION
from anabranch.train.optimizer import check_whole
from anabranch.train.task_contract import check_task

STEPS = 3
ONE = {"optimizer": "mezo", "learning_rate": 1e-2, "schedule": Constant.Config(), "device": "cpu", "batch_size": 4}


class Rows:
    """Batches by their number, so that whoever goes on has the same."""

    def __init__(self, rank=0, world=1):
        self.number, self.rank, self.world = 0, rank, world

    def next_batch(self, size):
        rows = torch.randn(size * self.world, 3, generator=torch.Generator().manual_seed(self.number))
        self.number += 1
        return rows[self.rank :: self.world]

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


class Bent(Task):
    """tanh of a line, with noise on what goes in, where it is asked for."""

    headline = "error"
    noise = 0.0
    frozen = "bias"

    def __init__(self, config, *, model=None):
        super().__init__(config, model=model)
        self.drawn, self.seen = [], []

    def build_model(self, context):
        model = nn.Linear(3, 2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) / 10 + 0.1)
        return model

    def learns(self, name, parameter):
        return name != self.frozen

    def training_data(self, context):
        return Rows(context.rank, context.world_size)

    def validation_data(self, context):
        return torch.randn(64, 3, generator=torch.Generator().manual_seed(99))

    def step(self, model, batch, context):
        noise = torch.randn(batch.shape)
        self.drawn.append(noise)
        self.seen.append(model.weight.detach().clone() if isinstance(model, nn.Linear) else None)
        return Losses.of(square=(model(batch + self.noise * noise).tanh() - 1).square().mean())

    def evaluate(self, model, data, context):
        return {"error": float((model(data).tanh() - 1).square().mean())}


class Noisy(Bent):
    """With noise."""

    noise = 0.5


class Free(Bent):
    """All of it learns."""

    frozen = None


def run_of(task=Bent, **train):
    settings = {
        **ONE,
        "steps": STEPS,
        "log_every": 1,
        "eval_every": None,
        "checkpoint_every": None,
        "weight_decay": 0.0,
    }
    return TaskRunConfig(task=task.Config(), train=TrainConfig(**{**settings, **train}))


def direction(step, sample, *shape):
    sequence = np.random.SeedSequence([0, step, sample, _DIRECTION])
    generator = torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
    return torch.randn(math.prod(shape), generator=generator).view(shape)


@torch.no_grad()
def naive(scale=1e-3, samples=1, decay=0.0, rate=1e-2):
    """Weights behind each step, in float64 but for what is drawn."""
    model, rows, found = Bent.build_model(None, None).double(), Rows(), []

    def loss(weight, batch):
        return float((torch.tanh(batch @ weight.T + model.bias) - 1).square().mean())

    weight = model.weight.detach().clone()
    for step in range(STEPS):
        batch, moves = rows.next_batch(4).double(), torch.zeros(2, 3, dtype=torch.float64)
        for sample in range(samples):
            z = direction(step, sample, 2, 3).double()
            moves += (loss(weight + scale * z, batch) - loss(weight - scale * z, batch)) / (2 * scale) * z / samples
        weight = weight - rate * (moves + decay * weight)
        found.append(weight)
    return found


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, {}),
        ({"mezo_samples": 3}, {"samples": 3}),
        ({"mezo_scale": 0.1, "weight_decay": 0.3}, {"scale": 0.1, "decay": 0.3}),
    ],
)
def test_steps_by_hand(changes, told, tmp_path):
    trainer = Trainer(run_of(**changes), tmp_path)
    bias = trainer.model.bias.detach().clone()
    trainer.fit()
    torch.testing.assert_close(trainer.model.weight.double(), naive(**told)[-1], rtol=1e-4, atol=1e-5)
    assert torch.equal(trainer.model.bias, bias)
    assert trainer.model.weight.grad is None
    assert not trainer.optimizer.state


def test_a_slope_is_the_gradient_along_the_direction(tmp_path):
    trainer = Trainer(run_of(steps=1, mezo_scale=1e-2), tmp_path)
    weight = trainer.model.weight
    batch = Rows().next_batch(4)
    gradient = torch.autograd.grad((trainer.model(batch).tanh() - 1).square().mean(), weight)[0]
    z = direction(0, 0, 2, 3)
    trainer.fit()
    [line] = [line for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert line["gradient_norm"] == pytest.approx(abs(float((gradient * z).sum())), rel=1e-2)


def test_both_points_see_the_same_batch_and_the_same_noise_and_weights_come_back(tmp_path):
    trainer = Trainer(run_of(Noisy, steps=2, accumulation=2, mezo_samples=2, learning_rate=0.0), tmp_path)
    before = trainer.model.weight.detach().clone()
    trainer.fit()
    drawn, seen = trainer.task.drawn, trainer.task.seen
    # Two steps of two micro-batches with two directions, at two points each.
    assert len(drawn) == 2 * 2 * 2 * 2
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(drawn[0], drawn[2])
    for number, (above, below) in enumerate(zip(seen[::2], seen[1::2], strict=True)):
        z = direction(number // 4, number % 2, 2, 3)
        torch.testing.assert_close((above - below) / 2e-3, z, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close((above + below) / 2, before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trainer.model.weight.detach(), before, rtol=1e-5, atol=1e-6)


def test_micro_batches_are_the_batch(tmp_path):
    found = []
    for parts in (1, 2):
        trainer = Trainer(run_of(accumulation=parts, steps=1), tmp_path / str(parts))
        if parts == 2:
            halves = iter(Rows().next_batch(4).split(2))
            trainer.stream.next_batch = lambda size, halves=halves: next(halves)
        trainer.fit()
        found.append(trainer.model.weight.detach().clone())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_it_learns(tmp_path):
    trainer = Trainer(run_of(Free, steps=300, learning_rate=0.05, log_every=100), tmp_path)
    with torch.no_grad():
        before = trainer.task.evaluate(trainer.model, trainer.task.validation_data(None), None)["error"]
    assert trainer.fit().headline < 0.7 * before


def test_a_task_keeps_the_contract_and_goes_on_to_the_bit():
    check_task(run_of(Noisy), is_random=True, ranks=False)


def test_a_loss_that_is_no_number_moves_nothing(tmp_path):
    class Broken(Bent):
        def step(self, model, batch, context):
            made = super().step(model, batch, context)
            return Losses.of(square=made.total * (math.nan if context.step == 1 else 1.0))

    trainer = Trainer(run_of(Broken), tmp_path)
    trainer.fit()
    lines = [line for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1]
    assert trainer.model.weight.isfinite().all()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_weights_of_half_the_bits_do_not_learn_by_it(tmp_path, kind):
    """Rounding moved them fifty times as far as what was learned, and nothing said so."""

    class Half(Bent):
        def build_model(self, context):
            return super().build_model(context).to(kind)

    with pytest.raises(ConfigError, match=r"weight learns in b?float16, .* load the model in float32"):
        Trainer(run_of(Half), tmp_path / "run")


def test_half_the_bits_may_be_there_frozen(tmp_path):
    """A base in bfloat16 beneath an adapter is the usual way."""

    class Beneath(Bent):
        def build_model(self, context):
            model = super().build_model(context)
            model.base = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
            return model

        def learns(self, name, parameter):
            return name == "weight"

    Trainer(run_of(Beneath, steps=2), tmp_path / "run").fit()
    for scale in (0.0, 1.5):
        with pytest.raises(ConfigError, match="mezo_scale"):
            run_of(mezo_scale=scale)


def test_numbers_that_lie_turned_in_memory_learn_as_others_do(tmp_path):
    """Mixtures have their B so. Directions go along memory, so that they are laid out straight first."""

    class Turned(Bent):
        def build_model(self, context):
            model = super().build_model(context)
            model.weight = nn.Parameter(model.weight.detach().clone())
            model.weight.data = model.weight.detach().T.contiguous().T
            assert not model.weight.is_contiguous()
            return model

    found = []
    for number, task in enumerate((Bent, Turned)):
        trainer = Trainer(run_of(task), tmp_path / str(number))
        trainer.fit()
        found.append(trainer.model.weight.detach())
    assert torch.equal(*found)
    assert not torch.equal(found[0], Bent(Bent.Config()).build_model(None).weight)


# How the second of two parameters lies in the memory of the first, [2, 3], and whether numbers are of both.
VIEWS = {
    "turned": (lambda weight: weight.T, True),
    "the same": (lambda weight: weight.view(6), True),
    "a part": (lambda weight: weight[1:, 1:], True),
    "its last number": (lambda weight: weight[-1:, -1], True),
    "its bytes in other types": (lambda weight: weight.view(torch.int32)[0].view(torch.float32), True),
    "a copy": (lambda weight: weight.T.clone(), False),
    "none of it": (lambda weight: weight[:0], False),
}


class Views(Bent):
    """A weight and another parameter, that is made of it."""

    view, learning = None, ("weight", "other")

    def build_model(self, context):
        model = super().build_model(context)
        model.other = nn.Parameter(VIEWS[self.view][0](model.weight.data))
        return model

    def learns(self, name, parameter):
        return name in self.learning


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("learning", [("weight", "other"), ("weight",), ("other",)])
def test_a_parameter_that_is_a_view_of_another_is_refused(tmp_path, view, learning):
    """Turned ones got memory of their own, so that two that were one learned apart, without a word."""
    task = type("Of", (Views,), {"view": view, "learning": learning})
    if not VIEWS[view][1]:
        Trainer(run_of(task, steps=1), tmp_path)
        return
    with pytest.raises(ConfigError, match="and other is a view of weight: both would be"):
        Trainer(run_of(task, steps=1), tmp_path)


def test_parts_of_one_memory_that_have_nothing_in_common_learn_and_so_does_one_parameter_under_two_names(tmp_path):
    """Columns beside each other, and pieces of a file, lie in one memory."""

    class Columns(Bent):
        def build_model(self, context):
            model, memory = super().build_model(context), torch.ones(2, 5)
            model.left, model.right = nn.Parameter(memory[:, :2]), nn.Parameter(memory[:, 2:])
            model.again = model.weight
            return model

        def learns(self, name, parameter):
            return True

    trainer = Trainer(run_of(Columns), tmp_path)
    trainer.fit()
    assert trainer.model.again is trainer.model.weight
    # What nobody uses moves along with the directions too.
    assert len({float(value) for value in trainer.model.left.detach().flatten()}) == 4


def test_two_that_are_views_of_each_other_stay_so_where_neither_learns(tmp_path):
    trainer = Trainer(run_of(type("Of", (Views,), {"view": "turned", "learning": ("bias",)})), tmp_path)
    assert trainer.model.other.data_ptr() == trainer.model.weight.data_ptr()


def test_what_was_added_before_memory_ended_is_taken_away_again(tmp_path, monkeypatch):
    monkeypatch.setattr(mezo, "_PIECE", 2)
    trainer = Trainer(run_of(Free, mezo_scale=0.1), tmp_path / "run")
    before = trainer.model.weight.detach().clone()
    whole, calls = mezo.MeZOStepper._direction, []

    def ending(self, step, sample):
        calls.append(step)
        for number, found in enumerate(whole(self, step, sample)):
            if number == 2 and len(calls) == 1:
                raise MemoryError
            yield found

    monkeypatch.setattr(mezo.MeZOStepper, "_direction", ending)
    with pytest.raises(MemoryError):
        trainer.fit()
    torch.testing.assert_close(trainer.model.weight.detach(), before, rtol=0, atol=1e-6)


def _rank(rank, world, folder):
    import torch.distributed as dist
    from safetensors.torch import save_file

    dist.init_process_group("gloo")
    trainer = Trainer(run_of(parallel="ddp"), f"{folder}/ddp")
    # No room for gradients that never come.
    assert trainer._stepper.wrapped is trainer.model
    trainer.fit()
    save_file({"weight": trainer.model.weight.detach().clone()}, f"{folder}/{rank}.safetensors")


@pytest.mark.slow
def test_replicas_move_as_one_process_does(tmp_path):
    run_ranks(_rank, 2, str(tmp_path), backend=None, timeout_s=120)
    weights = [load_file(tmp_path / f"{rank}.safetensors")["weight"] for rank in range(2)]
    assert torch.equal(*weights)
    alone = Trainer(run_of(), tmp_path / "alone")
    alone.fit()
    torch.testing.assert_close(weights[0], alone.model.weight.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("train", "parallel", "message"),
    [
        ({"parallel": "fsdp"}, {}, "train.parallel is fsdp"),
        ({}, {"experts": 2}, "parallel.experts is set"),
        ({}, {"pipeline": 2}, "parallel.pipeline is set"),
        ({}, {"exact": 2}, "parallel.exact is set"),
    ],
)
def test_what_moves_parts_of_parameters_is_refused(train, parallel, message):
    config = run_of(**train).replace(parallel=Parallel(**parallel))
    with pytest.raises(ConfigError, match=f"train.optimizer is mezo, and {message}; it moves whole parameters"):
        check_whole(config)
    check_whole(config.replace(train=config.train.replace(optimizer="adamw")))


def test_the_file_of_its_state_is_empty_and_is_read_again(tmp_path):
    trainer = Trainer(run_of(checkpoint_every=1), tmp_path)
    trainer.fit()
    newest = checkpoints(tmp_path)[-1]
    assert load_file(newest / "optimizer.safetensors") == {}
    assert json.loads((newest / "trainer.json").read_text())["progress"]["step"] == STEPS


def most_bytes(run):
    """The most bytes that are alive at a time, of those that are taken inside."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    taken = [one for one in seen.profiler.kineto_results.events() if one.name() == "[memory]"]
    changes = [one.nbytes() for one in sorted(taken, key=lambda one: one.start_ns())]
    assert changes
    return max(np.cumsum(changes))


def test_a_step_takes_the_memory_of_inference(tmp_path, monkeypatch):
    """Within a tenth of it, where a step with gradients takes far more."""
    monkeypatch.setattr(mezo, "_PIECE", 1024)
    config = Decoder.Config(vocab_size=64, dim=32, num_layers=4, max_positions=64)
    token_BL = torch.randint(64, (8, 33), generator=torch.Generator().manual_seed(0))

    class Text(Free):
        def build_model(self, context):
            return config.build(seed=0)

        def step(self, model, batch, context):
            return Losses.of(nats=model(token_BL[:, :-1], target_BL=token_BL[:, 1:]).loss)

    found = {}
    for name in ("mezo", "adamw"):
        trainer = Trainer(run_of(Text, optimizer=name), tmp_path / name)
        stepper, context = trainer._stepper, trainer._context
        stepper.gradient(trainer.stream, context)
        trainer.model.zero_grad(set_to_none=True)
        found[name] = most_bytes(lambda stepper=stepper, made=trainer: stepper.gradient(made.stream, made._context))
    with torch.no_grad():
        inference = most_bytes(lambda: trainer.model(token_BL[:, :-1], target_BL=token_BL[:, 1:]))
    assert found["mezo"] <= 1.1 * inference
    assert found["adamw"] > 2 * inference
