"""Poly and MHR trained by the trainer: two speeds, what is kept, new tasks, the average at the end."""

import json
import math
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from anabranch.adapters import load_peft
from anabranch.adapters.adapt import AdaptTask
from anabranch.adapters.adapt.lesson import Seen
from anabranch.adapters.mhr import MultiHeadRouted, Penalties, RoutingTable, Weights
from anabranch.adapters.mhr.method import Mhr, Poly
from anabranch.adapters.mhr.table import Granularity
from anabranch.adapters.own_folder import read_own
from anabranch.adapters.tasks import task_names, task_rows, told_tasks
from anabranch.data import ByteTokenizer
from anabranch.errors import ConfigError, DataError
from anabranch.lm import Decoder, load_model, save_model
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.testing import check_task
from anabranch.train import TaskRunConfig, TrainConfig, Trainer, checkpoints, read_metrics

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
SMALL = Mhr.Config(skills=2, heads=2, rank=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("mhr")
    save_model(root / "base", CONFIG.build(seed=1), ByteTokenizer.Config().build())
    made = {"back": lambda word: word[::-1], "up": str.upper, "double": lambda word: word * 2}
    words = ["ab", "cde", "fghi", "jk", "lmnop", "qr", "stu", "vw"]
    rows = [{"task": task, "input": word, "output": make(word)} for word in words for task, make in made.items()]
    for name, chosen in (("rows", ("back", "up")), ("new", ("double",))):
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows if row["task"] in chosen))
    return root


def config(place, method=SMALL, data="rows", **train):
    train = {
        "steps": 4,
        "batch_size": 4,
        "eval_every": 2,
        "checkpoint_every": 2,
        "log_every": 1,
        "device": "cpu",
        **train,
    }
    task = AdaptTask.Config(model=str(place / "base"), data=str(place / f"{data}.jsonl"), method=method, held_out=0.3)
    return TaskRunConfig(task=task, train=TrainConfig(**train))


@pytest.mark.parametrize("granularity", get_args(Granularity))
def test_two_speeds(place, tmp_path, granularity):
    run = config(place, SMALL.replace(granularity=granularity), learning_rate=1e-3, weight_decay=0.1)
    trainer = Trainer(run, tmp_path / "run")
    model = trainer.model
    tables = {id(module.z) for module in model.modules() if isinstance(module, RoutingTable)}
    assert tables
    for group in trainer.optimizer.param_groups:
        of_tables = {id(parameter) in tables for parameter in group["params"]}
        if not group["params"]:
            continue
        assert len(of_tables) == 1
        rate, decay = (0.1, 0.0) if of_tables.pop() else (1e-3, 0.1)
        assert group["lr"] == pytest.approx(rate)
        assert group["weight_decay"] == decay
    trainer.fit()
    rates = {group["lr"] for group in trainer.optimizer.param_groups if group["params"]}
    assert max(rates) == pytest.approx(100 * min(rates))


@pytest.mark.parametrize("granularity", ["finegrained", "coarsegrained"])
def test_the_contract_of_tasks(place, granularity):
    check_task(config(place, SMALL.replace(granularity=granularity)), ranks=False)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["finegrained", "coarsegrained"])
def test_the_contract_of_tasks_in_two_processes(place, granularity):
    check_task(config(place, SMALL.replace(granularity=granularity)))


def test_random_weights_are_resumed_to_the_bit(place):
    check_task(config(place, Poly.Config(skills=2, rank=2, weights=Weights(relaxed=True))), ranks=False, is_random=True)


def test_tasks_are_kept_by_name_and_answers_differ_by_task(place, tmp_path):
    run = config(place, SMALL.replace(targets=("q", "v", "down")), steps=40, learning_rate=0.02, eval_every=None)
    # Measured on what it learns: a base of random numbers has nothing to say of anything else.
    run = run.replace(task=run.task.replace(evaluation=run.task.data))
    trainer = Trainer(run, tmp_path / "run")
    result = trainer.fit()
    assert result.measures["nats_per_token"] < trainer.task.before["nats_per_token"] - 1
    written = trainer.task.write(tmp_path / "adapter")
    assert written.form == "anabranch"
    model = read_own(tmp_path / "adapter", load_model(place / "base")[0].eval())
    assert task_names(model) == ("back", "up")
    token_BL = torch.tensor([[97, 98, 10]] * 2)
    with torch.no_grad():
        found = model(token_BL, state=task_rows(model, ["up", "back"], 3)).logits_BLV
        swapped = model(token_BL, state=task_rows(model, ["back", "up"], 3)).logits_BLV
    assert not torch.allclose(found, swapped)
    torch.testing.assert_close(found[0], swapped[1])


