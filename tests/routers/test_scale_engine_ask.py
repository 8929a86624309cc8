"""`EngineAsk`: a model in this process asked as any other, one call of many failing alone."""

import asyncio

import pytest

from anabranch.data import ByteTokenizer
from anabranch.errors import BackendError, InputError
from anabranch.lm.decoder import Decoder
from anabranch.nn.attention import SelfAttention
from anabranch.nn.feed_forward import SwiGLU
from anabranch.routers.contract.ask import Answered, Arm
from anabranch.routers.money import Price
from anabranch.routers.scale import EngineAsk
from anabranch.serving.core.request import Sampling
from anabranch.serving.engine import LLM


@pytest.fixture(scope="module")
def llm():
    config = Decoder.Config(
        vocab_size=257,
        dim=32,
        num_layers=1,
        max_positions=256,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=SwiGLU.Config(hidden_dim=32),
        init_std=0.5,
    )
    made = LLM(config.build(seed=0), ByteTokenizer())
    yield made
    made.close()


@pytest.fixture
def ask(llm):
    made = EngineAsk(llm, name="small", price=Price.of_dollars(1, 2))
    yield made
    made.close()


def test_it_says_what_the_engine_says(llm, ask):
    messages = [{"role": "user", "content": "hi"}]
    [wanted] = llm.chat([messages], [{"max_tokens": 6, "temperature": 0.0}])
    found = asyncio.run(ask("small", "hi", max_tokens=6, temperature=0.0))
    assert isinstance(found, Answered)
    assert found.text == wanted.text
    assert (found.prompt_tokens, found.completion_tokens) == (len(wanted.prompt), 6)
    assert found.cost == pytest.approx((found.prompt_tokens + 2 * 6) / 1e6, abs=1e-9)
    assert ask.spent.completion_tokens == 6
    prompt = llm.tokenizer.encode_chat(llm.tokenizer.apply_chat_template(messages))
    assert wanted.prompt == tuple(prompt)


def test_samples_seeds_and_log_probabilities(ask):
    how = {"max_tokens": 5, "temperature": 1.0, "seed": 3}
    found = asyncio.run(ask("small", "hi", n=3, logprobs=2, **how))
    assert len(found.texts) == 3
    assert found.completion_tokens == 15
    assert len(found.logprobs(1)) == 5
    assert len(found.logprobs()[0]["top_logprobs"]) == 2
    # The n-th is drawn with the seed and n.
    assert asyncio.run(ask("small", "hi", **(how | {"seed": 4}))).text == found.texts[1]


def test_an_answer_ends_before_a_stop(ask):
    whole = asyncio.run(ask("small", "hi", max_tokens=20, temperature=0.0)).text
    end = whole[3:5]
    found = asyncio.run(ask("small", "hi", max_tokens=20, temperature=0.0, stop=[end]))
    assert found.text == whole[: whole.index(end)]
    assert found.choices[0]["finish_reason"] == "stop"


def test_many_ask_at_once_and_one_that_cannot_be_answered_fails_alone(ask):
    async def all_of():
        calls = [ask("small", "a" * (5000 if place == 2 else place + 1), max_tokens=3) for place in range(5)]
        return await asyncio.gather(*calls, return_exceptions=True)

    found = asyncio.run(all_of())
    assert isinstance(found[2], InputError)
    assert all(isinstance(one, Answered) for place, one in enumerate(found) if place != 2)


def test_who_leaves_is_not_waited_for_and_harms_nobody(ask):
    async def leave():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await ask("small", "hi", max_tokens=3)
        return await ask("small", "hi", max_tokens=3)

    assert asyncio.run(leave()).completion_tokens == 3


@pytest.mark.parametrize(
    ("arm", "message"),
    [("large", "the engine runs 'small'"), (Arm("small", {"reasoning_effort": "high"}), "knows no 'reasoning_effort'")],
)
def test_what_an_engine_does_not_do_is_told(ask, arm, message):
    with pytest.raises(InputError, match=message):
        asyncio.run(ask(arm, "hi"))


def test_an_engine_that_breaks_is_a_backend_error():
    class Broken:
        tokenizer = None

        def chat(self, conversations, sampling=None):
            raise RuntimeError("broken")

    made = EngineAsk(Broken())
    with pytest.raises(BackendError, match="any did not answer: RuntimeError: broken"):
        asyncio.run(made("any", "hi"))
    made.close()


def test_it_streams_the_whole_and_begins_anew(ask):
    async def pieces():
        return [piece async for piece in ask.stream("small", "hi", max_tokens=4)]

    said, whole = asyncio.run(pieces())
    assert said.text == whole.text
    ask.close()
    assert asyncio.run(ask("small", "hi", max_tokens=2)).completion_tokens == 2


def test_a_chat_needs_a_tokenizer(llm):
    tokenizer, llm.tokenizer = llm.tokenizer, None
    try:
        with pytest.raises(InputError, match="has no tokenizer"):
            llm.chat([[{"role": "user", "content": "hi"}]], Sampling())
    finally:
        llm.tokenizer = tokenizer
