"""peft itself: its logits on tiny models, kept in peft_golden.json, and where peft is installed those that it computes now.

To write the golden anew: ``PYTHONPATH=src:tests python -c "import adapters.test_peft_parity as t; t.write_golden()"`` with peft.
"""

import importlib.util
import json
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_kinds import tasks_for
from adapter_models import (
    ATTENTION,
    KINDS,
    LATENT,
    MLP,
    TOKENS,
    drawn,
    linear_layers,
    logits,
    make_adapter,
    make_base,
    make_kind,
    stacked,
)
from anabranch.adapters import (
    combine,
    load_peft,
    load_pool,
    merge,
    read_peft,
    rows_for,
    save_peft,
    unload,
    write_peft,
)
from anabranch.lm import SamplingConfig, generate, load_model

GOLDEN = Path(__file__).with_name("peft_golden.json")
HAS_PEFT = importlib.util.find_spec("peft") is not None
needs_peft = pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed")
# By name: the layers, and what else the adapter has. Experts stand in one tensor in transformers, so no LoRA of peft's is beside one.
ADAPTERS = {
    "attention": (ATTENTION, {}),
    "all": ([*ATTENTION, *MLP], {"target_modules": "all-linear"}),
    "latent": ([*LATENT, "o_proj"], {}),
    "stacked": (
        ["q_proj"],
        {
            "rank": 3,
            "extra": stacked([0, 1]),
            "target_parameters": ["mlp.experts.gate_up_proj", "experts.down_proj"],
            "lora_dropout": 0.0,
        },
    ),
    "ranks": (
        ["q_proj", "v_proj"],
        {
            "use_rslora": True,
            "ranks": {"model.layers.1.self_attn.v_proj": 7},
            "rank_pattern": {"1.self_attn.v_proj": 7},
            "alpha_pattern": {r"layers\.0\..*v_proj": 3},
            "target_modules": r".*self_attn\.[qv]_proj",
        },
    ),
    "head": (["o_proj"], {"extra": {"lm_head.weight": drawn("other head", (61, 32))}, "modules_to_save": ["lm_head"]}),
    "biases": (
        ["k_proj"],
        {
            "bias": "all",
            "extra": {f"model.layers.{n}.self_attn.k_proj.base_layer.bias": drawn(f"bias {n}", (16,)) for n in (0, 1)},
        },
    ),
    "velora": (
        ["q_proj"],
        {
            "extra": {
                f"model.layers.{n}.self_attn.q_proj.lora_velora_embed": drawn(f"velora {n}", (8,)) for n in (0, 1)
            },
            "velora_config": {"num_groups": 4, "scale": 1.0, "init_type": "batch_average_once"},
        },
    ),
    "one_layer": (["q_proj"], {"layers_to_transform": [1], "layers": [1]}),
    # Of other kinds: what `make_kind` is given.
    **{kind: kind for kind in KINDS},
    "p_tuning": ("prompt", {"peft_type": "P_TUNING", "encoder_hidden_size": 32}),
    "dora_all": ("dora", {"words": [*ATTENTION, *MLP], "target_modules": "all-linear", "use_rslora": True}),
}
CASES = [
    *(
        (family, name)
        for family in ("llama", "qwen2", "qwen3")
        for name in ("attention", "all", "ranks", "head", "one_layer")
    ),
    ("qwen2", "biases"),
    ("llama", "velora"),
    ("deepseek_v2", "latent"),
    *(("olmoe", name) for name in ("attention", "ranks", "stacked")),
    ("qwen3_moe", "stacked"),
    *((family, kind) for family in ("llama", "qwen2", "qwen3_moe", "olmoe") for kind in KINDS),
    ("llama", "dora_all"),
    ("llama", "p_tuning"),
    ("qwen3", "prefix"),
    ("deepseek_v2", "ia3"),
    ("deepseek_v2", "dora"),
]
# Of the rows of a batch, for Poly.
OF_ROWS = [2, 1]


def make(root, family, name):
    """(folder of the base, folder of the adapter)."""
    base = make_base(root / "base", family)
    if not isinstance(ADAPTERS[name][0], list):
        kind, options = (name, {}) if ADAPTERS[name] == name else ADAPTERS[name]
        if family == "deepseek_v2":
            options = {**options, "words": ["q_b_proj", "kv_b_proj", "o_proj"]}
        make_kind(root / "adapter", kind, base, family, **options)
        return root / "base", root / "adapter"
    words, options = ADAPTERS[name]
    options = dict(options)
    kept = options.pop("layers", (0, 1))
    layers = linear_layers(base, words)
    layers = {module: size for module, size in layers.items() if int(module.split(".")[2]) in kept}
    make_adapter(root / "adapter", layers, **options)
    return root / "base", root / "adapter"


