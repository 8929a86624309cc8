"""GaLore: its steps by the paper's algorithm written out, sizes of its state, what learns as with AdamW, and runs that go on to the bit."""

import json

import pytest
import torch
from torch import nn

from anabranch.adapters.adapt import AdaptTask, method_named
from anabranch.cli.main import main
from anabranch.data import ByteTokenizer
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm import Decoder, save_model
from anabranch.nn import MoE
from anabranch.train import Constant, TaskRunConfig, TrainConfig, Trainer
from anabranch.train.config import Parallel
from anabranch.train.galore import GaLore
from anabranch.train.optimizer import check_whole, load_optimizer_tensors, make_optimizer, optimizer_tensors

SHAPES = {"wide": (6, 9), "tall": (9, 6), "square": (7, 7), "stack": (3, 6, 9), "tall stack": (2, 8, 5)}


def gradients(shape, count):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def moved(parameter, optimizer, steps):
    for gradient in gradients(parameter.shape, steps):
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def written_out(weight, rank, every, scale, lr, decay, betas, eps, steps):
    """Algorithm 2 of the paper for one matrix; where it is tall its right singular vectors, whose signs are those of the same call."""
    is_tall = weight.shape[0] > weight.shape[1]
    first = second = projector = 0.0
    for count, gradient in enumerate(steps):
        if count % every == 0:
            u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
            projector = vh[:rank].T if is_tall else u[:, :rank]
        low = gradient @ projector if is_tall else projector.T @ gradient
        first = betas[0] * first + (1 - betas[0]) * low
        second = betas[1] * second + (1 - betas[1]) * low**2
        step = (first / (1 - betas[0] ** (count + 1))) / ((second / (1 - betas[1] ** (count + 1))).sqrt() + eps)
        back = step @ projector.T if is_tall else projector @ step
        weight = weight - lr * (scale * back + decay * weight)
    return weight


@pytest.mark.parametrize("name", SHAPES)
def test_steps_are_those_of_the_paper(name):
    parameter = nn.Parameter(gradients(SHAPES[name], 9)[8].clone())
    start, how = parameter.detach().clone(), {"rank": 3, "every": 3, "scale": 0.25}
    group = {"params": [parameter], "lr": 0.05, "weight_decay": 0.1}
    optimizer = GaLore([group], projected={id(parameter)}, betas=(0.9, 0.95), **how)
    made = moved(parameter, optimizer, 8)
    matrices = [start] if start.dim() == 2 else list(start)
    each = [[one] if start.dim() == 2 else list(one) for one in gradients(start.shape, 8)]
    for place, matrix in enumerate(matrices):
        wanted = written_out(
            matrix, **how, lr=0.05, decay=0.1, betas=(0.9, 0.95), eps=1e-8, steps=[one[place] for one in each]
        )
        torch.testing.assert_close(made if start.dim() == 2 else made[place], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 9), (5,), ()])
def test_what_is_not_projected_learns_as_with_adamw(shape):
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    optimizer = GaLore([{"params": [ours], "lr": 0.05, "weight_decay": 0.1}], projected=set(), rank=2)
    torch.testing.assert_close(
        moved(ours, optimizer, 6), moved(theirs, torch.optim.AdamW([theirs], lr=0.05, weight_decay=0.1), 6)
    )


def test_a_step_moves_in_its_directions_alone():
    for steps, rank in ((4, 2), (8, 4)):
        parameter = nn.Parameter(torch.zeros(8, 12))
        optimizer = GaLore([{"params": [parameter]}], projected={id(parameter)}, rank=2, every=4)
        assert int(torch.linalg.matrix_rank(moved(parameter, optimizer, steps))) == rank


def model_of(**changes):
    body = {"vocab_size": 61, "dim": 32, "num_layers": 1, "feed_forward": MoE.Config(num_experts=3, hidden_dim=16)}
    return Decoder.Config(**{**body, **changes}).build(seed=0)


