import pytest
import torch

from anabranch.errors import ConfigError, NotFiniteError
from anabranch.lm import Decoder, SamplingConfig, generate, stream
from anabranch.lm.generate import sample
from anabranch.nn import MoE, SelfAttention
from anabranch.routing import BiasBalancer, LinearScore, Router, TopK

VOCAB_SIZE = 31
GREEDY = SamplingConfig(temperature=0.0, max_tokens=8)
PROMPTS = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10]]


@pytest.fixture(scope="module")
def model():
    router = Router.Config(
        score=LinearScore.Config(init_std=0.5), select=TopK.Config(top_k=2), balance=(BiasBalancer.Config(),)
    )
    return Decoder.Config(
        vocab_size=VOCAB_SIZE,
        dim=16,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
        feed_forward=MoE.Config(num_experts=4, hidden_dim=8, router=router),
        init_std=0.3,
    ).build(seed=0)


def naive_greedy(model, prompt, max_tokens):
    """No cache: the whole sequence again for every token."""
    tokens = list(prompt)
    model.eval()
    with torch.no_grad():
        for _ in range(max_tokens):
            tokens.append(int(model(torch.tensor([tokens])).logits_BLV[0, -1].argmax()))
    model.train()
    return tokens[len(prompt) :]


# -- generation


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_is_the_naive_loop(model, prompt):
    assert generate(model, [prompt], GREEDY) == [naive_greedy(model, prompt, 8)]


def test_a_batch_gives_what_each_prompt_gives_alone(model):
    assert generate(model, PROMPTS, GREEDY) == [generate(model, [prompt], GREEDY)[0] for prompt in PROMPTS]


def test_rows_that_stop_leave_the_batch_and_the_others_go_on(model):
    whole = generate(model, PROMPTS, GREEDY)
    stop = whole[1][2]
    config = GREEDY.replace(stop=(stop,))
    expected = [row[: row.index(stop)] if stop in row else row for row in whole]
    assert generate(model, PROMPTS, config) == expected
    assert len(expected[1]) <= 2


def test_steps_name_the_rows_they_continue(model):
    whole = generate(model, PROMPTS, GREEDY)
    config, rows = GREEDY.replace(stop=(whole[1][0],)), []
    collected = {row: [] for row in range(3)}
    for step in stream(model, PROMPTS, config):
        rows.append(step.rows)
        for row, token in zip(step.rows, step.tokens, strict=True):
            collected[row].append(token)
    assert 1 not in rows[0]  # stopped at its first token
    assert list(collected.values()) == generate(model, PROMPTS, config)


def test_all_rows_stopping_ends_it(model):
    assert generate(model, PROMPTS, GREEDY.replace(stop=tuple(range(VOCAB_SIZE)))) == [[], [], []]


def test_nothing_to_do(model):
    assert generate(model, [], GREEDY) == []
    assert generate(model, PROMPTS, GREEDY.replace(max_tokens=0)) == [[], [], []]


def test_a_seed_reproduces_and_another_differs(model):
    config = SamplingConfig(max_tokens=20, temperature=1.5, seed=3)
    first, torch_state = generate(model, PROMPTS, config), torch.random.get_rng_state()
    assert generate(model, PROMPTS, config) == first
    assert generate(model, PROMPTS, config.replace(seed=4)) != first
    assert torch.equal(torch.random.get_rng_state(), torch_state)  # the global generator is not touched


def test_training_mode_comes_back_even_if_the_stream_is_left(model):
    model.train()
    generate(model, PROMPTS, GREEDY)
    assert model.training
    steps = stream(model, PROMPTS, GREEDY)
    next(steps)
    steps.close()
    assert model.training
    model.eval()
    generate(model, PROMPTS, GREEDY)
    assert not model.training
    model.train()


def test_streams_beside_each_other_and_modules_in_other_modes_keep_their_modes(model):
    model.train()
    model.blocks[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    first, second = (stream(model, PROMPTS, GREEDY.replace(max_tokens=most)) for most in (2, 6))
    next(first), next(second)
    list(first)
    list(second)
    assert {name: module.training for name, module in model.named_modules()} == before
    model.train()


def test_generation_counts_no_loads_and_keeps_no_gradients(model):
    model.train()
    generate(model, PROMPTS, GREEDY)
    assert all(parameter.grad is None for parameter in model.parameters())
    loads = [value for name, value in model.named_buffers() if name.endswith("load_E")]
    assert len(loads) == 2
    assert not any(load_E.any() for load_E in loads)


# -- sampling


def counts(logits, config, num_draws=20_000):
    generator = torch.Generator().manual_seed(0)
    drawn = sample(torch.tensor(logits).expand(num_draws, -1), config, generator)
    return torch.bincount(drawn, minlength=len(logits)) / num_draws


def test_temperature_zero_takes_the_first_of_the_most_likely():
    assert sample(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), SamplingConfig(temperature=0.0)).tolist() == [1]


