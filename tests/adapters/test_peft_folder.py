"""Folders of peft's: what is read, what is written, and every way in which one can be damaged, each told in one line."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_models import make_adapter
from anabranch.adapters import Adapter, Pair, read_peft, write_peft
from anabranch.adapters.peft_folder import described
from anabranch.errors import CheckpointError, DataError

LAYERS = {f"model.layers.{layer}.self_attn.{name}": (8, 6) for layer in range(2) for name in ("q_proj", "v_proj")}
FIRST = "model.layers.0.self_attn.q_proj"
HEAD = {"lm_head.weight": torch.randn(5, 8)}


@pytest.fixture
def folder(tmp_path):
    make_adapter(tmp_path / "a", LAYERS, modules_to_save=["lm_head"], extra=HEAD, from_the_future={"x": [1]})
    return tmp_path / "a"


def change(folder, **tensors):
    path = folder / "adapter_model.safetensors"
    found = {**load_file(path), **{f"base_model.model.{name}": tensor for name, tensor in tensors.items()}}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, path)


def retable(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_what_is_in_a_folder(folder):
    adapter = read_peft(folder)
    assert adapter.pairs.keys() == LAYERS.keys()
    assert {(pair.rank, pair.alpha, pair.scale) for pair in adapter.pairs.values()} == {(4, 8.0, 2.0)}
    assert torch.equal(adapter.saved["lm_head.weight"], HEAD["lm_head.weight"])
    assert adapter.num_parameters == 4 * 4 * (8 + 6) + 40
    assert adapter.table["from_the_future"] == {"x": [1]}


def test_what_is_written_is_what_was_read(folder, tmp_path):
    write_peft(tmp_path / "b", read_peft(folder))
    for file in ("adapter_config.json",):
        assert json.loads((tmp_path / "b" / file).read_text()) == json.loads((folder / file).read_text())
    ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (tmp_path / "b", folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    write_peft(tmp_path / "b", read_peft(tmp_path / "b"))  # an adapter gives way to another


def test_pickled_weights_are_read_without_running_them(folder):
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path), folder / "adapter_model.bin")
    path.unlink()
    assert read_peft(folder).pairs.keys() == LAYERS.keys()


def test_names_of_other_versions_of_peft(folder):
    weight = HEAD["lm_head.weight"]
    change(
        folder,
        **{
            "lm_head.weight": None,
            "lm_head.modules_to_save.weight": weight,
            f"{FIRST}.base_layer.bias": weight[0].clone(),
        },
    )
    assert read_peft(folder).saved.keys() == {"lm_head.weight", f"{FIRST}.bias"}
    write_peft(folder, read_peft(folder))
    assert f"base_model.model.{FIRST}.base_layer.bias" in load_file(folder / "adapter_model.safetensors")


NAN = torch.full((4, 8), float("nan"))
DAMAGES = {
    "nan": (
        lambda f: change(f, **{f"{FIRST}.lora_A.weight": NAN}),
        "q_proj.lora_A.weight' in .* holds NaN or infinity",
    ),
    "infinity": (
        lambda f: change(f, **{"lm_head.weight": HEAD["lm_head.weight"] / 0}),
        "lm_head.weight' in .* holds NaN or infinity",
    ),
    "integers": (
        lambda f: change(f, **{f"{FIRST}.lora_A.weight": torch.ones(4, 8, dtype=torch.int8)}),
        "is stored as int8; it must be",
    ),
    "rank 0": (
        lambda f: change(f, **{f"{FIRST}.lora_A.weight": torch.ones(0, 8)}),
        r"lora_A of .* has shape \[0, 8\]; it must be a matrix",
    ),
    "a vector": (
        lambda f: change(f, **{f"{FIRST}.lora_B.weight": torch.ones(6)}),
        r"lora_B of .* has shape \[6\]; it must be a matrix",
    ),
    "no numbers": (
        lambda f: change(f, **{f"{FIRST}.lora_B.weight": torch.ones(6, 0)}),
        r"lora_B of .* has shape \[6, 0\]; it must be a matrix",
    ),
    "two ranks": (
        lambda f: change(f, **{f"{FIRST}.lora_B.weight": torch.ones(6, 3)}),
        "has rank 4, and lora_B 3; they must have one",
    ),
    "another rank": (lambda f: retable(f, r=16), r"has rank 4, and adapter_config.json says 16 \(r, or rank_pattern\)"),
    "a name without end": (
        lambda f: change(f, **{f"{'a.' * 100_000}lora_A.weight": torch.ones(1)}),
        r"holds a tensor called 'base_model.* \.\.\. .*; a name has at most 500 characters",
    ),
    "a name of control": (
        lambda f: change(f, **{f"{FIRST}\n\x1b[2J.lora_A.weight": torch.ones(1)}),
        r"q_proj\\n\\x1b\[2J.lora_A.weight'; a name has at most 500 characters, none of which is for control",
    ),
    "near infinity": (
        lambda f: change(f, **{f"{FIRST}.lora_A.weight": torch.full((4, 8), -3e38)}),
        r"q_proj.lora_A.weight' in .* holds a number of the size 3e\+38; .* numbers are at most 1e\+30",
    ),
    "a half": (
        lambda f: change(f, **{f"{FIRST}.lora_A.weight": None}),
        f"lacks lora_A of {FIRST}, whose other half it has",
    ),
    "dora": (
        lambda f: change(f, **{f"{FIRST}.lora_magnitude_vector": torch.ones(6)}),
        r"holds .*: DoRA, which adapter_config.json does not say \(use_dora\)",
    ),
    "embedding": (
        lambda f: change(f, **{"model.embed_tokens.lora_embedding_A": torch.ones(4, 9)}),
        "adapters of embeddings, which",
    ),
    "bias of B": (lambda f: change(f, **{f"{FIRST}.lora_B.bias": torch.ones(6)}), "parts of lora_B, which"),
    "twice": (lambda f: change(f, **{"lm_head.modules_to_save.weight": torch.ones(5, 8)}), "which are of one tensor"),
    "no json": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot read .*adapter_config.json"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "it holds a list; it must be a table"),
    "deep": (lambda f: (f / "adapter_config.json").write_text("[" * 100_000), "cannot read .*adapter_config.json"),
    "no config": (
        lambda f: (f / "adapter_config.json").unlink(),
        "holds no adapter_config.json; give a folder that peft's",
    ),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        r"no weights in .* \(looked for adapter_model\.safetensors",
    ),
    "cut": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 50), "truncated or corrupt"),
    "a pickle": (
        lambda f: ((f / "adapter_model.safetensors").unlink(), (f / "adapter_model.bin").write_bytes(b"x")),
        "cannot read",
    ),
    "a length lacking": (
        lambda f: retable(f, use_dora=True),
        f"lacks lora_magnitude_vector of {FIRST}, of which it has the rest",
    ),
    "xlora": (lambda f: retable(f, peft_type="XLORA"), "peft_type in .* is 'XLORA'; LORA, IA3"),
    "vera": (
        lambda f: retable(f, peft_type="VERA", modules_to_save=None),
        "is VeRA, which peft computes around the matrices of a model",
    ),
    "ia3": (lambda f: retable(f, peft_type="IA3"), "holds .*: parts of lora_A, which cannot be computed here"),
    "a prompt": (
        lambda f: retable(f, peft_type="PROMPT_TUNING", num_virtual_tokens=4),
        "holds .*; PROMPT_TUNING of peft has prompt_embeddings alone",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_in_one_line(folder, damage):
    do, message = DAMAGES[damage]
    do(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        read_peft(folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


def test_an_adapter_without_pairs_adds_nothing_and_is_refused(folder):
    save_file({"base_model.model.lm_head.weight": torch.ones(5, 8)}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="holds no pair of lora_A and lora_B"):
        read_peft(folder)


def test_numbers_that_still_learn_are_written(folder):
    """Of an adapter that was made in memory, and with no word of torch's."""
    made = read_peft(folder)
    learning = {name: replace(pair, a_RC=pair.a_RC.clone().requires_grad_()) for name, pair in made.pairs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_peft(folder.parent / "written", replace(made, layers=learning))
    assert read_peft(folder.parent / "written").pairs.keys() == made.pairs.keys()


@pytest.mark.parametrize("place", ["nowhere", "a/adapter_config.json"])
def test_a_place_that_is_no_folder(folder, place):
    with pytest.raises(CheckpointError, match=r"no adapter at .*: it is"):
        read_peft(folder.parent / place)


def test_a_folder_with_anything_else_is_not_replaced(folder):
    (folder / "notes.txt").write_text("years of work")
    adapter = read_peft(folder)
    with pytest.raises(DataError, match=r"notes\.txt, which would be lost"):
        write_peft(folder, adapter)
    assert (folder / "notes.txt").read_text() == "years of work"


def test_a_config_that_says_something_else_is_not_written(folder, tmp_path):
    adapter = read_peft(folder)
    pair = adapter.pairs[FIRST]
    for other in (
        Pair(pair.a_RC, pair.b_OR, 9.0),
        Pair(pair.a_RC, pair.b_OR, 8.0, True),
        Pair(pair.a_RC[:2], pair.b_OR[:, :2], 8.0),
    ):
        with pytest.raises(CheckpointError, match=f"says something else of {FIRST} than its numbers"):
            write_peft(tmp_path / "b", Adapter(adapter.table, {**adapter.pairs, FIRST: other}))
    with pytest.raises(CheckpointError, match=r"something else of model\.layers\.0\.mlp\.up_proj"):
        write_peft(tmp_path / "b", Adapter(adapter.table, {**adapter.pairs, "model.layers.0.mlp.up_proj": pair}))
    assert not (tmp_path / "b").exists()


def test_a_table_is_made_true_of_other_pairs(folder, tmp_path):
    adapter = read_peft(folder)
    table = {**adapter.table, "layers_to_transform": [7], "exclude_modules": ["q_proj"]}
    pairs = {
        f"model.layers.{n}.mlp.up_proj": Pair(torch.ones(rank, 8), torch.ones(6, rank), alpha)
        for n, (rank, alpha) in enumerate([(2, 4.0), (3, 4.0), (2, 1.5)])
    }
    made = described(table, pairs)
    assert (made["r"], made["lora_alpha"]) == (2, 4)
    assert made["rank_pattern"] == {"model.layers.1.mlp.up_proj": 3}
    assert made["alpha_pattern"] == {"model.layers.2.mlp.up_proj": 1.5}
    assert made["from_the_future"] == {"x": [1]}
    write_peft(tmp_path / "b", Adapter(made, pairs))
    back = read_peft(tmp_path / "b").pairs
    assert {name: (pair.rank, pair.alpha) for name, pair in back.items()} == {
        name: (p.rank, p.alpha) for name, p in pairs.items()
    }
    with pytest.raises(ValueError, match="some scales are"):
        described(
            {}, {"a": pairs["model.layers.0.mlp.up_proj"], "b": Pair(torch.ones(1, 8), torch.ones(6, 1), 1.0, True)}
        )


def test_a_page_without_an_adapter_beside_it_is_not_replaced(folder, tmp_path):
    """And with one it is its card, which stays."""
    place = tmp_path / "pages"
    place.mkdir()
    (place / "README.md").write_text("mine")
    with pytest.raises(DataError, match=r"README\.md"):
        write_peft(place, read_peft(folder))
    assert (place / "README.md").read_text() == "mine"
    (place / "README.md").unlink()
    write_peft(place, read_peft(folder))
    (place / "README.md").write_text("card")
    write_peft(place, read_peft(folder))
    assert (place / "README.md").read_text() == "card"


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(1).expand(3, 10**12),
        lambda: torch.zeros(3, 32).to_sparse(),
        lambda: torch.zeros(3, 32).to_sparse_csr(),
        lambda: torch.zeros(3, 32, device="meta"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pickled_tensors_that_say_more_than_they_hold_are_refused(folder, make):
    """A file of 2 kB that asks for 12 TB."""
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    torch.save({**tensors, name: make()}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError) as error:
        read_peft(folder)
    assert "no plain tensor with a number for each of its places" in str(error.value)


def test_a_pickled_name_that_is_no_text_is_refused(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save({**tensors, 5: torch.ones(3)}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"a key of it is 5; names of tensors are text"):
        read_peft(folder)


def test_one_half_under_two_names_is_refused(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    again = name.removeprefix("base_model.model.")
    save_file({**tensors, again: tensors[name] + 1}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="which are of one tensor"):
        read_peft(folder)


def test_a_config_may_begin_with_a_byte_order_mark(tmp_path):
    """As editors on Windows write it."""
    make_adapter(tmp_path, {"model.layers.0.self_attn.q_proj": (32, 32)})
    path = tmp_path / "adapter_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_peft(tmp_path).table["r"] == 4
