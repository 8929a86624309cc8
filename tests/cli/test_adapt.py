"""``anabranch adapt``, from rows to an adapter that others read."""

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from safetensors.numpy import load_file, save_file

from anabranch.adapters import read_peft
from anabranch.adapters.adapt import AdaptTask
from anabranch.data import ByteTokenizer
from anabranch.lm import Decoder, export_huggingface, load_model, save_model
from anabranch.nn import MoE, SelfAttention, SwiGLU
from anabranch.nn.quantize import quantize
from scripted_endpoint import chat, endpoint, vectors

QUICK = [
    "--set=train.batch_size=4",
    "--set=train.device=cpu",
    "--set=train.checkpoint_every=3",
    "--set=train.schedule.kind=constant",
    "--set=task.held_out=0.3",
]


@pytest.fixture(scope="module")
def base(work):
    """In ``work/adapt``: a Hugging Face folder of a model that reads bytes, and rows of two tasks."""
    root = work / "adapt"
    config = Decoder.Config(
        vocab_size=257,
        dim=32,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
        feed_forward=SwiGLU.Config(hidden_dim=48),
        max_positions=64,
    )
    export_huggingface(root / "base", config.build(seed=1), ByteTokenizer.Config().build(), family="llama")
    rows = [
        {"task": task, "input": f"{task}: {word}", "output": word.upper()}
        for word in ("ab", "cde", "fghi", "jk", "lmnop", "qr", "stu")
        for task in ("one", "two")
    ]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "tests.jsonl").write_text("\n".join(json.dumps({**row, "split": "test"}) for row in rows))
    few = config.replace(attention=config.attention.replace(qkv_bias=True)).build(seed=1)
    quantize(few, "int4", group=32)
    save_model(root / "few", few, ByteTokenizer())
    return root


def adapted(here, *arguments):
    code, out, err = here("adapt", *arguments, *QUICK, "--json", "--quiet")
    assert code == 0, err
    return json.loads(out)


def test_lora_from_rows_to_a_folder_of_pefts(here, base):
    told = adapted(here, base / "base", base / "rows.jsonl", "--out", base / "lora", "--steps", 6, "--rank", 2)
    assert (told["method"], told["status"], told["step"], told["form"]) == ("lora", "finished", 6, "peft")
    assert told["tasks"] == 2
    assert told["after"]["by_task"].keys() == told["before"]["by_task"].keys() == {"one", "two"}
    assert told["after"]["nats_per_token"] != told["before"]["nats_per_token"]
    report = json.loads((base / "lora" / "report.json").read_text())
    assert report == told
    # Other programs look there for the base.
    table = json.loads((base / "lora" / "adapter" / "adapter_config.json").read_text())
    assert table["base_model_name_or_path"] == str(base / "base") == told["model"]
    code, out, err = here("adapters", "card", base / "lora" / "adapter")
    assert (code, err) == (0, "")
    assert "rank   2" in " ".join(out.split(" ")) or "2" in out
    given = ["--data", "text/alpha", "--tokens", 128, "--sequence-length", 32, "--json", "--quiet"]
    plain = json.loads(here("eval", base / "base", *given)[1])
    changed = json.loads(here("eval", base / "base", "--adapter", base / "lora" / "adapter", *given)[1])
    assert plain["nats_per_token"] != changed["nats_per_token"]


def test_a_training_that_came_to_nothing_says_so(here, base):
    """Its report is JSON that any reader takes."""
    line = ["adapt", base / "base", base / "rows.jsonl", "--out", base / "diverged", "--steps", 3, *QUICK, "--quiet"]
    code, out, _ = here(*line, "--learning-rate", 1e30)
    assert code == 0
    assert "2 of 3 steps changed nothing, as a gradient was not finite" in out

    def refused(word):
        raise AssertionError(f"{word} is no JSON")

    report = json.loads((base / "diverged" / "report.json").read_text(), parse_constant=refused)
    assert report["after"]["nats_per_token"] is None
    assert report["skipped_steps"] == 2


def test_a_model_that_is_not_sound_is_not_blamed_on_the_learning_rate(here, base):
    model, tokenizer = load_model(base / "base")
    with torch.no_grad():
        next(model.blocks.parameters()).view(-1)[0] = math.nan
    save_model(base / "unsound", model, tokenizer)
    line = ["adapt", base / "unsound", base / "rows.jsonl", "--out", base / "blamed", "--steps", 3, *QUICK, "--quiet"]
    code, out, err = here(*line)
    assert code == 0, err
    assert f"nor were answers of {base / 'unsound'} before the first step, so the model itself is not sound" in out
    assert "--learning-rate" not in out


