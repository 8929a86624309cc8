"""Ids that a vocabulary does not have are refused where they come in, however the table of vectors is stored."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from anabranch.depth.decoder_stack import DecoderStack
from anabranch.errors import ConfigError, InputError
from anabranch.lm import Decoder, SamplingConfig, generate, stream
from anabranch.lm.on_path import OnPath
from anabranch.lm.token_ids import check_batch
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.nn.packed import Packed
from anabranch.nn.quantize import PackedEmbedding, QuantizedLinear
from anabranch.serving import LLM, Sampling

# The last panel of 16 rows is not full.
VOCABULARY = 70
OUTSIDE = (-1, -16, -VOCABULARY, VOCABULARY, VOCABULARY + 9, VOCABULARY + 10, 1 << 40)


def build(kind):
    model = (
        Decoder.Config(
            vocab_size=VOCABULARY,
            dim=64,
            num_layers=2,
            attention=SelfAttention.Config(num_heads=2),
            feed_forward=SwiGLU.Config(hidden_dim=64),
            max_positions=64,
            tie_embeddings=True,
        )
        .build(seed=0)
        .eval()
    )
    if kind is not None:
        table = Packed.pack(model.embedding.weight, kind)
        model.embedding, model.head = PackedEmbedding(table), QuantizedLinear(table)
    return model


@pytest.fixture(scope="module", params=[None, "int8", "int4"], ids=str)
def model(request):
    return build(request.param)


DOORS = {
    "forward": lambda model, ids: model(torch.tensor([ids])),
    "forward with a cache": lambda model, ids: model(torch.tensor([ids]), cache=model.new_cache(8)),
    "on a path": lambda model, ids: OnPath(model, (0, 1))(torch.tensor([ids])),
    "in pieces": lambda model, ids: OnPath(model, None, chunk=2)(torch.tensor([ids])),
    "generate": lambda model, ids: generate(model, [[1, 2], ids], SamplingConfig(max_tokens=1)),
    "stream": lambda model, ids: list(stream(model, [ids], SamplingConfig(max_tokens=1))),
    "stack": lambda model, ids: DecoderStack(model).embed(torch.tensor([ids])),
}


@pytest.mark.parametrize("door", DOORS)
@torch.inference_mode()
def test_every_door_refuses_them_and_says_which(door, model):
    for token in (0, VOCABULARY - 1):
        DOORS[door](model, [1, token, 3])
    for token in OUTSIDE:
        with pytest.raises(ConfigError, match=rf"has (the|a) token .*0 to {VOCABULARY - 1}"):
            DOORS[door](model, [1, token, 3])


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_an_engine_refuses_them_and_serves_the_others(kind):
    llm = LLM(build(kind), num_blocks=16)
    fine = llm.generate([(1, 2)], Sampling(max_tokens=2, temperature=0))[0].tokens
    for token in OUTSIDE:
        for sampling in (Sampling(max_tokens=2), Sampling(max_tokens=0, prompt_logprobs=1)):
            with pytest.raises(InputError, match=f"the prompt has the token {token}; use 0 to {VOCABULARY - 1}"):
                llm.generate([(1, 2), (1, token)], sampling)
    assert llm.generate([(1, 2)], Sampling(max_tokens=2, temperature=0))[0].tokens == fine
    llm.close()


@given(st.lists(st.integers(-VOCABULARY, 2 * VOCABULARY), max_size=9))
def test_what_passes_is_what_the_vocabulary_has(ids):
    token_BL, is_in = torch.tensor([ids], dtype=torch.int64), all(0 <= index < VOCABULARY for index in ids)
    if is_in:
        check_batch(token_BL, VOCABULARY)
    else:
        with pytest.raises(ConfigError):
            check_batch(token_BL, VOCABULARY)


def test_a_compiled_model_is_compiled_whole():
    """The check looks at numbers, for which a graph would break."""
    model = build(None)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(whole(tokens).logits_BLV, model(tokens).logits_BLV)


def loss_of(model, token_L):
    return model(token_L[None, :-1], token_L[None, 1:]).loss


def test_gradients_of_each_sample_are_those_of_one_after_the_other():
    model = build(None)
    weights = dict(model.named_parameters())
    token_BL = torch.randint(0, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(0))

    def one(weights, token_L):
        return torch.func.functional_call(model, weights, (token_L[None, :-1], token_L[None, 1:])).loss

    together = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(weights, token_BL)
    for number, token_L in enumerate(token_BL):
        alone = torch.autograd.grad(loss_of(model, token_L), list(weights.values()))
        for name, gradient in zip(weights, alone, strict=True):
            torch.testing.assert_close(together[name][number], gradient, atol=1e-6, rtol=1e-4)


TRANSFORMS = {
    "vmap": lambda run: torch.func.vmap(run),
    "vmap in vmap": lambda run: lambda token_BL: torch.func.vmap(torch.func.vmap(run))(token_BL[None]),
    "vmap of columns": lambda run: lambda token_BL: torch.func.vmap(run, in_dims=1)(token_BL.T),
    "gradient": lambda run: (
        lambda token_BL: torch.func.grad(lambda x, ids: x * run(ids.flatten()))(torch.ones(()), token_BL)
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("row", [0, 1])
def test_wrong_ids_of_any_sample_are_refused(transform, row):
    model = build(None)
    run = TRANSFORMS[transform](lambda token_L: model(token_L[None]).logits_BLV.sum())
    token_BL = torch.randint(0, VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(0))
    run(token_BL)
    for token in OUTSIDE:
        token_BL[row, 2] = token
        with pytest.raises(ConfigError, match=f"has the token {token};"):
            run(token_BL)


@pytest.mark.parametrize("is_fake", [True, False], ids=["fake ids", "real ids"])
def test_without_numbers_nothing_is_looked_at(is_fake):
    model, token_BL = build(None), torch.tensor([[1, 2, 3]])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given_BL = mode.from_tensor(token_BL) if is_fake else token_BL
        assert model(given_BL).logits_BLV.shape == (1, 3, VOCABULARY)
    # Behind it they are looked at again.
    with pytest.raises(ConfigError):
        model(token_BL + VOCABULARY)


@pytest.mark.parametrize("tracing", ["fake", "symbolic"])
def test_a_graph_that_is_traced_is_of_any_ids(tracing):
    model, token_BL = build(None), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        graph = make_fx(lambda ids: model(ids).logits_BLV, tracing_mode=tracing, _allow_non_fake_inputs=True)(token_BL)
        torch.testing.assert_close(graph(token_BL + 4), model(token_BL + 4).logits_BLV)
