"""What lies beside an adapter when another is written in its place, in every form and by every road."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from adapter_models import ATTENTION, linear_layers, make_adapter, make_base
from anabranch.adapters import LowRank, load_peft, read_peft, save_peft, write_peft
from anabranch.adapters import folder_files as files
from anabranch.adapters.folder_files import adapter_folder, check_writable, staged_adapter
from anabranch.adapters.glider import describe_expert
from anabranch.adapters.glider.folder import read_described
from anabranch.adapters.own_folder import OwnAdapter, read_own, write_own
from anabranch.adapters.put_on import put_on
from anabranch.errors import CheckpointError, DataError
from anabranch.lm import load_model

SAID = {"README.md": "my model card", "glider.json": '{"author": "ann", "schema": 1, "instructions": ["Say it."]}'}
GATE = {"model.layers.0.self_attn.q_proj": torch.arange(32.0)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("files")
    base = make_base(place / "base", "llama")
    for name in ("one", "two"):
        make_adapter(place / name, linear_layers(base, ATTENTION), seed=name, rank=3)
    return place


def model_of(root):
    return load_model(root / "base")[0].eval()


def own(root, seed):
    made = put_on(model_of(root), {"*.attention.*": LowRank.Config(rank=2)}, seed=seed)
    return made


def saved(folder, root, name):
    save_peft(folder, load_peft(root / name, model_of(root)))


def mean(folder, root, name):
    write_own(folder, own(root, {"one": 1, "two": 2}[name]))
    OwnAdapter.read(folder).write(folder)


# (folder, root, which of two adapters): every way in which one is written, and the file of its numbers.
ROADS = {
    "write_peft": (lambda folder, root, name: write_peft(folder, read_peft(root / name)), "adapter_model.safetensors"),
    "save_peft": (saved, "adapter_model.safetensors"),
    "write_own": (lambda f, root, name: write_own(f, own(root, {"one": 1, "two": 2}[name])), "adapter.safetensors"),
    "OwnAdapter.write": (mean, "adapter.safetensors"),
}


@pytest.fixture(params=ROADS)
def road(request, root, tmp_path):
    write, numbers = ROADS[request.param]
    place = tmp_path / "adapter"
    write(place, root, "one")
    return place, lambda name: write(place, root, name), place / numbers


def told(place):
    return {name: (place / name).read_text() for name in SAID if (place / name).exists()}


@pytest.mark.parametrize("name", ["one", "two"])
def test_what_people_said_stays_and_how_it_learned_goes(road, name):
    place, write, numbers = road
    for file, text in {**SAID, "prompt.json": '{"template": "{prompt}"}'}.items():
        (place / file).write_text(text)
    before = load_file(numbers)
    write(name)
    assert told(place) == SAID
    assert not (place / "prompt.json").exists()
    after = load_file(numbers)
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in before) == (name == "one")
    assert [path.name for path in place.parent.iterdir()] == ["adapter"]


def test_nothing_is_written_beside_what_is_unknown(road):
    place, write, _ = road
    (place / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(DataError, match=r"adapter holds notes\.txt, which would be lost"):
        write("two")
    with pytest.raises(DataError, match=r"holds notes\.txt, .*; move it elsewhere"):
        check_writable(place)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before


@pytest.mark.parametrize("at", ["_copy", "_keep_gates"])
def test_one_that_fails_leaves_all_as_it_was(road, monkeypatch, at):
    place, write, _ = road
    for file, text in SAID.items():
        (place / file).write_text(text)
    before = {path.name: path.read_bytes() for path in place.iterdir()}

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, at, fail)
    with pytest.raises(KeyboardInterrupt):
        write("two")
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert [path.name for path in place.parent.iterdir()] == ["adapter"]


def test_gates_stay_beside_their_own_numbers_alone(root, tmp_path, caplog):
    place = tmp_path / "adapter"
    write_peft(place, read_peft(root / "one"))
    describe_expert(place, instruction="Say it.", gate=GATE)
    held = (place / "glider.safetensors").read_bytes()
    # What the base is called is no matter of numbers.
    write_peft(place, read_peft(root / "one").of_base("elsewhere"))
    assert (place / "glider.safetensors").read_bytes() == held
    assert not caplog.text
    write_peft(place, read_peft(root / "two"))
    assert "trained beside other numbers" in caplog.text
    assert "glider.safetensors.old" in caplog.text
    found = read_described(place)
    assert (found.instructions, found.gates) == (("Say it.",), None)
    for name in ("one", "two"):
        write_peft(place, read_peft(root / name))
        assert (place / "glider.safetensors.old").read_bytes() == held


def test_gates_of_another_scale_are_of_another_adapter(root, tmp_path, caplog):
    place = tmp_path / "adapter"
    write_peft(place, read_peft(root / "one"))
    describe_expert(place, gate=GATE)
    table = json.loads((place / "adapter_config.json").read_text())
    held = read_peft(place)
    (place / "adapter_config.json").write_text(json.dumps({**table, "lora_alpha": 1}))
    write_peft(place, held)
    assert (place / "glider.safetensors.old").exists()
    assert not (place / "glider.safetensors").exists()


def test_what_an_adapter_comes_with_gives_way_to_what_people_said_and_gates_do_not(root, tmp_path):
    place = tmp_path / "adapter"
    for instruction, number in (("First.", 1.0), ("Second.", 2.0)):
        with staged_adapter(place) as stage:
            write_peft(stage, read_peft(root / "one"))
            gate = {name: gate_C * number for name, gate_C in GATE.items()}
            describe_expert(stage, instruction=instruction, gate=gate)
            assert not place.exists() or read_described(place).instructions == ("First.",)
    found = read_described(place)
    assert found.instructions == ("First.",)
    assert float(next(iter(found.gates.values()))[1]) == 2.0
    assert not (place / "glider.safetensors.old").exists()


def test_a_form_takes_the_place_of_another_only_where_both_may(root, tmp_path):
    place = tmp_path / "adapter"
    write_peft(place, read_peft(root / "one"))
    with pytest.raises(DataError, match=r"adapter holds adapter_config\.json"):
        write_own(place, own(root, 1))
    with staged_adapter(place) as stage:
        write_own(stage, own(root, 1))
    assert sorted(path.name for path in place.iterdir()) == ["adapter.json", "adapter.safetensors"]
    read_own(place, model_of(root))


def test_what_changes_meanwhile_is_not_lost(root, tmp_path, monkeypatch):
    place = tmp_path / "adapter"
    write_peft(place, read_peft(root / "one"))
    (place / "README.md").write_text("first")
    kept = files._keep_gates

    def late(*places):
        (place / "README.md").write_text("later")
        kept(*places)

    monkeypatch.setattr(files, "_keep_gates", late)
    with pytest.raises(DataError, match=r"README\.md has changed while an adapter was written beside it; try again"):
        write_peft(place, read_peft(root / "two"))
    assert (place / "README.md").read_text() == "later"


def test_links_and_folders_stay_what_they_are(root, tmp_path):
    place = tmp_path / "adapter"
    write_peft(place, read_peft(root / "one"))
    (place / "README.md").symlink_to("../card.md")
    (place / "glider.json").mkdir()
    (place / "glider.json" / "x").write_text("y")
    write_peft(place, read_peft(root / "two"))
    assert os.readlink(place / "README.md") == "../card.md"
    assert (place / "glider.json" / "x").read_text() == "y"


def test_errors_name_the_place(root, tmp_path):
    place = tmp_path / "adapter"
    with pytest.raises(CheckpointError) as raised, staged_adapter(place) as stage:
        raise CheckpointError(f"what would go to {stage} is wrong")
    assert str(raised.value) == f"what would go to {place} is wrong"
    with pytest.raises(DataError) as found, adapter_folder(place) as made:
        raise DataError(f"{made}/x")
    assert str(found.value) == f"{place}/x"
    assert not place.exists()
