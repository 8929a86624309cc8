"""Formulas against what is measured: numbers and bytes of tensors, bytes of files, FLOPs as torch counts them, within 15 %."""

import copy
import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from anabranch.adapters import catalogue
from anabranch.adapters.tasks import task_rows
from anabranch.errors import ConfigError
from anabranch.lm import Decoder
from anabranch.nn import MoE, SelfAttention, SwiGLU, kernels
from anabranch.routing import Router, TopK
from with_peft import needs_peft

BATCH, LENGTH = 2, 24
CONFIG = Decoder.Config(
    vocab_size=96,
    dim=64,
    num_layers=3,
    attention=SelfAttention.Config(num_heads=4, num_kv_heads=2, qkv_bias=True),
    feed_forward=SwiGLU.Config(hidden_dim=160),
    max_positions=64,
)
SHAPE = catalogue.Shape.of(CONFIG)
# By id: options.
CASES = {
    "lora": {"rank": 16},
    "rslora": {"rank": 16, "targets": ("all",)},
    "lora-fa": {"rank": 16},
    "dylora": {"rank": 16},
    "adapter-drop": {"rank": 16, "drop": 2},
    "adapter-parallel": {"width": 16},
    "shira": {"rank": 8},
    "intrinsic": {"size": 512},
    "poly": {"rank": 8, "number": 3},
    "mhr": {"rank": 8, "number": 3},
    "molora": {"rank": 8, "number": 3},
    "dora": {"rank": 8},
    "ia3": {},
    "ssf": {},
    "adapter-houlsby": {"width": 16},
    "sparse-adapter": {"width": 16, "sparsity": 0.8},
    "adapter-fusion": {"width": 16, "number": 3},
    "adamix": {"width": 16, "number": 3},
    "lst": {},
    "bitfit": {},
    "ln-tuning": {},
    "attention-tuning": {},
    "full": {},
}
# Their FLOPs depend on how attention is computed.
IN_FRONT = {"prompt-tuning": {"tokens": 6}, "prefix-tuning": {"tokens": 6}, "mam": {"tokens": 6, "width": 16}}
IN_FRONT |= {"unipelt": {"tokens": 6, "rank": 8, "width": 16}}


@pytest.fixture(scope="module")
def base():
    return CONFIG.build()


def told(model, batch, length):
    """What a pass is told where a model routes by task."""
    by_task = any(getattr(module, "routes_by_task", False) for module in model.modules())
    return {"state": task_rows(model, ["0"] * batch, length)} if by_task else {}


def counted(model, *, backward):
    """FLOPs as torch counts them: of its own products, so in float64, which our kernels leave to it, and attention written out.

    Attention is counted over the whole square there, of which the causal half is meant.
    """
    model = copy.deepcopy(model).double()
    token_BL = torch.randint(96, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    # Which counts products that are added in place, where it is told.
    told_apart = {torch.ops.aten.addmm_: lambda y, a, b, **more: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=told_apart) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model.train()(token_BL, target_BL=token_BL, **told(model, BATCH, LENGTH)).loss
        if backward:
            loss.backward()
    return counter.get_total_flops()


def estimated(id, options, shape=SHAPE):
    return catalogue.estimate(catalogue.find(id), shape, options, batch=BATCH, length=LENGTH)


@pytest.mark.parametrize("id", [*CASES, *IN_FRONT])
def test_numbers_and_bytes(id, base):
    options = (CASES | IN_FRONT)[id]
    model, found = copy.deepcopy(base), estimated(id, options)
    applied = catalogue.apply(model, id, **options)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in learning) == found.trainable
    assert found.share == found.trainable / sum(parameter.numel() for parameter in base.parameters())
    if not applied.card.trains_base:
        measured = sum(value.numel() * value.element_size() for value in applied.state().values())
        assert found.adapter_bytes == pytest.approx(measured, rel=0.15)
    optimizer = torch.optim.AdamW(learning)
    token_BL = torch.arange(4).view(1, 4)
    model(token_BL, target_BL=token_BL, **told(model, 1, 4)).loss.backward()
    gradients = sum(one.grad.numel() * one.grad.element_size() for one in learning)
    optimizer.step()
    moments = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    )
    assert found.gradient_bytes == pytest.approx(gradients, rel=0.15)
    assert found.optimizer_bytes == pytest.approx(moments, rel=0.15)


