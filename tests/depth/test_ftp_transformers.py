"""FTP on transformers' models: what holds of our decoder holds of Llama, Qwen, Mistral and GPT-2, with either of their attentions."""

import pytest
import torch

pytest.importorskip("transformers")

from foreign_models import build_theirs

from anabranch.depth.ftp import TokenRouter, TokenSkipper, TrainingConfig, evaluate, redundancy_report, train_router
from anabranch.depth.gathered import gathered
from anabranch.depth.stack import run_path, stack_of
from anabranch.errors import ConfigError

FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": 4},
    "GPT2": {"n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4},
}
SCHEDULE = (0.0, 0.5, 0.3)


def model_of(family, attention="sdpa"):
    if family == "GPT2":
        import transformers

        torch.manual_seed(1)
        config = transformers.GPT2Config(vocab_size=61, initializer_range=0.3, bos_token_id=None, eos_token_id=None, **FAMILIES[family])
        model = transformers.GPT2LMHeadModel(config).eval()
    else:
        model = build_theirs(family, **FAMILIES[family])
    model.config._attn_implementation = attention
    return model


def tokens(batch=1, length=12, seed=0):
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


EVERY = [(family, attention) for family in FAMILIES for attention in ("sdpa", "eager")]


@pytest.mark.parametrize(("family", "attention"), EVERY)
def test_nothing_to_skip_is_the_dense_model(family, attention):
    model, token_BL = model_of(family, attention), tokens(2, 9)
    for router in ("static", TokenRouter(seed=3)):
        found = TokenSkipper(model, [0.0] * 3, router).prefill(token_BL).logits_BV
        if FAMILIES[family].get("sliding_window") is None:
            assert torch.equal(found, run_path(stack_of(model), token_BL, last_only=True)[:, -1])
        torch.testing.assert_close(found, model(token_BL).logits[:, -1], rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize(("family", "attention"), EVERY)
@pytest.mark.parametrize("kv", ["drop", "keep"])
def test_cached_decoding_is_the_pass_without_a_cache(family, attention, kv):
    whole = tokens(2, 16)
    for router in ("static", TokenRouter(seed=3)):
        skipper = TokenSkipper(model_of(family, attention), SCHEDULE, router, kv=kv)
        prefilled = skipper.prefill(whole[:, :12])
        pieces = [skipper.decode(whole[:, start:end], prefilled) for start, end in ((12, 13), (13, 16))]
        cached = torch.cat((prefilled.logits_BV.unsqueeze(1), *pieces), dim=1)
        torch.testing.assert_close(cached, skipper.uncached(prefilled, whole[:, 12:])[:, 11:], rtol=1e-4, atol=1e-4)
        assert prefilled.report.skipped == (0, 12, 6)


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_ours_and_theirs_agree(family):
    """Skipping tokens by hand: transformers' own model with a mask, where a block is given all rows and some outputs are not taken."""
    model, token_BL = model_of(family, "eager"), tokens(1, 10)
    skipper = TokenSkipper(model, SCHEDULE, "static")
    prefilled = skipper.prefill(token_BL)
    stack = stack_of(model)
    x_BLD, state = stack.embed(token_BL)
    place = torch.arange(10)
    with torch.no_grad():
        for layer in range(3):
            keep = prefilled.keep_IBL[layer, 0]
            seen = (place[:, None] >= place) & (keep | torch.eye(10, dtype=torch.bool))
            mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
            values = {"attention_mask": mask, "position_ids": place[None]}
            if state.rotary is not None:
                values["position_embeddings"] = state.rotary
            made = stack.layers[layer](x_BLD, **values)
            y_BLD = made[0] if isinstance(made, tuple) else made
            x_BLD = torch.where(keep[None, :, None], y_BLD, x_BLD)
        expected = stack.head(x_BLD, state)[:, -1]
    torch.testing.assert_close(prefilled.logits_BV, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_learns(family):
    model = model_of(family).train()
    rows = tokens(3, 14).tolist()
    router, history = train_router(model, [(row[:10], row[10:]) for row in rows], SCHEDULE, config=TrainingConfig(steps=3))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert history[-1]["loss"] > 0
    skipper = TokenSkipper(model, SCHEDULE, router)
    assert evaluate(skipper, rows[0][:10], rows[0][10:]).saved > 0


def test_padding_and_the_matrix():
    model = model_of("Llama")
    skipper, row = TokenSkipper(model, SCHEDULE, TokenRouter(seed=3)), tokens(1, 7)
    padded = torch.cat((torch.full((1, 3), 5), row), dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 7])
    torch.testing.assert_close(skipper.prefill(padded, mask).logits_BV, skipper.prefill(row).logits_BV, rtol=1e-4, atol=1e-4)
    assert len(redundancy_report(model, [row]).mean) == 3


def test_a_model_that_fails_within_a_block_is_as_it_was():
    model = model_of("Llama")

    def fails(*_):
        raise RuntimeError("no room")

    hook = model.model.layers[1].mlp.register_forward_hook(fails)
    skipper = TokenSkipper(model, SCHEDULE, "static")
    with pytest.raises(RuntimeError, match="no room"):
        skipper.prefill(tokens())
    hook.remove()
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(tokens()).logits.shape[-1], 61)


def test_stacks_of_others_are_refused():
    class Other:
        num_blocks = 3

    with pytest.raises(ConfigError, match="tokens cannot be skipped in a Other"):
        gathered(Other())
