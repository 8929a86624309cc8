"""Routed heads of transformers' attentions: the same at the start, with caches and masks; off is off; put on, saved, taken off."""

import copy
import inspect
import json

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from safetensors.torch import load_file, save_file

from anabranch.errors import CheckpointError, ConfigError, DataError, InputError
from anabranch.heads import (
    RoutedHeads,
    head_losses,
    head_report,
    load_heads,
    put_heads,
    routed_heads_of,
    save_heads,
    take_off_heads,
)
from anabranch.heads.padding import real_queries, said_real
from anabranch.routing import record_routing
from foreign_models import VOCAB, build_theirs

FAMILIES = {
    "Llama": {"intermediate_size": 48},
    "Qwen2": {"intermediate_size": 48},
    "Qwen3": {"intermediate_size": 48, "head_dim": 8},
    "Mistral": {"intermediate_size": 48, "sliding_window": 5},
    "GPT2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 48},
}


def theirs(family, **changes):
    if family != "GPT2":
        return build_theirs(family, **FAMILIES[family], **changes)
    config = transformers.GPT2Config(vocab_size=VOCAB, **FAMILIES["GPT2"], initializer_range=0.3, **changes)
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(config).eval()


def whisper(**changes):
    torch.manual_seed(1)
    sizes = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_source_positions": 20,
        "max_target_positions": 24,
        "num_mel_bins": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "init_std": 0.3,
        "begin_suppress_tokens": None,
    }
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes | changes)).eval()


def tokens(batch=2, length=9, seed=1):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def sound(batch=2):
    return torch.randn(batch, 8, 40, generator=torch.Generator().manual_seed(2))