@pytest.mark.parametrize("id", CASES)
def test_flops(id, base):
    plain, model = counted(base, backward=False), copy.deepcopy(base)
    found = estimated(id, CASES[id])
    tokens = BATCH * LENGTH
    catalogue.apply(model, id, **CASES[id])
    forward = counted(model, backward=False)
    assert found.base_flops * tokens == pytest.approx(plain, rel=0.05)
    assert found.added_flops * tokens == pytest.approx(forward - plain)
    assert found.training_flops * tokens == pytest.approx(counted(model, backward=True), rel=0.05)


def test_flops_of_experts():
    """A token goes through a part of them, and so do adapters beside them."""
    moe = MoE.Config(num_experts=4, hidden_dim=64, router=Router.Config(select=TopK.Config(top_k=2)))
    config = CONFIG.replace(feed_forward=moe)
    shape = catalogue.Shape.of(config)
    assert {matrix.share for matrix in shape.matrices if "experts" in matrix.part} == {0.5}
    found = estimated("lora", {"targets": ("mlp",), "rank": 8}, shape)
    assert found.trainable == 3 * 4 * 8 * (3 * (64 + 64))
    assert found.added_flops == pytest.approx(3 * 2 * 2 * 8 * (3 * (64 + 64)))
    # Of the router too, which no matrix stands for.
    full = estimated("full", {}, shape)
    assert full.training_flops == pytest.approx(full.full_flops)


@pytest.mark.parametrize("id", ["full", "bitfit", "lora"])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_file_of_the_whole_model_is_of_its_numbers(id, width):
    """With a header of some kilobytes; the files of others are in float32 whatever the model is in."""
    wide, found = (
        catalogue.estimate(catalogue.find(id), SHAPE, CASES[id], base_width=each).file_bytes for each in (4, width)
    )
    numbers = SHAPE.parameters if catalogue.find(id).trains_base else 0
    assert wide - found == (4 - width) * numbers
    assert 4 * numbers < wide < 4 * numbers + 2**20


def test_a_head_that_is_the_embedding_learns_where_all_does():
    shape = catalogue.Shape.of(CONFIG.replace(tie_embeddings=True, vocab_size=4096))
    full = estimated("full", {}, shape)
    assert full.training_flops == pytest.approx(full.full_flops)
    # With frozen weights there is the gradient of its input alone.
    lora, untied = (
        estimated("lora", {}, catalogue.Shape.of(CONFIG.replace(tie_embeddings=tied, vocab_size=4096)))
        for tied in (True, False)
    )
    assert lora.training_flops == pytest.approx(untied.training_flops)


def test_prompts_and_prefixes_make_sequences_longer():
    tokens, length = 6, LENGTH
    prompt, prefix = estimated("prompt-tuning", {"tokens": tokens}), estimated("prefix-tuning", {"tokens": tokens})
    assert prompt.trainable == tokens * 64
    assert prompt.added_flops == pytest.approx(prompt.base_flops * tokens / length)
    assert prefix.trainable == 2 * 3 * tokens * 32
    assert prefix.added_flops == 3 * 4 * 64 * tokens
    assert prompt.merged_flops is None
    # Vectors in front of the first layer learn through all of the model.
    assert prompt.training_flops > estimated("lora", {}).training_flops


