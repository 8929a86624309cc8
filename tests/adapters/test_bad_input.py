"""What somebody may hand in that is wrong: each told in one clear line, the model and every file as they were."""

import copy
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_models import TOKENS, linear_layers, logits, make_adapter, make_base
from anabranch.adapters import (
    Adapter,
    LowRankPool,
    Pair,
    RoutedLowRank,
    catalogue,
    chosen_rows,
    combine,
    export_mixture,
    load_peft,
    load_pool,
    merge,
    read_peft,
    rows_for,
    save_peft,
    unload,
    unmerge,
    write_peft,
)
from anabranch.adapters.own_folder import write_own
from anabranch.adapters.put_on import added_names
from anabranch.errors import AnabranchError
from anabranch.lm import load_model
from anabranch.nn.quantize import quantize
from anabranch.routing import Router, TopK

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A base, and two adapters of it."""
    root = tmp_path_factory.mktemp("bad")
    layers = linear_layers(make_base(root / "base", "llama"), ["q_proj", "down_proj"])
    make_adapter(root / "a", layers, seed="a", lora_dropout=0.0)
    make_adapter(root / "b", layers, rank=2, seed="b")
    return root


@pytest.fixture(scope="module")
def model(source):
    return load_model(source / "base")[0].eval()


def told(**fields):
    """A config that says something else; a field of None is left out."""

    def change(folder):
        path = folder / "adapter_config.json"
        table = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({name: value for name, value in table.items() if value is not None}))

    return change


def spelt(**fields):
    """The same, of which None is null."""

    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def held(change):
    """A weights file that holds something else."""

    def apply(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    return apply


def put(name, value):
    return held(lambda tensors: tensors.__setitem__(name, value(tensors.get(name)) if callable(value) else value))


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def filled(number):
    def change(tensor):
        tensor = tensor.clone()
        tensor[0, 0] = number
        return tensor

    return change


def without(*names):
    return held(lambda tensors: [tensors.pop(name) for name in names])


A, B, CONFIG, WEIGHTS = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", "adapter_config.json", "adapter_model.safetensors"
# A folder with one thing wrong with it, and what is said of it.
FOLDERS = {
    "NaN": (put(A, filled(math.nan)), "holds NaN or infinity"),
    "infinity": (put(B, filled(math.inf)), "holds NaN or infinity"),
    "a whole module that lacks": (told(modules_to_save=["norm"]), "which modules_to_save names"),
    "a head that lacks": (told(modules_to_save=["lm_head"]), "lm_head.weight, which modules_to_save names"),
    "rank 0": (told(r=0), "a rank must be a whole number, at least 1"),
    "negative rank": (told(r=-4), "a rank must be a whole number"),
    "rank of words": (told(r="four"), "a rank must be a whole number"),
    "rank true": (told(r=True), "a rank must be a whole number"),
    "rank of a fraction": (told(r=4.5), "a rank must be a whole number"),
    "another rank than the file": (told(r=5), "adapter_config.json says 5"),
    "alpha of words": (told(lora_alpha="much"), "it must be a finite number"),
    "endless alpha": (told(lora_alpha=1e300), "it must be a finite number"),
    "patterns that are a list": (told(rank_pattern=[1]), "it must be a table of patterns"),
    "rank 0 of a pattern": (told(rank_pattern={"q_proj": 0}), "a rank must be a whole number"),
    "a pattern that is none": (told(target_modules="*q_proj"), "target_modules"),
    "names that are numbers": (told(target_modules=[1, 2]), "it must be a list of names"),
    "bias of words": (told(bias="some"), "it must be none, all or lora_only"),
    "rslora of words": (told(use_rslora="yes"), "it must be true or false"),
    "layers of words": (told(layers_to_transform="first"), "it must be a layer's number"),
    "another kind": (told(peft_type="TELEPATHY"), "peft_type"),
    "no kind": (told(peft_type=None), "peft_type"),
    "targets without the layer": (
        told(target_modules=["down_proj"]),
        "which neither target_modules nor target_parameters",
    ),
    "targets that are null": (spelt(target_modules=None), "is None; peft may take its default layers"),
    "no targets": (told(target_modules=[]), "name those that the file has numbers for, model"),
    "no targets beside parameters": (told(target_modules=[], target_parameters=["down_proj"]), "is []; peft may take"),
    "targets with one more": (told(target_modules=["q_proj", "down_proj", "v_proj"]), "lacks lora_A and lora_B of"),
    "half a pair, no B": (without(B), "lacks lora_B"),
    "half a pair, no A": (without(A), "lacks lora_A"),
    "a missing layer": (without(A, B), "lacks lora_A and lora_B of"),
    "one layer too many": (
        lambda folder: [
            put(name.replace("layers.0", "layers.7"), torch.ones(shape))(folder)
            for name, shape in ((A, (4, 32)), (B, (32, 4)))
        ],
        "for which the model",
    ),
    "other widths": (put(A, torch.ones(4, 31)), "with 31 inputs|must be of one model"),
    "other outputs": (put(B, torch.ones(30, 4)), "and 30 outputs|must be of one model"),
    "two ranks of one pair": (put(B, torch.ones(32, 3)), "they must have one"),
    "a vector": (put(A, torch.ones(32)), "it must be a matrix"),
    "no rows": (put(A, torch.ones(0, 32)), "it must be a matrix of at least one row"),
    "three dimensions": (put(A, torch.ones(4, 32, 1)), "it must be a matrix"),
    "whole numbers": (put(A, torch.ones(4, 32, dtype=torch.int64)), "stored as int64"),
    "a tensor of nowhere": (
        put("base_model.model.model.layers.0.mlp.gate.weight", torch.ones(4)),
        "for which the model|which all rows would get|which has no sum",
    ),
    "a norm of another width": (
        put("base_model.model.model.norm.weight", torch.ones(31)),
        "of shape [31]|which all rows would get|which has no sum",
    ),
    "a name twice": (put(A.removeprefix("base_model.model."), torch.ones(4, 32)), "which are of one tensor"),
    "no pairs": (
        lambda folder: save_file({"x": torch.ones(1)}, folder / WEIGHTS),
        "so there is nothing to add|no pair|x",
    ),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "it holds no adapter_config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no weights in"),
    "a config cut off": (text(CONFIG, b'{"peft_type": "LO'), CONFIG),
    "a config that is a list": (text(CONFIG, b"[1, 2]"), CONFIG),
    "a config of bytes": (text(CONFIG, b"\xff\xfe\x00"), CONFIG),
    "weights cut off": (lambda folder: text(WEIGHTS, (folder / WEIGHTS).read_bytes()[:200])(folder), WEIGHTS),
    "no bytes of weights": (text(WEIGHTS, b""), WEIGHTS),
    "weights of words": (text(WEIGHTS, b"these are no weights at all"), WEIGHTS),
    "a header that is huge": (text(WEIGHTS, (2**62).to_bytes(8, "little") + b"{}"), WEIGHTS),
}


def unchanged(call, message, model, root):
    """The call ends with one clear line, and neither the model nor a file is another afterwards."""
    before = logits(model), {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(AnabranchError) as caught:
        call()
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert any(part in said for part in message.split("|")), said
    assert torch.equal(logits(model), before[0])
    assert {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()} == before[1]
    assert not model.config.linears


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_wrong(name, source, model, tmp_path):
    """Alone, beside one that is right, and where something is to be made of it."""
    spoil, message = FOLDERS[name]
    folder = tmp_path / "broken"
    shutil.copytree(source / "a", folder)
    spoil(folder)
    unchanged(lambda: load_peft(folder, model), message, model, tmp_path)
    unchanged(lambda: load_pool({"good": source / "b", "bad": folder}, model), message, model, tmp_path)
    unchanged(
        lambda: export_mixture(tmp_path / "out", model, {source / "a": 1.0, folder: 1.0}), message, model, tmp_path
    )


@pytest.mark.parametrize(
    "name", [name for name in FOLDERS if name.startswith(("targets that", "targets without", "no targets"))]
)
def test_layers_that_the_config_does_not_name_are_told_before_there_is_a_model(name, source, model, tmp_path):
    shutil.copytree(source / "a", tmp_path / "broken")
    FOLDERS[name][0](tmp_path / "broken")
    unchanged(lambda: read_peft(tmp_path / "broken"), FOLDERS[name][1], model, tmp_path)


def own(model, *steps):
    """A copy of the model on which these were done."""
    made = copy.deepcopy(model)
    for step in steps:
        step(made)
    return made


def one(rank=2, inputs=32, outputs=32, alpha=2.0):
    pair = Pair(torch.ones(rank, inputs), torch.ones(outputs, rank), alpha)
    return Adapter({"peft_type": "LORA"}, {"model.layers.0.self_attn.q_proj": pair})


# What is asked of adapters that are right, by (place, model) to the call.
CALLS = {
    "no such folder": (lambda place, model: load_peft(place / "none", model), "no adapter at"),
    "a file": (lambda place, model: load_peft(place / "a" / CONFIG, model), "it is a file"),
    "a second adapter": (
        lambda place, model: load_peft(place / "b", own(model, lambda m: load_peft(place / "a", m))),
        "has an adapter already",
    ),
    "another model": (
        lambda place, model: load_peft(place / "a", catalogue_model()),
        "is it an adapter of another model?",
    ),
    "a task of one that has none": (lambda place, model: load_peft(place / "b", model, task=0), "which has no tasks"),
    "a family that there is not": (lambda place, model: load_peft(place / "a", model, family="gpt9"), "gpt9"),
    "nothing to take off": (lambda place, model: unload(model), "no adapter that load_peft put onto it"),
    "nothing to merge": (lambda place, model: merge(model), "no adapter that load_peft"),
    "merged twice": (
        lambda place, model: merge(own(model, lambda m: load_peft(place / "a", m), merge)),
        "is merged already",
    ),
    "not merged": (
        lambda place, model: unmerge(own(model, lambda m: load_peft(place / "a", m))),
        "the adapter is not merged",
    ),
    "merged into few bits": (
        lambda place, model: merge(
            own(model, lambda m: quantize(m, "int8", head=None), lambda m: load_peft(place / "a", m))
        ),
        "stored in few bits",
    ),
    "NaN that is saved": (
        lambda place, model: save_peft(
            place / "out", own(model, lambda m: load_peft(place / "a", m), lambda m: spoilt(m, math.nan))
        ),
        "out holds NaN or infinity; the adapter is damaged",
    ),
    "numbers that are saved and could not be read": (
        lambda place, model: save_peft(
            place / "out", own(model, lambda m: load_peft(place / "a", m), lambda m: spoilt(m, 1e31))
        ),
        "out holds a number of the size 1e+31",
    ),
    "infinity that is saved in our own form": (
        lambda place, model: write_own(
            place / "out",
            own(model, lambda m: catalogue.apply(m, "adapter-parallel"), lambda m: spoilt(m, math.inf)),
        ),
        "out holds NaN or infinity; the adapter is damaged",
    ),
    "nothing to save": (lambda place, model: save_peft(place / "out", model), "no adapter to save"),
    "a folder of other things": (
        lambda place, model: write_peft(place / "base", read_peft(place / "a")),
        "would be lost|holds",
    ),
    "a config that says something else": (
        lambda place, model: write_peft(place / "out", Adapter({"peft_type": "LORA", "r": 9}, one().pairs)),
        "says something else",
    ),
    "a pool of none": (lambda place, model: load_pool({}, model), "give at least one folder"),
    "rows without a pool": (lambda place, model: rows_for(model, ["a"], 6), "no adapter that load_peft"),
    "an adapter that is not there": (
        lambda place, model: rows_for(own(model, lambda m: load_pool({"a": place / "a"}, m)), ["a", "c"], 6),
        "adapter 'c' is not on the model; there are 'a'",
    ),
    "a weight that is NaN": (
        lambda place, model: rows_for(own(model, lambda m: load_pool({"a": place / "a"}, m)), [{"a": math.nan}], 6),
        "row 0 has weight nan",
    ),
    "a weight without end": (
        lambda place, model: rows_for(
            own(model, lambda m: load_pool({"a": place / "a"}, m)), [None, {"a": math.inf}], 6
        ),
        "row 1 has weight inf",
    ),
    **{
        f"a row that is {row!r}": (
            lambda place, model, row=row: rows_for(
                own(model, lambda m: load_pool({"a": place / "a"}, m)), [None, row], 6
            ),
            message,
        )
        for row, message in {
            5: "row 1 is 5; it must be the name of an adapter, a mapping of names to weights, or None",
            False: "row 1 is False; it must be the name of an adapter",
            (("a", 1),): "row 1 is (('a', 1),); it must be the name of an adapter",
        }.items()
    },
    **{
        f"a weight that is {weight!r}": (
            lambda place, model, weight=weight: rows_for(
                own(model, lambda m: load_pool({"a": place / "a"}, m)), [None, {"a": weight}], 6
            ),
            message,
        )
        for weight, message in {
            "1": "row 1 has weight '1' for adapter 'a'; it must be a number",
            None: "row 1 has weight None for adapter 'a'; it must be a number",
            True: "row 1 has weight True for adapter 'a'; it must be a number",
        }.items()
    },
    "a whole number that no float holds": (
        lambda place, model: rows_for(own(model, lambda m: load_pool({"a": place / "a"}, m)), [{"a": -(10**400)}], 6),
        "row 0 has weight -inf for adapter 'a'",
    ),
    "a name that is none": (
        lambda place, model: rows_for(own(model, lambda m: load_pool({"a": place / "a"}, m)), [{5: 1.0}], 6),
        "adapter 5 is not on the model; there are 'a'",
    ),
    "adapters by numbers that are not whole": (
        lambda place, model: chosen_rows(torch.zeros(2), 6),
        "index has type torch.float32; it must be int64",
    ),
    "rows of another batch": (
        lambda place, model: run(own(model, lambda m: load_pool({"a": place / "a"}, m)), ["a", None, "a"]),
        "chosen for 18 tokens of a pass of 12",
    ),
    "adapters by numbers that there are not": (
        lambda place, model: chose(own(model, lambda m: load_pool({"a": place / "a"}, m)), torch.tensor([3, 0])),
        "adapter",
    ),
    "weights of another shape": (
        lambda place, model: chosen_rows(torch.zeros(2, 2, dtype=torch.int64), 6, torch.ones(3)),
        "both must be [rows] or [rows, choices]",
    ),
    "more choices than adapters": (
        lambda place, model: RoutedLowRank.Config(ranks=(4, 4), router=Router.Config(select=TopK.Config(top_k=3))),
        "top_k",
    ),
    "a pool of rank 0": (lambda place, model: LowRankPool(4, 4, [2, 0]), "rank is 0; it must be at least 1"),
    "alphas of other adapters": (lambda place, model: LowRankPool(4, 4, [2, 2], alphas=[1.0]), "give one for each"),
    "a sum of none": (lambda place, model: combine([], []), "0 weights for 0 adapters"),
    "a weight too few": (lambda place, model: combine([one(), one()], [1.0]), "1 weights for 2 adapters"),
    "a sum of two models": (lambda place, model: combine([one(), one(inputs=16)], [1, 1]), "must be of one model"),
    "a sum that no float holds": (
        lambda place, model: combine([one(alpha=2e9)] * 2, [3e38, 3e38]),
        "cannot hold; give weights nearer to 0",
    ),
    "ranks that cannot be summed": (
        lambda place, model: combine([one(), one(3)], [1, 1], "ties"),
        "'ties_svd' does not",
    ),
    "a rule that there is not": (lambda place, model: combine([one()], [1], "average"), "method is 'average'"),
    "a density above all": (lambda place, model: combine([one()], [1], "ties", density=2.0), "density is 2.0"),
    "no density": (lambda place, model: combine([one()], [1], "dare", density=0.0), "density is 0.0"),
    "a rank of no use": (lambda place, model: combine([one()], [1], "ties", rank=2), "has none to choose"),
    "nothing to export": (lambda place, model: export_mixture(place / "out", model, {}), "no adapter to export"),
    "a method that there is not": (lambda place, model: catalogue.apply(model, "lora2"), "did you mean 'lora'"),
    "an option that it has not": (
        lambda place, model: catalogue.apply(model, "lora", width=2),
        "has no option 'width'",
    ),
    "rank 0 of a method": (
        lambda place, model: catalogue.apply(model, "lora", rank=0),
        "must be a whole number, at least 1",
    ),
    "a layer that there is not": (
        lambda place, model: catalogue.apply(model, "lora", targets=("w",)),
        "names no linear layer of this model",
    ),
    "no layers": (lambda place, model: catalogue.apply(model, "lora", targets=()), "targets is empty"),
    "biases that there are not": (lambda place, model: catalogue.apply(model, "bitfit"), "this model has no biases"),
    "every layer dropped": (
        lambda place, model: catalogue.apply(model, "adapter-drop", drop=9),
        "no linear layer is left",
    ),
    "more active than there are": (lambda place, model: catalogue.apply(model, "mixlora", number=2, active=3), "top_k"),
    "a method of others": (lambda place, model: catalogue.apply(model, "vera"), "not one of our own methods"),
    "a method on an adapter": (
        lambda place, model: catalogue.apply(own(model, lambda m: load_peft(place / "a", m)), "lora"),
        "take that off first",
    ),
    "a method that cannot be merged": (
        lambda place, model: catalogue.apply(own(model), "adapter-parallel").merge(),
        "cannot be merged",
    ),
    "no adapter of the catalogue": (
        lambda place, model: catalogue.load_applied(place / "a", model),
        "it holds no catalogue",
    ),
    "measurements of no method": (
        lambda place, model: measured(place, [{"method": "x", "accuracy": 1}]),
        "there is no card",
    ),
    "measurements above one": (
        lambda place, model: measured(place, [{"method": "lora", "accuracy": 3}]),
        "from 0 to 1",
    ),
    "measurements that are none": (lambda place, model: measured(place, {"lora": 1}), "a list of measurements"),
}


@torch.no_grad()
def spoilt(model, number):
    """In place: one number of what was put on is this."""
    model.get_parameter(added_names(model)[0]).view(-1)[0] = number


def catalogue_model():
    from adapter_models import CONFIGS

    return CONFIGS["llama"]().replace(dim=64).build()


def run(model, rows):
    return model(TOKENS, state=rows_for(model, rows, TOKENS.shape[1]))


def chose(model, index):
    return model(TOKENS, state=chosen_rows(index, TOKENS.shape[1]))


def measured(place, rows):
    path = place.parent / "measured.json"
    path.write_text(json.dumps(rows))
    try:
        return catalogue.read_measurements(path, list(catalogue.CARDS))
    finally:
        path.unlink()


@pytest.mark.parametrize("name", CALLS)
def test_what_is_asked_cannot_be(name, source, model):
    call, message = CALLS[name]
    unchanged(lambda: call(source, model), message, model, source)


def test_there_are_as_many_as_were_asked_for():
    assert len(FOLDERS) + len(CALLS) >= 90