def theirs(base, adapter):
    """peft's model."""
    import peft
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(model, adapter).eval()


def ours(base, adapter):
    """Logits of our model, whose rows have tasks where the adapter has."""
    return run(load_peft(adapter, load_model(base)[0]), adapter)


def run(model, adapter):
    tasks = is_poly(adapter) and tasks_for(model, OF_ROWS, TOKENS.shape[1])
    with torch.no_grad():
        return model.eval()(TOKENS, state=tasks or None).logits_BLV


def is_poly(adapter):
    return json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "POLY"


def logits_of_peft(base, adapter, model=None):
    """Of tokens; those of virtual ones are left out."""
    tasks = {"task_ids": torch.tensor(OF_ROWS)} if is_poly(adapter) else {}
    with torch.no_grad():
        return called(model or theirs(base, adapter), TOKENS, **tasks).logits[:, -TOKENS.shape[1] :]


def called(model, *given, **options):
    """What peft's model gives; it calls transformers in ways that those warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(*given, **options)


def write_golden():
    found = {}
    for family, name in CASES:
        with tempfile.TemporaryDirectory() as root:
            values = logits_of_peft(*make(Path(root), family, name))
        # Of one sequence every second position: enough to tell, and small.
        found[f"{family}.{name}"] = [[round(float(value), 5) for value in row] for row in values[1, 1::2]]
    GOLDEN.write_text(json.dumps(found, separators=(",", ":")) + "\n")


@pytest.mark.parametrize(("family", "name"), CASES)
def test_logits_are_those_that_peft_gave(family, name, tmp_path):
    base, adapter = make(tmp_path, family, name)
    found = ours(base, adapter)[1, 1::2]
    wanted = torch.tensor(json.loads(GOLDEN.read_text())[f"{family}.{name}"])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


@needs_peft
@pytest.mark.parametrize(("family", "name"), CASES)
def test_logits_are_those_that_peft_gives(family, name, tmp_path):
    base, adapter = make(tmp_path, family, name)
    model = load_peft(adapter, load_model(base)[0])
    wanted = logits_of_peft(base, adapter)
    torch.testing.assert_close(run(model, adapter), wanted, rtol=1e-5, atol=1e-5)
    # What we write is the same to peft.
    save_peft(tmp_path / "copy", model)
    assert torch.equal(logits_of_peft(base, tmp_path / "copy"), wanted)


@needs_peft
@pytest.mark.parametrize(
    ("family", "name"), [("llama", "all"), ("llama", "dora"), ("olmoe", "ia3"), ("olmoe", "stacked")]
)
def test_matrices_that_are_called_turned_are_taken_as_they_lie(family, name, tmp_path):
    """peft warns of ``fan_in_fan_out`` where a layer is no Conv1D, and goes on without."""
    base, adapter = make(tmp_path, family, name)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fan_in_fan_out": True}))
    torch.testing.assert_close(ours(base, adapter), logits_of_peft(base, adapter), rtol=1e-5, atol=1e-5)


@needs_peft
def test_what_peft_saves_is_read(tmp_path):
    base, adapter = make(tmp_path, "llama", "ranks")
    model = theirs(base, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "saved")
    ours = load_peft(tmp_path / "saved", load_model(base)[0])
    with torch.no_grad():
        torch.testing.assert_close(logits(ours), model(TOKENS).logits, rtol=1e-5, atol=1e-5)
    save_peft(tmp_path / "copy", ours)
    tables = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("saved", "copy")]
    assert tables[0] == tables[1]


@needs_peft
@pytest.mark.parametrize("method", ["exact", "linear"])
def test_sums_are_those_of_peft(method, tmp_path):
    """peft's ``cat`` and ``linear``, computed by it and by us from folders; what we wrote, peft reads to the same logits."""
    base = make_base(tmp_path / "base", "llama")
    for seed in "ab":
        make_adapter(tmp_path / seed, linear_layers(base, ["q_proj", "down_proj"]), seed=seed, lora_alpha=6)
    model = theirs(tmp_path / "base", tmp_path / "a")
    model.load_adapter(tmp_path / "b", "b")
    model.add_weighted_adapter(
        ["default", "b"], [0.5, 0.75], "sum", combination_type="cat" if method == "exact" else "linear"
    )
    model.set_adapter("sum")
    model.eval()  # the new adapter has dropout, and is in training
    with torch.no_grad():
        wanted = model(TOKENS).logits
    made = combine([read_peft(tmp_path / seed) for seed in "ab"], [0.5, 0.75], method)
    write_peft(tmp_path / "sum", made.adapter)
    assert (made.error > 0.01) == (method == "linear")
    torch.testing.assert_close(
        logits(load_peft(tmp_path / "sum", load_model(tmp_path / "base")[0])), wanted, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(logits_of_peft(tmp_path / "base", tmp_path / "sum"), wanted, rtol=1e-5, atol=1e-5)


@needs_peft
@pytest.mark.parametrize("family", ["llama", "olmoe"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves_of_other_kinds_is_read(family, kind, tmp_path):
    """And saved by us it is the same, whatever fields peft has written that we do not know."""
    base, adapter = make(tmp_path, family, kind)
    model = theirs(base, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "saved")
    found = load_peft(tmp_path / "saved", load_model(base)[0])
    wanted = logits_of_peft(base, adapter, model)
    torch.testing.assert_close(run(found, adapter), wanted, rtol=1e-5, atol=1e-5)
    save_peft(tmp_path / "copy", found)
    tables = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("saved", "copy")]
    assert tables[0] == tables[1]


def learning(base, adapter):
    """peft's model whose adapter learns. Virtual tokens it does not load so: they are put into an adapter that is new."""
    import peft
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = peft.PeftConfig.from_pretrained(adapter)
        if not config.is_prompt_learning:
            return peft.PeftModel.from_pretrained(plain, adapter, is_trainable=True).train()
        config.inference_mode = False
        made = peft.get_peft_model(plain, config)
    with torch.no_grad():
        made.prompt_encoder.default.embedding.weight.copy_(
            load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"]
        )
    return made.train()


@needs_peft
@pytest.mark.parametrize("kind", ["lora", *KINDS])
@pytest.mark.parametrize("family", ["qwen2", "olmoe"])
def test_gradients_are_those_of_peft(family, kind, tmp_path):
    """Of the loss of the same positions, with the base frozen, dropout left out; Poly draws the same numbers from one seed."""
    base = make_base(tmp_path / "base", family)
    if kind == "lora":
        make_adapter(tmp_path / "adapter", linear_layers(base, ATTENTION), lora_dropout=0.0)
    else:
        make_kind(tmp_path / "adapter", kind, base, family, **({"lora_dropout": 0.0} if kind == "dora" else {}))
    peers = learning(tmp_path / "base", tmp_path / "adapter")
    model = load_peft(tmp_path / "adapter", load_model(tmp_path / "base")[0], trainable=True).train()
    poly = kind == "poly"
    for seed, call in (
        (0, lambda: called(peers, TOKENS, **({"task_ids": torch.tensor(OF_ROWS)} if poly else {})).logits[:, -6:]),
        (0, lambda: model(TOKENS, state=tasks_for(model, OF_ROWS, 6) if poly else None).logits_BLV),
    ):
        torch.manual_seed(seed)
        torch.nn.functional.cross_entropy(call().flatten(0, 1), TOKENS.roll(-1, 1).flatten()).backward()
    wanted = {name: one.grad for name, one in peers.named_parameters() if one.requires_grad}
    found = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert sum(one.numel() for one in found.values()) == sum(one.numel() for one in wanted.values())
    sums = [
        sorted(float(grad.abs().sum()) for grad in grads)
        for grads in (wanted.values(), [p.grad for p in found.values()])
    ]
    assert sums[1] == pytest.approx(sums[0], rel=1e-4)


@needs_peft
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_what_is_generated_is_what_peft_finds_likeliest(kind, tmp_path):
    """With a cache here, by whole passes there: ``generate`` of peft 0.21.2 leaves out the prefix with transformers as it is now."""
    base, adapter = make(tmp_path, "llama", kind)
    model, token_BL = theirs(base, adapter), TOKENS
    for _ in range(6):
        with torch.no_grad():
            token_BL = torch.cat((token_BL, called(model, token_BL).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    sampling = SamplingConfig(max_tokens=6, temperature=0.0)
    found = generate(load_peft(adapter, load_model(base)[0]), TOKENS.tolist(), sampling)
    assert found == token_BL[:, -6:].tolist()


def saved_heads(root, family, **options):
    """A base, and adapters a and b of its queries and head as peft saves them: with a copy of the head beside."""
    base = make_base(root / "base", family)
    layers = {**linear_layers(base, ["q_proj"]), "lm_head": (32, 61)}
    for name in "ab":
        lengths = {
            f"{module}.lora_magnitude_vector": 2 + drawn(f"{name}{module}", (size[1],))
            for module, size in layers.items()
        }
        extra = lengths if options.get("use_dora") else {}
        make_adapter(root / f"made {name}", layers, seed=name, extra=extra, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs(root / "base", root / f"made {name}").save_pretrained(root / name)
        assert "base_model.model.lm_head.base_layer.weight" in load_file(root / name / "adapter_model.safetensors")
    return root


@needs_peft
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_adapters_of_the_head_that_peft_saves(family, options, tmp_path):
    """Put on, merged, taken off, saved again, and read by peft again."""
    place = saved_heads(tmp_path, family, **options)
    wanted = logits_of_peft(place / "base", place / "a")
    model = load_peft(place / "a", load_model(place / "base")[0])
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    save_peft(tmp_path / "copy", model)
    torch.testing.assert_close(logits_of_peft(place / "base", tmp_path / "copy"), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(merge(model)), wanted, rtol=1e-4, atol=2e-5)
    write_peft(tmp_path / "whole", read_peft(place / "a"))
    assert torch.equal(logits_of_peft(place / "base", tmp_path / "whole"), wanted)
    assert torch.equal(logits(unload(model)), logits(load_model(place / "base")[0]))


@needs_peft
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "way", [("cat", "exact"), ("linear", "linear"), ("ties_svd", "ties_svd")], ids=lambda way: way[1]
)
def test_sums_of_adapters_of_the_head_are_those_of_peft(family, way, tmp_path):
    place = saved_heads(tmp_path, family)
    model = theirs(place / "base", place / "a")
    options = {"density": 0.4} if "ties" in way[1] else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_adapter(place / "b", "b")
        model.add_weighted_adapter(["default", "b"], [0.5, 0.75], "sum", combination_type=way[0], **options)
    model.set_adapter("sum")
    with torch.no_grad():
        wanted = model.eval()(TOKENS).logits
    write_peft(
        tmp_path / "sum", combine([read_peft(place / name) for name in "ab"], [0.5, 0.75], way[1], **options).adapter
    )
    found = logits(load_peft(tmp_path / "sum", load_model(place / "base")[0]))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(logits_of_peft(place / "base", tmp_path / "sum"), wanted, rtol=1e-5, atol=2e-5)


@needs_peft
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rows_of_adapters_of_the_head_are_as_peft_computes_them(family, tmp_path):
    place = saved_heads(tmp_path, family)
    model = load_pool({name: place / name for name in "ab"}, load_model(place / "base")[0]).eval()
    wanted = torch.stack([logits_of_peft(place / "base", place / name)[row] for row, name in enumerate("ba")])
    with torch.no_grad():
        found = model(TOKENS, state=rows_for(model, ["b", "a"], TOKENS.shape[1])).logits_BLV
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


@needs_peft
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_copy_that_is_another_head_is_put_where_peft_puts_it(family, tmp_path):
    """Into the embedding too, where that is the head."""
    place = saved_heads(tmp_path, family)
    path = place / "a" / "adapter_model.safetensors"
    name = "base_model.model.lm_head.base_layer.weight"
    save_file({**load_file(path), name: drawn("another head", (61, 32))}, path)
    model = load_peft(place / "a", load_model(place / "base")[0])
    torch.testing.assert_close(logits(model), logits_of_peft(place / "base", place / "a"), rtol=1e-5, atol=1e-5)


@needs_peft
@pytest.mark.parametrize("word", ["gate", "mlp"])
@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_mixtures_that_peft_saves_whole(family, word, tmp_path):
    import peft
    import transformers

    make_base(tmp_path / "base", family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[word]))
        with torch.no_grad():
            for name, one in model.named_parameters():
                if one.requires_grad:
                    one.copy_(drawn(name, one.shape))
        model.save_pretrained(tmp_path / "saved")
    found = load_peft(tmp_path / "saved", load_model(tmp_path / "base")[0])
    torch.testing.assert_close(
        logits(found), logits_of_peft(tmp_path / "base", tmp_path / "saved"), rtol=1e-5, atol=1e-5
    )
