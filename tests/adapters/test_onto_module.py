"""Routed adapters put onto models that are not ours: GPT-2 (Conv1D), Llama and Mamba of transformers."""

import contextlib
import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from anabranch.adapters import DynMoLE, LowRank, MixedLowRank, merge, mixture_report, unmerge, write_peft
from anabranch.adapters.beside import Beside, passing
from anabranch.adapters.dora import Dora
from anabranch.adapters.graft import layers_of
from anabranch.adapters.lora_mixer import SoftThenTopK
from anabranch.adapters.mhr import MultiHeadRouted, adapt, merge_task, to_single_lora
from anabranch.adapters.mhr.few_shot import mu as average
from anabranch.adapters.own_folder import read_own, write_own
from anabranch.adapters.put_on import added_names, linears_on, put_on, take_off
from anabranch.adapters.tasks import on_tasks, task_rows
from anabranch.adapters.use import use_of_tables
from anabranch.errors import CheckpointError, ConfigError, InputError
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.routing import LinearScore, Router

transformers = pytest.importorskip("transformers")
TOKENS = torch.tensor([[3, 17, 60, 8, 8, 41], [5, 5, 22, 1, 59, 30]])
SIZES = {"vocab_size": 61, "hidden_size": 16}


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=61,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_inner=24,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    return _made(transformers.GPT2LMHeadModel, config)


