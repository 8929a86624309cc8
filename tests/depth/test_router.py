"""Generation at a depth that routers choose: what is decided on a prompt holds, whoever else is in the batch; counts, traces, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anabranch.depth import DepthRouter, path_of, routed_pass, run_path, stack_of
from anabranch.depth.dr_llm import BankConfig, RouterBank
from anabranch.errors import ConfigError
from anabranch.lm.generate import SamplingConfig, generate
from block_stacks import BLOCKS, decoder, model, tokens
from depth_banks import ByState, Scripted

GREEDY = SamplingConfig(max_tokens=5, temperature=0)
PROMPTS = [[3, 9, 27, 1], [5], [60, 2, 2, 8, 31, 7], [11, 12]]
NAMES = ("ours", "ours-window", "llama", "qwen2-window", "gpt2")


@torch.no_grad()
def by_hand(stack, prompt, path, count=GREEDY.max_tokens):
    """Greedy, each time over the whole sequence."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(run_path(stack, torch.tensor([ids]), path)[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_is_decided_on_a_prompt_holds_for_its_tokens_in_any_batch(name):
    stack = stack_of(model(name))
    router = DepthRouter.attach(model(name), ByState())
    wanted, paths = [], []
    for prompt in PROMPTS:
        made = routed_pass(stack, ByState(), torch.tensor([prompt]))
        paths.append(path_of(made.decision_BN[0].tolist()))
        wanted.append(by_hand(stack, prompt, paths[-1]))
    assert len(set(paths)) > 1
    assert router.generate(PROMPTS, GREEDY) == wanted
    assert [router.generate(prompt, GREEDY) for prompt in PROMPTS] == wanted


@pytest.mark.parametrize("name", NAMES)
def test_full_depth_and_paths(name):
    stack, router = stack_of(model(name)), DepthRouter.attach(model(name))
    whole = [by_hand(stack, prompt, range(BLOCKS)) for prompt in PROMPTS]
    assert router.generate(PROMPTS, GREEDY, depth="full") == whole
    if name.startswith("ours"):
        assert generate(model(name), PROMPTS, GREEDY) == whole
    paths = [(0, 2), (0, 1, 1, 2), (2, 1), (0, 0, 1, 2, 2)]
    assert router.generate(PROMPTS, GREEDY, depth=paths) == [
        by_hand(stack, *both) for both in zip(PROMPTS, paths, strict=True)
    ]
    assert router.generate(PROMPTS[0], GREEDY, depth=(0, 2, 2)) == by_hand(stack, PROMPTS[0], (0, 2, 2))


@pytest.mark.parametrize("name", NAMES)
def test_decisions_at_every_step_are_each_rows_own(name):
    router = DepthRouter.attach(model(name), ByState())
    together = router.generate(PROMPTS, GREEDY, decide="step")
    assert together == [router.generate(prompt, GREEDY, decide="step") for prompt in PROMPTS]


