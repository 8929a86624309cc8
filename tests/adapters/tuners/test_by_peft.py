"""Methods that peft alone computes, on models of ours: each gives what peft gives from the folder that is written."""

import json
import resource
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_models import make_base
from anabranch.adapters import load_peft, merge, save_peft, unload, unmerge
from anabranch.adapters.catalogue import CARDS
from anabranch.adapters.catalogue.through_peft import put_by_peft
from anabranch.adapters.graft import layers_of
from anabranch.adapters.peft_kinds import BY_PEFT
from anabranch.adapters.saving import adapter_on
from anabranch.data import ByteTokenizer
from anabranch.errors import CheckpointError, ConfigError, MissingExtraError
from anabranch.lm import export_huggingface, load_model
from every_method import CONFIG, SMALL, TOKENS, drawn
from with_peft import needs_peft, theirs

# Of cards, those that adapt puts on through peft.
METHODS = [id for id, card in CARDS.items() if card.backend == "peft" and card.only_peft is None]
# In a file of LoRA's form, or of virtual tokens', which are read without peft.
PLAIN = {"pissa", "olora", "p-tuning"}
TUNED = [id for id in METHODS if id not in PLAIN]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    made = tmp_path_factory.mktemp("by_peft")
    export_huggingface(made / "base", CONFIG.build(seed=1), ByteTokenizer.Config().build(), family="qwen2")
    return made


def put(root, id, dtype=None, *, seed=0):
    model, _ = load_model(root / "base", dtype=dtype)
    options = {name: value for name, value in SMALL.items() if name in CARDS[id].options}
    return put_by_peft(model, id, seed=seed, **options)


@pytest.fixture(scope="module")
def written(root):
    """By method: (folder, the logits of the model that it was written from)."""
    made = {}

    def of(id):
        if id not in made:
            model = drawn(put(root, id), 3)
            save_peft(root / id, model)
            made[id] = root / id, logits(model)
        return made[id]

    return of


@torch.no_grad()
def logits(model):
    return model.eval()(TOKENS % model.config.vocab_size).logits_BLV


def read(root, folder):
    model, _ = load_model(root / "base")
    return load_peft(folder, model)


@needs_peft
@pytest.mark.parametrize("id", METHODS)
def test_a_new_one_learns_alone_and_starts_where_its_card_says(root, id):
    base = logits(load_model(root / "base")[0])
    model = put(root, id)
    if CARDS[id].starts_as_base:
        assert torch.allclose(logits(model), base, atol=1e-4)
    # Some start where a part has no gradient yet.
    drawn(model, 3).train()
    model(TOKENS, TOKENS.roll(-1, 1)).loss.backward()
    learns = {name for name, value in model.named_parameters() if value.requires_grad}
    assert learns == {name for name, value in model.named_parameters() if value.grad is not None}
    assert learns


@needs_peft
@pytest.mark.parametrize("id", METHODS)
def test_peft_gives_the_same_from_the_folder_and_so_do_we(root, written, id):
    folder, found = written(id)
    assert not torch.allclose(found, logits(load_model(root / "base")[0]), atol=1e-3)
    assert torch.allclose(logits(read(root, folder)), found, atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        assert torch.allclose(
            theirs(root / "base", folder)(TOKENS).logits[:, -TOKENS.shape[1] :], found, atol=1e-4, rtol=1e-4
        )


@needs_peft
@pytest.mark.parametrize("id", TUNED)
def test_merged_unmerged_taken_off_and_saved_again(root, written, tmp_path, id):
    folder, found = written(id)
    base, model = logits(load_model(root / "base")[0]), read(root, folder)
    save_peft(tmp_path / "again", model)
    ours, again = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "again"))
    assert ours.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in ours.items())
    if BY_PEFT[CARDS[id].peft_type].merges:
        assert torch.allclose(logits(merge(model)), found, atol=1e-4, rtol=1e-4)
        assert torch.allclose(logits(unmerge(model)), found, atol=1e-6)
    else:
        with pytest.raises(ConfigError, match="which no matrix can take in"):
            merge(model)
    assert BY_PEFT[CARDS[id].peft_type].merges == (CARDS[id].merges == "yes")
    assert torch.equal(logits(unload(model)), base)


