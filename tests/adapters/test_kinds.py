"""Every kind of adapter that is no plain LoRA: computed by its formula, put on, saved, merged, learned, taken off."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_kinds import FAMILIES, MERGED, TASK, close, opened, put_on
from adapter_models import (
    KINDS,
    SKILLS,
    SPLITS,
    TOKENS,
    VIRTUAL,
    linear_layers,
    logits,
    of_inputs,
)
from anabranch.adapters import (
    Adapter,
    Pair,
    adapter_of,
    combine,
    load_peft,
    load_pool,
    merge,
    read_peft,
    save_peft,
    unload,
    unmerge,
    write_peft,
)
from anabranch.errors import ConfigError
from anabranch.lm import SamplingConfig, generate, load_model, save_model
from anabranch.nn.quantize import quantize


def by_formula(places, kind, family, tmp_path):
    """Logits of a plain model whose matrices, or whose vocabulary, hold the adapter."""
    root, base, made = places[family]
    tensors, changed = made[kind], dict(base)
    if kind == "prompt":
        return behind_words(root, base, tensors["prompt_embeddings"], tmp_path)
    for module in linear_layers(base, ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]):
        own = {name: tensors.get(f"base_model.model.{module}.{name}") for name in ENDINGS}
        weight = changed[f"{module}.weight"].double()
        if own["lora_magnitude_vector"] is not None:
            turned = weight + 2.0 * own["lora_B.weight"].double() @ own["lora_A.weight"].double()
            weight = turned / turned.norm(dim=1, keepdim=True) * own["lora_magnitude_vector"][:, None]
        if own["ia3_l"] is not None:
            weight = weight * own["ia3_l"]
            if not of_inputs(module) and f"{module}.bias" in changed:
                changed[f"{module}.bias"] = changed[f"{module}.bias"] * own["ia3_l"][:, 0]
        if own["poly_lora_A"] is not None:
            weight = weight + poly_delta(*(own[name] for name in ENDINGS[3:]))
        changed[f"{module}.weight"] = weight.float()
    folder = tmp_path / "changed"
    folder.mkdir()
    save_file(changed, folder / "model.safetensors")
    (folder / "config.json").write_text((root / "base" / "config.json").read_text())
    return logits(load_model(folder)[0])


ENDINGS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_magnitude_vector",
    "poly_lora_A",
    "poly_lora_B",
    "poly_router.module_logits",
    "ia3_l",
)


def poly_delta(a, b, mixed, *_):
    """B A / r of a task, split by split."""
    weight = mixed[TASK].double().sigmoid().view(SPLITS, SKILLS)
    weight = weight / weight.sum(1, keepdim=True)
    a_CR = torch.cat([torch.einsum("k,kpr->pr", weight[s], a[s].double()) for s in range(SPLITS)])
    b_RO = torch.cat([torch.einsum("k,krq->rq", weight[s], b[s].double()) for s in range(SPLITS)], dim=1)
    return (a_CR @ b_RO).T / a.shape[-1]


def behind_words(root, base, prompt, tmp_path):
    """Logits of a model that has the virtual tokens as words, behind them."""
    model = load_model(root / "base")[0].eval()
    vocab = model.config.vocab_size
    config = model.config.replace(vocab_size=vocab + VIRTUAL)
    wider = config.build().eval()
    state = dict(model.state_dict())
    state["embedding.weight"] = torch.cat((state["embedding.weight"], prompt))
    if "head.weight" in state:
        state["head.weight"] = torch.cat((state["head.weight"], torch.zeros(VIRTUAL, config.dim)))
    wider.load_state_dict(state)
    words_BM = torch.arange(vocab, vocab + VIRTUAL).expand(len(TOKENS), VIRTUAL)
    with torch.no_grad():
        return wider(torch.cat((words_BM, TOKENS), dim=1)).logits_BLV[:, VIRTUAL:, :vocab]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "prefix"])
def test_logits_are_those_of_the_formula(places, kind, family, tmp_path):
    """Those of a prefix are kept from peft, in test_peft_parity."""
    model = put_on(places, kind, family)
    wanted = by_formula(places, kind, family, tmp_path)
    close(logits(model), wanted)
    assert (wanted - logits(opened(places, family))).abs().max() > 0.05
    assert not any(parameter.requires_grad for parameter in model.parameters())
    config = model.config
    assert config.count().parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_written_and_read_the_same(places, kind, tmp_path):
    root, _, made = places["llama"]
    adapter = read_peft(root / kind)
    assert adapter.what == {"dora": "DoRA", "ia3": "IA3", "poly": "Poly"}.get(kind, f"{kind} tuning")
    assert adapter.num_parameters == sum(tensor.numel() for tensor in made[kind].values())
    assert adapter.table["from_the_future"] == [{"a": None}]
    write_peft(tmp_path / "a", adapter)
    save_peft(tmp_path / "b", put_on(places, kind))
    for name in "ab":
        found = load_file(tmp_path / name / "adapter_model.safetensors")
        assert found.keys() == made[kind].keys()
        assert all(torch.equal(found[key], made[kind][key]) for key in found)
        tables = [json.loads((place / "adapter_config.json").read_text()) for place in (root / kind, tmp_path / name)]
        assert tables[0] == tables[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_taken_off_nothing_is_left(places, kind, family):
    model = put_on(places, kind, family)
    assert not torch.allclose(logits(model), logits(opened(places, family)), atol=1e-3)
    unload(model)
    assert torch.equal(logits(model), logits(opened(places, family)))
    assert model.config == opened(places, family).config
    assert all(parameter.requires_grad for parameter in model.parameters())
    put_on(places, kind, family, model=model)  # and again


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", MERGED)
def test_merged_it_computes_the_same_and_unmerged_the_base_is_there_to_the_bit(places, kind, family):
    model, weights = put_on(places, kind, family), opened(places, family).state_dict()
    before = logits(model)
    merge(model)
    close(logits(model), before)
    assert model.config == opened(places, family).config
    unmerge(model)
    assert torch.equal(logits(model), before)
    merge(model)
    unload(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in MERGED])
def test_what_no_matrix_takes_in_is_not_merged(places, kind):
    model = put_on(places, kind)
    before = logits(model)
    with pytest.raises(
        ConfigError, match=r"the adapter is (Poly|\w+ tuning), which no matrix can take in; leave it beside"
    ):
        merge(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_without_a_sum_are_refused_in_one_line(places, kind):
    folder = places["llama"][0] / kind
    adapter = read_peft(folder)
    with pytest.raises(ConfigError, match=f"adapter 2 is {adapter.what}, and only plain LoRA has a sum") as error:
        combine([combine_with(places), adapter], [1, 1])
    assert "\n" not in str(error.value)
    model = opened(places)
    with pytest.raises(ConfigError, match=f"adapter 'one' is {adapter.what}, and rows choose among plain LoRA alone"):
        load_pool({"one": folder}, model)
    assert torch.equal(logits(model), logits(opened(places)))
    with pytest.raises(ConfigError, match=f"the adapter is {adapter.what}, and this needs plain LoRA"):
        _ = adapter.pairs


def combine_with(places):
    """A plain adapter."""
    return Adapter(
        {"peft_type": "LORA"}, {"model.layers.0.self_attn.q_proj": Pair(torch.ones(1, 32), torch.ones(32, 1), 1.0)}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_it_is_saved_loaded_and_saved_for_peft(places, kind, tmp_path):
    model = put_on(places, kind)
    save_model(tmp_path / "native", model)
    again = load_model(tmp_path / "native")[0]
    assert again.config == model.config
    assert torch.equal(logits(again), logits(model))
    save_peft(tmp_path / "folder", again)
    back = load_peft(tmp_path / "folder", opened(places), **({"task": TASK} if kind == "poly" else {}))
    close(logits(back), logits(model), 1e-6)
    found, made = load_file(tmp_path / "folder" / "adapter_model.safetensors"), places["llama"][2][kind]
    assert all(torch.equal(found[name], made[name]) for name in made)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_padded_and_alone_rows_are_the_same(places, kind, family):
    model = put_on(places, kind, family).eval()
    whole = logits(model)
    with torch.no_grad():
        cache = model.new_cache(6)
        parts = [model(TOKENS[:, i:end], cache=cache).logits_BLV for i, end in ((0, 3), (3, 4), (4, 6))]
        close(torch.cat(parts, dim=1), whole)
        alone = torch.cat([model(TOKENS[row : row + 1]).logits_BLV for row in range(2)])
        close(alone, whole)
        padded = torch.cat((torch.zeros(2, 2, dtype=torch.int64), TOKENS), dim=1)
        mask = torch.ones_like(padded, dtype=torch.bool)
        mask[:, :2] = False
        close(model(padded, token_mask_BL=mask).logits_BLV[:, 2:], whole)
    prompts = [TOKENS[0].tolist(), TOKENS[1, :3].tolist()]
    sampling = SamplingConfig(max_tokens=5, temperature=0.0)
    assert generate(model, prompts, sampling) == [generate(model, [one], sampling)[0] for one in prompts]


@pytest.mark.parametrize("kind", KINDS)
def test_what_learns_is_the_adapter_alone(places, kind, tmp_path):
    model = put_on(places, kind, trainable=True).train()
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning
    assert all(".beside." in name or name == "streams.weight" for name in learning)
    for _ in range(2):
        model.zero_grad()
        model(TOKENS, TOKENS.roll(-1, 1)).loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for name, parameter in model.named_parameters() if name in learning)
        torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1).step()
    save_peft(tmp_path / "learned", model)
    task = {"task": TASK} if kind == "poly" else {}
    again = load_peft(tmp_path / "learned", opened(places), **task)
    assert torch.equal(logits(again), logits(model))
    before, after = read_peft(places["llama"][0] / kind).tensors(), adapter_of(again).tensors()
    assert all(not torch.equal(before[name], after[name]) for name in before if "module_logits" not in name)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_model_in_few_bits_and_in_half_precision(places, kind):
    """A rounded base stays near; what is learned is kept in float32 beside bfloat16."""
    whole = logits(put_on(places, kind))
    model = opened(places)
    quantize(model, "int8", head=None)
    rounded = logits(model)
    put_on(places, kind, model=model)
    assert (logits(model) - whole).abs().max() < 0.4 * (rounded - whole).abs().max()
    assert torch.equal(logits(unload(model)), rounded)
    half = put_on(places, kind, model=opened(places, dtype=torch.bfloat16))
    assert logits(half).dtype == torch.bfloat16
    assert (logits(half).float() - whole).abs().max() < 0.4
    kept = {parameter.dtype for name, parameter in half.named_parameters() if ".beside." in name or "streams" in name}
    assert kept == {torch.float32}
