"""``anabranch eval --adapter`` and ``anabranch adapters merge``, from folders to figures; and what is wrong with a folder, in one line."""

import json
import shutil
from typing import get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_models import KINDS, linear_layers, make_adapter, make_kind, stacked
from anabranch.adapters import load_peft, read_peft
from anabranch.adapters.algebra import METHODS
from anabranch.adapters.catalogue import apply
from anabranch.adapters.own_folder import write_own
from anabranch.cli.adapters.merge import merge
from anabranch.data import ByteTokenizer
from anabranch.lm import Decoder, export_huggingface, load_model, save_model
from anabranch.nn import SelfAttention, SwiGLU


@pytest.fixture(scope="module")
def adapted(work):
    """In ``work/adapted``: a model that reads bytes, two adapters of it, and the model with their sum in its matrices."""
    root = work / "adapted"
    config = Decoder.Config(
        vocab_size=257,
        dim=32,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
        feed_forward=SwiGLU.Config(hidden_dim=48),
        max_positions=64,
    )
    tokenizer = ByteTokenizer.Config().build()
    model = config.build(seed=1)
    export_huggingface(root / "base", model, tokenizer, family="llama")
    base = load_file(root / "base" / "model.safetensors")
    layers = linear_layers(base, ["q_proj", "down_proj"])
    made = [make_adapter(root / name, layers, seed=name) for name in ("first", "second")]
    for module in layers:
        for tensors in made:
            a, b = (tensors[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
            base[f"{module}.weight"] += 0.5 * 2.0 * b @ a
    export_huggingface(root / "merged", model, tokenizer, family="llama")
    save_file(base, root / "merged" / "model.safetensors")
    return root


EVAL = ["--data", "text/alpha", "--tokens", 512, "--sequence-length", 32, "--json", "--quiet"]


def measured(here, *arguments):
    code, out, err = here("eval", *arguments, *EVAL)
    assert code == 0, err
    return json.loads(out)


def test_a_model_is_measured_with_the_sum_of_two_adapters(here, adapted):
    plain = measured(here, adapted / "base")
    code, out, _ = here(
        "adapters", "merge", adapted / "first", adapted / "second", "--weights", "0.5,0.5", "--out", adapted / "sum"
    )
    assert code == 0
    assert "4 layers, rank 8, " in out
    assert "anabranch eval MODEL --adapter" in out
    found, wanted = measured(here, adapted / "base", "--adapter", adapted / "sum"), measured(here, adapted / "merged")
    assert found["nats_per_token"] == pytest.approx(wanted["nats_per_token"], rel=1e-5)
    assert found["adapter"] == str(adapted / "sum")
    assert found.keys() - plain.keys() == {"adapter"}
    one = measured(here, adapted / "base", "--adapter", adapted / "first")
    assert len({round(each["nats_per_token"], 3) for each in (plain, found, one)}) == 3
    code, out, _ = here("eval", adapted / "base", "--adapter", adapted / "first", *EVAL[:-2])
    assert code == 0
    assert f"adapter {adapted / 'first'}" in out


def test_adapters_that_name_different_bases_are_told(here, adapted, tmp_path, caplog):
    """By the last word of the name: a model may lie in several places. One that any model may have is told too."""
    first = shutil.copytree(adapted / "first", tmp_path / "first")
    said = json.loads((first / "adapter_config.json").read_text())
    (first / "adapter_config.json").write_text(json.dumps({**said, "base_model_name_or_path": "org/one"}))
    for base, is_told in (("elsewhere/One", False), ("org/another", True), ("runs/base", True)):
        folder = shutil.copytree(adapted / "second", tmp_path / base)
        table = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**table, "base_model_name_or_path": base}))
        caplog.clear()
        code, _, err = here("adapters", "merge", first, folder, "--out", tmp_path / "sum" / base)
        assert code == 0, err
        told = [record.getMessage() for record in caplog.records]
        assert [f"name different bases, 'org/one' and '{base}'" in one for one in told] == [True] * is_told
        made = json.loads((tmp_path / "sum" / base / "adapter_config.json").read_text())
        assert made["base_model_name_or_path"] == (None if is_told else "org/one")


