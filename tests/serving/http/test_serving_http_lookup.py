"""Prompt lookup in a server: the official client reads what it reads without, and metrics tell what was guessed."""

import pytest

from anabranch.data import ByteTokenizer
from anabranch.serving.config import ServingConfig
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.local import LocalEngine
from serving_models import small_moe
from serving_thread import serving

openai = pytest.importorskip("openai")
MODEL = "small"
# Few letters to choose from, so what is said repeats.
BIAS = {str(token): 60 for token in b"ab c"}
ASKED = [
    {"prompt": "abc abc abc", "temperature": 0, "max_tokens": 24, "logit_bias": BIAS},
    {"prompt": "abab", "temperature": 0.9, "seed": 4, "max_tokens": 16, "logit_bias": BIAS, "n": 2},
    {"prompt": "abc", "temperature": 0, "max_tokens": 16, "logit_bias": BIAS, "logprobs": 2, "frequency_penalty": 0.2},
]


def answers(model, number):
    """What a client is told, whole and streamed, and what the server counts."""
    config = ServingConfig(
        num_blocks=256, name=MODEL, dtype="float32", max_seqs=8, max_batched_tokens=64, prompt_lookup=number
    )
    found = []
    with (
        serving(lambda: LocalEngine(lambda: Engine.of(model, config, tokenizer=ByteTokenizer()))) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="anything", max_retries=0, timeout=60) as client,
    ):
        before = running.metrics()
        assert before["drafted_tokens_total"] == before["accepted_draft_tokens_total"] == 0
        # A stop string that is complete in the middle of what one step gives.
        whole = client.completions.create(model=MODEL, **ASKED[0]).choices[0].text
        for fields in (*ASKED, {**ASKED[0], "stop": [whole[len(whole) // 2 :][:4]]}):
            said = client.completions.create(model=MODEL, **fields)
            pieces = list(client.completions.create(model=MODEL, stream=True, **fields))
            text = {
                choice.index: "".join(
                    piece.choices[0].text for piece in pieces if piece.choices[0].index == choice.index
                )
                for choice in said.choices
            }
            assert text == {choice.index: choice.text for choice in said.choices}
            tokens = [choice.logprobs.tokens if choice.logprobs else None for choice in said.choices]
            ends = [choice.finish_reason for choice in said.choices]
            found.append((text, ends, tokens, said.usage.completion_tokens))
        metrics = running.metrics()
    return found, metrics


def test_the_official_client_reads_the_same_and_metrics_tell():
    model = small_moe()
    plain, before = answers(model, 0)
    guessed, metrics = answers(model, 6)
    assert guessed == plain
    assert plain[-1][1] == ["stop"]
    assert before["drafted_tokens_total"] == 0
    assert metrics["drafted_tokens_total"] >= metrics["accepted_draft_tokens_total"] > 20
    # Tokens that were behind a stop string are nobody's.
    assert metrics["generation_tokens_total"] == before["generation_tokens_total"]
    assert metrics["steps_total"] < before["steps_total"]