def llama():
    config = transformers.LlamaConfig(
        **SIZES,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _made(transformers.LlamaForCausalLM, config)


def mamba():
    config = transformers.MambaConfig(
        **SIZES, state_size=4, num_hidden_layers=2, intermediate_size=32, time_step_rank=4, pad_token_id=0
    )
    return _made(transformers.MambaForCausalLM, config)


def _made(kind, config):
    torch.manual_seed(0)
    return kind(config).eval()


MODELS = {
    "gpt2": (gpt2, ("*.attn.c_attn", "*.mlp.c_*")),
    "llama": (llama, ("*.q_proj", "*.k_proj", "*.v_proj", "*.down_proj")),
    # One of these is multiplied by and never called.
    "mamba": (mamba, ("*.in_proj", "*.dt_proj", "*.out_proj")),
}
SKILLS = MultiHeadRouted.Config(tasks=("sql", "law"), skills=3, heads=2, rank=2)
ROUTER = Router.Config(score=LinearScore.Config(init="kaiming_uniform"), select=SoftThenTopK.Config(top_k=2))
KINDS = {
    "mhr": SKILLS,
    "poly": SKILLS.replace(heads=1, granularity="layerwise"),
    "dynmole": DynMoLE(num_experts=3, rank=2, dropout=0.0).layer(3),
    # For tokens of which none is soft.
    "top_k": DynMoLE(num_experts=3, rank=2, policy="top_k", keep_top_k=1, dropout=0.0).layer(3),
    "lora_mixer": MixedLowRank.Config(ranks=(2, 2, 2), router=ROUTER),
    "lora_mixer_groups": MixedLowRank.Config(ranks=(2, 2, 2), router=ROUTER, router_group="qkv"),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param][0]()


def patterns(model, kind=None):
    found = next(words for make, words in MODELS.values() if type(make()) is type(model))
    # Who decides together reads the same.
    if kind == "lora_mixer_groups":
        found = [word for word in found if word.endswith(("q_proj", "k_proj", "v_proj"))] or found[:1]
    return found


def put(model, kind, seed=0):
    return put_on(model, dict.fromkeys(patterns(model, kind), KINDS[kind]), seed=seed)


def drawn(model, seed=5):
    """The model with numbers in what is zero at first."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def of_tasks(model, kind, names=("sql", "law")):
    return on_tasks(model, names) if kind in ("mhr", "poly") else contextlib.nullcontext()


def logits(model, token_BL=TOKENS, **options):
    with torch.no_grad():
        return model(token_BL, use_cache=False, **options).logits


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_new_layers_add_nothing_and_go_again(model, kind):
    before, names = logits(model), list(model.state_dict())
    assert put(model, kind) is model
    with of_tasks(model, kind):
        assert torch.equal(logits(model), before)
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learns == {name for name in added_names(model) if name in dict(model.named_parameters())} != set()
    drawn(model)
    with of_tasks(model, kind):
        assert not torch.allclose(logits(model), before)
    assert take_off(model) is model
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == names
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ConfigError, match="no layers beside its matrices"):
        take_off(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_changes_the_adapter_alone(model, kind):
    drawn(put(model, kind)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    labels = task_rows(model, ["sql", "law"], 6) if kind in ("mhr", "poly") else {}
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.5)
    with passing(model, labels=labels, length=6) as seen:
        loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
        extra = seen.losses()
        (loss + sum(extra.values())).backward()
    assert bool(extra) == (kind not in ("mhr", "poly"))
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert changed <= set(added_names(model))
    assert all(parameter.grad is not None for parameter in learned)


@pytest.mark.parametrize("kind", ["dynmole", "top_k", "lora_mixer"])
def test_few_experts_are_all_with_weights_of_zero(model, kind):
    """Rows go to their experts alone, and what is made is what all experts made, weighed by what the router kept."""
    drawn(put(model, kind))
    for layer in layers_of(model).values():
        layer.register_forward_hook(_by_all_experts)
    checked = logits(model)
    assert checked.isfinite().all()
    report = mixture_report(model, [(TOKENS, None, None)])
    assert len(report.routers) == len(layers_of(model))


def _by_all_experts(layer, args, y):
    x, context = args
    routing = layer.route(x, context)
    weight_NE = x.new_zeros(routing.num_items, layer.pool.num_experts)
    used_NK = routing.index_NK >= 0
    weight_NE.scatter_add_(1, routing.index_NK.clamp_min(0), routing.weight_NK * used_NK)
    x_NC = x.flatten(0, -2)
    wanted = sum(
        weight_NE[:, number, None]
        * layer.pool.scales[number]
        * (x_NC @ layer.pool.a[number].T @ layer.pool.b[number].T)
        for number in range(layer.pool.num_experts)
    )
    torch.testing.assert_close(y.flatten(0, -2), wanted, rtol=1e-4, atol=1e-4)


def test_a_row_of_a_task_is_as_if_it_were_alone(model):
    drawn(put(model, "mhr"))
    with on_tasks(model, ["sql", "law"]):
        both = logits(model)
    with on_tasks(model, "law"):
        close(both[1:], logits(model, TOKENS[1:]))
        close(both[1], logits(model)[1])
    assert not torch.allclose(both[0], logits_of(model, "law", TOKENS[:1])[0])
    with passing(model, labels=task_rows(model, ["sql", "law"], 6)):
        assert torch.equal(logits(model), both)
    with on_tasks(model, ["sql", "law"]), passing(model, length=6):
        assert torch.equal(logits(model), both)
    # Each row twice in a row, as beams are.
    with on_tasks(model, ["sql", "law"]):
        close(logits(model, TOKENS.repeat_interleave(2, 0)), both.repeat_interleave(2, 0))
        with pytest.raises(InputError, match="a pass has 3 rows, and 2 tasks are told"):
            logits(model, TOKENS[[0, 1, 1]])
    with pytest.raises(InputError, match=r"routes by task, and no task is told; .* or use on_tasks"):
        logits(model)
    assert all(not module.told for module in model.modules() if isinstance(module, Beside))


def logits_of(model, task, token_BL=TOKENS):
    with on_tasks(model, task):
        return logits(model, token_BL)


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_keeps_the_task_of_its_row(model, beams):
    drawn(put(model, "mhr"))
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(TOKENS)
    with on_tasks(model, ["sql", "law"]):
        both = model.generate(TOKENS, attention_mask=mask, **options)
    for row, task in enumerate(("sql", "law")):
        with on_tasks(model, task):
            alone = model.generate(TOKENS[row : row + 1], attention_mask=mask[:1], **options)
        assert torch.equal(both[row : row + 1], alone)


def test_what_runs_again_in_the_backward_pass_has_its_task():
    model = drawn(put(llama(), "mhr")).train()
    grads = []
    for checkpoints in (False, True):
        if checkpoints:
            for block in model.model.layers:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        model.zero_grad()
        with on_tasks(model, ["sql", "law"]):
            model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        grads.append(
            {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        )
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_again(model, kind, tmp_path):
    base = copy.deepcopy(model)
    drawn(put(model, kind))
    with of_tasks(model, kind):
        wanted = logits(model)
    write_own(tmp_path / "made", model)
    again = read_own(tmp_path / "made", copy.deepcopy(base))
    with of_tasks(again, kind):
        assert torch.equal(logits(again), wanted)
    assert linears_on(again) == linears_on(model)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert any(parameter.requires_grad for parameter in read_own(tmp_path / "made", base, trainable=True).parameters())


def test_folders_of_other_models_are_told(tmp_path):
    write_own(tmp_path / "made", put(gpt2(), "mhr"))
    ours = Decoder.Config(
        vocab_size=61,
        dim=16,
        num_layers=1,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=SwiGLU.Config(hidden_dim=24),
        max_positions=16,
    ).build()
    with pytest.raises(
        CheckpointError, match="is of a 'GPT2LMHeadModel', whose layers have other names than those of this Decoder"
    ):
        read_own(tmp_path / "made", ours)
    write_own(tmp_path / "ours", put_on(ours, {"*.attention.q": LowRank.Config(rank=2)}))
    with pytest.raises(CheckpointError, match="is of one of ours, whose layers have other names"):
        read_own(tmp_path / "ours", gpt2())
    other = gpt2()
    with torch.no_grad():
        other.transformer.h[0].attn.c_attn.weight.add_(1)
    with pytest.raises(CheckpointError, match="was trained on another base"):
        read_own(tmp_path / "made", other)
    assert not layers_of(other)


def test_few_shot_forms_and_exports(model, tmp_path):
    drawn(put(model, "mhr"))
    wanted = logits_of(model, "law")
    assert use_of_tables(model).weight_TME.shape == (2, len(layers_of(model)), 3)
    for adapter in (to_single_lora(model, "law"), average(model)):
        assert adapter.pairs.keys() == layers_of(model).keys()
    write_peft(tmp_path / "law", to_single_lora(model, "law"))
    close(logits(merge_task(copy.deepcopy(model), "law")), wanted)
    new = adapt(copy.deepcopy(model), "legal", mode="z")
    assert {name.rpartition(".")[2] for name, one in new.named_parameters() if one.requires_grad} == {"z"}
    mean = adapt(copy.deepcopy(model), mode="mu")
    assert all(isinstance(layer, LowRank) for layer in layers_of(mean).values())


# Into the matrices


def our_llama():
    config = Decoder.Config(
        vocab_size=61,
        dim=16,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=2, num_kv_heads=1, qkv_bias=True),
        feed_forward=SwiGLU.Config(hidden_dim=24),
        max_positions=16,
        init_std=0.2,
    )
    return config.build(seed=1).eval()


def test_a_task_goes_into_the_matrices_and_out_again(model):
    before, names = {name: value.clone() for name, value in model.state_dict().items()}, list(model.state_dict())
    drawn(put(model, "mhr"))
    wanted = logits_of(model, "law")
    with pytest.raises(ConfigError, match=r"a layer of kind 'multi_head_routed' .* merge_task leaves"):
        merge(model)
    merge_task(model, "law")
    beside = logits(model)
    assert merge(model) is model
    assert list(model.state_dict()) == names
    close(logits(model), wanted)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ConfigError, match="merged already"):
        merge(model)
    assert unmerge(model) is model
    assert torch.equal(logits(model), beside)
    with pytest.raises(ConfigError, match="not merged"):
        unmerge(model)
    take_off(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("linears", ["*.attention.*", "blocks.*.feed_forward.*", "blocks.0.*"])
def test_a_task_goes_into_the_matrices_of_ours_and_out_again(linears):
    model = our_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config
    drawn(put_on(model, {linears: SKILLS.replace(granularity="coarsegrained")}))
    with torch.no_grad():
        wanted = model(TOKENS, state=task_rows(model, ["law", "law"], 6)).logits_BLV
        merge_task(model, "law")
        beside, put_config = model(TOKENS).logits_BLV, model.config
        merge(model)
        close(model(TOKENS).logits_BLV, wanted)
        assert model.config == config
        unmerge(model)
        assert model.config == put_config
        assert torch.equal(model(TOKENS).logits_BLV, beside)
    take_off(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_merged_for_good_is_forgotten(model):
    merge(drawn(put_on(model, {patterns(model)[0]: LowRank.Config(rank=2)})), keep=False)
    with pytest.raises(ConfigError, match="no adapter"):
        unmerge(model)
    # Another can be put on.
    put(model, "mhr")


def test_what_was_put_on_since_is_told(model):
    merge(drawn(put_on(model, {patterns(model)[0]: LowRank.Config(rank=2)})))
    put(model, "mhr")
    with pytest.raises(ConfigError, match="another adapter since"):
        unmerge(model)
    take_off(model)
    unmerge(model)


def test_a_matrix_that_is_another_tensor_too_takes_in_nothing():
    model = gpt2()
    merged = drawn(put_on(model, {"lm_head": LowRank.Config(rank=2)}))
    before = logits(merged)
    with pytest.raises(ConfigError, match=r"lm_head is transformer\.wte\.weight of the model too"):
        merge(merged)
    assert torch.equal(logits(merged), before)


class Read(nn.Module):
    """A layer and what a forward pass makes of it."""

    def __init__(self, how, layer=None):
        super().__init__()
        self.layer, self.how = nn.Linear(16, 16) if layer is None else layer, how

    def forward(self, x):
        return self.how(self.layer, x)


READ = {
    "attention of torch": lambda: (
        nn.MultiheadAttention(16, 4, batch_first=True),
        "out_proj",
        lambda m, x: m(x, x, x)[0],
    ),
    "encoder layer": lambda: (
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
        "self_attn.out_proj",
        lambda m, x: m(x),
    ),
    "turned": lambda: (Read(lambda layer, x: x @ layer.weight.T), "layer", lambda m, x: m(x)),
    "addmm": lambda: (
        Read(lambda layer, x: torch.addmm(layer.bias, x[0], layer.weight.t())),
        "layer",
        lambda m, x: m(x),
    ),
    "einsum": lambda: (Read(lambda layer, x: torch.einsum("oc,blc->blo", layer.weight, x)), "layer", lambda m, x: m(x)),
    "in a list": lambda: (Read(lambda layer, x: x @ torch.cat([layer.weight])), "layer", lambda m, x: m(x)),
    "Conv1D": lambda: (
        Read(lambda layer, x: x @ layer.weight, transformers.pytorch_utils.Conv1D(16, 16)),
        "layer",
        lambda m, x: m(x),
    ),
}


@pytest.mark.parametrize("case", READ)
@pytest.mark.parametrize("grad", [True, False])
def test_a_matrix_that_is_read_and_not_called_is_told_where_what_stands_beside_it_would_add_nothing(case, grad):
    model, name, run = READ[case]()
    model.eval()
    drawn(put_on(model, {name: LowRank.Config(rank=2)}))
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(ConfigError, match=f"reads the matrix of {name} and does not call it"),
    ):
        run(model, torch.randn(2, 5, 16))
    take_off(model)
    assert run(model, torch.randn(2, 5, 16)).isfinite().all()


@pytest.mark.parametrize("turned", [True, False])
def test_what_a_matrix_is_asked_of_itself_is_answered(turned):
    def how(layer, x):
        weight = layer.weight
        assert (weight.shape, weight.dtype, weight.device.type, weight.dim(), weight.numel()) == (
            (16, 16),
            x.dtype,
            "cpu",
            2,
            256,
        )
        assert (weight.is_floating_point(), weight.requires_grad, weight.size(0), weight.is_cuda) == (
            True,
            False,
            16,
            False,
        )
        return layer(x)

    model = Read(how, transformers.pytorch_utils.Conv1D(16, 16) if turned else None)
    drawn(put_on(model, {"layer": LowRank.Config(rank=2)}))
    assert model(torch.randn(2, 5, 16)).isfinite().all()


class Doubles(nn.Linear):
    def forward(self, x, gain=1.0):
        return super().forward(x) * 2 * gain


def hooked():
    layer = nn.Linear(16, 16)
    layer.register_forward_hook(lambda module, given, found: found * 3)
    return layer


def replaced():
    layer = nn.Linear(16, 16)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight) * 3
    return layer


@pytest.mark.parametrize(
    "make",
    [lambda: Doubles(16, 16), hooked, replaced, lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))],
    ids=["forward of its own", "hook", "forward replaced", "weight made anew"],
)
def test_a_layer_that_does_more_than_multiply_has_something_beside_it_and_takes_nothing_in(make):
    layer, x = make(), torch.randn(2, 5, 16)
    before = layer(x)
    model = drawn(put_on(Read(lambda layer, x: layer(x), layer), {"layer": LowRank.Config(rank=2)}))
    beside = model(x)
    torch.testing.assert_close(beside - before, model.layer.beside(x))
    with pytest.raises(ConfigError, match="that does more than multiply by its matrix"):
        merge(model)
    assert torch.equal(model(x), beside)


@pytest.mark.parametrize(
    ("first", "last", "shares"), [(0, 16, True), (8, 24, True), (16, 32, True), (None, None, False)]
)
def test_a_matrix_in_memory_that_others_read_takes_nothing_in(first, last, shares):
    model = Read(lambda layer, x: layer(x))
    model.register_buffer("all", torch.randn(32, 16))
    if shares:
        model.layer.weight = nn.Parameter(model.all[first:last])
    drawn(put_on(model, {"layer": LowRank.Config(rank=2)}))
    before = model.all.clone()
    if shares:
        with pytest.raises(ConfigError, match="layer is all of the model too, which would change with it"):
            merge(model)
    else:
        merge(model)
    assert torch.equal(model.all, before)


# What cannot be


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.zeros(3, 4, 4))
        self.few = nn.Linear(4, 4)
        self.few.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
        self.none, self.complex = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, dtype=torch.complex64)
        self.none.weight, self.none.out_features = nn.Parameter(torch.zeros(0, 4)), 0


@pytest.mark.parametrize(
    ("pattern", "kind", "message"),
    [
        (
            "*.c_attn",
            SKILLS,
            r"'\*\.c_attn', which fits no linear layer of the Stacked; its linear layers are called one, few, none and 1 more",
        ),
        ("norm", SKILLS, "'norm', which fits norm, a LayerNorm and no linear layer"),
        ("experts.up", SKILLS, "fits experts.up, a stack of 3 matrices in one tensor, as experts are stored"),
        ("few", SKILLS, r"few is a Linear stored in few bits \(int8\), which nothing is put beside"),
        ("none", SKILLS, r"none has a matrix of \[0, 4\], beside which nothing can stand"),
        ("complex", SKILLS, "complex is of complex numbers"),
        ("one", Dora.Config(rank=2), "of kind 'dora', which does more than add"),
        ("one", SKILLS.replace(heads=3), "heads is 3, which does not divide the 4 inputs of one"),
    ],
)
def test_what_nothing_can_stand_beside(pattern, kind, message):
    model = Stacked()
    names = list(model.state_dict())
    with pytest.raises(ConfigError, match=message) as caught:
        put_on(model, {pattern: kind})
    assert "\n" not in str(caught.value)
    assert list(model.state_dict()) == names
    assert model.one.weight.requires_grad


def test_what_is_no_model_or_has_layers_already():
    model = put(gpt2(), "mhr")
    with pytest.raises(ConfigError, match="already; take it off first, or merge it"):
        put(model, "dynmole")
    for wrong in ("gpt2", None):
        with pytest.raises(ConfigError, match="layers are put onto a Decoder of ours or a module of torch"):
            put_on(wrong, {"*": SKILLS})
    with pytest.raises(ConfigError, match="around a Decoder, 0; put layers onto that one"):
        put_on(nn.Sequential(our_llama()), {"*": SKILLS})
    with pytest.raises(ConfigError, match="there is nothing to put on"):
        put_on(gpt2(), {})


def test_a_matrix_that_stands_at_two_places_has_one_layer():
    model = nn.Module()
    model.one = nn.Linear(4, 4)
    model.again = model.one
    put_on(model, {"one": LowRank.Config(rank=1)})
    assert model.one is model.again
    take_off(model)
    assert isinstance(model.one, nn.Linear)
    assert model.one is model.again


class Gathering(nn.Module):
    """Gives a layer some of the tokens, as experts get them."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)

    def forward(self, x_BLC):
        return self.one(x_BLC.flatten(0, 1)[::2])


def test_items_whose_rows_nobody_knows_are_told():
    model = put_on(Gathering(), {"one": SKILLS})
    x_BLC = torch.randn(2, 3, 4)
    with (
        on_tasks(model, ["sql", "law"]),
        pytest.raises(
            InputError, match=r"one gets \[3, 4\] in a pass of 2 rows of 3, and which of them these are nobody"
        ),
    ):
        model(x_BLC)
    with on_tasks(model, "law"):
        assert model(x_BLC).shape == (3, 4)