def test_resumed_to_the_bit(here, base):
    straight = adapted(here, base / "base", base / "rows.jsonl", "--out", base / "straight", "--steps", 6)
    adapted(here, base / "base", base / "rows.jsonl", "--out", base / "parts", "--steps", 3)
    code, out, err = here("adapt", "--out", base / "parts", "--resume", "--steps", 6, "--json", "--quiet")
    assert code == 0, err
    resumed = json.loads(out)
    assert resumed["after"] == straight["after"]
    assert resumed["before"] == straight["before"]
    one, other = (
        (base / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("straight", "parts")
    )
    assert one == other


LOSSES = (5.0, 4.0, 4.5, 4.25, 6.0)


@pytest.fixture
def told_losses(monkeypatch):
    """The evaluations after 2, 4, ... steps come to `LOSSES`."""
    real = AdaptTask.evaluate

    def evaluate(self, model, data, context):
        found = real(self, model, data, context)
        return found | ({"nats_per_token": LOSSES[context.step // 2 - 1]} if context.step else {})

    monkeypatch.setattr(AdaptTask, "evaluate", evaluate)


def test_it_stops_early_and_writes_the_best(here, base, told_losses):
    """What is written is what a training that ended at the best step writes, to the bit."""
    rows = [base / "base", base / "rows.jsonl"]
    options = ["--steps", 10, "--eval-every", 2, "--patience", 2]
    straight = adapted(here, *rows, "--out", base / "to-4", "--steps", 4)
    told = adapted(here, *rows, "--out", base / "early", *options, "--keep-best")
    assert (told["status"], told["step"], told["steps"]) == ("finished", 8, 10)
    assert (told["stopped_early"], told["best_step"], told["written_step"]) == (True, 4, 4)
    assert told["after"]["nats_per_token"] == 4.0
    assert json.loads((base / "early" / "report.json").read_text()) == told
    last = adapted(here, *rows, "--out", base / "last", *options)
    assert (last["stopped_early"], last["best_step"], last["written_step"]) == (True, 4, 8)
    assert last["after"]["nats_per_token"] == 4.25
    best, of_4, of_8 = (load_file(Path(one["adapter"]) / "adapter_model.safetensors") for one in (told, straight, last))
    assert all((best[name] == of_4[name]).all() for name in of_4)
    assert any((best[name] != of_8[name]).any() for name in of_8)
    # Who asks again is told the same.
    code, out, err = here("adapt", "--out", base / "early", "--resume", "--json", "--quiet")
    assert code == 0, err
    assert {**json.loads(out), "peak_memory_bytes": 0} == {**told, "peak_memory_bytes": 0}
    # And more patience goes on from where it was.
    line = ["adapt", "--out", base / "early", "--resume", "--patience", 3, "--json", "--quiet"]
    more = json.loads(here(*line)[1])
    assert (more["step"], more["stopped_early"], more["written_step"]) == (10, False, 4)


def test_it_says_that_it_stops_early(here, base, told_losses):
    line = ["adapt", base / "base", base / "rows.jsonl", "--out", base / "told-early", *QUICK]
    code, out, err = here(*line, "--steps", 10, "--eval-every", 2, "--patience", 2, "--keep-best")
    assert code == 0, err
    shown = [line.partition("nats/token")[2] for line in err.splitlines() if "held-out answers" in line]
    assert shown == [
        ", the best so far",
        ", the best so far",
        ", the best was step 4",
        ", the best was step 4: training ends here",
    ]
    assert "early, at step 8: of its evaluations none since step 4 was better; written is step 4, the best" in out
    code, out, err = here("adapt", "--out", base / "told-early", "--resume")
    assert code == 0, err
    assert "written is step 4" in out


@pytest.mark.parametrize("option", [["--patience", 2], ["--keep-best"]])
def test_what_it_needs_to_know_the_best(here, base, option):
    line = ["adapt", base / "base", base / "rows.jsonl", "--out", base / "none", *QUICK, *option]
    code, _, err = here(*line)
    assert code == 2
    assert "eval_every is None, so held-out data is looked at once, at the end; set eval_every to the steps" in err
    code, _, err = here(*line, "--eval-every", 2, "--set", "task.held_out=0")
    assert code == 2
    assert "no rows are held out, by which to know what is better: give some with --eval-data" in err
    assert not (base / "none").exists()


def test_what_it_says(here, base):
    code, out, err = here("adapt", base / "base", base / "rows.jsonl", "--out", base / "said", "--steps", 2, *QUICK)
    assert code == 0, err
    assert "frozen" in err
    assert "14 rows" not in err  # some are held out
    assert "held out" in err
    for word in ("one", "two", "all", "before", "after", "asked as", "anabranch adapters eval"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--out", "z"], "MODEL is missing"),
        (["{base}/base", "--out", "z"], "DATA is missing"),
        (["{base}/base", "{base}/no.jsonl", "--out", "z"], "cannot read"),
        (["{base}/base", "text/alpha/0.py", "--out", "z"], "line 1: this is no JSON"),
        (["{base}/base", "{base}/rows.jsonl", "--out", "z", "--method", "lorra"], "did you mean 'lora'"),
        (
            ["{base}/base", "{base}/rows.jsonl", "--out", "z", "--method", "nope"],
            "there are adamix, .* lora, .* unipelt$",
        ),
        (
            ["{base}/base", "{base}/rows.jsonl", "--out", "z", "--from", "x"],
            "--from is '.*x', which method 'lora' does not take; mhr, poly do",
        ),
        (
            ["{base}/base", "{base}/rows.jsonl", "--out", "z", "--method", "gate", "--rank", "2"],
            "--rank is 2, which method 'gate' does not take; .*dora, .*lora",
        ),
        *(
            (
                ["{base}/base", "{base}/rows.jsonl", "--out", "z", "--method", method, "--rank", "2"],
                f"--rank is 2, which method '{method}' does not take; .*dora, .*lora",
            )
            for method in ("ia3", "prompt-tuning", "adamix")
        ),
        (["{base}/base", "{base}/tests.jsonl", "--out", "z"], r"all 14 rows of .* held out \(split: test\)"),
        (["{base}/base", "{base}/rows.jsonl", "--out", "z", "--target", "w1"], "fits no linear layer"),
        (["{base}/base", "{base}/rows.jsonl", "--out", "z", "--mode", "z"], "mode"),
        (["{base}/base", "{base}/rows.jsonl", "--out", "z", "--set", "method.rnk=2"], "did you mean"),
        (["no", "{base}/rows.jsonl", "--out", "z"], "no model at"),
        (["--out", "z", "--resume"], "no training run in z"),
        (["{base}/base", "{base}/rows.jsonl", "--out", "{base}/base"], "holds|read"),
    ],
)
def test_mistakes_in_one_line(here, base, arguments, told):
    import re

    code, out, err = here("adapt", *(one.format(base=base) for one in arguments), "--quiet")
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert re.search(told, err), err


@pytest.fixture(scope="module")
def routed(work, base, request):
    """The folder of an adapter that routes by task."""
    from anabranch.adapters.adapt import AdaptTask
    from anabranch.adapters.mhr.method import Mhr
    from anabranch.train import TaskRunConfig, TrainConfig, Trainer

    method = Mhr.Config(skills=2, heads=2, rank=2, targets=("q", "down"))
    task = AdaptTask.Config(model=str(base / "base"), data=str(base / "rows.jsonl"), method=method)
    run = TaskRunConfig(task=task, train=TrainConfig(steps=5, batch_size=4, learning_rate=0.02, device="cpu"))
    trainer = Trainer(run, base / "routed")
    trainer.fit()
    return trainer.task.write(base / "routed" / "adapter").folder


EVAL = ["--data", "text/alpha", "--tokens", 128, "--sequence-length", 32, "--json", "--quiet"]


def test_a_task_of_an_inventory_leaves_it_as_plain_lora(here, base, routed):
    def measured(*arguments):
        code, out, err = here("eval", base / "base", *arguments, *EVAL)
        assert code == 0, err
        return json.loads(out)["nats_per_token"]

    found = {}
    for task in ("one", "two"):
        found[task] = measured("--adapter", routed, "--task", task)
        code, out, err = here("adapters", "export", base / "base", routed, "--task", task, "--out", base / f"of-{task}")
        assert code == 0, err
        assert "anabranch eval" in out
        assert measured("--adapter", base / f"of-{task}") == pytest.approx(found[task], rel=1e-5)
    assert found["one"] != pytest.approx(found["two"], rel=1e-6)
    code, out, err = here("adapters", "export", base / "base", routed, "--average", "--out", base / "mu", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["difference"] < 1e-5 * max(1, told["greatest_logit"])
    assert json.loads((base / "mu" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base / "base"
    )


def test_what_is_made_of_an_adapter_is_asked_as_it_learned(here, base, tmp_path):
    """An export, a merge and a pool of adapters that say the same."""
    from anabranch.adapters.adapt.prompts import template_in

    form = ["--set=task.template=Q: {prompt} A:", "--steps", 1]
    for name, method in (("one", []), ("two", []), ("routed", ["--method", "mhr"])):
        adapted(here, base / "base", base / "rows.jsonl", "--out", tmp_path / name, *method, *form)
    one, two, routed = (tmp_path / name / "adapter" for name in ("one", "two", "routed"))
    lines = {
        "of-one": ("export", base / "base", one, two),
        "of-task": ("export", base / "base", routed, "--task", "one"),
        "merged": ("merge", one, two, "--method", "linear"),
    }
    for name, line in lines.items():
        code, _, err = here("adapters", *line, "--out", tmp_path / name)
        assert code == 0, err
        assert template_in(tmp_path / name) == "Q: {prompt} A:", name
    measured = []
    for adapter, more in ((tmp_path / "of-one", []), (tmp_path / "of-one", ["--template", "Q: {prompt} A:"])):
        code, out, err = here(
            "adapters", "eval", base / "base", adapter, "--data", base / "rows.jsonl", "--json", *more
        )
        assert code == 0, err
        measured.append(json.loads(out)["nats_per_token"])
    assert measured[0] == measured[1]


def test_the_form_that_adapters_of_others_learned_is_shown_without_what_steers_a_terminal(here, base, tmp_path):
    for name in ("one", "two"):
        adapted(here, base / "base", base / "rows.jsonl", "--out", tmp_path / name, "--steps", 1)
        note = json.dumps({"template": "\x9b31m\x1b[2JEVIL\u202e {prompt}"})
        (tmp_path / name / "adapter" / "prompt.json").write_text(note)
    folders = json.dumps([str(tmp_path / name / "adapter") for name in ("one", "two")])
    line = ("--method", "lora_mixer", "--set", f"method.adapters={folders}", "--steps", 1, *QUICK)
    code, out, err = here("adapt", base / "base", base / "rows.jsonl", "--out", tmp_path / "mixed", *line)
    assert code == 0, err
    assert "EVIL" in out
    assert not set("\x9b\x1b\u202e") & set(out)


@pytest.mark.parametrize(
    "line",
    [
        ("merge", "one", "two"),
        ("merge", "routed", "routed-too", "--method", "mean"),
        ("export", "base", "one", "two"),
        ("export", "base", "routed", "--task", "one"),
    ],
)
def test_a_note_that_says_nothing_is_told_before_anything_is_written(here, base, tmp_path, line):
    for name in ("one", "two", "routed", "routed-too"):
        if name in line:
            method = ["--method", "mhr"] if name.startswith("routed") else []
            adapted(here, base / "base", base / "rows.jsonl", "--out", tmp_path / name, *method, "--steps", 1)
    places = {"base": base / "base"} | {
        name: tmp_path / name / "adapter" for name in ("one", "two", "routed", "routed-too")
    }
    line = [places.get(word, word) if number else word for number, word in enumerate(line)]
    line = [*line[:-1], "one"] if "--task" in line else line
    note = next(place for place in line[1:] if place in places.values() and place != places["base"]) / "prompt.json"
    said = note.read_text()
    note.write_text('{"template": "none"}')
    code, _, err = here("adapters", *line, "--out", tmp_path / "made")
    assert code == 2
    assert "prompt.json" in err
    assert not (tmp_path / "made").exists()
    note.write_text(said)
    code, _, err = here("adapters", *line, "--out", tmp_path / "made")
    assert code == 0, err
    assert (tmp_path / "made" / "prompt.json").read_text() == said


def test_generate_with_an_adapter(here, base, routed):
    """The same tokens as the library makes of the model with that adapter on it, of each task; and in a plan of memory."""
    from anabranch.adapters.own_folder import read_own
    from anabranch.adapters.tasks import on_tasks
    from anabranch.lm import SamplingConfig
    from anabranch.lm import generate as library

    given = ["--prompt", "one: xy", "--max-tokens", 12, "--temperature", 0, "--json"]

    def ids(*more):
        code, out, err = here("generate", base / "base", *given, *more)
        assert code == 0, err
        return json.loads(out)["token_ids"]

    model, tokenizer = load_model(base / "base")
    # Larger numbers than a few steps learn, and a skill for each task, so that each has a text of its own.
    strong = base / "strong"
    shutil.copytree(routed, strong)
    table = load_file(routed / "adapter.safetensors")
    table = {name: number * 40 if name.endswith("inventory.b") else number for name, number in table.items()}
    for name in (name for name in table if name.endswith("table.z")):
        table[name][0], table[name][1] = [9.0, -9.0], [-9.0, 9.0]
    save_file(table, strong / "adapter.safetensors")
    read_own(strong, model)
    texts = {}
    for task in ("one", "two"):
        with on_tasks(model, task):
            prompt = tokenizer.encode_prompt("one: xy")
            sampling = SamplingConfig(max_tokens=12, temperature=0, stop=tuple(tokenizer.stop_ids))
            expected = library(model, [prompt], sampling)[0]
        texts[task] = ids("--adapter", strong, "--task", task)
        assert texts[task] == expected
        assert ids("--adapter", strong, "--task", task, "--memory", "2GiB", "--dtype", "float32") == expected
    assert texts["one"] != texts["two"]
    assert ids() not in texts.values()

    def answers(*more):
        code, out, err = here(
            "chat", base / "base", "-m", "xy", "--max-tokens", 12, "--temperature", 0, "--json", *more
        )
        assert code == 0, err
        return json.loads(out)["token_ids"]

    told = [answers("--adapter", strong, "--task", task) for task in texts]
    assert told[0] != told[1]
    assert answers() not in told


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("generate {base} -p x --adapter {routed}", "one of .one., .two."),
        ("chat {base} -m x --adapter {routed}/../checkpoints", "checkpoints"),
        ("generate {base} -p x --adapter {routed} --task thre", "'thre'"),
        ("generate {base} -p x --task one", "task"),
        ("generate {base} -p x --adapter nowhere", "nowhere"),
        ("generate {base} -p x --adapter {routed} --task one --rewire", "--adapter cannot be combined with --rewire"),
        ("eval {base} --adapter {routed} --data text/alpha", r"name the text's with --task, one of \['one', 'two'\]"),
        ("eval {base} --adapter {routed} --task thre --data text/alpha", "task 'thre' is not one of the 2"),
        ("eval {base} --task one --data text/alpha", "does not route by task"),
        ("adapters export {base} {routed} --out z", "name one of .* with --task, or say --average"),
        ("adapters export {base} {routed} --out z --task one --average", "not both"),
        (
            "adapters export {base} {routed} --out z --task one --data {base}/../rows.jsonl",
            "nothing is measured on rows",
        ),
        (
            "adapters export {base} {routed} --out z --data {base}/../rows.jsonl",
            "name the one that is exported with --task",
        ),
        ("adapters export {base} {routed} --out z --task no", "task 'no' is not one of the 2"),
        ("adapters export {base} {routed} --out z --task one --rank 2", "alone and without"),
        ("adapters export {base} text --out z --task one", "that routes, alone"),
        ("eval {base} --adapter {routed}/../checkpoints --data text/alpha", "no adapter at"),
        ("eval {routed}/.. --data text/alpha", "adapt"),
    ],
)
def test_what_cannot_be_done_with_one(here, base, routed, command, told):
    import re

    code, out, err = here(*command.format(base=base / "base", routed=routed).split())
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1, err
    assert re.search(told, err), err


def test_new_tasks_with_the_skills_of_another_adapter(here, base, routed):
    rows = (base / "rows.jsonl").read_text().replace('"one"', '"new"').replace('"two"', '"new"')
    (base / "new.jsonl").write_text(rows)
    given = ["--method", "mhr", "--from", routed, "--mode", "z", "--steps", 3, "--out", base / "z"]
    told = adapted(here, base / "base", base / "new.jsonl", *given)
    # What tables have come to, each and on average, between 0 and 1.
    tables = told["routing"].pop("tables")
    assert len(tables) == 4
    for name, mean in told["routing"].items():
        assert mean == pytest.approx(sum(table[name] for table in tables.values()) / 4)
        assert 0 <= mean <= 1
    # Two targets in each of two blocks.
    assert told["parameters"] == 4 * 2 * 2
    assert told["tasks"] == 1


def nats(here, base, *adapter):
    given = ["--data", "text/alpha", "--tokens", 128, "--sequence-length", 32, "--json", "--quiet"]
    return json.loads(here("eval", base / "base", *adapter, *given)[1])["nats_per_token"]


def test_experts_that_a_router_chooses(here, base, monkeypatch):
    """New ones all or few by the entropy; and adapters that were trained before, whose router alone learns."""
    plain = nats(here, base)
    small = ["--method", "dynmole", "--rank", 2, "--set=method.experts=3", "--set=method.keep_top_k=1"]
    told = adapted(here, base / "base", base / "rows.jsonl", "--out", base / "dynmole", "--steps", 4, *small)
    assert (told["method"], told["form"]) == ("dynmole", "anabranch")
    assert nats(here, base, "--adapter", base / "dynmole" / "adapter") != plain
    for name, seed in (("law", 1), ("sql", 2)):
        options = ["--rank", seed, "--seed", seed, "--out", base / name, "--steps", 4]
        adapted(here, base / "base", base / "rows.jsonl", *options)
    monkeypatch.chdir(base)
    folders = json.dumps([f"{name}/adapter" for name in ("law", "sql")])
    given = ["--method", "lora_mixer", f"--set=method.adapters={folders}", "--set=method.top_k=2"]
    mixed = adapted(here, base / "base", base / "rows.jsonl", "--out", base / "mixer", "--steps", 4, *given)
    # It goes on from another place than the one it began in.
    monkeypatch.chdir(base.parent)
    code, _, err = here("adapt", "--resume", "--out", base / "mixer", "--steps", 5, "--json", "--quiet")
    assert code == 0, err
    # Two blocks with a router for q, k and v and one for o, of two rows of 32 numbers.
    assert (mixed["method"], mixed["parameters"]) == ("lora_mixer", 2 * 2 * 2 * 32)
    # What routers do with the rows that are measured.
    for told_of in (told, mixed):
        found = told_of["routing"]
        assert len(found["routers"]) == {"dynmole": 6, "lora_mixer": 4}[told_of["method"]]
        assert found["active"] == pytest.approx(
            sum(router["active"] for router in found["routers"]) / len(found["routers"])
        )
        assert 0 <= found["information"] < 1
        assert [int(number) for number in found["routers"][0]["by_task"]] == [0, 1] == list(range(len(found["tasks"])))
    assert nats(here, base, "--adapter", base / "mixer" / "adapter") not in (plain, told)
    fresh = ["--method", "lora_mixer", "--rank", 2, "--set=method.experts=3"]
    new = adapted(here, base / "base", base / "rows.jsonl", "--out", base / "fresh", "--steps", 2, *fresh)
    assert new["parameters"] > mixed["parameters"]


@pytest.mark.parametrize("method", [["dynmole"], ["lora_mixer", "--target", "all"]])
def test_mixtures_beside_experts_from_training_to_export(here, base, tmp_path, method):
    """Each expert is given some of the tokens, and of some tasks perhaps none."""
    experts = Decoder.Config(
        vocab_size=257,
        dim=32,
        num_layers=1,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
        feed_forward=MoE.Config(num_experts=8, hidden_dim=8),
        max_positions=64,
    )
    save_model(tmp_path / "moe", experts.build(seed=1), ByteTokenizer.Config().build())
    given = ["--method", *method, "--rank", 2, "--set=method.experts=3", "--steps", 2]
    given += ["--set=method.keep_top_k=1"] if method == ["dynmole"] else ["--set=method.top_k=2"]
    told = adapted(here, tmp_path / "moe", base / "rows.jsonl", *given, "--out", tmp_path / "run")
    assert told["routing"]["active"] >= 1
    adapter = tmp_path / "run" / "adapter"
    for line in (
        ("report", tmp_path / "moe", adapter, "--data", base / "rows.jsonl", "--out", tmp_path / "page"),
        (
            "export",
            tmp_path / "moe",
            adapter,
            "--task",
            "one",
            "--data",
            base / "rows.jsonl",
            "--out",
            tmp_path / "one",
        ),
    ):
        code, _, err = here("adapters", *line)
        assert code == 0, err
    code, out, err = here(
        "adapters", "eval", tmp_path / "moe", tmp_path / "one", "--data", base / "rows.jsonl", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["nats_per_token"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "dynmole", "--set=method.keep_top_k=9"], "keep_top_k is 9, but there are 6 destinations"),
        (
            ["--method", "dynmole", "--set=method.experts=100000000"],
            "experts is 100000000; it must be less than or equal to 65536",
        ),
        (["--method", "dynmole", "--set=method.experts_per_layer=[2, 99999999]"], "a layer has at most 65,536 experts"),
        (["--method", "lora_mixer", "--set=method.experts=99999999"], "experts is 99999999; it must be less"),
        (["--rank", 10**9], "are free; take a smaller rank, fewer experts or fewer layers"),
        (["--method", "lora_mixer", '--set=method.adapters=["a"]'], "adapters has 1; a router needs at least 2"),
        (["--method", "lora_mixer", "--set=method.top_k=9"], "top_k is 9, but there are 6 experts; use 1 to 6"),
        (["--method", "lora_mixer", '--set=method.adapters=["a", "b"]'], "/a: it is not there"),
    ],
)
def test_mixtures_that_cannot_be(here, base, options, message):
    code, _, err = here("adapt", base / "base", base / "rows.jsonl", "--out", base / "none", *options, *QUICK)
    assert (code, message in err) == (2, True), err
    assert not (base / "none").exists()


def test_adapters_are_fused_and_kinds_unified_from_training_to_generation(here, base):
    """Two bottlenecks that were trained apart, and attention over them; and UniPELT: what `adapters fuse` makes of both generates."""
    for name in ("law", "sql"):
        given = ["--method", "adapter-pfeiffer", "--set=method.width=3", "--out", base / f"{name}-apart", "--steps", 3]
        told = adapted(here, base / "base", base / "rows.jsonl", *given)
        assert told["form"] == "anabranch"
    folders = json.dumps([str(base / f"{name}-apart" / "adapter") for name in ("law", "sql")])
    given = ["--method", "adapter-fusion", f"--set=method.adapters={folders}", "--out", base / "attended", "--steps", 3]
    told = adapted(here, base / "base", base / "rows.jsonl", *given)
    # Q, K and V of both blocks.
    assert (told["method"], told["form"], told["parameters"]) == ("adapter-fusion", "anabranch", 2 * 3 * 32 * 32)
    unified = ["--method", "unipelt", "--rank", 2, "--set=method.tokens=3", "--set=method.width=3", "--steps", 3]
    unipelt = adapted(here, base / "base", base / "rows.jsonl", *unified, "--out", base / "unified")
    assert (unipelt["method"], unipelt["form"]) == ("unipelt", "anabranch")
    # The same line goes on with it, from whichever place its folders are named; and without them, as their numbers are in the checkpoint.
    again = [*given[:1], "adapter-fusion", f"--set=method.adapters={folders.replace(str(base), base.name)}"]
    again += ["--out", base / "attended", "--resume", "--json", "--quiet"]
    code, out, err = here("adapt", base / "base", base / "rows.jsonl", *again, "--steps", 4)
    assert code == 0, err
    straight = [*given[:3], "--out", base / "straight-attended", "--steps", 6]
    adapted(here, base / "base", base / "rows.jsonl", *straight)
    (base / "sql-apart").rename(base / "sql-gone")
    code, out, err = here("adapt", "--out", base / "attended", "--resume", "--steps", 6, "--json", "--quiet")
    assert code == 0, err
    (base / "sql-gone").rename(base / "sql-apart")
    assert json.loads(out)["parameters"] == told["parameters"]
    one, other = (
        (base / name / "adapter" / "adapter.safetensors").read_bytes() for name in ("attended", "straight-attended")
    )
    assert one == other
    other = json.dumps([str(base / "law-apart" / "adapter")])
    code, out, err = here("adapt", "--out", base / "attended", "--resume", f"--set=method.adapters={other}")
    assert code == 2
    assert "task.method.adapters was" in err
    plain = nats(here, base)
    for name, kind in (("attended", "adapter_fusion"), ("unified", "front")):
        adapter = base / name / "adapter"
        assert nats(here, base, "--adapter", adapter) != plain
        code, out, err = here("adapters", "card", adapter, "--json")
        assert code == 0, err
        assert kind in json.loads(out)["kinds"]
        code, out, err = here("adapters", "fuse", base / "base", adapter, "--out", base / f"{name}-whole", "--json")
        assert code == 0, err
        assert json.loads(out)["difference"] < 1e-3
        line = ["--prompt", "name a law", "--max-tokens", 4, "--temperature", 0]
        code, out, err = here("generate", base / f"{name}-whole", *line)
        assert code == 0, err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "adapter-fusion", "--set=method.adapters=[]"], "adapters is empty; name at least one folder"),
        (["--method", "adapter-fusion", '--set=method.adapters=["a"]'], "/a (looked for adapter.json)"),
        (["--method", "adapter-fusion", '--set=method.adapters="a"'], "adapters is 'a'; it must be a list"),
        (["--method", "adapter-fusion", "--set=method.number=0"], "number"),
        (["--method", "unipelt", "--set=method.tokens=0"], "tokens"),
        (["--method", "unipelt", "--set=method.number=3"], "unipelt has no option 'number'"),
    ],
)
def test_what_cannot_be_fused_or_unified(here, base, options, message):
    code, _, err = here("adapt", base / "base", base / "rows.jsonl", "--out", base / "none", *options, *QUICK)
    assert (code, message in err) == (2, True), err
    assert not (base / "none").exists()