@pytest.mark.parametrize("mode", ["full", "z", "mu", "random"])
def test_new_tasks_from_an_adapter(place, tmp_path, mode):
    first = Trainer(config(place, steps=2), tmp_path / "first")
    first.fit()
    first.task.write(tmp_path / "adapter")
    method = SMALL.replace(start=str(tmp_path / "adapter"), mode=mode)
    trainer = Trainer(config(place, method, data="new"), tmp_path / mode)
    learns = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    routed = [module for module in trainer.model.modules() if isinstance(module, MultiHeadRouted)]
    if mode == "z":
        assert learns == len(routed) * 2 * 2
    if mode == "mu":
        assert not routed
    trainer.fit()
    assert trainer.task.write(tmp_path / f"{mode}-adapter").form == ("peft" if mode == "mu" else "anabranch")
    again = Trainer(config(place, method, data="new", steps=6), tmp_path / mode, resume=True)
    assert again.fit().step == 6


def loss_of_others(method):
    """The loss of two rows of two tasks, all of whose tokens have p = 1/2 under the other task."""
    told = torch.tensor([[1, 2], [3, 4]]), torch.tensor([1, 1]), torch.tensor([2, 2]), torch.tensor([0, 1])
    [lesson] = method.lessons(told)
    assert lesson.rows[3].tolist() == [1, 0]
    seen = Seen.of(torch.tensor([9.0, 9.0, math.log(2), math.log(2)]), torch.zeros(()), torch.arange(4), 4)
    return lesson.losses(seen, slice(2, 4))["unlikelihood"]


def test_what_is_asked_of_skills_that_were_trained_before(place, tmp_path):
    """Routing is set anew; sizes are theirs, and others are refused."""
    first = Trainer(config(place, steps=2), tmp_path / "first")
    first.fit()
    first.task.write(tmp_path / "adapter")
    given = Mhr.Config(start=str(tmp_path / "adapter"))

    def layers(method):
        trainer = Trainer(config(place, method, data="new"), tmp_path / "run")
        trainer.close()
        return [module.config for module in trainer.model.modules() if isinstance(module, MultiHeadRouted)]

    anew = {"unknown": "average", "anneal": 0.5, "weights": Weights(form="l2"), "penalties": Penalties(sparsity=0.5)}
    for mode in ("full", "z"):
        for kind in layers(given.replace(mode=mode, **anew)):
            assert {name: getattr(kind, name) for name in anew} == anew
            assert (kind.skills, kind.heads, kind.rank) == (SMALL.skills, SMALL.heads, SMALL.rank)
    # Field by field: what nobody asks anew is as it was.
    punished = SMALL.replace(penalties=Penalties(sparsity=0.5, unlikelihood=0.25))
    second = Trainer(config(place, punished, steps=1), tmp_path / "second")
    second.fit()
    second.task.write(tmp_path / "punished")
    of_second = Mhr.Config(start=str(tmp_path / "punished"))
    for asked, wanted in (
        (Penalties(), (0.5, 0.25)),
        (Penalties(information=1.0), (0.5, 0.25)),
        (Penalties(unlikelihood=2.0), (0.5, 2.0)),
    ):
        trainer = Trainer(config(place, of_second.replace(penalties=asked), data="new"), tmp_path / "run")
        trainer.close()
        kind = next(module.config for module in trainer.model.modules() if isinstance(module, MultiHeadRouted))
        assert (kind.penalties.sparsity, kind.penalties.unlikelihood) == wanted
        assert float(loss_of_others(trainer.task.method)) == pytest.approx(wanted[1] * math.log(2))
    for wrong, told in (
        ({"rank": 3}, "rank is 3, and the skills in .* have 2; leave it out"),
        ({"granularity": "coarsegrained"}, "granularity is 'coarsegrained', and the skills in .* have 'finegrained'"),
        ({"targets": ("*.attention.*", "up")}, r"targets are \*\.attention\.\*, up, and the skills"),
        ({"targets": ("up",)}, r"targets are up, and the skills in .* stand beside \*\.attention\.\*"),
    ):
        with pytest.raises(ConfigError, match=told):
            layers(given.replace(**wrong))
    for name, value in {**anew, "table_speed": 3.0}.items():
        with pytest.raises(ConfigError, match=f"{name} is of routing, and mode is 'mu'"):
            given.replace(mode="mu", **{name: value})


@pytest.mark.parametrize("redundant", [False, True])
def test_the_average_needs_no_tasks(place, tmp_path, redundant):
    first = Trainer(config(place, steps=2), tmp_path / "first")
    first.fit()
    first.task.write(tmp_path / "adapter")
    rows = [json.loads(line) for line in (place / "new.jsonl").read_text().splitlines()]
    (place / "bare.jsonl").write_text("\n".join(json.dumps({**row, "task": ""}) for row in rows))
    method = Mhr.Config(start=str(tmp_path / "adapter"), mode="mu", redundant=redundant)
    found = []
    for data in ("bare", "new"):
        trainer = Trainer(config(place, method, data=data), tmp_path / data)
        trainer.fit()
        trainer.task.write(tmp_path / f"{data}-adapter")
        found.append(load_file(tmp_path / f"{data}-adapter" / "adapter_model.safetensors"))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    with pytest.raises(DataError, match="names no task"):
        Trainer(config(place, method.replace(mode="full", redundant=False), data="bare"), tmp_path / "full")