def open_up(model, start=0.0, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
                if name.endswith("score.bias"):
                    parameter.add_(start)
    return model


def close(found, expected, tolerance=2e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_putting_heads_on_changes_nothing(family, kind):
    model, token_BL = theirs(family, attn_implementation=kind), tokens()
    mask_BL = torch.ones_like(token_BL)
    mask_BL[0, :3] = 0
    plain = model(token_BL).logits, model(token_BL, attention_mask=mask_BL).logits
    made = model.generate(token_BL, max_new_tokens=5, do_sample=False, pad_token_id=0)
    state = set(model.state_dict())
    assert put_heads(model, 2) is model
    assert len(routed_heads_of(model)) == 3
    close(model(token_BL).logits, plain[0], 1e-6)
    found = model(token_BL, attention_mask=mask_BL).logits
    close(found[1], plain[1][1], 1e-6)
    close(found[0, 3:], plain[1][0, 3:], 1e-6)
    assert torch.equal(model.generate(token_BL, max_new_tokens=5, do_sample=False, pad_token_id=0), made)
    take_off_heads(model)
    assert set(model.state_dict()) == state
    assert torch.equal(model(token_BL).logits, plain[0])


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_heads_that_are_left_out_make_no_difference_with_and_without_a_cache(family, kind):
    model, token_BL = open_up(put_heads(theirs(family, attn_implementation=kind), 1, block=4), -6.0), tokens(length=24)
    whole = model(token_BL).logits
    assert all(told["computed"] < 0.9 for told in head_report(model))
    assert all(0 < told["saved"] < 0.5 for told in head_report(model))
    for heads in routed_heads_of(model).values():
        heads.skip = False
    close(model(token_BL).logits, whole)
    for heads in routed_heads_of(model).values():
        heads.skip = True
    # By its name in the versions of before 5.24, and since.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = transformers.DynamicCache(config=model.config)
    parts = [
        model(token_BL[:, a:b], use_cache=True, **{name: cache}).logits
        for a, b in ((0, 12), (12, 13), (13, 20), (20, 24))
    ]
    close(torch.cat(parts, 1), whole, 1e-4)


@torch.no_grad()
def test_cross_attention_of_whisper():
    model = whisper()
    call = {"input_features": sound(), "decoder_input_ids": tokens(length=20)}
    expected = model(**call).logits
    made = model.generate(sound(), max_new_tokens=5, do_sample=False)
    put_heads(model, 1, where="model.decoder.layers.*.encoder_attn", block=4)
    assert sorted(routed_heads_of(model)) == [f"model.decoder.layers.{layer}.encoder_attn" for layer in (0, 1)]
    close(model(**call).logits, expected, 1e-6)
    assert torch.equal(model.generate(sound(), max_new_tokens=5, do_sample=False), made)
    open_up(model, -6.0)
    spared = model(**call).logits
    assert all(told["computed"] < 1 for told in head_report(model))
    for heads in routed_heads_of(model).values():
        heads.skip = False
    whole = model(**call).logits
    close(spared, whole)
    assert (whole - expected).abs().max() > 1e-3


@torch.no_grad()
def test_all_attentions_of_whisper():
    model = whisper()
    call = {"input_features": sound(), "decoder_input_ids": tokens()}
    expected = model(**call).logits
    put_heads(model, 2)
    assert len(routed_heads_of(model)) == 6
    close(model(**call).logits, expected, 1e-6)


def test_it_learns_and_only_the_gates_where_the_rest_is_frozen():
    model, token_BL = theirs("Llama").requires_grad_(False), tokens()
    put_heads(model, 1, target=0.3).train()
    loss = model(token_BL, labels=token_BL).loss + head_losses(model)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".gate." in name), name
    assert head_losses(model) == 0


def test_gradient_checkpointing_gives_the_same_gradients_and_counts_once():
    gradients = {}
    for again in (False, True):
        model, token_BL = put_heads(theirs("Llama"), 1, target=0.3).train(), tokens()
        open_up(model)
        if again:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        (model(token_BL, labels=token_BL).loss + head_losses(model)).backward()
        gradients[again] = {name: each.grad for name, each in model.named_parameters()}
        for heads in routed_heads_of(model).values():
            assert float(heads.gate.router.balance[0].num_pairs) == token_BL.numel() * 3
    for name, gradient in gradients[False].items():
        close(gradients[True][name], gradient)


@torch.no_grad()
def test_padding_counts_for_nothing():
    model, token_BL = put_heads(theirs("Llama"), 1), tokens()
    mask_BL = torch.ones_like(token_BL)
    mask_BL[0, :4] = 0
    model(token_BL, attention_mask=mask_BL)
    assert [told["tokens"] for told in head_report(model)] == [14] * 3


@torch.no_grad()
def test_the_models_own_choice_of_attention_is_followed_when_it_changes():
    model, token_BL = theirs("Llama"), tokens()
    put_heads(model, 2)
    expected = model(token_BL).logits
    model.set_attn_implementation("eager")
    made = model(token_BL, output_attentions=True)
    close(made.logits, expected)
    assert len(made.attentions) == 3
    assert made.attentions[0].shape == (2, 4, 9, 9)


@torch.no_grad()
def test_a_trace_of_it():
    model, token_BL = open_up(put_heads(theirs("Llama"), 1)), tokens()
    with record_routing(model) as recorder:
        model(token_BL)
    trace = recorder.trace()
    assert [layer.layer for layer in trace.layers] == [0, 1, 2]
    for layer in range(3):
        decisions = trace.decisions(layer)
        assert decisions.item_N.tolist() == [0] * 9 + [1] * 9
        assert decisions.position_N.tolist() == list(range(9)) * 2


@torch.no_grad()
def test_copies(tmp_path):
    model, token_BL = open_up(put_heads(theirs("Llama"), 1)), tokens()
    twin = copy.deepcopy(model)
    close(twin(token_BL).logits, model(token_BL).logits, 1e-6)
    twin.set_attn_implementation("eager")
    assert model.config._attn_implementation == "sdpa"


# Beside the model


@torch.no_grad()
def test_what_was_saved_is_put_on_again(tmp_path):
    model, token_BL = open_up(put_heads(theirs("Llama"), 1, target=0.25, block=2)), tokens()
    expected = model(token_BL).logits
    save_heads(tmp_path / "heads", model)
    save_heads(tmp_path / "heads", model)
    assert sorted(path.name for path in (tmp_path / "heads").iterdir()) == ["heads.json", "heads.safetensors"]
    other = load_heads(tmp_path / "heads", theirs("Llama"))
    close(other(token_BL).logits, expected, 1e-6)
    assert {heads.routing.target for heads in routed_heads_of(other).values()} == {0.25}


@pytest.mark.parametrize("layer", [float("inf"), float("nan"), -5, 10**9, 1.5, "1", None, True])
def test_a_layer_that_cannot_be_is_refused(tmp_path, layer):
    save_heads(tmp_path / "heads", put_heads(theirs("Llama"), 1))
    damaged(tmp_path / "heads", lambda table: next(iter(table["modules"].values())).update(layer=layer))
    with pytest.raises(CheckpointError, match=r"heads\.json"):
        load_heads(tmp_path / "heads", theirs("Llama"))


def damaged(folder, change):
    table = json.loads((folder / "heads.json").read_text())
    change(table)
    (folder / "heads.json").write_text(json.dumps(table))


def changed(folder, change):
    path = folder / "heads.safetensors"
    numbers = load_file(path)
    save_file({name: change(value).contiguous() for name, value in numbers.items()}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "heads.json").unlink(), "holds no routed heads"),
        (lambda folder: (folder / "heads.json").write_text("{"), "cannot read"),
        (lambda folder: damaged(folder, lambda table: table.update(format="other")), "not of routed heads that this"),
        (lambda folder: damaged(folder, lambda table: table.update(base="0")), "are of another model"),
        (
            lambda folder: damaged(folder, lambda table: table["modules"].update(x={})),
            "of an attention x, which the model",
        ),
        (
            lambda folder: damaged(
                folder, lambda table: next(iter(table["modules"].values()))["heads"].update(num_shared=9)
            ),
            "num_shared is 9",
        ),
        (
            lambda folder: damaged(
                folder, lambda table: list(table["modules"].values())[-1]["heads"].update(routing="none")
            ),
            "its routing is 'none'; it must be 'relu' or 'topk'",
        ),
        (lambda folder: damaged(folder, lambda table: table["modules"].clear()), "names no attention"),
        (lambda folder: changed(folder, lambda value: value * float("nan")), r"gate\..* is not finite everywhere"),
        (lambda folder: changed(folder, lambda value: value[..., None]), "is of shape"),
        (lambda folder: (folder / "heads.safetensors").write_bytes(b"no"), "cannot be read"),
        (lambda folder: (folder / "heads.safetensors").unlink(), "cannot be read"),
    ],
)
def test_a_damaged_folder_is_refused_and_the_model_left_as_it_was(tmp_path, damage, message):
    model = put_heads(theirs("Llama"), 1)
    save_heads(tmp_path / "heads", model)
    damage(tmp_path / "heads")
    other, token_BL = theirs("Llama"), tokens()
    expected = other(token_BL).logits
    with pytest.raises((CheckpointError, ConfigError), match=message):
        load_heads(tmp_path / "heads", other)
    assert not routed_heads_of(other)
    assert torch.equal(other(token_BL).logits, expected)


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError):
        save_heads(tmp_path / "mine", put_heads(theirs("Llama"), 1))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: put_heads(theirs("Llama"), 4), "num_shared is 4, but the attention has 4 heads"),
        (
            lambda: put_heads(theirs("Llama"), 1, where="*.cross"),
            r"fits where='\*.cross'; it has model.layers.0.self_attn",
        ),
        (lambda: put_heads(put_heads(theirs("Llama"), 1), 1), "has routed heads already"),
        (
            lambda: put_heads(theirs("GPT2", reorder_and_upcast_attn=True), 1),
            "no attention of this GPT2LMHeadModel|reorder_and_upcast_attn",
        ),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_bad_calls():
    heads = RoutedHeads(theirs("Llama").model.layers[0].self_attn, 1)
    with pytest.raises(InputError, match="hidden_states is NoneType"):
        heads()
    with pytest.raises(InputError, match=r"hidden_states is shape \[3, 32\]"):
        heads(torch.zeros(3, 32))


REAL = torch.ones(2, 9, dtype=torch.bool)
REAL[0, 5:] = False


def test_it_holds_within_and_for_its_shape_alone():
    assert said_real(2, 9) is None
    with real_queries(REAL):
        assert said_real(2, 9) is REAL
        assert said_real(2, 8) is None
        with real_queries(REAL[:1]):
            assert said_real(2, 9) is None
        assert said_real(2, 9) is REAL
    assert said_real(2, 9) is None


@torch.no_grad()
def test_padding_of_a_text_that_listens_counts_for_nothing_and_changes_nothing():
    model = put_heads(whisper(), 1, where="model.decoder.layers.*.encoder_attn")
    open_up(model)
    call = {"input_features": sound(), "decoder_input_ids": tokens()}
    whole = model(**call).logits
    assert [told["tokens"] for told in head_report(model)] == [18, 18]
    for name, module in model.named_modules():
        if name.endswith("encoder_attn"):
            module.forget()
    with real_queries(REAL):
        found = model(**call).logits
    assert [told["tokens"] for told in head_report(model)] == [14, 14]
    torch.testing.assert_close(found[REAL], whole[REAL], atol=1e-5, rtol=1e-5)