def test_an_adapter_is_described_and_queries_are_written_of_by_an_endpoint(here, base):
    """By hand, by a model that is shown rows, and asked in turn of a query and for vectors."""
    adapted(here, base / "base", base / "rows.jsonl", "--rank", 2, "--out", base / "told", "--steps", 1)
    pool = base / "described"
    for name in ("one", "two"):
        shutil.copytree(base / "told" / "adapter", pool / name)

    def answer(path, body):
        if path.endswith("embeddings"):
            return 200, vectors(*[[float("one" in text), float("two" in text), 0.1] for text in body["input"]]), {}
        asked = body["messages"][1]["content"]
        return 200, chat("Say it as in task two." if "two" in asked else "Shout."), {}

    code, out, err = here("adapters", "route", pool, "what of two?")
    assert (code, "describe" in out) == (0, True), err
    code, out, err = here(
        "adapters", "describe", pool / "one", "--instruction", "This is task one.", "--instruction", "One!", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["instructions"] == ["This is task one.", "One!"]
    with endpoint(answer) as (url, seen):
        given = ["--writer", url, "--writer-model", "w"]
        line = ["adapters", "describe", pool / "two", "--data", base / "rows.jsonl", "--task", "two", *given]
        code, out, err = here(*line)
        assert (code, "Say it as in task two." in out) == (0, True), err
        assert "Input: two: ab\nOutput: AB" in seen[0][1]["messages"][1]["content"]
        assert json.loads((pool / "two" / "glider.json").read_text())["instructions"] == ["Say it as in task two."]
        found = ["--embedder", url, "--embedder-model", "e", "--json"]
        code, out, err = here("adapters", "route", pool, "what of two?", *given, *found)
        assert code == 0, err
        told = json.loads(out)
        assert (told["instruction"], told["retrieved"][0]["name"]) == ("Say it as in task two.", "two")
    for line, message in (
        (["describe", pool / "one"], "describe the task with --instruction, or give rows"),
        (["describe", pool / "one", "--instruction", "x", "--data", base / "rows.jsonl"], "one of them"),
        (["describe", pool / "one", "--data", base / "rows.jsonl"], "name one with --writer and --writer-model"),
        (
            ["describe", pool / "one", "--instruction", "x", "--task", "two"],
            "--task is for instructions that are written",
        ),
        (["describe", pool / "one", "--instruction", " "], "the instruction of"),
        (["describe", base / "base", "--instruction", "x"], "no adapter at"),
        (["describe", pool / "one", "--data", base / "rows.jsonl", "--writer", url], "--writer-model is not"),
        (["describe", pool / "one", "--data", base / "rows.jsonl", *given], "cannot reach"),
        (["describe", pool / "one", "--data", base / "rows.jsonl", "--task", "no", *given], "--task is 'no', of which"),
        (["route", pool, "x", "--embedder", url], "--embedder-model is not"),
        (["route", pool, "x", "--embedder", url, "--embedder-model", "e"], "cannot reach"),
        (["route", pool, "x", "--key-env", "HOME"], "--key-env is for --writer and --embedder"),
    ):
        code, _, err = here("adapters", *line)
        assert (code, message in err) == (2, True), (line, err)
    assert json.loads((pool / "one" / "glider.json").read_text())["instructions"] == ["This is task one.", "One!"]


def clustered(here, base):
    """The pool shown, merged into a smaller one that routes, and routed in two levels: what `route` says of that."""
    code, out, err = here("adapters", "cluster", base / "pool", "--clusters", 1)
    assert code == 0, err
    assert "cluster-1" in out
    assert "law, sql" in out
    code, out, err = here("adapters", "cluster", base / "pool", "--clusters", 1, "--out", base / "small", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["clusters"] == {"cluster-1": ["law", "sql"]}
    assert told["similarity"][0][0] == 1
    assert told["errors"]["cluster-1"] > 0
    code, out, err = here("adapters", "route", base / "small", "which law is it", "--model", base / "base", "--json")
    assert code == 0, err
    assert [one["name"] for one in json.loads(out)["experts"]] == ["cluster-1"]
    for line, message in (
        (("--clusters", 3), "clusters is 3; of 2 experts there are 1 to 2"),
        (("--clusters", 1, "--rank", 2), "--out asks for"),
        (("--clusters", 1, "--out", base / "pool"), "would be lost if"),
        (("--clusters", 1, "--out", base / "small"), "holds"),
    ):
        code, _, err = here("adapters", "cluster", base / "pool", *line)
        assert (code, message in err) == (2, True), (line, err)
    line = ["which law is it", "--model", base / "base", "--clusters", 2, "--json"]
    code, out, err = here("adapters", "route", base / "pool", *line)
    assert code == 0, err
    return json.loads(out)


def test_route_chooses_as_the_pool_says(here, base, tmp_path):
    """By the file that serve and generate read; options of the command go before it."""
    pool = tmp_path / "pool"
    for name, seed in (("one", 1), ("two", 2)):
        adapted(here, base / "base", base / "rows.jsonl", "--out", tmp_path / name, "--seed", seed, "--steps", 1)
        shutil.copytree(tmp_path / name / "adapter", pool / name)
        code, _, err = here("adapters", "describe", pool / name, "--instruction", f"tell of {name}")
        assert code == 0, err

    def routed(place, *given):
        code, out, err = here("adapters", "route", place, "tell of two", "--model", base / "base", "--json", *given)
        assert code == 0, err
        told = json.loads(out)
        return told["a"], sorted(expert["weight"] for expert in told["experts"])

    usual, both = routed(pool)
    assert min(both) > 0
    (pool / "pool.json").write_text(json.dumps({"weight": 7.0, "top_k": 1}))
    assert routed(pool)[0] == 7.0 != usual
    assert routed(pool)[1] == [0.0, 1.0]
    assert routed(f"arrow:{pool}")[0] == 0.0
    (pool / "pool.json").write_text(json.dumps({"local": "none"}))
    assert routed(pool, "--local", "arrow") != routed(pool)
    for place, given, told in (
        (f"arrow:{pool}", ["--local", "phatgoose"], "says itself how tokens choose"),
        (tmp_path / "one" / "adapter", [], "adapter"),
        (tmp_path / "none", [], "none"),
    ):
        code, out, err = here("adapters", "route", place, "tell of two", *given)
        assert (code, out, told in err, len(err.strip().splitlines())) == (2, "", True, 1), err
    (pool / "pool.json").write_text(json.dumps({"top_k": 3}))
    code, _, err = here("adapters", "route", pool, "tell of two")
    assert (code, "pool.json: top_k is 3" in err) == (2, True), err


def test_a_pool_of_adapters_with_gates_routes_queries(here, base, caplog):
    """From training each adapter and its gates apart to the command that says which of them a query is for."""
    asked = {
        "law": ["Name the law of a case.", "Say which law a case falls under."],
        "sql": "Write SQL for a question.",
    }
    for seed, (name, texts) in enumerate(asked.items()):
        given = ["--rank", 2, "--seed", seed, "--out", base / f"pool-{name}", "--steps", 4]
        adapted(here, base / "base", base / "rows.jsonl", *given)
        lora = base / f"pool-{name}" / "adapter"
        (lora / "glider.json").write_text(json.dumps({"instructions": texts}))
        gate = ["--method", "gate", f"--set=method.adapter={lora}", "--out", base / f"gate-{name}", "--steps", 4]
        told = adapted(here, base / "base", base / "rows.jsonl", *gate)
        assert (told["method"], told["form"]) == ("gate", "peft")
        # The adapter is what it was; a gate of each of the four layers of both blocks was learned.
        assert told["parameters"] == 2 * 4 * 32
        shutil.copytree(base / f"gate-{name}" / "adapter", base / "pool" / name)
        before, after = (load_file(path / "adapter_model.safetensors") for path in (lora, base / "pool" / name))
        assert before.keys() == after.keys()
        assert all((before[key] == after[key]).all() for key in before)
    code, out, err = here("adapters", "route", base / "pool", "which law is it", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert [one["name"] for one in told["experts"]] == ["law", "sql"] == [one["name"] for one in told["retrieved"]]
    assert told["calibration"]["members"] == 2
    assert told["weights"] == {}
    code, out, err = here("adapters", "route", base / "pool", "which \x1b[31mlaw\nis it")
    assert code == 0, err
    assert out.split("\n")[0].endswith("which \N{REPLACEMENT CHARACTER}[31mlaw is it")
    code, out, err = here("adapters", "route", base / "pool", "which law is it", "--model", base / "base", "--json")
    assert code == 0, err
    assert sum(one["weight"] for one in json.loads(out)["experts"]) == pytest.approx(1, abs=1e-5)
    code, out, err = here("adapters", "route", base / "pool", "which law is it", "--model", base / "base")
    assert code == 0, err
    assert "law" in out
    assert "global share" in out
    # What its members call their base is the same wherever it lies, and another name is told.
    tables = [base / "pool" / name / "adapter_config.json" for name in asked]
    for place, named in (("elsewhere", None), ("moved", "org/another"), ("another", "org/another")):
        shutil.copytree(base / "base", base / place)
        for table in tables if named else ():
            table.write_text(json.dumps({**json.loads(table.read_text()), "base_model_name_or_path": named}))
        caplog.clear()
        code, _, err = here("adapters", "route", base / "pool", "which law is it", "--model", base / place, "--json")
        assert code == 0, err
        told = [record.getMessage() for record in caplog.records]
        assert [f"the model is '{base / place}'; is it another one?" in one for one in told] == [True] * (
            place == "moved"
        )
    told = clustered(here, base)
    assert told["weights"]["blocks.0.attention.q"].keys() == {"law", "sql"}
    for line, message in (
        ((base / "rows.jsonl", "x"), "no pool at"),
        ((base / "base", "x"), "has no folder with adapter_config.json"),
        ((base / "pool" / "sql", "x"), "is one adapter (adapter_config.json), and a pool is a folder of such folders"),
        ((base / "pool", " "), "there is nothing to route"),
        ((base / "pool", "x", "--clusters", 2), "--clusters is 2, which tokens choose among, and there are none"),
        ((base / "pool", "x", "--clusters", 3, "--model", base / "base"), "clusters is 3; of 2 experts"),
    ):
        code, _, err = here("adapters", "route", *line)
        assert (code, message in err) == (2, True), (line, err)


def test_gates_are_written_from_rows_without_training(here, base, tmp_path, monkeypatch):
    """They are the means of what goes in, whatever the number of rows of a pass, and a pool routes by them."""
    from anabranch.adapters.glider import GliderPool
    from anabranch.adapters.glider.folder import read_described

    adapted(here, base / "base", base / "rows.jsonl", "--rank", 2, "--out", tmp_path / "one", "--steps", 1)
    for name in ("law", "sql"):
        shutil.copytree(tmp_path / "one" / "adapter", tmp_path / "pool" / name)
    given = ["--model", base / "base", "--data", base / "rows.jsonl"]
    code, out, err = here("adapters", "gates", tmp_path / "pool" / "law", *given, "--rows", 5, "--json")
    assert code == 0, err
    assert (json.loads(out)["rows"], len(json.loads(out)["layers"])) == (5, 8)
    # The name in its package is the command's.
    monkeypatch.setattr(sys.modules["anabranch.cli.adapters.gates"], "_BATCH", 2)
    code, out, err = here("adapters", "gates", tmp_path / "pool" / "sql", *given, "--rows", 5)
    assert (code, "8 layers" in out) == (0, True), err
    found = [read_described(tmp_path / "pool" / name).gates for name in ("law", "sql")]
    for module, gate_C in found[0].items():
        assert bool((gate_C > 0).all())
        assert torch.allclose(gate_C, found[1][module], atol=1e-5)
    pool = GliderPool.load(tmp_path / "pool")
    pool.onto(load_model(base / "base")[0])
    assert not any(layer.router.score.unsigned_E.any() for layer in pool.layers().values())
    for line, message in (
        ([tmp_path / "pool" / "law", *given], "has gates already (glider.safetensors)"),
        ([tmp_path / "one" / "adapter", *given, "--task", "no"], "--task is 'no', of which"),
        ([base / "base", *given], "no adapter at"),
    ):
        code, _, err = here("adapters", "gates", *line)
        assert (code, message in err, len(err.strip().splitlines())) == (2, True, 1), (line, err)
    gates = tmp_path / "one" / "adapter" / "glider.safetensors"
    assert not gates.exists()
    # Somebody else is quicker.
    made = sys.modules["anabranch.adapters.glider"].activations_of_rows
    monkeypatch.setattr(
        "anabranch.adapters.glider.activations_of_rows", lambda *given: gates.write_text("theirs") and made(*given)
    )
    code, _, err = here("adapters", "gates", tmp_path / "one" / "adapter", *given)
    assert (code, "has gates already (glider.safetensors)" in err) == (2, True)
    assert gates.read_text() == "theirs"


def test_an_adapter_is_not_put_onto_another_base(here, base, routed):
    config = Decoder.Config(
        vocab_size=257,
        dim=32,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
        feed_forward=SwiGLU.Config(hidden_dim=48),
        max_positions=64,
    )
    export_huggingface(base / "other", config.build(seed=2), ByteTokenizer.Config().build(), family="llama")
    for given in (
        ["adapters", "export", base / "other", routed, "--average", "--out", base / "never"],
        ["eval", base / "other", "--adapter", routed, "--task", "one", *EVAL],
    ):
        code, out, err = here(*given)
        assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
        assert "was trained on another base" in err
    assert not (base / "never").exists()


def used_by(base, folder, task):
    """A mixture's experts as the rows of a task use them, written as they were learned, and run one by one."""
    from anabranch.adapters import mixture_report, static_mixture
    from anabranch.adapters.own_folder import read_own

    model, tokenizer = load_model(base / "base")
    read_own(folder, model)
    rows = [json.loads(line) for line in (base / "rows.jsonl").read_text().splitlines()]
    texts = [(row["input"], row["output"]) for row in rows if row["task"] == task]
    ids = [tokenizer.encode_prompt(f"{asked}\n") + tokenizer.encode(answer) for asked, answer in texts]
    report = mixture_report(model, [(torch.tensor([row]), None, torch.tensor([0])) for row in ids])
    return static_mixture(model, report.weights_of(0)).pairs


@pytest.mark.parametrize("method", ["dynmole", "lora_mixer"])
def test_a_mixture_leaves_as_the_average_of_its_experts(here, base, method):
    place = base / f"run-{method}"
    given = ["--method", method, "--steps", 2, "--rank", 2, "--set=method.experts=3"]
    adapted(here, base / "base", base / "rows.jsonl", "--out", place, *given)
    for options, said in (([], "--average writes the plain average"), (["--task", "one"], "--task is 'one', but")):
        code, out, err = here("adapters", "export", base / "base", place / "adapter", *options, "--out", place / "no")
        assert (code, out) == (2, "")
        assert said in err
        assert "--task NAME --data ROWS" in err
    code, out, err = here(
        "adapters", "export", base / "base", place / "adapter", "--average", "--out", place / "out", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["task"] == "average"
    assert json.loads(out)["ranks"] == [6]
    # As the rows of a task use its experts: nearer to the mixture where it is used.
    used = ["--task", "one", "--data", base / "rows.jsonl", "--out", place / "used", "--json"]
    code, out, err = here("adapters", "export", base / "base", place / "adapter", *used)
    assert code == 0, err
    assert json.loads(out)["task"] == "one"
    wanted, found = used_by(base, place / "adapter", "one"), read_peft(place / "used").pairs
    assert found.keys() == wanted.keys()
    for name, pair in found.items():
        torch.testing.assert_close(pair.delta(), wanted[name].delta())
    average = read_peft(place / "out").pairs
    assert not all(
        torch.allclose(pair.delta(), average[name].delta(), rtol=1e-4, atol=0) for name, pair in found.items()
    )
    code, out, err = here(
        "adapters", "export", base / "base", place / "adapter", *used[:1], "three", *used[2:4], "--out", "z"
    )
    assert (code, out, "has no row of task 'three'" in err) == (2, "", True)
    assert here("adapters", "card", place / "out")[0] == 0
    code, out, _ = here("adapters", "card", place / "adapter")
    assert (code, str(place / "adapter") in out) == (0, True)
    # Our own form is named where peft's is needed, and what there is of it.
    code, out, err = here("adapters", "merge", place / "adapter", place / "out", "--out", place / "no")
    assert (code, out) == (2, "")
    assert "anabranch's own form" in err
    assert "--method mean" in err


def test_it_says_to_how_many_tokens_rows_are_cut(here, base):
    rows = [{"input": "long " * 40 + str(number), "output": "x"} for number in range(6)]
    (base / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = here("adapt", base / "base", base / "long.jsonl", "--out", base / "cut", "--steps", 1, *QUICK)
    assert code == 0, err
    assert "cut to 64 tokens" in err  # positions of the model, fewer than task.sequence_length


def test_held_out_rows_of_unknown_tasks_are_told_by_their_line(here, base):
    rows = [{"task": task, "input": "a", "output": "b"} for task in ("one", "zzz unknown")]
    (base / "odd.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["--eval-data", base / "odd.jsonl", "--method", "mhr", "--out", base / "odd-run", "--quiet"]
    code, out, err = here("adapt", base / "base", base / "rows.jsonl", *given)
    assert (code, out) == (2, "")
    assert "odd.jsonl, line 2: task 'zzz unknown' is not one of the 2" in err


# Methods of the catalogue, and what commands take them


def test_a_method_of_the_catalogue_from_rows_to_a_served_model(here, base):
    """Trained, measured row by row, fused with its base, and then a model like any other."""
    told = adapted(
        here,
        base / "base",
        base / "rows.jsonl",
        "--method",
        "lst",
        "--set",
        "method.reduction=4",
        "--out",
        base / "lst",
        "--steps",
        6,
        "--learning-rate",
        0.03,
    )
    assert (told["method"], told["form"], told["status"]) == ("lst", "anabranch", "finished")
    assert told["after"]["nats_per_token"] < told["before"]["nats_per_token"]

    def measured(*arguments):
        code, out, err = here("adapters", "eval", *arguments, "--data", base / "rows.jsonl", "--json", "--quiet")
        assert code == 0, err
        return json.loads(out)

    adapter = base / "lst" / "adapter"
    plain, changed = measured(base / "base"), measured(base / "base", adapter, "--answers", 8)
    assert plain["nats_per_token"] > changed["nats_per_token"]
    assert changed["by_task"].keys() == {"one", "two"}
    assert 0 <= changed["exact"] <= 1
    assert 0 <= changed["rouge_l"] <= 1
    assert "rouge_l" not in plain
    code, out, err = here("adapters", "fuse", base / "base", adapter, "--out", base / "fused", "--json")
    assert code == 0, err
    done = json.loads(out)
    assert (done["merged"], done["difference"]) == (False, 0.0)
    assert measured(base / "fused")["nats_per_token"] == pytest.approx(changed["nats_per_token"], rel=1e-6)
    code, out, err = here("generate", base / "fused", "--prompt", "one: ab", "--max-tokens", 4)
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options", "form", "merged"),
    [
        ("dora", ["--rank", 2, "--target", "q"], "peft", True),
        ("ia3", [], "peft", True),
        ("shira", ["--rank", 1], "anabranch", True),
        ("adapter-parallel", ["--set", "method.width=2"], "anabranch", False),
        ("prefix-tuning", ["--set", "method.tokens=3"], "peft", False),
        ("mhr", ["--rank", 2, "--set", "method.skills=2", "--set", "method.heads=2"], "anabranch", False),
    ],
)
def test_other_methods_take_the_same_way(here, base, method, options, form, merged):
    out_folder = base / f"way-{method}"
    told = adapted(
        here, base / "base", base / "rows.jsonl", "--method", method, *options, "--out", out_folder, "--steps", 4
    )
    assert (told["method"], told["form"]) == (method, form)
    code, out, err = here(
        "adapters", "fuse", base / "base", out_folder / "adapter", "--out", f"{out_folder}-fused", "--json"
    )
    assert code == 0, err
    done = json.loads(out)
    assert done["merged"] == merged
    assert done["difference"] <= 1e-4 * done["greatest_logit"]
    code, out, err = here(
        "adapters", "eval", base / "base", out_folder / "adapter", "--data", base / "rows.jsonl", "--json", "--quiet"
    )
    assert code == 0, err
    nats = json.loads(out)["nats_per_token"]
    code, out, err = here("adapters", "eval", f"{out_folder}-fused", "--data", base / "rows.jsonl", "--json", "--quiet")
    assert code == 0, err
    assert json.loads(out)["nats_per_token"] == pytest.approx(nats, rel=1e-4)


def test_the_card_of_a_folder_of_our_own(here, base, routed):
    code, out, err = here("adapters", "card", routed, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["kinds"], told["tasks"]) == (["multi_head_routed"], ["one", "two"])
    assert told["layers"] == {"*.q": "multi_head_routed", "*.down": "multi_head_routed"}
    assert told["parameters"] == sum(value.size for value in load_file(routed / "adapter.safetensors").values())
    code, out, err = here("adapters", "card", routed)
    assert code == 0, err
    assert "2: one, two" in out
    damaged = base / "damaged"
    shutil.copytree(routed, damaged)
    (damaged / "adapter.json").write_text('{"format": "anabranch-adapter", "schema": 1}')
    code, out, err = here("adapters", "card", damaged)
    assert (code, out) == (2, "")
    assert "describes an adapter of nothing" in err
    shutil.rmtree(damaged)


def test_what_trains_the_base_becomes_a_model(here, base):
    told = adapted(
        here, base / "base", base / "rows.jsonl", "--method", "ln-tuning", "--out", base / "norms", "--steps", 3
    )
    assert (told["method"], told["form"]) == ("ln-tuning", "model")
    code, _, err = here("eval", base / "norms" / "adapter", *EVAL)
    assert code == 0, err
    code, _, err = here("adapt", "--out", base / "norms", "--resume", "--method", "dora", "--json")
    assert code == 2
    assert "--method is 'dora', but the run in" in err
    assert "uses 'ln-tuning'" in err


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("adapt {base}/base {base}/rows.jsonl --out z --method lily", "which peft alone trains"),
        ("adapt {base}/base {base}/rows.jsonl --out z --method loftq", "which nobody runs here; starts from a base"),
        (
            "adapt {base}/base {base}/rows.jsonl --out z --method bitfit",
            "would train nothing: this model has no biases; take ln-tuning, .* such as lora",
        ),
        (
            "adapt {base}/few {base}/rows.jsonl --out z --method bitfit",
            "bitfit would train nothing: matrices of this model are in few bits, .* such as lora",
        ),
        (
            "adapt {base}/base {base}/rows.jsonl --out z --method dora --set method.width=3",
            "dora has no option 'width'",
        ),
        ("adapters eval {base}/base", "give a file with --data"),
        ("adapters eval {base}/base --data {base}/rows.jsonl --template x", "stands for what is asked"),
        ("adapters eval {base}/base --data {base}/rows.jsonl --answers 600 --max-tokens 64", "answers 600"),
        ("adapters eval {base}/base {base}/no --data {base}/rows.jsonl", "no"),
        (
            "adapters eval {routed} {base}/base --data {base}/rows.jsonl",
            r"holds an adapter \(adapter.json\), which is not",
        ),
        (
            "adapters eval {base}/adapters {base}/base --data {base}/rows.jsonl",
            "no model in .*, a folder of adapters; name",
        ),
        (
            "adapters eval {base}/base {base}/base --data {base}/rows.jsonl",
            r"holds no adapter_config.json, and is a model \(config.json\)",
        ),
        (
            "adapters eval {base}/base {base}/routed --data {base}/rows.jsonl",
            "is a run of anabranch adapt; give its adapter, .*routed/adapter",
        ),
        ("adapters eval {base}/base {routed} --data {base}/untold.jsonl", "names none; give each row a task"),
        ("adapters fuse {base}/base {routed} --out {base}/never --task no", "task 'no' is not one of the 2"),
        ("adapters fuse {base}/base {base}/no --out {base}/never", "no"),
    ],
)
def test_their_mistakes_in_one_line(here, base, routed, command, told):
    import re

    (base / "untold.jsonl").write_text('{"input": "a", "output": "b"}')
    (base / "adapters" / "one").mkdir(parents=True, exist_ok=True)
    (base / "adapters" / "one" / "adapter_config.json").write_text("{}")
    code, out, err = here(*command.format(base=base, routed=routed).split(), "--quiet")
    assert (code, out) == (2, ""), err
    assert len(err.strip().splitlines()) == 1
    assert re.search(told, err), err
    assert not (base / "never").exists()


def test_wrong_choices_of_rows_are_learned_from_and_told(here, base):
    words = ["ab", "cde", "fghi", "jk", "lmnop", "qr", "stu"]
    rows = [
        {"task": "one", "input": word, "output": word.upper(), "choices": [other.upper() for other in words[:3]]}
        for word in words
    ]
    (base / "choices.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["--set=task.unlikelihood=1", "--set=task.length_normalized=1", "--steps", 2]
    told = adapted(here, base / "base", base / "choices.jsonl", "--out", base / "choices", *given)
    assert 0 <= told["after"]["choice_accuracy"] <= 1
    code, _, err = here("adapt", base / "base", base / "rows.jsonl", "--out", base / "none", *given, *QUICK)
    assert code == 2
    assert "has wrong choices" in err


def test_adapters_are_weighed_by_rows(here, base):
    adapted(here, base / "base", base / "rows.jsonl", "--out", base / "one", "--steps", 3, "--rank", 2)
    adapted(here, base / "base", base / "rows.jsonl", "--out", base / "two", "--steps", 6, "--rank", 2, "--seed", 1)
    given = ["--model", base / "base", "--data", base / "rows.jsonl", "--steps", 6]
    folders = [base / "one" / "adapter", base / "two" / "adapter"]
    code, out, err = here(
        "adapters", "merge", *folders, "--out", base / "weighed", *given, "--method", "linear", "--json"
    )
    assert code == 0, err
    told = json.loads(out)
    assert told["tried"] == 6
    assert told["loss"] <= told["base_loss"]
    assert len(told["weights"]) == 2
    assert (base / "weighed" / "adapter_config.json").exists()
    code, out, err = here("adapters", "merge", *folders, "--out", base / "weighed2", *given)
    assert code == 0, err
    assert "6 weights were tried" in " ".join(out.split())


def test_help_and_guide_say_what_target_is_without_being_said():
    """Methods with layers of their own, by name; of all others the card tells it."""
    from anabranch.adapters.adapt import method_named, method_names
    from anabranch.cli.adapt import adapt

    told = get_type_hints(adapt, include_extras=True)["targets"].__metadata__[0].help
    guide = (Path(__file__).parents[2] / "docs" / "adapters-guide.md").read_text().replace("`", "")
    own = {name: targets for name in method_names() if (targets := getattr(method_named(name), "targets", None))}
    by_layers = {layers: [name for name in own if own[name] == layers] for layers in own.values()}
    words = {("*.attention.*",): "attention", ("gate", "up", "down"): "gate, up and down", ("down",): "down"}
    assert by_layers.keys() == words.keys()
    for layers, names in by_layers.items():
        for text in (told, guide):
            parts = re.split("; |[Dd]efault: ", text)
            said = next(part for part in parts if re.match(rf"(the )?{words[layers]}( layers)? for ", part))
            assert set(re.findall(r"[\w-]+", said.partition(" for ")[2])) - {"and"} == set(names)
