"""A grammar that holds from the end of a preamble on: token by token, and sampled."""

import numpy as np
import pytest
import torch

from anabranch.data.tokenizer import ByteTokenizer
from anabranch.errors import InputError
from anabranch.serving.chat import Dialect, call_grammar
from anabranch.serving.core.request import Preamble, Request, Sampling
from anabranch.serving.grammar import GrammarStore, regex
from anabranch.serving.sampling import Sampler
from anabranch.serving.sampling.preamble import PreambledMatcher
from reasoning_models import HARMONY, QWEN3, tokenizer_of

DIGIT = regex("[0-9]")


def matcher_of(tokenizer, preamble, form=DIGIT):
    store = GrammarStore(tokenizer, tokenizer.stop_ids, is_tried=True)
    return PreambledMatcher(store.get(form), preamble, store.bytes_of)


def walk(matcher, tokens):
    """Whether each token was allowed, and taken, up to the first that was not."""
    for at, token in enumerate(tokens):
        allowed = bool(matcher.allowed_V()[token])
        assert matcher.take(token) == allowed, at
        if not allowed:
            return at
    return None


def test_reasoning_that_the_prompt_began_is_free_and_ends_with_the_tag():
    tokenizer = ByteTokenizer()
    for text in ("</think>5", "a{ </thin </think>5", "<think></think>5"):
        matcher = matcher_of(tokenizer, Preamble(close=("</think>",)))
        assert walk(matcher, text.encode()) is None
        assert matcher.is_final
    assert walk(matcher_of(tokenizer, Preamble(close=("</think>",))), b"a</think>b") == 9
    matcher = matcher_of(tokenizer, Preamble(close=("</think>",)))
    # It cannot end before it has answered.
    assert not matcher.allowed_V()[tokenizer.eos_id]
    assert not matcher.is_final
    assert walk(matcher, [*b"a</think>", tokenizer.eos_id]) == 9
    assert np.array_equal(np.flatnonzero(matcher_of(tokenizer, Preamble(close=("x",))).allowed_V()), np.arange(256))


def test_reasoning_may_begin_or_not():
    tokenizer = tokenizer_of(QWEN3)
    opens = tuple(tokenizer.encode("<think>"))
    assert len(opens) == 1
    for text in ("5", "<think>so</think>5"):
        matcher = matcher_of(tokenizer, Preamble(open=opens, close=("</think>",)))
        assert walk(matcher, tokenizer.encode(text)) is None
        assert matcher.is_final
    for text, at in (("so", 0), ("5<think>", 1), ("<think>so</think><think>", 4)):
        assert walk(matcher_of(tokenizer, Preamble(open=opens, close=("</think>",))), tokenizer.encode(text)) == at


def test_what_begins_reasoning_may_begin_the_answer_too():
    tokenizer = ByteTokenizer()
    form = regex("<(b|think)>")
    for text, wanted in (
        ("<b>", None),
        ("<think>x</think><b>", None),
        ("<think>x</think>x", 16),
        ("<x", 1),
        ("<thb", 3),
    ):
        matcher = matcher_of(tokenizer, Preamble(open=tuple(b"<think>"), close=("</think>",)), form)
        assert walk(matcher, text.encode()) == wanted, text


def test_a_token_that_ends_both_is_an_error():
    tokenizer = ByteTokenizer()
    store = GrammarStore(tokenizer, tokenizer.stop_ids, is_tried=True)
    pieces = {0: b"</think> \n", 1: b"</think>5"}
    for token, is_right in ((0, True), (1, False)):
        matcher = PreambledMatcher(store.get(DIGIT), Preamble(close=("</think>",)), pieces.__getitem__)
        assert matcher.take(token) == is_right
        assert (matcher.error is None) == is_right
        assert matcher.allowed_V().any() == is_right


def test_gpt_oss_answers_and_calls_behind_its_channels():
    tokenizer = tokenizer_of(HARMONY)
    dialect = Dialect.of(tokenizer)
    reasoning = dialect.reasoning_after("<|start|>assistant")
    analysis = "<|channel|>analysis<|message|>so<|end|><|start|>assistant"
    answer = dialect.preamble(reasoning, tokenizer, is_call=False)
    for text in (f"{analysis}<|channel|>final<|message|>5", "<|channel|>final <|constrain|>json<|message|>5"):
        matcher = matcher_of(tokenizer, answer)
        assert walk(matcher, tokenizer.encode(text)) is None
        assert matcher.is_final
        assert matcher.allowed_V()[tokenizer.id_of("<|return|>")]
    tools = [{"type": "function", "function": {"name": "now"}}]
    form = call_grammar(tools, "required", dialect=dialect)
    calling = dialect.preamble(reasoning, tokenizer, is_call=True)
    call = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}"
    for text in (call, analysis + call):
        matcher = matcher_of(tokenizer, calling, form)
        assert walk(matcher, tokenizer.encode(text)) is None
        assert matcher.allowed_V()[tokenizer.id_of("<|call|>")]
    for text in (call.replace("now", "rm"), analysis + "<|channel|>final<|message|>"):
        assert walk(matcher_of(tokenizer, calling, form), tokenizer.encode(text)) is not None


def test_a_sampler_goes_on_where_another_has_been():
    tokenizer = ByteTokenizer()
    sampling = Sampling(temperature=0, grammar=DIGIT, preamble=Preamble(close=("</think>",)))
    logits_1V = torch.zeros(1, 257)
    logits_1V[0, ord("x")], logits_1V[0, ord("7")] = 2, 1
    for before, wanted in ((b"", "x"), (b"x</think", "x"), (b"x</think>", "7")):
        sampler = Sampler(257, stop_tokens=tokenizer.stop_ids, tokenizer=tokenizer, is_tried=True)
        sampler.add(Request(id="a", prompt=(1,), sampling=sampling), list(before))
        [made] = sampler(logits_1V, ["a"])
        assert (chr(made.token), made.error) == (wanted, None)


@pytest.mark.parametrize("wrong", [{"close": ()}, {"close": ("",)}, {"close": ("a",), "open": (1.5,)}])
def test_a_preamble_has_an_end(wrong):
    with pytest.raises(InputError):
        Preamble(**wrong)
    with pytest.raises(InputError, match="preamble is 'x'"):
        Sampling(preamble="x")