@needs_peft
def test_it_goes_on_learning_from_a_folder(root, written):
    folder, found = written("vera")
    model, _ = load_model(root / "base")
    load_peft(folder, model, trainable=True)
    assert {name.rpartition("vera_lambda_")[2][0] for name, one in model.named_parameters() if one.requires_grad} == {
        "b",
        "d",
    }
    assert torch.equal(logits(model), found)


@needs_peft
@pytest.mark.parametrize("id", ["pissa", "olora"])
def test_what_starts_elsewhere_is_plain_lora_of_twice_the_rank(root, written, id):
    """The base that everybody has needs no other start."""
    table = json.loads((written(id)[0] / "adapter_config.json").read_text())
    assert (table["peft_type"], table["r"], table.get("init_lora_weights")) == ("LORA", 2 * SMALL["rank"], None)
    assert adapter_on(read(root, written(id)[0])).pairs


@needs_peft
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save in .* whole tensors beside it cannot be computed here"),
        ({"bias": "all"}, "bias in .* biases of the base that learned beside it"),
        ({"r": 2**31}, "r in .* is 2147483648, and the file has"),
        ({"r": 3}, "is no adapter of VeRA for this model that peft reads"),
        ({"target_modules": ["q_proj"]}, "is it another model's adapter"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, r"lacks .*k_proj"),
        ({"peft_type": "LILY"}, "which weighs its experts by the mean over all tokens"),
        ({"peft_type": "OTHER"}, "can be read"),
    ],
)
def test_a_folder_that_says_something_else_is_refused(root, written, tmp_path, change, says):
    folder, _ = written("vera")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    table = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**table, **change}))
    with pytest.raises(CheckpointError, match=says) as told:
        read(root, tmp_path)
    assert "\n" not in str(told.value)


@needs_peft
@pytest.mark.parametrize(
    ("id", "change", "says"),
    [
        (
            "loha",
            {"rank_pattern": {"q_proj": 3_000_000}},
            "rank_pattern of 'q_proj' in .* is 3000000; no adapted matrix is wider than",
        ),
        ("loha", {"rank_pattern": {"q_proj": "8"}}, "rank_pattern of 'q_proj' in .* is '8'; it must be a whole number"),
        ("loha", {"rank_pattern": [1]}, r"rank_pattern is \[1\]; it must say a number for names of matrices"),
        ("loha", {"r": True}, "r in .* is True; it must be a whole number"),
        (
            "loha",
            {"alpha_pattern": {"q_proj": 1e308}},
            "alpha_pattern of 'q_proj' in .* is 1e.308; it must be a number of size 1e.30",
        ),
        ("loha", {"alpha": None}, "alpha in .* is None; it must be a number"),
        ("hra", {"r": 1_000_000}, "r in .* is 1000000; no adapted matrix is wider than"),
    ],
)
def test_sizes_that_a_few_words_ask_for_are_looked_at_before_anything_is_made(
    root, written, tmp_path, id, change, says
):
    """A folder of a few kilobytes took gigabytes before it was refused."""
    folder, _ = written(id)
    (tmp_path / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    table = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**table, **change}))
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=says) as told:
        read(root, tmp_path)
    assert "\n" not in str(told.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun < 200_000


@needs_peft
def test_numbers_that_are_damaged_are_refused(root, written, tmp_path):
    folder, _ = written("vera")
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "lambda_b" in name)
    for damaged, says in (
        ({**tensors, name: tensors[name] * torch.nan}, "NaN or infinity"),
        ({each: value for each, value in tensors.items() if each != name}, "lacks"),
    ):
        save_file(damaged, tmp_path / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=says):
            read(root, tmp_path)
    model, _ = load_model(root / "base")
    assert not hasattr(model, "_attached_adapter")


def test_without_peft_one_line_names_the_extra(root, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "peft" else object())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "VERA", "r": 2, "target_modules": ["q_proj"]})
    )
    for call in (lambda: put(root, "vera"), lambda: read(root, tmp_path)):
        with pytest.raises(MissingExtraError, match=r"needs .*peft; pip install 'anabranch\[peft\]'$"):
            call()