def test_draws_follow_the_softmax_at_the_temperature():
    logits = [0.0, 1.0, 2.0, -1.0]
    for temperature in (0.5, 1.0, 3.0):
        share = counts(logits, SamplingConfig(temperature=temperature))
        torch.testing.assert_close(share, (torch.tensor(logits) / temperature).softmax(0), rtol=0, atol=0.015)


def test_top_k_keeps_the_k_most_likely_in_proportion():
    share = counts([0.0, 1.0, 2.0, -1.0], SamplingConfig(temperature=1.0, top_k=2))
    expected = torch.tensor([0.0, 1.0, 2.0, 0.0]).exp() * torch.tensor([0, 1, 1, 0])
    torch.testing.assert_close(share, expected / expected.sum(), rtol=0, atol=0.015)
    assert share[0] == share[3] == 0


def test_top_p_keeps_the_shortest_prefix_that_reaches_p():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().tolist()
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.8, 3), (0.95, 4), (1.0, 4)):
        share = counts(logits, SamplingConfig(temperature=1.0, top_p=top_p))
        assert share.count_nonzero() == kept
    torch.testing.assert_close(
        counts(logits, SamplingConfig(temperature=1.0, top_p=0.6)),
        torch.tensor([2 / 3, 1 / 3, 0, 0]),
        rtol=0,
        atol=0.015,
    )


def test_top_k_and_top_p_both_hold():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    assert counts(logits, SamplingConfig(temperature=1.0, top_k=3, top_p=0.5)).count_nonzero() == 2
    assert counts(logits, SamplingConfig(temperature=1.0, top_k=1, top_p=0.9)).count_nonzero() == 1
    assert counts(logits, SamplingConfig(temperature=1.0, top_k=99)).count_nonzero() == 4


def test_a_tiny_temperature_is_greedy_and_not_an_error():
    logits_BV = torch.tensor([[300.0, -300.0, 299.0], [-1.0, -1e4, 5.0]])
    assert sample(logits_BV, SamplingConfig(temperature=1e-40), torch.Generator().manual_seed(0)).tolist() == [0, 2]


def test_bf16_logits_are_sampled_in_fp32():
    logits_BV = torch.zeros(1, 300, dtype=torch.bfloat16)
    drawn = sample(
        logits_BV.expand(5000, -1), SamplingConfig(temperature=1.0, top_p=0.9999), torch.Generator().manual_seed(0)
    )
    assert drawn.unique().numel() == 300


# -- errors


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 1 is empty; give at least one token"),
        ([[1, 31]], "prompt 0 has a token outside 0 to 30; is it another tokenizer's?"),
        ([[-1]], "prompt 0 has a token outside 0 to 30"),
    ],
)
def test_bad_prompts(model, prompts, message):
    with pytest.raises(ConfigError, match=message):
        generate(model, prompts, GREEDY)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be greater than or equal to 0"),
        ({"top_k": 0}, "top_k is 0; it must be greater than or equal to 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be greater than 0"),
        ({"top_p": 1.1}, "top_p is 1.1; it must be less than or equal to 1"),
        ({"max_tokens": -1}, "max_tokens is -1; it must be greater than or equal to 0"),
    ],
)
def test_messages(fields, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**fields)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logits", [[torch.nan, 1.0], [torch.inf, 1.0], [-torch.inf, -torch.inf]])
def test_no_token_is_drawn_from_what_are_no_numbers(logits, temperature):
    with pytest.raises(NotFiniteError, match=r"row 1 has logits that are not numbers \(the largest is (nan|-?inf)\)"):
        sample(torch.tensor([[0.0, 1.0], logits]), SamplingConfig(temperature=temperature))


def test_tokens_that_are_closed_are_no_fault():
    assert sample(torch.tensor([[-torch.inf, 1.0]]), SamplingConfig(temperature=1.0)).tolist() == [1]
