"""Folders as people leave them: what transformers reads of them, we read of them."""

import json
import tempfile
from itertools import combinations
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file, save_model

from anabranch.data import train_bpe
from anabranch.errors import CheckpointError
from anabranch.experts.parscale import load_parscale
from anabranch.lm import SamplingConfig, convert, export_huggingface, generate, load_config, load_model
from anabranch.lm.checkpoint import open_model
from anabranch.serving.expertflow import load_offloaded

VOCAB = 24


def theirs(seed: int, **changes):
    """A tiny model of transformers, other weights for each ``seed``."""
    fields = {"vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields, **heads, **changes)).eval()


@torch.no_grad()
def logits(model):
    output = model.eval()(torch.arange(VOCAB).view(2, -1))
    return output.logits_BLV if hasattr(output, "logits_BLV") else output.logits


def read_by_transformers(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def assert_alike(folder: Path) -> None:
    torch.testing.assert_close(logits(load_model(folder)[0]), logits(read_by_transformers(folder)), rtol=0, atol=1e-5)


def edit(folder: Path, **changes) -> None:
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**table, **changes}))


# Several files of weights


def put(folder: Path, kind: str, state: dict[str, torch.Tensor]) -> None:
    """The weights ``state`` in one way of storing them."""
    stem, suffix = ("model", "safetensors") if kind.startswith("safe") else ("pytorch_model", "bin")
    write = save_file if suffix == "safetensors" else torch.save
    if kind.endswith("whole"):
        write(state, folder / f"{stem}.{suffix}", **({"metadata": {"format": "pt"}} if write is save_file else {}))
        return
    names = sorted(state)
    files = {f"{stem}-{part + 1:05}-of-00002.{suffix}": names[part::2] for part in range(2)}
    for file, held in files.items():
        tensors = {name: state[name] for name in held}
        write(tensors, folder / file, **({"metadata": {"format": "pt"}} if write is save_file else {}))
    table = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(table))


WAYS = ("safe whole", "safe shards", "bin whole", "bin shards")


@pytest.mark.parametrize("present", [ways for count in range(1, 5) for ways in combinations(WAYS, count)])
def test_of_several_files_of_weights_the_one_is_read_that_transformers_reads(tmp_path, present, caplog):
    theirs(0).config.save_pretrained(tmp_path)
    for seed, kind in enumerate(WAYS):
        if kind in present:
            put(tmp_path, kind, {name: tensor.clone() for name, tensor in theirs(seed).state_dict().items()})
    assert_alike(tmp_path)
    # Whole files beside shards of the same kind are what a second save leaves: one of the two is of another model.
    first = present[0].split()[0]
    assert ("remove the older of the two" in caplog.text) == ({f"{first} whole", f"{first} shards"} <= set(present))