def test_linear_tells_its_error(here, adapted):
    line = [
        "adapters",
        "merge",
        adapted / "first",
        adapted / "second",
        "-o",
        adapted / "linear",
        "--method",
        "linear",
        "--json",
    ]
    code, out, _ = here(*line)
    said = json.loads(out)
    assert code == 0
    assert (said["weights"], said["layers"], said["ranks"], said["method"]) == ([1.0, 1.0], 4, [4], "linear")
    assert 0 < said["error"] < 3
    assert said["size_bytes"] > 1000
    assert (adapted / "linear" / "adapter_model.safetensors").exists()


def test_svd_of_a_rank(here, adapted):
    line = [
        "adapters",
        "merge",
        adapted / "first",
        adapted / "second",
        "-o",
        adapted / "svd",
        "--method",
        "svd",
        "--rank",
        5,
    ]
    assert here(*line, "--quiet")[:2] == (0, "")
    code, out, _ = here("adapters", "card", adapted / "svd", "--json")
    said = json.loads(out)
    assert (code, said["ranks"], said["layers"], said["targets"]) == (0, [5], 4, ["down_proj", "q_proj"])


def test_rules_of_peft_tell_what_they_are_given(here, adapted):
    line = ["adapters", "merge", adapted / "first", adapted / "second", "--weights", "0.5,0.5"]
    code, out, _ = here(
        *line, "-o", adapted / "ties", "--method", "ties", "--density", 0.5, "--majority", "frequency", "--json"
    )
    said = json.loads(out)
    assert (code, said["density"], said["majority"], said["ranks"], said["cut_off"]) == (0, 0.5, "frequency", [4], 0)
    code, out, _ = here(
        *line, "-o", adapted / "dropped", "--method", "dare_linear_svd", "--seed", 3, "--rank", 2, "--json"
    )
    said = json.loads(out)
    assert (code, said["seed"], said["rank"], said["ranks"]) == (0, 3, 2, [2])
    assert 0 < said["cut_off"] < 1
    code, out, _ = here(*line, "-o", adapted / "pruned", "--method", "magnitude_prune_svd")
    assert code == 0
    assert "of what magnitude_prune made, which the rank could not hold" in out


def test_methods_of_the_command_are_those_of_the_library():
    assert get_args(get_type_hints(merge)["method"]) == METHODS


