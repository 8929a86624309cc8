"""FTP on transformers' models: what holds of our decoder holds of Llama, Qwen, Mistral and GPT-2, with either of their attentions."""

import pytest
import torch

pytest.importorskip("transformers")

from anabranch.depth.ftp import TokenSkipper, TrainingConfig, evaluate, redundancy_report, train_router
from anabranch.depth.gathered import gathered
from anabranch.depth.stack import run_path, stack_of
from anabranch.errors import ConfigError
from block_stacks import MAKERS, tokens
from skipped_models import router as router_of

THEIRS = [name for name in MAKERS if not name.startswith("ours")]
SCHEDULE = (0.0, 0.5, 0.3)


@pytest.mark.parametrize("name", THEIRS)
def test_nothing_to_skip_is_the_dense_model(name):
    model, token_BL = MAKERS[name](), tokens(2, 9)
    before = model.config._attn_implementation
    for router in ("static", router_of()):
        found = TokenSkipper(model, [0.0] * 3, router).prefill(token_BL).logits_BV
        if "window" not in name:
            with torch.no_grad():
                assert torch.equal(found, run_path(stack_of(model), token_BL, last_only=True)[:, -1])
        torch.testing.assert_close(found, model(token_BL).logits[:, -1], rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("kv", ["drop", "keep"])
def test_cached_decoding_is_the_pass_without_a_cache(name, kv):
    whole = tokens(2, 16)
    for router in ("static", router_of()):
        skipper = TokenSkipper(MAKERS[name](), SCHEDULE, router, kv=kv)
        prefilled = skipper.prefill(whole[:, :12])
        pieces = [skipper.decode(whole[:, start:end], prefilled) for start, end in ((12, 13), (13, 16))]
        cached = torch.cat((prefilled.logits_BV.unsqueeze(1), *pieces), dim=1)
        torch.testing.assert_close(cached, skipper.uncached(prefilled, whole[:, 12:])[:, 11:], rtol=1e-4, atol=1e-4)
        assert prefilled.report.skipped == (0, 12, 6)


@pytest.mark.parametrize("name", ["llama-eager", "gpt2-eager"])
def test_skipping_is_their_own_blocks_under_a_mask(name):
    """By hand: transformers' block is given all rows and a mask of who is kept, and what it gives the others is not taken."""
    model, token_BL, place = MAKERS[name](), tokens(1, 10), torch.arange(10)
    prefilled = TokenSkipper(model, SCHEDULE, "static").prefill(token_BL)
    stack = stack_of(model)
    x_BLD, state = stack.embed(token_BL)
    with torch.no_grad():
        for layer in range(3):
            keep = prefilled.keep_IBL[layer, 0]
            seen = (place[:, None] >= place) & (keep | torch.eye(10, dtype=torch.bool))
            values = {"attention_mask": torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]}
            if state.rotary is not None:
                values["position_embeddings"] = state.rotary
            made = stack.layers[layer](x_BLD, **values)
            y_BLD = made[0] if isinstance(made, tuple) else made
            x_BLD = torch.where(keep[None, :, None], y_BLD, x_BLD)
        expected = stack.head(x_BLD, state)[:, -1]
    torch.testing.assert_close(prefilled.logits_BV, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gpt2"])
def test_the_router_learns(name):
    model = MAKERS[name]().train()
    rows = tokens(3, 14).tolist()
    router, history = train_router(
        model, [(row[:10], row[10:]) for row in rows], SCHEDULE, config=TrainingConfig(steps=3)
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert history[-1]["loss"] > 0
    assert evaluate(TokenSkipper(model, SCHEDULE, router), rows[0][:10], rows[0][10:]).saved > 0


def test_padding_and_the_matrix():
    model, row = MAKERS["llama"](), tokens(1, 7)
    skipper = TokenSkipper(model, SCHEDULE, router_of())
    padded, mask = torch.cat((torch.full((1, 3), 5), row), dim=1), torch.tensor([[0] * 3 + [1] * 7])
    torch.testing.assert_close(
        skipper.prefill(padded, mask).logits_BV, skipper.prefill(row).logits_BV, rtol=1e-4, atol=1e-4
    )
    assert len(redundancy_report(model, [row]).mean) == 3


def test_a_model_that_fails_within_a_block_is_as_it_was():
    model = MAKERS["llama"]()

    def fails(*_):
        raise RuntimeError("no room")

    hook = model.model.layers[1].mlp.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="no room"):
        TokenSkipper(model, SCHEDULE, "static").prefill(tokens(1, 8))
    hook.remove()
    assert model.config._attn_implementation == "sdpa"
    assert bool(model(tokens(1, 8)).logits.isfinite().all())


def test_stacks_of_others_are_refused():
    class Other:
        num_blocks = 3

    with pytest.raises(ConfigError, match="tokens cannot be skipped in a Other"):
        gathered(Other())