@settings(max_examples=20)
@given(rank=st.integers(1, 64), layers=st.integers(1, 4), dim=st.sampled_from([32, 64]))
def test_what_learns_less_costs_less(rank, layers, dim):
    shape = catalogue.Shape.of(CONFIG.replace(num_layers=layers, dim=dim))
    lora, fixed = (estimated(id, {"rank": rank}, shape) for id in ("lora", "lora-fa"))
    full = estimated("full", {}, shape)
    assert fixed.trainable < lora.trainable
    assert fixed.optimizer_bytes < lora.optimizer_bytes
    assert fixed.training_flops <= lora.training_flops
    assert lora.training_flops - 3 * lora.added_flops < full.training_flops
    assert full.training_flops == pytest.approx(full.full_flops)
    assert lora.merged_flops == 0


PEFT = {
    "lora": {"rank": 16},
    "dora": {"rank": 16},
    "vera": {"rank": 64},
    "randlora": {"rank": 8},
    "loha": {"rank": 8},
    "hira": {"rank": 16},
    "miss": {"rank": 16},
    "delora": {"rank": 16},
    "fourierft": {"entries": 100},
    "oft": {"block": 16},
    "ia3": {},
    "prompt-tuning": {"tokens": 6},
    "prefix-tuning": {"tokens": 6},
}