def test_a_model_saved_whole_over_its_shards_is_the_new_one(tmp_path):
    old, new = theirs(0), theirs(1)
    old.save_pretrained(tmp_path / "a", max_shard_size="2KB")
    new.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a/model.safetensors.index.json").exists()  # transformers leaves it
    assert_alike(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", to="huggingface")
    assert torch.equal(read_by_transformers(tmp_path / "b").lm_head.weight, new.lm_head.weight)


def test_weights_under_a_name_of_their_own_are_refused(tmp_path):
    theirs(0).save_pretrained(tmp_path)
    edit(tmp_path, transformers_weights="other.safetensors")
    with pytest.raises(CheckpointError, match=r"transformers_weights in .* is 'other.safetensors', which is not"):
        load_model(tmp_path)


# A head beside a tied embedding


def save_tied(folder: Path, stored: str) -> None:
    """A model whose config ties head and embedding, with these of the two in its file."""
    model = theirs(0)
    model.save_pretrained(folder)
    edit(folder, tie_word_embeddings=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if stored in ("both alike", "the head"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    if stored in ("the head", "the embedding"):
        del state["model.embed_tokens.weight" if stored == "the head" else "lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("stored", ["both alike", "both", "the head", "the embedding"])
def test_a_tied_model_has_the_head_that_is_stored(tmp_path, stored, caplog):
    save_tied(tmp_path / "a", stored)
    assert_alike(tmp_path / "a")
    is_own = stored == "both"
    assert load_config(tmp_path / "a").tie_embeddings == load_model(tmp_path / "a")[0].config.tie_embeddings != is_own
    assert ("lm_head.weight differ, so the model has both" in caplog.text) == is_own
    for to in ("native", "huggingface"):
        convert(tmp_path / "a", tmp_path / to, to=to)
        expected = logits(read_by_transformers(tmp_path / "a"))
        torch.testing.assert_close(logits(load_model(tmp_path / to)[0]), expected, rtol=0, atol=1e-5)
    assert_alike(tmp_path / "huggingface")


def test_what_save_model_of_safetensors_writes_of_a_tied_model(tmp_path):
    model = theirs(0, tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path)
    save_model(model, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    assert "model.embed_tokens.weight" not in load_file(tmp_path / "model.safetensors")
    assert_alike(tmp_path)


def test_a_config_is_read_without_weights(tmp_path):
    theirs(0, tie_word_embeddings=True).config.save_pretrained(tmp_path)
    assert load_config(tmp_path).tie_embeddings


# Weights of several types

TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def mixture(folder: Path, types: dict[str, torch.dtype]) -> dict[str, torch.Tensor]:
    """A tiny Mixtral whose tensors have these types by the end of their names (else bfloat16)."""
    fields = {"vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**fields, **heads, num_local_experts=3, num_experts_per_tok=2)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    state = {
        name: torch.randn_like(tensor).to(next((k for end, k in types.items() if name.endswith(end)), torch.bfloat16))
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return state


def test_float32_routers_and_norms_stay_what_they_are(tmp_path):
    state = mixture(tmp_path / "a", dict.fromkeys(("gate.weight", "norm.weight"), torch.float32))
    convert(tmp_path / "a", tmp_path / "native")
    for source in ("a", "native"):
        model, _ = load_model(tmp_path / source)
        router = model.blocks[0].feed_forward.router.score.weight
        assert torch.equal(router, state["model.layers.0.block_sparse_moe.gate.weight"])
        assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
        assert logits(model).isfinite().all()
        assert len(generate(model, [[1, 2]], SamplingConfig(max_tokens=3))[0]) == 3


ENDS = (
    "embed_tokens.weight",
    "lm_head.weight",
    "norm.weight",
    "gate.weight",
    "q_proj.weight",
    "o_proj.weight",
    "w1.weight",
)


@settings(max_examples=8, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(ENDS, TYPES)))
@example({**dict.fromkeys(ENDS, torch.bfloat16), "q_proj.weight": torch.float32, "lm_head.weight": torch.float32})
def test_a_conversion_without_a_type_loses_no_digit_and_every_model_computes(types):
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        state = mixture(place / "a", types)
        convert(place / "a", place / "native")
        convert(place / "native", place / "back", to="huggingface")
        back = load_file(place / "back/model.safetensors")
        for key, tensor in state.items():
            assert torch.equal(back[key].double(), tensor.double()), key
            if not key.endswith((".q_proj.weight", ".k_proj.weight", ".v_proj.weight", ".w1.weight", ".w3.weight")):
                assert back[key].dtype == tensor.dtype, (
                    key
                )  # ours are several of theirs in one, in the widest type of them
        for source in ("a", "native"):
            model, _ = load_model(place / source)
            assert model.embedding.weight.dtype == types["embed_tokens.weight"]
            assert logits(model).dtype == types["embed_tokens.weight"]


# Special ids

IDS = st.none() | st.integers(-1, VOCAB - 1) | st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3, unique=True)
GIVEN = st.fixed_dictionaries({}, optional={"bos_token_id": IDS, "eos_token_id": IDS, "pad_token_id": IDS})


def check_ids(ids: dict[str, object], has_tokenizer: bool) -> None:
    """Special ids of a config.json survive there and back."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        theirs(0).save_pretrained(place / "a")
        (place / "a/generation_config.json").unlink()
        table = json.loads((place / "a/config.json").read_text())
        kept = {key: value for key, value in table.items() if not key.endswith("_token_id")}
        (place / "a/config.json").write_text(json.dumps({**kept, **ids}))
        if has_tokenizer:
            train_bpe(["abc"], 257).save(place / "a")
        convert(place / "a", place / "native")
        convert(place / "native", place / "back", to="huggingface")
        convert(place / "a", place / "straight", to="huggingface")
        for folder in ("back", "straight"):
            found = json.loads((place / folder / "config.json").read_text())
            named = {key: value for key, value in found.items() if key.endswith("_token_id")}
            assert {key: named.pop(key) for key in ids} == ids
            assert not named or has_tokenizer  # else the class of transformers has its own defaults


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_special_ids_of_a_config_survive(has_tokenizer):
    check_ids({"eos_token_id": [3, 4], "bos_token_id": 1}, has_tokenizer)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(GIVEN, st.booleans())
def test_any_special_ids_of_a_config_survive(ids, has_tokenizer):
    check_ids(ids, has_tokenizer)


def test_every_end_of_a_tokenizer_is_in_the_config(tmp_path):
    theirs(0).save_pretrained(tmp_path / "a")
    model, _ = load_model(tmp_path / "a")
    tokenizer = train_bpe(["abc"], 257)
    tokenizer._ends = [3, 4]
    export_huggingface(tmp_path / "b", model, tokenizer)
    assert read_by_transformers(tmp_path / "b").config.eos_token_id == [tokenizer.eos_id, 3, 4]


# Adapters


@pytest.mark.parametrize("has_model", [True, False])
def test_an_adapter_beside_a_model_is_refused(tmp_path, has_model):
    if has_model:
        theirs(0).save_pretrained(tmp_path / "a")
    else:
        (tmp_path / "a").mkdir()
    (tmp_path / "a/adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    for read in (load_model, load_config, open_model, load_parscale, lambda path: convert(path, tmp_path / "b")):
        with pytest.raises(
            CheckpointError, match=r"a holds an adapter \(adapter_config.json\), which is not applied here; name"
        ):
            read(tmp_path / "a")
    assert not (tmp_path / "b").exists()
    if has_model:
        (tmp_path / "a/adapter_config.json").rename(tmp_path / "elsewhere.json")
        assert_alike(tmp_path / "a")


@pytest.mark.parametrize("text", ["{}", "[]", '{"format": "other"}', "no JSON"])
def test_anybodys_adapter_json_beside_a_model_is_no_adapter(tmp_path, text):
    theirs(0).save_pretrained(tmp_path / "a")
    (tmp_path / "a/adapter.json").write_text(text)
    assert_alike(tmp_path / "a")
    (tmp_path / "a/adapter.json").write_text('{"format": "anabranch-adapter", "schema": 1}')
    with pytest.raises(CheckpointError, match=r"a holds an adapter \(adapter.json\), which is not applied here"):
        load_model(tmp_path / "a")


@pytest.mark.parametrize("source", ["a", "native"])
def test_a_mixture_of_types_computes_with_experts_in_files_too(tmp_path, source):
    mixture(tmp_path / "a", {"lm_head.weight": torch.float32, "w1.weight": torch.float16, "w3.weight": torch.float16})
    convert(tmp_path / "a", tmp_path / "native")
    whole, _ = load_model(tmp_path / source)
    offloaded, _, engine = load_offloaded(tmp_path / source, None)
    with engine:
        torch.testing.assert_close(logits(offloaded), logits(whole), rtol=0.05, atol=0.05)
