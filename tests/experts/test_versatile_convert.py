"""Dense models made versatile on their own weights, and back: ours, and blocks of transformers."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from anabranch.data import DataConfig, Files
from anabranch.errors import ConfigError
from anabranch.experts.versatile import (
    PatchedModel,
    VersatileFFN,
    VersatileMLP,
    collect_routing,
    follow_steps,
    from_dense,
    patch_model,
    record_difficulty,
    to_dense,
    unpatch,
)
from anabranch.lm import Decoder
from anabranch.nn import BuildContext, Dense, ForwardContext, MoE, RMSNorm, SelfAttention, SwiGLU
from anabranch.routing import BiasBalancer, Router, SwitchLoss, TopK, record_routing
from anabranch.routing.relax import Temperature
from anabranch.testing import check_task
from anabranch.train import Constant, TaskRunConfig, TextTask, TrainConfig, Trainer, read_metrics

FP32_TOLERANCE = 1e-5
SMALL = {"num_experts": 4, "max_loops": 3}


def tokens(batch=2, length=9, seed=0):
    return torch.randint(0, 31, (batch, length), generator=torch.Generator().manual_seed(seed))


def dense(hidden_dim=24, **changes):
    config = Decoder.Config(
        vocab_size=31,
        dim=16,
        num_layers=2,
        init_std=0.2,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=SwiGLU.Config(hidden_dim=hidden_dim),
    )
    return config.replace(**changes).build(seed=0)


# ---- our own models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_one_loop_is_the_dense_model_to_the_bit(training):
    """L_max = 1: one loop is all there is, lambda = 0, and nothing of the width path is left."""
    model, token_BL = dense().train(training), tokens()
    made = from_dense(model, num_experts=4, max_loops=1)
    assert made.training is training
    with torch.set_grad_enabled(training):
        assert torch.equal(made(token_BL).logits_BLV, model(token_BL).logits_BLV)
    if training:
        made(token_BL).logits_BLV.sum().backward()
        gradients = {
            name: parameter.grad.clone() for name, parameter in made.named_parameters() if ".paths." not in name
        }
        model(token_BL).logits_BLV.sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-4)  # sums in another order


def test_weights_are_shared_and_keys_are_the_dense_ones():
    model = dense()
    made = from_dense(model, **SMALL)
    state, own = model.state_dict(), made.state_dict()
    assert {name for name in own if name not in state} == {
        f"blocks.{layer}.feed_forward.paths.{head}"
        for layer in (0, 1)
        for head in ("router.score.weight", "loops.score.weight", "loops.temperature.value")
    }
    for name, value in state.items():
        assert own[name].data_ptr() == value.data_ptr(), name
    again = dense()
    nn.init.zeros_(again.blocks[0].feed_forward.w13.weight)
    found = again.load_state_dict(own, strict=False)
    assert not found.missing_keys
    assert torch.equal(again(tokens()).logits_BLV, model(tokens()).logits_BLV)


def test_to_dense_undoes_from_dense():
    model = dense().eval()
    back = to_dense(from_dense(model, **SMALL))
    assert back.config == model.config
    assert torch.equal(back(tokens()).logits_BLV, model(tokens()).logits_BLV)


def test_a_separate_norm_starts_as_the_blocks():
    model = dense(norm_eps=1e-3)
    for block in model.blocks:
        nn.init.uniform_(block.feed_forward_norm.weight, 0.5, 1.5)
    shared, separate = (from_dense(model, seed=3, norm=norm, **SMALL).eval() for norm in ("shared", "separate"))
    token_BL = tokens()
    torch.testing.assert_close(
        separate(token_BL).logits_BLV, shared(token_BL).logits_BLV, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE
    )
    own = separate.blocks[1].feed_forward.paths.width_norm
    assert own.weight.data_ptr() != model.blocks[1].feed_forward_norm.weight.data_ptr()


def test_dense_layers_stay_dense():
    model = dense(dense_layers=(0,), dense_feed_forward=SwiGLU.Config(hidden_dim=8))
    made = from_dense(model, **SMALL)
    assert [type(block.feed_forward) for block in made.blocks] == [SwiGLU, VersatileFFN]


def test_from_ffn_takes_the_layers_themselves():
    ffn = dense().blocks[0].feed_forward
    layer = VersatileFFN.from_ffn(ffn, max_loops=1)
    assert layer.w13 is ffn.w13
    assert layer.w2 is ffn.w2
    x_BLD, norm = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)), RMSNorm(16)
    context = ForwardContext(position_BL=torch.zeros(1, 1), rotary=(torch.ones(1), torch.ones(1)))
    with torch.no_grad():
        assert torch.equal(layer.add_to(x_BLD, norm, context), x_BLD + ffn(norm(x_BLD)))


# ---- models of transformers ---------------------------------------------------------------------------------------------------

FAMILIES = ("llama", "qwen2", "qwen3", "smollm3", "olmo", "olmo2", "gemma2", "phi3", "nemotron")


def transformers_model(family, **changes):
    transformers = pytest.importorskip("transformers")
    name = {"olmo": "Olmo", "olmo2": "Olmo2", "smollm3": "SmolLM3", "gpt_neox": "GPTNeoX"}.get(
        family, family.capitalize()
    )
    sizes = {
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, f"{name}Config")(**{**sizes, **changes})
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def logits(model, token_BL=None):
    with torch.no_grad():
        return model(tokens() if token_BL is None else token_BL, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_patched_with_one_loop_is_the_dense_model_to_the_bit(family):
    model = transformers_model(family)
    expected, keys = logits(model), list(model.state_dict())
    patch_model(model, num_experts=4, max_loops=1)
    assert torch.equal(logits(model), expected)
    state = model.state_dict()
    assert [name for name in state if ".paths." not in name] == keys
    assert sum(".paths." in name for name in state) == 2 * 3


def test_in_bf16_one_loop_is_still_the_dense_model_to_the_bit():
    model = transformers_model("llama").bfloat16()
    expected = logits(model)
    assert torch.equal(logits(patch_model(model, num_experts=4, max_loops=1)), expected)
    with torch.enable_grad():  # all loops, mixed in fp32
        assert torch.equal(model.train()(tokens(), use_cache=False).logits, expected)
    unpatch(model)
    assert torch.isfinite(logits(patch_model(model, **SMALL).eval())).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_is_the_inverse(family):
    model = transformers_model(family)
    expected, keys = logits(model), list(model.state_dict())
    before = [layer.mlp for layer in model.model.layers]
    pointers = [value.data_ptr() for value in model.state_dict().values()]
    assert patch_model(model, **SMALL) is model
    assert not torch.allclose(logits(model), expected)
    assert unpatch(model) is model
    assert torch.equal(logits(model), expected)
    assert list(model.state_dict()) == keys
    assert [value.data_ptr() for value in model.state_dict().values()] == pointers  # nothing was copied
    assert all(layer.mlp is mlp for layer, mlp in zip(model.model.layers, before, strict=True))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_patched_block_equals_ours():
    """A Llama block and our block on the same weights give the same stream, whichever path tokens take."""
    model = patch_model(transformers_model("llama"), **SMALL)
    block = model.model.layers[0]
    with torch.no_grad():
        for head in (block.mlp.paths.router, block.mlp.paths.loops):
            head.score.weight.mul_(50)
    ours = VersatileFFN.from_ffn(dense().blocks[0].feed_forward, **SMALL)
    ours.w13.weight = nn.Parameter(torch.cat([block.mlp.gate_proj.weight, block.mlp.up_proj.weight]))
    ours.w2.weight = block.mlp.down_proj.weight
    ours.paths.load_state_dict(block.mlp.paths.state_dict())
    norm, x_BLD = RMSNorm(16, 1e-6), torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))
    context = ForwardContext(position_BL=torch.zeros(1, 1), rotary=(torch.ones(1), torch.ones(1)))
    with torch.no_grad():
        expected = ours.add_to(x_BLD, norm, context)
        found = x_BLD + block.mlp(block.post_attention_layernorm(x_BLD))  # as the block does it
        named = x_BLD + block.mlp(block.post_attention_layernorm(hidden_states=x_BLD))  # or might
    assert torch.equal(named, found)
    torch.testing.assert_close(found, expected, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)
    assert len({*ours.paths.loops(x_BLD.flatten(0, 1), context).index_NK[:, 0].tolist()}) == 3


@pytest.mark.parametrize("family", ["llama", "olmo2", "nemotron"])
def test_early_exit_equals_all_loops_with_norms_on_either_side(family):
    model, token_BL = patch_model(transformers_model(family), **SMALL), tokens(4, 11)
    for layer in model.model.layers:
        nn.init.normal_(layer.mlp.paths.loops.score.weight)
    quick = logits(model, token_BL)
    for layer in model.model.layers:
        layer.mlp.paths.config = layer.mlp.paths.config.replace(early_exit=False)
    torch.testing.assert_close(quick, logits(model, token_BL), atol=1e-4, rtol=1e-4)


def test_checkpoints_go_both_ways():
    model = transformers_model("llama")
    expected = logits(model)
    state = copy.deepcopy(patch_model(model, **SMALL)).state_dict()
    plain = transformers_model("llama", initializer_range=0.01)
    found = plain.load_state_dict(state, strict=False)
    assert not found.missing_keys
    assert torch.equal(logits(plain), expected)
    again = patch_model(transformers_model("llama", initializer_range=0.01), seed=5, **SMALL)
    again.load_state_dict(state)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_whole_and_can_be_unpatched(copied):
    model = transformers_model("llama")
    expected = logits(model)
    patch_model(model, **SMALL)
    patched = logits(model)
    twin = copied(model)
    assert torch.equal(logits(twin), patched)
    with torch.no_grad():
        twin.model.layers[0].mlp.gate_proj.weight.zero_()
        twin.model.layers[0].post_attention_layernorm.weight.zero_()
    assert torch.equal(logits(model), patched)
    assert not torch.equal(logits(twin), patched)
    unpatch(copied(model))
    assert torch.equal(logits(model), patched)
    assert torch.equal(logits(unpatch(copied(model))), expected)


def test_training_reaches_heads_and_weights_and_the_balance_loss_is_collected():
    router = Router.Config(
        select=TopK.Config(normalize="softmax"), balance=(SwitchLoss.Config(alpha=0.5), BiasBalancer.Config())
    )
    model, token_BL = patch_model(transformers_model("llama"), router=router, **SMALL).train(), tokens()
    mask_BL = torch.ones_like(token_BL)
    mask_BL[0, :3] = 0
    with collect_routing(attention_mask=mask_BL) as context:
        loss = model(token_BL, attention_mask=mask_BL, labels=token_BL).loss
    assert len(context.losses["load_balancing"]) == 2
    assert 1 <= context.mean_metrics()["mean_loops"] <= 3
    assert model.model.layers[0].mlp.paths.router.balance[1].load_E.sum() == 2 * (18 - 3)  # padding goes nowhere
    (loss + sum(context.mean_losses().values())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_the_models_own_recompute_counts_losses_once():
    model, token_BL = patch_model(transformers_model("llama"), **SMALL).train(), tokens()
    gradients = []
    for recompute in (False, True):
        if recompute:
            enable = getattr(model, "activation_checkpointing_enable", None)  # the newer name
            (enable or model.gradient_checkpointing_enable)()
        model.zero_grad()
        torch.manual_seed(0)
        with collect_routing() as context:
            (model(token_BL, labels=token_BL, use_cache=False).loss).backward()
        assert len(context.losses["load_balancing"]) == 2
        gradients.append(model.model.layers[0].mlp.paths.loops.score.weight.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_steps_of_an_optimizer_lower_the_temperature():
    model = patch_model(transformers_model("llama"), temperature=Temperature.Config(start=4.0, decay=0.5), **SMALL)
    value = model.model.layers[1].mlp.paths.loops.temperature.value
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = follow_steps(optimizer, model, 10)
    for expected in (2.0, 1.0):
        optimizer.step()
        assert value.item() == expected
    handle.remove()
    optimizer.step()
    assert value.item() == 1.0
    follow_steps(optimizer, model, 10, start=4)
    assert value.item() == 0.25


@pytest.fixture
def text_task(tmp_path, monkeypatch):
    """A run of `TextTask` on a little text."""
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("some words that repeat themselves, over and over\n" * 40)
    data = DataConfig(corpus=Files.Config(paths=(str(tmp_path / "text.txt"),)), sequence_length=16)
    return TaskRunConfig(
        task=TextTask.Config(data=data), train=TrainConfig(steps=4, batch_size=4, learning_rate=1e-2, eval_tokens=64)
    )


def patched_llama():
    return PatchedModel(patch_model(transformers_model("llama", vocab_size=257), **SMALL))


def test_a_patched_model_trains_by_the_trainer_and_resumes_to_the_bit(text_task):
    check_task(text_task, ranks=False, model=patched_llama())


def test_a_patched_model_learns_what_a_loop_with_followed_steps_does(text_task, tmp_path):
    settings = {
        "weight_decay": 0.0,
        "clip": None,
        "schedule": Constant.Config(warmup=0),
        "device": "cpu",
        "log_every": 1,
    }
    run = text_task.replace(train=text_task.train.replace(**settings))
    trainer = Trainer(run, tmp_path / "run", model=patched_llama())
    result = trainer.fit()
    records = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert all(record["auxiliary"].keys() == {"load_balancing"} for record in records)
    assert all(1 <= record["mean_loops"] <= 3 for record in records)
    assert len(records[0]["max_violation_by_layer"]) == 2
    assert (
        result.bits_per_byte
        == trainer.task.evaluate(trainer.model, trainer._held_out, trainer._context)["bits_per_byte"]
    )

    model, stream = patched_llama().model.train(), run.task.data.build().train(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    follow_steps(optimizer, model, 4)
    for step in range(4):
        # The same random numbers as in the trainer's step: a function of seed, step and rank.
        torch.manual_seed(int(np.random.SeedSequence([0, step, 0]).generate_state(1, np.uint64)[0]))
        batch = stream.next_batch(4)
        with collect_routing() as context:
            logits_BLV = model(batch.token_BL, use_cache=False).logits
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), batch.target_BL.flatten())
        assert float(loss.detach()) == pytest.approx(records[step]["cross_entropy"], rel=1e-4)
        (loss + sum(context.mean_losses().values())).backward()
        optimizer.step()
        optimizer.zero_grad()
    temperatures = [
        layer.mlp.paths.loops.temperature.value.item()
        for layer in (*model.model.layers, *trainer.model.model.model.layers)
    ]
    assert len(set(temperatures)) == 1
    assert temperatures[0] != patched_llama().model.model.layers[0].mlp.paths.loops.temperature.value.item()


def test_what_is_trained_is_what_unpatch_gives_back(text_task, tmp_path):
    wrapped = patched_llama()
    path = Trainer(text_task, tmp_path / "run", model=wrapped).fit().checkpoint
    stored = load_file(path / "model.safetensors")
    assert (path / "tokenizer.json").is_file()
    plain = unpatch(wrapped.model)
    assert torch.equal(plain.model.layers[0].mlp.gate_proj.weight, stored["model.model.layers.0.mlp.gate_proj.weight"])
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no patched block; patch_model makes them"):
        PatchedModel(plain)
    with pytest.raises(ConfigError, match="the tokenizer has 257 tokens"):
        Trainer(text_task, tmp_path / "other", model=PatchedModel(patch_model(transformers_model("llama"), **SMALL)))


def test_traces_know_sequences_and_positions():
    model = patch_model(transformers_model("llama"), **SMALL)
    with record_routing(model) as routing, record_difficulty(model) as difficulty:
        logits(model)
    # Loops stand behind the experts where nobody names what is recorded.
    for trace, counts in ((routing.trace(), (4, 4, 3, 3)), (difficulty.trace(), (3, 3))):
        assert [(layer.layer, layer.num_destinations) for layer in trace.layers] == list(enumerate(counts))
        assert trace.decisions(1).position_N.tolist() == [*range(9), *range(9)]


def test_generation_with_a_cache_equals_full_passes():
    model = patch_model(transformers_model("llama"), **SMALL)
    for layer in model.model.layers:
        nn.init.normal_(layer.mlp.paths.loops.score.weight)
    made = model.generate(tokens(1, 4), max_new_tokens=5, do_sample=False)
    token_BL = tokens(1, 4)
    for _ in range(made.shape[1] - 4):
        token_BL = torch.cat([token_BL, logits(model, token_BL)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, token_BL)


# ---- errors -------------------------------------------------------------------------------------------------------------------


class OddMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.act = nn.Linear(16, 24), nn.Linear(24, 16), nn.GELU()


class OddBlock(nn.Module):
    def __init__(self, mlp=None, **norms):
        super().__init__()
        self.mlp = mlp or OddMLP()
        for name in norms:
            self.add_module(name, RMSNorm(16))


def quantised():
    """Weights as integers, which cannot be cut into experts of their own."""
    model = transformers_model("llama")
    for layer in model.model.layers:
        down = layer.mlp.down_proj
        down.weight = nn.Parameter(torch.zeros(16, 24, dtype=torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: from_dense(from_dense(dense(), **SMALL)),
            "from_dense needs a model of 'swiglu' or 'mlp' layers, this one has 'versatile'",
        ),
        (lambda: to_dense(dense()), "to_dense needs a 'versatile' model, this one has 'swiglu'"),
        (
            lambda: from_dense(dense(), num_experts=5, slices="contiguous"),
            "does not divide hidden_dim=24 into contiguous slices",
        ),
        (
            lambda: VersatileFFN.from_ffn(
                SwiGLU.Config(hidden_dim=8).build(BuildContext(8, linears={"down": Dense.Config()}))
            ),
            "from_ffn needs a feed-forward of plain matrices, w2 is a Split",
        ),
        (lambda: VersatileFFN.from_ffn(nn.GELU()), "from_ffn needs a SwiGLU or an MLP, this is GELU"),
        (lambda: patch_model(nn.Sequential()), "Sequential has no block with an 'mlp'"),
        (
            lambda: patch_model(nn.ModuleDict({"a": OddBlock(post_attention_layernorm=1)})),
            "a.mlp (OddMLP) has a structure that is not known: layers first, second, act",
        ),
        (lambda: patch_model(nn.ModuleDict({"a": OddBlock(input_layernorm=1)})), "a (OddBlock) does not add its MLP"),
        (lambda: patch_model(patch_model(transformers_model("llama"), **SMALL)), "mlp is versatile already; unpatch"),
        (lambda: unpatch(transformers_model("llama")), "LlamaForCausalLM has no patched block"),
        (lambda: patch_model(transformers_model("llama"), norm="separate"), "use norm='shared' with patch_model"),
        (
            lambda: patch_model(transformers_model("nemotron"), num_experts=4, width_compute="grouped"),
            "model.layers.0.mlp is no SwiGLU of plain matrices",
        ),
        (lambda: patch_model(quantised(), num_experts=4, width_compute="grouped"), "quantised ones cannot be sliced"),
        (lambda: patch_model(transformers_model("gpt_neox"), **SMALL), "it has use_parallel_residual"),
    ],
)
def test_errors_name_the_module(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


def test_a_mask_of_another_pass_is_refused():
    model = patch_model(transformers_model("llama"), **SMALL)
    with (
        pytest.raises(ConfigError, match="a mask of 4 tokens, this pass has 18"),
        collect_routing(attention_mask=torch.ones(1, 4)),
    ):
        logits(model)


def test_an_error_leaves_the_model_as_it_was():
    model = transformers_model("llama")
    expected, odd = logits(model), model.model.layers[1].mlp
    model.model.layers[1].mlp = OddMLP()
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp \(OddMLP\)"):
        patch_model(model, **SMALL)
    model.model.layers[1].mlp = odd
    assert not any(isinstance(module, VersatileMLP) for module in model.modules())
    assert torch.equal(logits(model), expected)


def test_a_mixture_is_no_dense_model():
    moe = dense(feed_forward=MoE.Config(num_experts=4, hidden_dim=8))
    with pytest.raises(ConfigError, match="this one has 'moe'"):
        from_dense(moe)
