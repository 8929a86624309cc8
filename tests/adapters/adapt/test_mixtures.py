"""Methods of `adapt` whose experts a router chooses: what they hand on to the systems themselves."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from anabranch.adapters import load_mixture
from anabranch.adapters.adapt import AdaptTask
from anabranch.adapters.adapt.mixtures import Dynmole, LoraMixer
from anabranch.adapters.graft import layers_of
from anabranch.adapters.lora_mixer import mixed_layers
from anabranch.adapters.own_folder import read_own
from anabranch.errors import ConfigError, DataError
from anabranch.lm import load_model
from anabranch.train import Constant, TaskRunConfig, TrainConfig, Trainer, read_metrics
from every_method import TASKS, TOKENS, make_place


def test_what_the_system_refuses_is_refused_at_once():
    with pytest.raises(ConfigError, match="keep_top_k"):
        Dynmole.Config(experts=2, keep_top_k=3)


def test_blocks_have_as_many_experts_as_is_said(place):
    def of_blocks(*numbers):
        model, _ = load_model(place / "base")
        given = {"experts_per_layer": numbers, "rank": 2, "keep_top_k": 1}
        return Dynmole.Config(**given).build().begin(model, [""], seed=0)

    found = {name: layer.pool.num_experts for name, layer in layers_of(of_blocks(2, 4)).items()}
    parts = ("gate", "up", "down")
    assert found == {f"blocks.{block}.feed_forward.{part}": 2 + 2 * block for block in (0, 1) for part in parts}
    with pytest.raises(ConfigError, match="3 values for 2 blocks"):
        of_blocks(2, 4, 4)
    with pytest.raises(ConfigError, match="targets has 'q'; with experts_per_layer"):
        Dynmole.Config(experts_per_layer=(2, 2), targets=("q",))


def test_the_loss_of_lora_mixer_is_as_is_said():
    said = LoraMixer.Config(scale_by_experts=False, entropy_schedule="rising", balance_loss=0.5).build().layer([""])
    (loss,) = said.router.balance
    assert (loss.scale_by_experts, loss.schedule, loss.a) == (False, "rising", 0.5)


# LoRA-Mixer: labels choose, and routers after them


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("mixtures"))


def trained(place, out, *, steps=4, given=False, rows="rows.jsonl", accumulation=1, **options):
    """The trainer after a training of LoRA-Mixer: new experts, or the adapters ``law`` and ``sql``, or those ``given`` by their folders."""
    folders = ("law", "sql") if given is True else given
    adapters = tuple(str(place / name) for name in folders) if folders else None
    sizes = {} if adapters else {"rank": 2}
    method = LoraMixer.Config(adapters=adapters, top_k=1, **sizes, **options)
    task = AdaptTask.Config(model=str(place / "base"), data=str(place / rows), method=method, held_out=0.0)
    train = TrainConfig(
        steps=steps,
        batch_size=4,
        accumulation=accumulation,
        learning_rate=1e-2,
        weight_decay=0.0,
        eval_every=None,
        checkpoint_every=None,
        log_every=1,
        device="cpu",
        schedule=Constant.Config(),
    )
    trainer = Trainer(TaskRunConfig(task=task, train=train), out)
    trainer.fit()
    return trainer


def numbers(trainer):
    """(A and B of all experts, layer by layer; weights of the routers)."""
    layers = mixed_layers(trainer.task.base).values()
    pools = [torch.cat([layer.pool.a.flatten(1), layer.pool.b.flatten(1)], dim=1).detach().clone() for layer in layers]
    shared = {id(layer.router): layer.router.score.weight.detach().clone() for layer in layers}
    return pools, list(shared.values())


def terms(trainer):
    return [set(line["auxiliary"]) for line in read_metrics(trainer.out) if line["kind"] == "train"]


def some(place, name, *, task):
    """A file of the rows of one task."""
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    (place / name).write_text("\n".join(json.dumps(row) for row in rows if row["task"] in task))
    return name


def test_new_experts_are_of_the_tasks_by_name(place, tmp_path):
    trainer = trained(place, tmp_path, stages="hard_soft")
    # What has learned at any time, though experts are frozen by now.
    pools, routers = numbers(trainer)
    assert trainer.task.num_learning == sum(each.numel() for each in (*pools, *routers))
    for layer in mixed_layers(trainer.task.base).values():
        assert layer.config.experts == TASKS
        assert layer.pool.num_experts == len(TASKS)
    soft = trained(place, tmp_path / "soft")
    assert {layer.pool.num_experts for layer in mixed_layers(soft.task.base).values()} == {6}


def test_a_row_teaches_the_expert_of_its_task_alone(place, tmp_path):
    rows = some(place, "law-alone.jsonl", task=["law"])
    (place / rows).write_text((place / "rows.jsonl").read_text().replace('"back"', '"law"').replace('"up"', '"law"'))
    trainer = trained(place, tmp_path, given=True, rows=rows, stages="hard", alignment=0.0)
    pools, _ = numbers(trainer)
    given, _ = load_model(place / "base")
    load_mixture({name: place / name for name in ("law", "sql")}, given)
    for found, layer in zip(pools, mixed_layers(given).values(), strict=True):
        first = torch.cat([layer.pool.a.flatten(1), layer.pool.b.flatten(1)], dim=1)
        assert not torch.equal(found[0], first[0])
        assert torch.equal(found[1], first[1])


def test_adapters_in_the_folders_of_their_runs_are_called_as_the_runs(place, tmp_path):
    for name in ("law", "sql"):
        shutil.copytree(place / name, tmp_path / "runs" / name / "adapter")
    rows = some(place, "of-two.jsonl", task=["law", "sql"])
    (place / rows).write_text((place / "rows.jsonl").read_text().replace('"back"', '"law"').replace('"up"', '"sql"'))
    given = [tmp_path / "runs" / name / "adapter" for name in ("sql", "law")]
    trainer = trained(place, tmp_path / "out", given=given, rows=rows, stages="hard")
    assert {layer.config.experts for layer in mixed_layers(trainer.task.base).values()} == {("sql", "law")}
    # Tasks are sorted, adapters as they are given.
    state = trainer.task.method.state(torch.tensor([0, 1]), 1, 0.0)
    assert next(value for value in state.values() if isinstance(value, torch.Tensor)).flatten().tolist() == [1, 0]


def test_a_row_without_a_task_has_no_expert(place, tmp_path):
    lines = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    lines += [{name: value for name, value in row.items() if name != "task"} for row in lines[:3]]
    (place / "some-without.jsonl").write_text("\n".join(map(json.dumps, lines)))
    trainer = trained(place, tmp_path, rows="some-without.jsonl", alignment=0.5)
    task = trainer.task
    assert task.names == ("", *TASKS)
    assert {layer.config.experts for layer in mixed_layers(task.base).values()} == {TASKS}
    assert task.method.loss_counts(torch.tensor([-1, 0, 1, 2, 1])) == {"task_alignment": 3.0}


@pytest.mark.parametrize("rows", ["rows.jsonl", "some-without-too.jsonl"])
def test_a_batch_in_parts_draws_rows_to_their_experts_as_at_once(place, tmp_path, rows):
    """Rows of several lengths, and some without an expert: no part has as many of either as another."""
    lines = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    for number, row in enumerate(lines):
        row["input"] *= 1 + number % 3
        if number % 3 == 0 and rows != "rows.jsonl":
            del row["task"]
    (place / f"long-{rows}").write_text("\n".join(map(json.dumps, lines)))
    options = {"alignment": 1.0, "balance_loss": 0.0, "entropy_loss": 0.0, "rows": f"long-{rows}", "steps": 2}
    stages = "hard" if rows == "rows.jsonl" else "soft"
    once = trained(place, tmp_path / "once", stages=stages, **options)
    parts = trained(place, tmp_path / "parts", stages=stages, accumulation=2, **options)
    for found, expected in zip(numbers(parts), numbers(once), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("hold", "moves"), [("frozen", False), ("preserved", True), ("free", True), (None, False)])
def test_experts_learn_first_and_routers_after_them(place, tmp_path, hold, moves):
    seen, step_of = [], AdaptTask.step

    def watched(self, model, batch, context):
        seen.append(numbers(SimpleNamespace(task=self)))
        return step_of(self, model, batch, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaptTask, "step", watched)
        trainer = trained(place, tmp_path, steps=6, stages="hard_soft", hold=hold)
    seen.append(numbers(trainer))

    def same(one, other, kind):
        return all(torch.equal(a, b) for a, b in zip(seen[one][kind], seen[other][kind], strict=True))

    assert not same(0, 3, 0)
    assert same(3, 6, 0) != moves
    assert not same(3, 6, 1)
    found = terms(trainer)
    assert "task_alignment" in found[0]
    assert "specialisation" not in found[0]
    assert "specialisation" in found[5]
    assert [("preservation" in each) for each in found] == [False] * 3 + [hold == "preserved"] * 3


def test_what_holds_experts_is_added_up_over_layers(place, tmp_path):
    """beta sum_l sum_i ||theta_i - theta_i(0)||^2 of the step, which the line of the step tells."""
    drifts, step_of = [], AdaptTask.step

    def watched(self, model, batch, context):
        drifts.append(sum(float(layer.drift().detach()) for layer in mixed_layers(self.base).values()))
        return step_of(self, model, batch, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaptTask, "step", watched)
        trainer = trained(place, tmp_path, steps=4, hold="preserved", beta=0.25)
    lines = [line for line in read_metrics(trainer.out) if line["kind"] == "train"]
    assert [line["auxiliary"]["preservation"] for line in lines] == pytest.approx([0.25 * drift for drift in drifts])
    assert drifts[0] == 0 < drifts[-1]


@pytest.mark.parametrize("given", [False, True])
def test_the_chosen_experts_alone_are_held(place, tmp_path, given):
    """beta sum_{i in C} of the step: what an expert outside of C moved is not in it."""
    rows, names = "of-chosen.jsonl", ("law", "sql")
    (place / rows).write_text((place / "rows.jsonl").read_text().replace('"back"', '"law"').replace('"up"', '"sql"'))
    drifts, step_of = [], AdaptTask.step

    def watched(self, model, batch, context):
        one, all_of = torch.tensor([False, True]), torch.tensor([True, True])
        layers = mixed_layers(self.base).values()
        drifts.append([sum(float(layer.drift(which).detach()) for layer in layers) for which in (one, all_of)])
        return step_of(self, model, batch, context)

    options = {"given": given, "rows": rows, "hold": "preserved", "preserve": ("sql",), "alignment": 0.1, "beta": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaptTask, "step", watched)
        trainer = trained(place, tmp_path, **options)
    assert {layer.config.experts for layer in mixed_layers(trainer.task.base).values()} == {names}
    lines = [line for line in read_metrics(trainer.out) if line["kind"] == "train"]
    assert [line["auxiliary"]["preservation"] for line in lines] == pytest.approx([0.5 * one for one, _ in drifts])
    assert 0 < drifts[-1][0] < drifts[-1][1]


@pytest.mark.parametrize(
    ("options", "routers"),
    [
        # Two blocks: q, k and v have one, and o its own.
        ({}, 2 * 2),
        ({"router_per": "projection"}, 2 * 4),
        # Given ones are beside q and v.
        ({"given": True}, 2),
        ({"given": True, "router_per": "projection"}, 2 * 2),
        ({"targets": ("q", "v", "gate", "up", "down")}, 2 * 3),
        ({"targets": ("q", "v", "gate", "up", "down"), "router_per": "projection"}, 2 * 5),
        ({"targets": ("q", "down")}, 2 * 2),
        # q, k, v; o; gate, up; down.
        ({"targets": ("all",)}, 2 * 4),
        ({"targets": ("all",), "router_per": "projection"}, 2 * 7),
        ({"targets": ("blocks.*.attention.*", "blocks.1.feed_forward.up")}, 2 * 2 + 1),
        ({"targets": ("blocks.1.*",)}, 4),
        # The first target that fits counts.
        ({"targets": ("q", "all")}, 2 * 4),
        ({"targets": ("*.attention.*", "all")}, 2 * 4),
        ({"targets": ("gate", "all")}, 2 * 4),
        ({"targets": ("q", "blocks.0.*")}, 4 + 1),
    ],
)
def test_how_many_routers_there_are(place, tmp_path, options, routers):
    """One for what reads the same, or one for each matrix; and they are read back so."""
    trainer = trained(place, tmp_path / "run", steps=2, **options)
    assert len(numbers(trainer)[1]) == routers
    trainer.task.write(tmp_path / "adapter")
    base, _ = load_model(place / "base")
    read_own(tmp_path / "adapter", base)
    assert len({id(layer.router) for layer in mixed_layers(base).values()}) == routers
    with torch.no_grad():
        found, wanted = base.eval()(TOKENS).logits_BLV, trainer.task.base.eval()(TOKENS).logits_BLV
    assert torch.equal(found, wanted)


def test_what_is_trained_in_stages_is_read_back(place, tmp_path):
    trainer = trained(place, tmp_path / "run", stages="hard_soft")
    trainer.task.write(tmp_path / "adapter")
    base, _ = load_model(place / "base")
    read_own(tmp_path / "adapter", base)
    with torch.no_grad():
        found, wanted = base.eval()(TOKENS).logits_BLV, trainer.task.base.eval()(TOKENS).logits_BLV
    assert torch.equal(found, wanted)


def test_labels_lead_routers_that_choose_from_the_beginning(place, tmp_path):
    """Rows of tasks that have no expert are led nowhere."""
    text = (place / "rows.jsonl").read_text()
    (place / "partly.jsonl").write_text(text.replace('"back"', '"law"'))
    trainer = trained(place, tmp_path, given=True, rows="partly.jsonl", alignment=0.5)
    assert all("task_alignment" in each for each in terms(trainer))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"given": True, "stages": "hard"}, ConfigError, "task 'back' has no expert; adapters are called 'law', 'sql'"),
        ({"given": True, "alignment": 0.1}, ConfigError, "task 'back' has no expert"),
        ({"stages": "hard", "experts": 2, "rows": "three.jsonl"}, ConfigError, "experts is 2, and rows are of 3 tasks"),
        (
            {"stages": "hard", "rows": "one.jsonl"},
            ConfigError,
            "rows are of 1 named tasks, so there is nothing to choose",
        ),
        ({"stages": "hard", "rows": "none.jsonl"}, DataError, "the row names no task"),
        ({"hold": "frozen"}, ConfigError, "hold is 'frozen' from the beginning, and new experts add nothing"),
        ({"given": True, "targets": ("up",)}, ConfigError, "targets is of new experts, and adapters are given"),
        ({"given": True, "experts": 9}, ConfigError, "experts is of new experts, and adapters are given"),
        ({"given": True, "alpha": 9.0}, ConfigError, "alpha is of new experts, and adapters are given"),
        ({"preserve": ("up",)}, ConfigError, "preserve names 'up', and hold is None; set hold to 'preserved'"),
        (
            {"hold": "preserved", "preserve": ("none",), "alignment": 0.1},
            ConfigError,
            "preserved has 'none', which no expert is called; they are 'back', 'up'",
        ),
        (
            {"given": True, "hold": "preserved", "preserve": ("law", "law")},
            ConfigError,
            "preserved has 'law' twice",
        ),
        (
            {"hold": "preserved", "preserve": ("up",)},
            ConfigError,
            "'up', which no expert is called; they have no names",
        ),
    ],
)
def test_what_cannot_be_in_stages(place, tmp_path, options, error, message):
    text = (place / "rows.jsonl").read_text()
    third = text.splitlines()[0].replace('"back"', '"third"')
    (place / "three.jsonl").write_text(f"{text}\n{third}")
    some(place, "one.jsonl", task=["up"])
    (place / "none.jsonl").write_text(json.dumps({"input": "ab", "output": "ba"}))
    with pytest.raises(error, match=message):
        trained(place, tmp_path, **options)
