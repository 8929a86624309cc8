"""Whose numbers a checkpoint of LoRA-Mixer holds: it is read into the same mixture on the same base, and into no other."""

import json
from functools import partial

import pytest
import torch
from torch import nn

from adapter_models import ATTENTION, linear_layers, make_adapter, make_base
from anabranch.adapters import Labelled, MixedLowRank, MixtureTask, fit_router, load_fitted, load_mixture
from anabranch.adapters.lora_mixer.mixture_file import MIXTURE
from anabranch.adapters.put_on import put_on
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm import load_model
from anabranch.train import Constant, TrainConfig

ROWS = [([1, 2, 3 + row % 7], [9 + row % 2], "ab"[row % 2]) for row in range(8)]
TRAIN = TrainConfig(steps=2, batch_size=4, learning_rate=0.05, schedule=Constant.Config(), device="cpu")


class Theirs(nn.Module):
    """A module that is not ours: a table of vectors, and two layers that adapters may name."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.q_proj, self.o_proj = nn.Embedding(61, 8), nn.Linear(8, 8), nn.Linear(8, 61)

    def forward(self, input_ids, attention_mask=None):
        return type("Output", (), {"logits": self.o_proj(self.q_proj(self.table(input_ids)).relu())})


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """{whose model: (how to make it by a seed, folders of adapters)}."""
    root, layers = tmp_path_factory.mktemp("mixtures"), {"q_proj": (8, 8), "o_proj": (8, 61)}
    base = make_base(root / "base", "llama")
    for where, own in (("theirs", layers), ("ours", linear_layers(base, ATTENTION))):
        for name in "abc":
            make_adapter(root / where / name, own, seed=name)
        make_adapter(root / where / "louder", own, seed="b", lora_alpha=64)
    folders = {where: {path.name: path for path in (root / where).iterdir()} for where in ("theirs", "ours")}

    def ours(seed=0):
        model = load_model(root / "base")[0].eval()
        if seed:
            model.blocks[1].attention.out.weight.data[3, 4] += 1
        return model

    return {"theirs": (Theirs, folders["theirs"]), "ours": (ours, folders["ours"])}


@pytest.fixture(params=["theirs", "ours"])
def place(request, places):
    return places[request.param]


def mixture(place, names=("a", "b"), *, seed=0, **options):
    make, folders = place
    given = names if isinstance(names, dict) else {name: folders[name] for name in names}
    return load_mixture(given, make(seed), **options)


def kept(place, folder, names=("a", "b"), **options):
    """(the checkpoint of a mixture whose routers are others than at first, its model)."""
    model = mixture(place, names, **options)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".router." in name:
                parameter.normal_(generator=torch.Generator().manual_seed(5))
    task = MixtureTask(MixtureTask.Config(), model=model, data=Labelled.of(ROWS, "ab"))
    folder.mkdir()
    task.save(folder, model, model.state_dict())
    return folder, model


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_it_is_read_into_the_same_mixture(place, tmp_path, caplog):
    folder, model = kept(place, tmp_path / "kept", top_k=1)
    again = mixture(place, top_k=1)
    assert load_fitted(folder, again) is again
    same(state(again), state(model))
    assert not caplog.text


# What is read into, and what is said of it.
OTHERS = {
    "another order": (
        partial(mixture, names=("b", "a")),
        "of the experts 'a', 'b', and the model has 'b', 'a' in this order",
    ),
    "other names": (
        partial(mixture, names=("a", "c")),
        "of the experts 'a', 'b', and the model has 'a', 'c'; load_mixture",
    ),
    "another base": (partial(mixture, seed=1), "is of a mixture on another base, with other numbers than this model's"),
    "another top_k": (
        partial(mixture, top_k=1),
        r"router.select.top_k is 2, and the model's is 1; load_mixture with what",
    ),
    "other scales": (
        lambda place: mixture(place, {"a": place[1]["a"], "b": place[1]["louder"]}),
        r"alphas is \[8.0, 8.0\], and the model's is \[8.0, 64.0\]",
    ),
    "more experts": (
        partial(mixture, names=("a", "b", "c")),
        "and the model has 'a', 'b', 'c'; load_mixture with what",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_mixture_is_refused_and_stays_as_it_was(place, tmp_path, other):
    folder, _ = kept(place, tmp_path / "kept")
    make, message = OTHERS[other]
    model = make(place)
    before = state(model)
    with pytest.raises(CheckpointError, match=message):
        load_fitted(folder, model)
    same(state(model), before)


def test_a_base_that_was_read_in_half_its_bits_is_the_same(place, tmp_path):
    folder, fitted = kept(place, tmp_path / "kept")
    make, folders = place
    found = load_mixture({name: folders[name] for name in "ab"}, make().bfloat16())
    load_fitted(folder, found)
    wanted = {name: value.to(state(found)[name].dtype) for name, value in state(fitted).items()}
    same(state(found), wanted)


@pytest.mark.parametrize("other", ["another order", "another base"])
def test_a_run_does_not_go_on_with_another_mixture(place, tmp_path, other):
    fit_router(mixture(place), Labelled.of(ROWS, "ab"), tmp_path / "run", train=TRAIN)
    make, message = OTHERS[other]
    with pytest.raises(CheckpointError, match=message):
        fit_router(make(place), Labelled.of(ROWS, "ab"), tmp_path / "run", train=TRAIN.replace(steps=4), resume=True)


def test_a_run_of_ours_is_read_by_its_folder(places, tmp_path):
    fit_router(mixture(places["ours"]), Labelled.of(ROWS, "ab"), tmp_path / "run", train=TRAIN)
    load_fitted(tmp_path / "run", mixture(places["ours"]))
    with pytest.raises(CheckpointError, match="and the model has 'b', 'a' in this order"):
        load_fitted(tmp_path / "run", mixture(places["ours"], ("b", "a")))


def test_what_an_earlier_version_wrote_is_read_and_it_is_said_what_is_not_compared(place, tmp_path, caplog):
    folder, model = kept(place, tmp_path / "kept")
    (folder / MIXTURE).unlink()
    again = mixture(place, ("b", "a"))
    load_fitted(folder, again)
    assert "neither the names of its experts nor its base are compared" in caplog.text
    same(state(again), state(model))


def test_of_ours_an_earlier_version_said_top_k_in_the_config(places, tmp_path):
    folder, _ = kept(places["ours"], tmp_path / "kept")
    (folder / MIXTURE).unlink()
    with pytest.raises(CheckpointError, match=r"top_k is 2, and the model's is 1"):
        load_fitted(folder, mixture(places["ours"], top_k=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.update(format="other"), "is of format 'other', schema 1; this version reads"),
        (lambda table: table.update(schema=2), "schema 2; this version reads"),
        (lambda table: table.pop("experts"), "lacks a list of experts, or tables of layers and base"),
        (lambda table: table.update(base={}), "base in .* is no digest of a base; copy the folder again"),
        (lambda table: table.update(layers={}), "is of a mixture whose .* is None, and the model's is"),
        (lambda table: table.update(layers=dict.fromkeys(table["layers"], 3)), "is of a mixture whose .* is 3"),
        (lambda table: table.update(experts=[1, None]), "of the experts 1, None, and the model has 'a', 'b'"),
    ],
)
def test_a_damaged_file_is_told(places, tmp_path, change, message):
    folder, _ = kept(places["theirs"], tmp_path / "kept")
    table = json.loads((folder / MIXTURE).read_text())
    change(table)
    (folder / MIXTURE).write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=message):
        load_fitted(folder, mixture(places["theirs"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": (3, 3)}, r"ranks is \[2, 3\], and the model's is \[3, 3\]"),
        ({"alphas": (1.0, 2.0)}, r"alphas is \[2.0, 3.0\], and the model's is \[1.0, 2.0\]"),
        ({"rslora": True}, "rslora is False, and the model's is True"),
        ({"closed": (1,)}, r"closed is \[\], and the model's is \[1\]"),
        ({"router_group": None}, "router_group is 'qkv', and the model's is None"),
        ({"router_group": "other"}, "router_group is 'qkv', and the model's is 'other'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_experts_without_names_are_told_by_their_layers(places, tmp_path, changes, message):
    """Of a config that was written by hand: in all that its tensors do not tell, and what it computes depends on."""
    linears = {"*.attention.[qkv]": MixedLowRank.Config(ranks=(2, 3), router_group="qkv")}
    model = put_on(places["ours"][0](), linears)
    task = MixtureTask(MixtureTask.Config(), model=model, data=Labelled.of(ROWS, "ab"))
    (tmp_path / "kept").mkdir()
    task.save(tmp_path / "kept", model, model.state_dict())
    load_fitted(tmp_path / "kept", put_on(places["ours"][0](), linears, seed=3))
    other = {name: config.replace(**changes) for name, config in linears.items()}
    with pytest.raises(CheckpointError, match=message):
        load_fitted(tmp_path / "kept", put_on(places["ours"][0](), other))


def test_names_are_as_many_as_experts():
    with pytest.raises(ConfigError, match="experts has 1 names for 2 adapters; give one for each"):
        MixedLowRank.Config(ranks=(1, 2), experts=("a",))