def test_which_parameters_of_a_model_and_how_much_state():
    model = model_of()
    optimizer = make_optimizer(model, TrainConfig(optimizer="galore", galore_rank=4))
    assert isinstance(optimizer, GaLore)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        is_projected = (".attention." in name and parameter.dim() == 2) or ".w13" in name or ".w2" in name
        assert optimizer.is_projected(parameter) is is_projected, name
        held = sum(value.numel() for moment, value in optimizer.state[parameter].items() if moment != "step")
        if is_projected:
            *stack, rows, columns = parameter.shape
            each = 4 * (min(rows, columns) + 2 * max(rows, columns))
            assert held == each * (stack[0] if stack else 1), name
        else:
            assert held == 2 * parameter.numel(), name


def test_its_state_is_saved_and_no_other_shape_is_taken():
    model = model_of()
    config = TrainConfig(optimizer="galore", galore_rank=4)
    optimizer = make_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors = {name: value.clone() for name, value in optimizer_tensors(model, optimizer).items()}
    other = make_optimizer(model, config)
    load_optimizer_tensors(model, other, tensors)
    for name, value in optimizer_tensors(model, other).items():
        assert torch.equal(value, tensors[name]), name
    with pytest.raises(CheckpointError, match="which fits no parameter"):
        load_optimizer_tensors(model, make_optimizer(model, config.replace(galore_rank=5)), tensors)


@pytest.mark.parametrize(
    ("train", "parallel", "message"),
    [
        ({"parallel": "fsdp"}, {}, "train.parallel is fsdp"),
        ({}, {"experts": 2}, "parallel.experts is set"),
        ({}, {"pipeline": 2}, "parallel.pipeline is set"),
    ],
)
def test_what_moves_parts_of_parameters_is_refused(place, train, parallel, message):
    config = run_of(place, **train).replace(parallel=Parallel(**parallel))
    with pytest.raises(ConfigError, match=f"train.optimizer is galore, and {message}"):
        check_whole(config)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("galore")
    save_model(root / "base", model_of(vocab_size=257, max_positions=64), ByteTokenizer.Config().build())
    rows = [{"task": "back", "input": word, "output": word[::-1]} for word in "ab cde fghi jk lmnop q rst uv".split()]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def run_of(place, **changes):
    task = AdaptTask.Config(
        model=str(place / "base"), data=str(place / "rows.jsonl"), method=method_named("full"), held_out=0.0
    )
    train = {"steps": 5, "batch_size": 4, "learning_rate": 1e-2, "schedule": Constant.Config(), "device": "cpu"}
    how = {"optimizer": "galore", "galore_rank": 4, "galore_every": 2, "checkpoint_every": None}
    return TaskRunConfig(task=task, train=TrainConfig(**{**train, **how, **changes}))


def test_a_run_learns_and_goes_on_to_the_bit(place, tmp_path):
    whole = Trainer(run_of(place), tmp_path / "whole")
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.fit()
    assert any(not torch.equal(value, before[name]) for name, value in whole.model.state_dict().items())
    Trainer(run_of(place, steps=3), tmp_path / "part").fit()
    again = Trainer(run_of(place), tmp_path / "part", resume=True)
    again.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


@pytest.mark.slow
def test_by_the_command(place, tmp_path, capsys):
    line = [
        "adapt",
        str(place / "base"),
        str(place / "rows.jsonl"),
        "--method",
        "full",
        "--steps",
        "2",
        "--quiet",
        "--json",
    ]
    assert (
        main([*line, "--set", "train.optimizer=galore", "--set", "train.galore_rank=4", "--out", str(tmp_path / "r")])
        == 0
    )
    capsys.readouterr()
    assert main([*line, "--set", "train.optimizer=galor", "--out", str(tmp_path / "s")]) == 2
    assert "galore" in capsys.readouterr().err
    assert main(["adapters", "card", "galore"]) == 0
    assert "train.optimizer=galore" in capsys.readouterr().out
