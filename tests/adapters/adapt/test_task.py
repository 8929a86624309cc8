"""The task of adapting: its loss by hand, what learns, what is kept, and the trainer's contract."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from anabranch.adapters.adapt import AdaptTask, Lora, Method
from anabranch.adapters.adapt.method import patterns_of_targets
from anabranch.adapters.adapt.mixtures import Dynmole, LoraMixer
from anabranch.adapters.low_rank import LowRank
from anabranch.config import configclass
from anabranch.data import ByteTokenizer
from anabranch.errors import ConfigError, DataError, TokenizerError
from anabranch.lm import Decoder, save_model
from anabranch.nn import MoE, SelfAttention, SwiGLU
from anabranch.testing import check_task
from anabranch.train import Constant, TaskRunConfig, TrainConfig, Trainer, checkpoints, read_task_run_config

CONFIG = Decoder.Config(
    vocab_size=257,
    dim=32,
    num_layers=2,
    attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
    feed_forward=SwiGLU.Config(hidden_dim=48),
    max_positions=64,
    # Its head is not learned, and must be able to say something.
    init_std=0.2,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model that reads bytes, and rows of two tasks."""
    root = tmp_path_factory.mktemp("adapt")
    save_model(root / "base", CONFIG.build(seed=1), ByteTokenizer.Config().build())
    words = ["ab", "cde", "fghi", "jk", "lmnop", "q", "rst", "uv"]
    rows = [
        {"task": task, "input": f"{task}: {word}", "output": word[::-1] if task == "back" else word.upper()}
        for word in words
        for task in ("back", "up")
    ]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def config(place, method=None, **changes):
    train = {"steps": 4, "batch_size": 4, "eval_every": 2, "checkpoint_every": 2, "log_every": 1, "device": "cpu"}
    task = {"held_out": 0.3}
    task |= {
        name: changes.pop(name)
        for name in list(changes)
        if name in ("template", "held_out", "label_smoothing", "evaluation")
    }
    return TaskRunConfig(
        task=AdaptTask.Config(
            model=str(place / "base"), data=str(place / "rows.jsonl"), method=method or Lora.Config(rank=2), **task
        ),
        train=TrainConfig(**{**train, **changes}),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_over_rows_of_their_answers(place, smoothing):
    run = config(place, label_smoothing=smoothing)
    task = run.task.build()
    context = context_of(run)
    model = task.build_model(context).eval()
    rows = [5, 0, 6]
    losses = task.step(model, tuple(tensor[rows] for tensor in task.learned.tensors), context)
    expected = []
    for row in rows:
        length, start = int(task.learned.length_N[row]), int(task.learned.start_N[row])
        ids = task.learned.token_NL[row, :length].long()
        logits = task.base(ids[None, :-1]).logits_BLV[0, start - 1 :]
        expected.append(F.cross_entropy(logits, ids[start:], label_smoothing=smoothing))
    torch.testing.assert_close(losses.total, torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)
    assert list(losses.terms) == ["answer"]


def context_of(run, **changes):
    from anabranch.train import TaskContext

    return TaskContext(run.train, run.train.batch_size, **changes)


def test_a_mixture_of_experts_counts_no_padding(place, tmp_path):
    """A row of a batch loses as it does alone: padding goes to no expert."""
    routed = CONFIG.replace(feed_forward=MoE.Config(num_experts=4, hidden_dim=8))
    save_model(tmp_path / "base", routed.build(seed=1), ByteTokenizer.Config().build())
    run = config(place)
    task = run.task.replace(model=str(tmp_path / "base")).build()
    model = task.build_model(context_of(run)).eval()

    def answer(rows):
        given = tuple(tensor[rows] for tensor in task.learned.tensors)
        return task.step(model, given, context_of(run)).terms["answer"]

    alone = torch.stack([answer([row]) for row in (0, 5, 6)]).mean()
    torch.testing.assert_close(answer([0, 5, 6]), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    [Dynmole.Config(experts=2, keep_top_k=1, rank=2), LoraMixer.Config(targets=("all",), experts=2, rank=2, top_k=1)],
)
def test_routers_beside_experts_are_reported_by_the_tokens_of_each(place, tmp_path, method):
    """An expert is given some of the tokens, none of them padding; they keep their tasks."""
    routed = CONFIG.replace(feed_forward=MoE.Config(num_experts=4, hidden_dim=8))
    save_model(tmp_path / "base", routed.build(seed=1), ByteTokenizer.Config().build())
    run = config(place, method, steps=1)
    trainer = Trainer(run.replace(task=run.task.replace(model=str(tmp_path / "base"))), tmp_path / "run")
    trainer.fit()
    told = trainer.task.routing()
    held = trainer.task.held_out
    beside = [router for router in told["routers"] if "experts" in router["layers"][0]]
    assert beside
    tokens = int((held.length_N - 1).sum())
    assert all(0 < router["tokens"] <= tokens and router["information"] is not None for router in beside)
    whole = [router for router in told["routers"] if router not in beside]
    assert all(router["tokens"] == tokens for router in whole)
    assert bool(whole) == isinstance(method, LoraMixer.Config)


@pytest.mark.parametrize("make", [Dynmole.Config, LoraMixer.Config])
def test_losses_of_layers_are_those_of_the_whole_batch(place, tmp_path, make):
    """Rows differ in length, and a mean over tokens of a part weighs as much as it has of them. The balance losses are left out.

    They are products of two means, which parts have not in common.
    """
    options = {"rank": 2, "experts": 3, "entropy_loss": 1.0, "balance_loss": 0.0, "dropout": 0.0}
    if make is LoraMixer.Config:
        options = {"rank": 2, "experts": 3, "top_k": 2, "entropy_loss": 1.0, "balance_loss": 0.0}
    lengths = AdaptTask.Config(model=str(place / "base"), data=str(place / "rows.jsonl"), method=Lora.Config()).build()
    assert len(set(lengths.learned.length_N.tolist())) > 2
    found = []
    for parts in (1, 4):
        run = config(place, make(**options), batch_size=8, accumulation=parts, schedule=Constant.Config())
        trainer = Trainer(run, tmp_path / str(parts))
        gradient = trainer._stepper.gradient(trainer.stream, trainer._context)
        slopes = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        trainer.close()
        found.append((gradient.total, gradient.terms, gradient.metrics, slopes))
    torch.testing.assert_close(found[1], found[0], rtol=2e-4, atol=1e-6)


@pytest.mark.slow
def test_it_learns_and_the_base_stays(place, tmp_path):
    # Measured on what it learns: a base of random numbers has nothing to say of anything else.
    same = str(place / "rows.jsonl")
    run = config(place, Lora.Config(targets=("all",)), evaluation=same, steps=50, learning_rate=0.02, eval_every=None)
    trainer = Trainer(run, tmp_path / "run")
    before = {name: value.clone() for name, value in trainer.task.base.state_dict().items() if "beside" not in name}
    result = trainer.fit()
    task = trainer.task
    assert result.measures["nats_per_token"] < task.before["nats_per_token"] - 1
    assert result.measures["by_task"].keys() == {"back", "up"} == task.before["by_task"].keys()
    parts = result.measures["by_task"].values()
    assert sum(part["rows"] for part in parts) == len(task.held_out)
    assert sum(part["tokens"] for part in parts) == result.measures["tokens"]
    mean = sum(part["nats_per_token"] * part["tokens"] for part in parts) / result.measures["tokens"]
    assert mean == pytest.approx(result.measures["nats_per_token"])
    after = trainer.task.base.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    files = {path.name for path in checkpoints(tmp_path / "run")[-1].iterdir()}
    assert files == {"adapter.safetensors", "config.json", "optimizer.safetensors", "trainer.json", "SHA256SUMS"}


def test_the_contract_of_tasks(place):
    check_task(config(place), ranks=False)


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, Dynmole.Config(rank=2, entropy_loss=1.0, balance_loss=0.0, dropout=0.0)])
def test_the_contract_of_tasks_in_two_processes(place, method):
    check_task(config(place, method))