def test_a_mixture_is_exported(here, adapted, tmp_path):
    line = ["adapters", "export", adapted / "base", adapted / "first", adapted / "second", "--weights", "0.5,0.5"]
    code, out, err = here(*line, "--out", tmp_path / "sum", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert (said["layers"], said["ranks"], said["error"], said["weights"]) == (4, [8], 0, [0.5, 0.5])
    assert said["difference"] < 1e-5 < said["greatest_logit"]
    found, wanted = (
        measured(here, adapted / "base", "--adapter", tmp_path / "sum"),
        measured(here, adapted / "merged"),
    )
    assert found["nats_per_token"] == pytest.approx(wanted["nats_per_token"], rel=1e-5)
    code, out, _ = here(*line, "--out", tmp_path / "low", "--rank", 2)
    assert code == 0
    assert "4 layers, rank 2, " in out
    assert "differ from the mixture's by at most" in out


def test_adapters_in_a_model_are_exported(here, adapted, tmp_path):
    model = load_peft(adapted / "first", load_model(adapted / "base")[0])
    save_model(tmp_path / "model", model)
    code, out, err = here("adapters", "export", tmp_path / "model", "--out", tmp_path / "own", "--json")
    assert code == 0, err
    assert (json.loads(out)["layers"], json.loads(out)["ranks"]) == (4, [4])
    pairs = [read_peft(place).pairs for place in (adapted / "first", tmp_path / "own")]
    assert all(torch.equal(pairs[0][name].a_RC, pairs[1][name].a_RC) for name in pairs[0])


def test_adapters_of_the_head_as_peft_writes_them(here, adapted, tmp_path):
    """With a copy of the head beside: summed, held against the mixture, and put onto a model in few bits."""
    head = load_file(adapted / "base" / "model.safetensors")["lm_head.weight"]
    for name in ("one", "two", "other"):
        copy = head + 1 if name == "other" else head.clone()
        make_adapter(tmp_path / name, {"lm_head": (32, 257)}, seed=name, extra={"lm_head.base_layer.weight": copy})
    both = (tmp_path / "one", tmp_path / "two", "--weights", "0.5,0.5")
    code, out, err = here("adapters", "export", adapted / "base", *both, "--out", tmp_path / "exported", "--json")
    assert code == 0, err
    assert json.loads(out)["difference"] < 1e-4
    assert here("adapters", "merge", *both, "--out", tmp_path / "sum")[0] == 0
    few = ("--quantize", "int8")
    found = [
        measured(here, adapted / "base", *more, *few)["nats_per_token"]
        for more in ([], ["--adapter", tmp_path / "sum"], ["--adapter", tmp_path / "exported"])
    ]
    assert found[1] == pytest.approx(found[2], rel=1e-6)
    assert abs(found[1] - found[0]) > 1e-3
    for line in (
        ["adapters", "merge", tmp_path / "one", tmp_path / "other", "--out", tmp_path / "none"],
        ["eval", adapted / "base", "--adapter", tmp_path / "other", "--quantize", "int8", *EVAL],
    ):
        code, _, err = here(*line)
        assert code == 2
        assert "holds other numbers for lm_head.weight than" in err
        assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_a_card(here, adapted):
    code, out, _ = here("adapters", "card", adapted / "first", "--json")
    assert code == 0
    assert json.loads(out) == {
        "adapter": str(adapted / "first"),
        "kind": "LoRA",
        "base": "base",
        "layers": 4,
        "stacked_layers": 0,
        "targets": ["down_proj", "q_proj"],
        "ranks": [4],
        "alphas": [8.0],
        "rslora": False,
        "brings_whole": [],
        "copies": [],
        "parameters": 2 * 4 * (32 + 32 + 48 + 32),
        "size_bytes": sum(path.stat().st_size for path in (adapted / "first").iterdir()),
    }
    extra = {**stacked([0]), "model.norm.weight": torch.ones(32)}
    layers = {"model.layers.0.self_attn.q_proj": (32, 32)}
    options = {
        "target_parameters": ["gate_up_proj", "down_proj"],
        "rank": 3,
        "use_rslora": True,
        "alpha_pattern": {"down_proj": 0.5},
    }
    extra["lm_head.weight"] = torch.ones(61, 32)
    options["modules_to_save"] = ["norm"]
    make_adapter(adapted / "much", layers, extra=extra, base_model_name_or_path=None, **options)
    code, out, _ = here("adapters", "card", adapted / "much")
    assert code == 0
    assert "LoRA for a base that it does not name" in out
    assert "1 and 2 stacks of experts: down_proj, gate_up_proj, q_proj" in out
    assert "3   alpha 0.5 to 8, scale alpha / sqrt(rank)" in out
    assert "whole model.norm.weight copies lm_head.weight, of the base" in " ".join(out.split())


@pytest.fixture(scope="module")
def kinds(adapted):
    """Beside them an adapter of each kind."""
    base = load_file(adapted / "base" / "model.safetensors")
    for kind in KINDS:
        make_kind(adapted / kind, kind, base, base_model_name_or_path="a base")
    return adapted


SAID = {
    "dora": ("DoRA", {"ranks": [4], "alphas": [8.0], "rslora": False}, "rank   4   alpha 8, scale alpha / rank"),
    "ia3": ("IA3", {"of_inputs": 2, "of_outputs": 4}, "factors   of what 2 layers get and 4 give"),
    "poly": (
        "Poly",
        {"ranks": [3], "tasks": 3, "skills": 4, "splits": 2},
        "tasks   3 tasks mix 4 skills of rank 3 in 2 splits",
    ),
    "prompt": ("prompt tuning", {"virtual_tokens": 5}, "tokens   5 virtual ones in front of every sequence"),
    "prefix": ("prefix tuning", {"virtual_tokens": 5}, "tokens   5 virtual ones in front of every sequence"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_measured_told_and_not_summed(here, kinds, kind):
    plain = measured(here, kinds / "base")
    task = ["--task", 1] if kind == "poly" else []
    found = measured(here, kinds / "base", "--adapter", kinds / kind, *task)
    assert abs(found["nats_per_token"] - plain["nats_per_token"]) > 1e-5
    cached = measured(here, kinds / "base", "--adapter", kinds / kind, *task, "--cached")
    assert cached["nats_per_token"] == pytest.approx(found["nats_per_token"], rel=1e-5)
    name, sizes, line = SAID[kind]
    said = json.loads(here("adapters", "card", kinds / kind, "--json")[1])
    assert {key: said[key] for key in ("kind", "base", *sizes)} == {"kind": name, "base": "a base", **sizes}
    code, out, _ = here("adapters", "card", kinds / kind)
    assert code == 0
    assert f"{name} for 'a base'" in out
    assert " ".join(line.split()) in " ".join(out.split())
    code, out, err = here("adapters", "merge", kinds / kind, kinds / "first", "--out", kinds / "none")
    assert (code, out) == (2, "")
    assert err.strip().endswith(f"adapter 1 is {name}, and only plain LoRA has a sum")
    assert not (kinds / "none").exists()


def test_what_a_folder_says_of_its_base_does_not_reach_the_terminal(here, adapted):
    make_adapter(
        adapted / "sly", {"model.layers.0.self_attn.q_proj": (32, 32)}, base_model_name_or_path="\x1b[2J\x1b]0;hi\x07"
    )
    code, out, _ = here("adapters", "card", adapted / "sly")
    assert code == 0
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "eval {0}/base --adapter {0}/poly",
            "the model routes by task; name the text's with --task, one of ['0', '1', '2']",
        ),
        ("eval {0}/base --adapter {0}/poly --task 3", "task '3' is not one of the 3"),
        ("eval {0}/base --adapter {0}/ia3 --task 0", "--task is '0', and the model does not route by task"),
    ],
)
def test_tasks_that_cannot_be_are_one_line(here, kinds, line, message):
    code, out, err = here(*line.format(kinds).split(), *EVAL)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1), err
    assert message in err
    assert "fault inside" not in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("eval {0}/base --adapter {0}/base", "holds no adapter_config.json"),
        ("eval {0}/base --adapter nowhere", "no adapter at nowhere: it is not there"),
        ("eval {0}/base --adapter {0}/nan", "holds NaN or infinity"),
        ("eval trained --adapter {0}/first", "adapt|inputs"),
        (
            "adapters merge {0}/first {0}/second --weights 1 --out z",
            "--weights is '1'; give a finite number for each of the 2 adapters",
        ),
        ("adapters merge {0}/first --steps 3 --out z", "--steps is 3, which is only for a search of the weights"),
        ("adapters merge {0}/first --data x.jsonl --out z", "name it with --model"),
        ("adapters merge {0}/first --data x.jsonl --model {0}/base --weights 1 --out z", "leave one of the two out"),
        ("adapters merge {0}/first --weights a --out z", "--weights is 'a'; write numbers with commas"),
        ("adapters merge {0}/first {0}/nan --out z", "holds NaN or infinity"),
        ("adapters merge {0}/first --out {0}/first", "would be lost"),
        ("adapters merge {0}/first --out {0}/base", "would be lost if it were replaced"),
        ("adapters card {0}/base", "holds no adapter_config.json, and is a model (config.json)"),
        ("adapters card {0}", "is a pool, a folder of adapters ("),
        ("adapters describe {0} --instruction x", "is a pool, a folder of adapters ("),
        ("adapters export {0}/failed --out z", "holds NaN or infinity"),
        ("adapters card {0}/nan", "holds NaN or infinity"),
        ("adapters merge {0}/first --rank 3 --out z", "rank is 3, and method 'exact' has none to choose"),
        ("adapters merge {0}/first --method best --out z", "method is 'best'"),
        ("adapters merge {0}/first --density 0.5 --out z", "density is 0.5, and method 'exact' keeps all numbers"),
        ("adapters merge {0}/first --method ties --density 0 --out z", "density is 0.0; it is the share"),
        ("adapters merge {0}/first --method ties --seed 2 --out z", "seed is 2, and method 'ties' draws nothing"),
        ("adapters export {0}/base {0}/first {0}/first --out z", "is given twice"),
        ("adapters export {0}/base --rank 2 --out z", "--rank is 2, and there is no ADAPTER"),
        ("adapters export {0}/base --out z", "the model has no adapter to save"),
        ("adapters export {0}/base {0}/nan --out z", "holds NaN or infinity"),
        ("adapters export {0}/base {0}/first --out {0}/base", "would be lost"),
        ("adapters export {0}/base {0}/first --weights 1,2 --out z", "give a finite number for each of the 1 adapters"),
        ("adapters export trained {0}/first --out z", "adapt|inputs"),
    ],
)
def test_what_is_wrong_is_one_line(here, adapted, trained, work, line, message):
    if not (adapted / "nan").exists():
        make_adapter(adapted / "nan", {"model.layers.0.self_attn.q_proj": (32, 32)}, rank=1)
        path = adapted / "nan" / "adapter_model.safetensors"
        save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(path).items()}, path)
        model, tokenizer = load_model(adapted / "base")
        load_peft(adapted / "first", model)
        with torch.no_grad():
            model.blocks[0].attention.qkv.beside["q"].a[0, 0] = torch.nan
        save_model(adapted / "failed", model, tokenizer)
    before = sorted(str(path) for path in adapted.rglob("*"))
    code, out, err = here(*line.format(adapted).split())
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1), err
    assert any(part in err for part in message.split("|")), err
    assert "fault inside" not in err
    assert sorted(str(path) for path in adapted.rglob("*")) == before
    assert not (work / "z").exists()