@settings(max_examples=8)
@given(
    decisions=st.lists(st.lists(st.integers(0, 2), min_size=BLOCKS, max_size=BLOCKS), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_a_routed_pass_is_each_row_on_its_path(decisions, seed):
    token_BL = tokens(3, 4, seed)
    for name in ("ours", "llama"):
        stack, bank = stack_of(model(name)), Scripted(decisions)
        made = routed_pass(stack, bank, token_BL)
        alone = [run_path(stack, token_BL[row : row + 1], path_of(decisions[row])) for row in range(3)]
        torch.testing.assert_close(made.logits_BLV, torch.cat(alone), atol=1e-5, rtol=1e-4)
        assert made.decision_BN.tolist() == decisions
        assert [layer for layer, *_ in bank.shown] == list(range(BLOCKS))


@torch.no_grad()
def test_routers_see_what_goes_into_a_block_and_no_padding():
    stack = stack_of(model("llama"))
    bank = Scripted([[1, 0, 2]] * 2)
    token_BL, mask_BL = tokens(2, 5), torch.ones(2, 5, dtype=torch.long)
    mask_BL[0, :2] = 0
    routed_pass(stack, bank, token_BL, attention_mask=mask_BL, control=0.25)
    x_BLD, state = stack.embed(token_BL, mask_BL)
    behind = stack.block(0, x_BLD, state)
    for (_, shown_BLD, shown_BL, control), wanted_BLD in zip(bank.shown, (x_BLD, behind, behind), strict=True):
        assert torch.equal(shown_BLD, wanted_BLD)
        assert torch.equal(shown_BL, mask_BL.bool())
        assert control == 0.25


def test_new_tokens_are_decided_on_alone():
    bank = Scripted([[1] * BLOCKS] * 2)
    router = DepthRouter.attach(model("ours"), bank)
    router.generate(PROMPTS[:2], GREEDY, decide="step")
    shapes = [shown.shape[:2] for _, shown, *_ in bank.shown[::BLOCKS]]
    assert shapes == [(2, 4)] + [(2, 1)] * 4
    bank.shown.clear()
    router.generate(PROMPTS[:2], GREEDY)
    assert len(bank.shown) == BLOCKS


def test_sequences_that_stop_leave_and_the_others_keep_their_paths():
    stack, paths = stack_of(model("ours")), [(0, 2), (0, 1, 2), (0, 1, 1, 2), (1,)]
    whole = [by_hand(stack, prompt, path) for prompt, path in zip(PROMPTS, paths, strict=True)]
    stop = whole[1][1]
    config = GREEDY.replace(stop=(stop,))
    wanted = [made[: made.index(stop)] if stop in made else made for made in whole]
    assert DepthRouter.attach(model("ours")).generate(PROMPTS, config, depth=paths) == wanted


def test_sampling_is_that_of_generate():
    config = SamplingConfig(max_tokens=6, temperature=1.3, top_k=20, top_p=0.9, seed=7)
    assert DepthRouter.attach(model("ours")).generate(PROMPTS, config, depth="full") == generate(
        model("ours"), PROMPTS, config
    )


def test_the_report_counts_runs_of_blocks_by_token():
    router = DepthRouter.attach(model("ours"), Scripted([[1, 0, 2], [1, 1, 1]]))
    router.generate([[1, 2, 3], [4]], SamplingConfig(max_tokens=3, temperature=0))
    found = router.report()
    # The prompt and the first two new tokens of each go through the model.
    assert (found.num_blocks, found.sequences, found.tokens) == (3, 2, 5 + 3)
    assert found.uses == (1.0, 3 / 8, (2 * 5 + 3) / 8)
    assert found.layers_per_token == pytest.approx((3 * 5 + 3 * 3) / 8)
    assert found.decisions == {"skip": 1, "execute": 4, "repeat": 1}
    assert 0 < found.router_seconds < found.seconds
    assert found.router_share == found.router_seconds / found.seconds
    assert found.to_dict()["uses"] == list(found.uses)
    assert str(found).startswith("3.00 of 3 blocks per token, over 8 tokens of 2 sequences; routers took ")
    router.reset()
    assert (router.report().tokens, router.report().layers_per_token, router.report().router_share) == (0, 0.0, 0.0)
    router.generate([1, 2], SamplingConfig(max_tokens=1, temperature=0), depth=(1,))
    assert (router.report().uses, router.report().decisions["skip"]) == ((0.0, 1.0, 0.0), 0)


def test_decisions_are_recorded_as_a_trace():
    router = DepthRouter.attach(model("ours"), Scripted([[1, 0, 2], [1, 1, 1]]))
    router.generate([[1, 2, 3], [4]], GREEDY)
    trace = router.trace()
    assert [trace.layers[block].num_destinations for block in range(3)] == [3, 3, 3]
    assert trace.load_LE().tolist() == [[0, 2, 0], [1, 1, 0], [0, 1, 1]]
    rows = trace.table.to_pylist()
    assert {(row["item"], row["layer"], row["destination"]) for row in rows} == {
        (0, 0, 1),
        (1, 0, 1),
        (0, 1, 0),
        (1, 1, 1),
        (0, 2, 2),
        (1, 2, 1),
    }
    assert {row["weight"] for row in rows} == {1.0}
    router.generate([5, 6], GREEDY)
    assert {row["item"] for row in router.trace().table.to_pylist()} == {0, 1, 2}


def test_modules_keep_their_modes_and_nothing_is_learned():
    made = decoder()
    made.train()
    made.blocks[1].eval()
    DepthRouter.attach(made, ByState()).generate(PROMPTS, GREEDY)
    assert made.training
    assert not made.blocks[1].training
    assert all(parameter.grad is None for parameter in made.parameters())


class OfAnother(Scripted):
    num_blocks, width = 4, 16


@pytest.mark.parametrize(
    ("bank", "message"),
    [
        (OfAnother([[1]]), "the routers have num_blocks=4, and the model 3; they are of another model"),
        (nn.Linear(2, 2), r"bank is a Linear, which has no method decide\(layer"),
        (7, "bank is a int"),
    ],
)
def test_wrong_banks(bank, message):
    with pytest.raises(ConfigError, match=message):
        DepthRouter.attach(model("ours"), bank)


def test_a_bank_of_another_model_of_the_same_sizes():
    stack = stack_of(decoder(seed=3))
    fields = {"num_blocks": stack.num_blocks, "width": stack.width}
    bank = RouterBank(BankConfig(**fields, fingerprint=stack.fingerprint()))
    assert DepthRouter.attach(decoder(seed=3), bank).bank is bank
    with pytest.raises(
        ConfigError, match=f"of another model of the same sizes: fingerprint {stack.fingerprint()}, and"
    ):
        DepthRouter.attach(decoder(seed=4), bank)
    # Of no certain model.
    assert DepthRouter.attach(decoder(seed=4), RouterBank(BankConfig(**fields))).bank is not None


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("abc", "prompt is 'abc'; give token ids, or several lists"),
        (None, "prompt is None; give token ids"),
        (7, "prompt is 7; give token ids"),
        (torch.tensor(7), "prompt is 7; give token ids"),
        ([True], r"prompt 0 is \[True\]; a prompt is a list of token ids"),
        ([1.0], r"prompt 0 is \[1.0\]"),
        (["abc"], r"prompt 0 is \['abc'\]"),
        ([[1], "a"], "prompt 1 is 'a'"),
        ([[1], 2], "prompt 1 is 2"),
        ([[1], None], "prompt 1 is None"),
        ([1, [2]], r"prompt 0 is \[1, \[2\]\]"),
    ],
)
def test_prompts_that_are_none(prompt, message):
    router = DepthRouter.attach(model("ours"))
    with pytest.raises(ConfigError, match=message):
        router.generate(prompt, GREEDY, depth="full")
    for prompts in ("abc", None, 7):
        with pytest.raises(ConfigError, match=r"prompts is .*; give lists of token ids"):
            list(router.stream(prompts, GREEDY, depth="full"))
        with pytest.raises(ConfigError, match=r"prompts is .*; give lists of token ids"):
            generate(model("ours"), prompts, GREEDY)
    with pytest.raises(ConfigError, match=r"prompt 0 is \[True\]"):
        generate(model("ours"), [[True]], GREEDY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": "deep"}, "depth is 'deep'; it must be 'routed', 'full', or a list of blocks"),
        ({"depth": (0, 5)}, "path has block 5; the model has blocks 0 to 2"),
        ({"depth": (0, 0, 0)}, "the path comes to block 0 3 times; a block may run at most 2"),
        ({"depth": [(0,)] * 3}, "there are 3 paths for 4 sequences"),
        ({"depth": None}, "path is None"),
        ({"control": 1.5}, "control is 1.5; it must be a number from -1"),
        ({"control": float("nan")}, "control is nan"),
        ({"control": "0"}, "control is '0'"),
        ({"decide": "token"}, "decide is 'token'; it must be one of prompt, step"),
    ],
)
def test_wrong_options(options, message):
    router = DepthRouter.attach(model("ours"), Scripted([[1] * BLOCKS] * 4))
    with pytest.raises(ValueError, match=message):
        router.generate(PROMPTS, GREEDY, **options)