def test_resumed_the_evaluation_before_is_that_of_the_beginning(place, tmp_path):
    Trainer(config(place, steps=2), tmp_path / "run").fit()
    held = read_task_run_config(tmp_path / "run", AdaptTask)
    first = Trainer(held, tmp_path / "run", resume=True)
    longer = held.replace(train=held.train.replace(steps=4))
    first.close()
    trainer = Trainer(longer, tmp_path / "run", resume=True)
    before = trainer.task.before
    trainer.fit()
    assert before is not None
    assert trainer.task.before == before


def test_another_base_or_other_rows_are_not_gone_on_with(place, tmp_path):
    save_model(tmp_path / "base", CONFIG.build(seed=1), ByteTokenizer.Config().build())
    rows = (place / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows)
    Trainer(config(tmp_path, steps=2), tmp_path / "run").fit()
    save_model(tmp_path / "base", CONFIG.build(seed=2), ByteTokenizer.Config().build())
    with pytest.raises(DataError, match="another model than when the run began"):
        Trainer(config(tmp_path, steps=4), tmp_path / "run", resume=True)
    save_model(tmp_path / "base", CONFIG.build(seed=1), ByteTokenizer.Config().build())
    (tmp_path / "rows.jsonl").write_text(rows.replace("LMNOP", "LMNOQ"))
    with pytest.raises(DataError, match="cannot resume"):
        Trainer(config(tmp_path, steps=4), tmp_path / "run", resume=True)