def test_neither_a_merge_nor_an_export_replaces_an_adapter(here, adapted, tmp_path):
    shutil.copytree(adapted / "second", tmp_path / "mine")
    held = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    for line in (["merge"], ["export", adapted / "base"]):
        code, out, err = here("adapters", *line, adapted / "first", "--out", tmp_path / "mine")
        assert (code, out) == (2, "")
        assert "mine already holds an adapter (adapter_config.json); choose another folder, or remove it first" in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == held


def test_the_command_takes_means_alone_of_our_own_form(tmp_path, here):
    found = []
    for seed, name in enumerate(("a", "b")):
        model = Decoder.Config(dim=16, num_layers=2, attention=SelfAttention.Config(num_heads=4)).build(seed=0)
        apply(model, "adapter-pfeiffer", seed=seed, width=3)
        write_own(tmp_path / name, model)
        found.append(load_file(tmp_path / name / "adapter.safetensors"))
    first, second = found
    line = ["adapters", "merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "mean"]
    code, out, err = here(*line, "--method", "mean", "--weights", "1,3", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["method"], told["weights"], told["layers"]) == ("mean", [1.0, 3.0], 1)
    found = load_file(tmp_path / "mean" / "adapter.safetensors")
    assert told["parameters"] == sum(value.numel() for value in found.values())
    for name, value in found.items():
        torch.testing.assert_close(value, 0.25 * first[name] + 0.75 * second[name])
    # What is there is not replaced, nor is an adapter of peft's form.
    before = (tmp_path / "mean" / "adapter.safetensors").read_bytes()
    code, out, err = here(*line, "--method", "mean")
    assert (code, out, "mean already holds an adapter (adapter.json); choose another folder" in err) == (2, "", True)
    assert (tmp_path / "mean" / "adapter.safetensors").read_bytes() == before
    shutil.rmtree(tmp_path / "mean")
    code, out, err = here(*line, "--method", "mean")
    assert (code, "the mean of 2" in out) == (0, True), err
    shutil.rmtree(tmp_path / "mean")
    make_adapter(tmp_path / "low", {"model.layers.0.self_attn.q_proj": (16, 16)})
    mixed = ["adapters", "merge", tmp_path / "low", tmp_path / "a", "--method", "mean", "--out", tmp_path / "mean"]
    code, out, err = here(*mixed)
    assert (code, out) == (2, "")
    assert f"{tmp_path / 'a'} is in anabranch's own form and {tmp_path / 'low'} is not" in err
    for options, message in (
        ([], "--method exact is for LoRA in folders of peft's"),
        (["--method", "svd"], "--method svd is for LoRA"),
        (["--method", "mean", "--rank", 2], "--rank is for LoRA"),
        (["--method", "mean", "--weights", "1,-1"], "a mean has weights of 0 and above"),
    ):
        code, out, err = here(*line, *options)
        assert (code, out, message in err) == (2, "", True), err