@needs_peft
@pytest.mark.parametrize("id", ["vera", "oft", "fourierft"])
@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe"])
def test_outputs_that_files_have_in_another_order_and_layers_beside_experts(tmp_path, family, id):
    """As transformers has them, whose order peft's numbers are of."""
    make_base(tmp_path / "base", family)
    model, _ = load_model(tmp_path / "base")
    words = {"deepseek_v2": ("q_up", "kv_down"), "qwen3_moe": ("q", "v")}[family]
    options = {name: value for name, value in SMALL.items() if name in CARDS[id].options}
    put_by_peft(model, id, **options, targets=words)
    save_peft(tmp_path / "adapter", drawn(model, 3))
    found = logits(model)
    again, _ = load_model(tmp_path / "base")
    assert torch.allclose(logits(load_peft(tmp_path / "adapter", again)), found, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(
            theirs(tmp_path / "base", tmp_path / "adapter")(TOKENS % again.config.vocab_size).logits,
            found,
            atol=1e-4,
            rtol=1e-4,
        )
    assert torch.allclose(logits(merge(again)), found, atol=1e-4, rtol=1e-4)


@needs_peft
def test_experts_are_refused(tmp_path):
    make_base(tmp_path / "base", "qwen3_moe")
    model, _ = load_model(tmp_path / "base")
    with pytest.raises(ConfigError, match="is of an expert, around which peft's layers cannot stand here"):
        put_by_peft(model, "oft", block=4, targets=("down",))
    assert not model.config.linears


# Whose first numbers are drawn by the seed; others start at nothing, at the matrix, or by a seed that peft's config has.
DRAWN = {
    "p-tuning",
    "unilora",
    "loha",
    "lokr",
    "hira",
    "gralora",
    "delora",
    "fourierft",
    "vblora",
    "hra",
}


@needs_peft
@pytest.mark.parametrize("id", METHODS)
def test_first_numbers_are_those_of_the_seed(root, id):
    """And what else draws goes on as if nothing had been put on."""
    before = torch.random.get_rng_state()
    first, again, other = (put(root, id, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items()) == (id in DRAWN)
    assert torch.equal(torch.random.get_rng_state(), before)


@needs_peft
@pytest.mark.parametrize("id", METHODS)
def test_numbers_are_counted_once_and_what_it_started_as_with_them(root, id):
    """Of virtual tokens, whose network is gone when they have learned, the tokens alone."""
    model = put(root, id)
    learns = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    wanted = {"p-tuning": SMALL["tokens"] * CONFIG.dim, "pissa": 2 * learns, "olora": 2 * learns}.get(id, learns)
    assert model.config.count().parameters - CONFIG.count().parameters == wanted


@needs_peft
@pytest.mark.parametrize("id", TUNED)
def test_what_is_written_is_for_use_and_learns_where_it_is_to(root, written, id):
    folder, _ = written(id)
    assert json.loads((folder / "adapter_config.json").read_text())["inference_mode"] is True
    for trainable in (True, False):
        model = load_peft(folder, load_model(root / "base")[0], trainable=trainable)
        assert any(parameter.requires_grad for parameter in model.parameters()) == trainable
        # What learned before, too.
        for layer in layers_of(model).values():
            layer.put(layer.numbers())
        assert not any(parameter.requires_grad for parameter in model.parameters())


@needs_peft
@pytest.mark.parametrize("id", TUNED)
def test_what_is_added_to_narrow_outputs_is_not_rounded(root, id):
    model = drawn(put(root, id, torch.bfloat16), 3)
    layer = next(one for one in layers_of(model).values() if one.numbers().order_O is None)
    x = torch.randn(5, layer.numbers().sizes[0], generator=torch.Generator().manual_seed(4)).bfloat16()
    with torch.no_grad():
        y, wanted = layer.tuner.base_layer(x), layer.tuner(x)
        found = layer(x)
    assert (y.dtype, found.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float() + found, wanted.float(), rtol=1e-6, atol=1e-6)


@needs_peft
def test_virtual_tokens_are_not_learned_in_front_of_embeddings_that_are_multiplied():
    """Whether virtual tokens are multiplied too depends on who trains them."""
    model = CONFIG.replace(embedding_scale=2.0).build(seed=1)
    with pytest.raises(ConfigError, match="the model multiplies embeddings by 2, and peft does not multiply virtual"):
        put_by_peft(model, "p-tuning", tokens=3, hidden=8)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config == CONFIG.replace(embedding_scale=2.0)