def test_all_skills_may_learn_for_the_average(place, tmp_path):
    """As the reference does it: K skills learn under equal weights, and what is written is one plain LoRA that does what the model does."""
    first = Trainer(config(place, steps=2), tmp_path / "first")
    first.fit()
    first.task.write(tmp_path / "adapter")
    method = SMALL.replace(start=str(tmp_path / "adapter"), mode="mu", redundant=True)
    trainer = Trainer(config(place, method, data="new"), tmp_path / "run")
    alone = Trainer(config(place, method.replace(redundant=False), data="new"), tmp_path / "alone")
    learns, one = (
        sum(parameter.numel() for parameter in each.model.parameters() if parameter.requires_grad)
        for each in (trainer, alone)
    )
    assert learns == SMALL.skills * one
    alone.close()
    trainer.fit()
    assert trainer.task.routing() == {}
    assert trainer.task.write(tmp_path / "written").form == "peft"
    token_BL = torch.tensor([[97, 98, 10]])
    with torch.no_grad():
        found = load_peft(tmp_path / "written", load_model(place / "base")[0].eval())(token_BL).logits_BLV
        wanted = trainer.task.base.eval()(token_BL).logits_BLV
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="redundant is for mode 'mu', and mode is 'full'"):
        SMALL.replace(redundant=True)


def test_weights_move_to_the_average_at_the_end(place, tmp_path):
    method = SMALL.replace(anneal=0.5)
    trainer = Trainer(config(place, method, steps=4), tmp_path / "run")
    trainer.fit()
    shares = [float(module.share) for module in trainer.model.modules() if isinstance(module, RoutingTable)]
    assert shares == pytest.approx([0.0] * len(shares), abs=1e-6)
    half = Trainer(config(place, method, steps=4), tmp_path / "half")
    for module in half.model.modules():
        if isinstance(module, MultiHeadRouted):
            module.on_step(3, 0.75)
            assert float(module.table.share) == pytest.approx(2**-0.5)
    half.close()


def test_what_is_added_to_the_loss_is_logged(place, tmp_path):
    penalties = Penalties(sparsity=0.1, prediction=0.1, information=0.1, orthogonality=0.1, unlikelihood=0.5)
    Trainer(config(place, SMALL.replace(penalties=penalties), steps=2), tmp_path / "run").fit()
    record = next(record for record in read_metrics(tmp_path / "run") if record["kind"] == "train")
    assert record["auxiliary"].keys() == {
        "mhr_sparsity",
        "mhr_prediction",
        "mhr_information",
        "mhr_orthogonality",
        "unlikelihood",
    }
    assert record["loss"] == pytest.approx(record["answer"] + sum(record["auxiliary"].values()), rel=1e-4)
    assert checkpoints(tmp_path / "run")


def test_answers_are_made_unlikely_under_the_task_of_another_row(place, tmp_path):
    """-log(1 - p) of each token of an answer, where the row before is of another task; 0 where it is of the same."""
    trainer = Trainer(
        config(place, SMALL.replace(penalties=Penalties(unlikelihood=0.5)), batch_size=3), tmp_path / "run"
    )
    task, model = trainer.task, trainer.model
    with torch.no_grad():
        for name, parameter in task.base.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    token_NL, start_N, length_N, task_N = task.learned.tensors[:4]
    [first, second], third = [(task_N == number).nonzero()[0] for number in (0, 1)], (task_N == 1).nonzero()[1]
    row_B = torch.cat([first, second, third])
    assert task_N[row_B].tolist() == [0, 1, 1]
    losses = task.step(model, tuple(tensor[row_B] for tensor in task.learned.tensors[:4]), task._context)
    expected = []
    # The first is told the last's task, the second the first's, and the third that of the second, which is its own.
    for row, told in zip(row_B.tolist()[:2], (1, 0), strict=True):
        token_1L = token_NL[row : row + 1, : length_N[row]].long()
        logits_LV = task.base(token_1L, state=told_tasks(torch.tensor([told]), token_1L.shape[1])).logits_BLV[0]
        place = torch.arange(int(start_N[row]), int(length_N[row]))
        p = logits_LV.softmax(-1)[place - 1, token_1L[0, place]]
        expected.append(-torch.log1p(-p).mean())
    torch.testing.assert_close(losses.terms["unlikelihood"], 0.5 * sum(expected) / 3, rtol=1e-4, atol=1e-6)
    trainer.close()


def test_rows_of_a_task_that_is_not_learned(place, tmp_path):
    run = config(place)
    run = run.replace(task=run.task.replace(evaluation=str(place / "new.jsonl")))
    with pytest.raises(Exception, match="task 'double' is not one of the 2") as error:
        Trainer(run, tmp_path / "run")
    assert isinstance(error.value, DataError | ValueError)
    (tmp_path / "bare.jsonl").write_text('{"input": "x", "output": "y"}')
    with pytest.raises(DataError, match="names no task"):
        run.task.replace(data=str(tmp_path / "bare.jsonl"), evaluation=None).build()


def test_modes_go_on_from_something():
    with pytest.raises(ConfigError, match="mode is 'z'"):
        Poly.Config(mode="z")
    assert Mhr.Config().heads == 8
    assert Poly.Config().heads == 1