def test_wrong_prompts_and_no_routers():
    router = DepthRouter.attach(model("llama"))
    with pytest.raises(ConfigError, match="depth is 'routed', and no routers are attached"):
        router.generate(PROMPTS, GREEDY)
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        router.generate([[1], []], GREEDY, depth="full")
    with pytest.raises(ConfigError, match="prompt 0 has a token outside 0 to 60"):
        router.generate([61], GREEDY, depth="full")
    with pytest.raises(ConfigError, match="prompt 0 is empty"):
        router.generate([], GREEDY, depth="full")


@pytest.mark.parametrize(("decision", "found"), [([3], "3"), ([-1], "-1"), ([1, 1], "2 decisions on 1 sequences")])
def test_decisions_that_are_none(decision, found):
    class Wrong:
        def decide(self, layer, x_BLD, mask_BL, control):
            return torch.tensor(decision), torch.ones(len(decision), 3)

    with pytest.raises(ConfigError, match=f"the router of block 0 decided {found}; it must be 0, 1 or 2"):
        DepthRouter.attach(model("ours"), Wrong()).generate([1], GREEDY)


def test_no_tokens_and_no_prompts():
    router = DepthRouter.attach(model("ours"))
    assert router.generate([[1, 2]], GREEDY.replace(max_tokens=0), depth="full") == [[]]
    assert list(router.stream([], GREEDY, depth="full")) == []