@needs_peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("id", PEFT)
def test_flops_of_peft(id):
    """The whole forward pass, of transformers' Llama of the same sizes."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = catalogue.apply_peft(transformers.LlamaForCausalLM(config), id, **PEFT[id])
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(torch.zeros(BATCH, LENGTH, dtype=torch.int64))
    found = estimated(id, PEFT[id])
    assert (found.base_flops + found.added_flops) * BATCH * LENGTH == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_an_estimate_is_json():
    for card in catalogue.CARDS.values():
        if card.count is not None:
            told = json.loads(json.dumps(catalogue.estimate(card, SHAPE).to_dict()))
            assert told["id"] == card.id
            assert told["bytes"]["optimizer"] == 8 * told["trainable"]


@pytest.mark.parametrize("ids", ["3,17", ("3", "17"), [3, 17]])
def test_ids_of_tokens(ids):
    found = estimated("trainable-tokens", {"ids": ids})
    assert (found.options["ids"], found.trainable) == (("3", "17"), 2 * 64)
    assert estimated("trainable-tokens", {"ids": 3}).options["ids"] == ("3",)


@pytest.mark.parametrize(
    ("id", "options", "more", "message"),
    [
        ("lora", {"rank": 0}, {}, "rank of lora is 0; it must be a whole number, at least 1"),
        ("lora", {"rank": True}, {}, "rank of lora is True"),
        ("lora", {"rank": "8"}, {}, "rank of lora is '8'"),
        ("lora", {"alpha": "x"}, {}, "alpha of lora is 'x'; it must be a finite number"),
        ("lora", {"alpha": float("nan")}, {}, "alpha of lora is nan"),
        (
            "lora",
            {"rank": 10**12},
            {},
            "rank of lora is 1000000000000; it must be a whole number, at least 1 and at most",
        ),
        ("cpt", {"ids": ("3", "x")}, {}, r"ids of cpt is \('3', 'x'\); it must be ids of tokens, such as 3,17"),
        ("trainable-tokens", {"ids": ("3", "3")}, {}, "it must be ids of tokens, such as 3,17, each once"),
        ("cartridge", {"tokens": 1}, {}, "tokens of cartridge is 1; it must be a whole number, at least 2"),
        ("lora", {"targets": 3}, {}, "targets of lora is 3; it must be names of linear layers"),
        (
            "adapter-parallel",
            {"activation": 3},
            {},
            "activation of adapter-parallel is 3; it must be a word, such as relu",
        ),
        ("lora", {"width": 1}, {}, "lora has no option 'width'; it has rank, alpha, targets"),
        ("bitfit", {"rank": 1}, {}, "bitfit has no option 'rank'; it has none"),
        ("lora", {"targets": ("up_proi",)}, {}, "targets has 'up_proi', which names no linear layer"),
        ("lora", {}, {"batch": 0}, "batch is 0; it must be at least 1"),
        ("lora", {}, {"length": 0}, "length is 0; it must be at least 1"),
        (
            "side-tuning",
            {},
            {},
            "side-tuning trains those of the small network, and one, which cannot be told beforehand",
        ),
        ("adapter-drop", {"drop": 3}, {}, "adapter-drop would train nothing: no linear layer is left to adapt"),
    ],
)
def test_what_cannot_be_estimated(id, options, more, message):
    with pytest.raises(ConfigError, match=message):
        catalogue.estimate(catalogue.find(id), SHAPE, options, **more)


def kept(model, batch=BATCH, length=LENGTH):
    """Bytes that a step keeps for its backward pass, each storage once; without parameters."""
    own = {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers()]}
    found = {}

    def pack(value):
        storage = value.untyped_storage()
        # Integers are plans and ids, not activations.
        if value.is_floating_point() and storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return value

    token_BL = torch.randint(96, (batch, length), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = model.train()(token_BL, target_BL=token_BL, **told(model, batch, length)).loss
    # All are alive, so that no address was given twice.
    made = sum(storage.nbytes() for storage in found.values())
    loss.backward()
    return made


KEPT = {
    "lora": {"rank": 16},
    "rslora": {"rank": 16, "targets": ("all",)},
    "lora-fa": {"rank": 16},
    "adapter-drop": {"rank": 16, "drop": 2},
    "adapter-houlsby": {"width": 16},
    "sparse-adapter": {"width": 16, "sparsity": 0.8},
    "adapter-fusion": {"width": 16, "number": 3},
    "adapter-parallel": {"width": 16},
    "ia3": {},
    "ssf": {},
    "bitfit": {},
    "ln-tuning": {},
    "attention-tuning": {},
    "full": {},
    "lst": {},
    "unipelt": {"tokens": 6, "rank": 8, "width": 16},
    "prompt-tuning": {"tokens": 6},
}


@pytest.mark.skipif(kernels.load() is None, reason="without kernels more is kept")
@pytest.mark.parametrize("id", KEPT)
def test_activations_that_a_step_keeps(id, base):
    model = copy.deepcopy(base)
    catalogue.apply(model, id, **KEPT[id])
    assert estimated(id, KEPT[id]).activation_bytes == pytest.approx(kept(model), rel=0.15)


@pytest.mark.skipif(kernels.load() is None, reason="without kernels more is kept")
def test_activations_of_queries_behind_a_gate():
    """Heads that are much wider than the model, so that what UniPELT keeps of queries is most of it."""
    wide = SelfAttention.Config(num_heads=8, num_kv_heads=1, head_dim=32)
    config = CONFIG.replace(dim=8, attention=wide, feed_forward=SwiGLU.Config(hidden_dim=8))
    model, options = config.build(), {"tokens": 6, "rank": 2, "width": 2}
    catalogue.apply(model, "unipelt", **options)
    found = estimated("unipelt", options, catalogue.Shape.of(config))
    assert found.activation_bytes == pytest.approx(kept(model), rel=0.05)


def test_activations_of_what_goes_along_the_model_or_takes_no_gradient_below():
    """LST keeps at most half of what LoRA does; what learns in the last layers alone keeps nothing of those below."""
    lora, ladder = (estimated(id, {"targets": ("all",)} if id == "lora" else {}) for id in ("lora", "lst"))
    assert ladder.activation_bytes <= lora.activation_bytes / 2
    dropped = [estimated("adapter-drop", {"rank": 16, "drop": drop}).activation_bytes for drop in range(3)]
    assert dropped == sorted(dropped, reverse=True)
    assert dropped[2] < 0.6 * dropped[0]
    twice = catalogue.estimate(catalogue.find("lora"), SHAPE, {}, batch=2 * BATCH, length=LENGTH)
    assert twice.activation_bytes == 2 * estimated("lora", {}).activation_bytes
    half = catalogue.estimate(catalogue.find("lora"), SHAPE, {}, batch=BATCH, length=LENGTH, base_width=2)
    assert estimated("lora", {}).activation_bytes / 2 < half.activation_bytes < estimated("lora", {}).activation_bytes