def test_rows_that_say_they_are_held_out_are_not_learned_beside_a_file_of_others(place):
    """And of that file those alone are measured that say so, where some do."""
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["split"] = "test" if number % 4 == 0 else "train"
    (place / "told.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = config(place, evaluation=str(place / "told.jsonl"))
    task = run.task.replace(data=str(place / "told.jsonl")).build()
    assert (len(task.learned), len(task.held_out)) == (len(rows) - len(rows) // 4, len(rows) // 4)
    # A file that says nothing is measured whole.
    assert len(config(place, evaluation=str(place / "rows.jsonl")).task.build().held_out) == len(rows)


def test_without_held_out_rows_nothing_is_evaluated(place, tmp_path):
    trainer = Trainer(config(place, held_out=0.0, steps=1), tmp_path / "run")
    assert trainer.fit().measures == {}
    assert trainer.task.before is None


def test_what_does_not_fit(place, tmp_path):
    with pytest.raises(ConfigError, match=r"template is 'x'"):
        config(place, template="x")
    with pytest.raises(ConfigError, match="fits no linear layer"):
        Trainer(config(place, Lora.Config(targets=("w9",))), tmp_path / "a")
    save_model(tmp_path / "base", CONFIG.replace(vocab_size=100).build())
    with pytest.raises(TokenizerError):
        config(place).task.replace(model=str(tmp_path / "base")).build()
    with pytest.raises(TokenizerError, match="257 tokens, but the model 100"):
        config(place).task.build(model=CONFIG.replace(vocab_size=100).build(), tokenizer=ByteTokenizer.Config().build())


def test_targets_are_words_patterns_or_all():
    assert patterns_of_targets(("q", "blocks.1.*", "all", "q")) == ["*.q", "blocks.1.*", "blocks.*"]


class Small(Method):
    """A method of somebody's own, in the lines it takes."""

    @configclass
    class Config(Method.Config):
        """Nothing of its own."""

    def layer(self, tasks):
        return LowRank.Config(rank=len(tasks))


def test_a_method_of_ones_own(place, tmp_path):
    from anabranch.adapters.own_folder import read_own
    from anabranch.lm import load_model

    trainer = Trainer(config(place, Small.Config(targets=("q",))), tmp_path / "run")
    trainer.fit()
    written = trainer.task.write(tmp_path / "adapter")
    assert written.form == "anabranch"
    base = load_model(place / "base")[0]
    token_BL = torch.tensor([[1, 2, 3]])
    expected = trainer.task.base(token_BL).logits_BLV
    assert torch.equal(read_own(Path(written.folder), base)(token_BL).logits_BLV, expected)
