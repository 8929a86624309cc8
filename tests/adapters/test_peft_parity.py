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

from adapter_models import (
    ATTENTION,
    LATENT,
    MLP,
    TOKENS,
    drawn,
    linear_layers,
    logits,
    make_adapter,
    make_base,
    stacked,
)
from anabranch.adapters import combine, load_peft, read_peft, save_peft, write_peft
from anabranch.lm import load_model

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
    "one_layer": (["q_proj"], {"layers_to_transform": [1], "layers": [1]}),
}
CASES = [
    *(
        (family, name)
        for family in ("llama", "qwen2", "qwen3")
        for name in ("attention", "all", "ranks", "head", "one_layer")
    ),
    ("qwen2", "biases"),
    ("deepseek_v2", "latent"),
    *(("olmoe", name) for name in ("attention", "ranks", "stacked")),
    ("qwen3_moe", "stacked"),
]


def make(root, family, name):
    """(folder of the base, folder of the adapter)."""
    words, options = ADAPTERS[name]
    options = dict(options)
    base = make_base(root / "base", family)
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


def logits_of_peft(base, adapter):
    with torch.no_grad():
        return theirs(base, adapter)(TOKENS).logits


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
    found = logits(load_peft(adapter, load_model(base)[0]))[1, 1::2]
    wanted = torch.tensor(json.loads(GOLDEN.read_text())[f"{family}.{name}"])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


@needs_peft
@pytest.mark.parametrize(("family", "name"), CASES)
def test_logits_are_those_that_peft_gives(family, name, tmp_path):
    base, adapter = make(tmp_path, family, name)
    model = load_peft(adapter, load_model(base)[0])
    wanted = logits_of_peft(base, adapter)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    # What we write is the same to peft.
    save_peft(tmp_path / "copy", model)
    assert torch.equal(logits_of_peft(base, tmp_path / "copy"), wanted)


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
