"""NanoFlow's options of an engine's config: the same tokens, and what contradicts itself is refused."""

import contextlib

import pytest

from anabranch.errors import ConfigError
from anabranch.serving import LLM, Sampling, ServingConfig
from serving_models import saved_moe

PROMPTS = [[65 + at] * (20 + at) for at in range(6)]
GREEDY = Sampling(temperature=0, max_tokens=24, ignore_eos=True)


def tokens(**options):
    with contextlib.closing(LLM(saved_moe(), dtype="float32", **options)) as llm:
        answers = llm.generate(PROMPTS, GREEDY)
        return [answer.tokens for answer in answers], llm.engine.scheduler.stats().counters


def test_tokens_stay_whatever_is_offloaded_or_cut():
    plain, _ = tokens()
    small, counters = tokens(num_blocks=8, host_kv="1MiB")
    assert small == plain
    assert counters["swapped_out_blocks"] > 0
    assert tokens(num_blocks=8, host_kv="1MiB", admit_by_peak=True, scheduling="sync")[0] == plain
    assert tokens(nano_batches=True)[0] == plain


def test_what_contradicts_itself():
    with pytest.raises(ConfigError, match="disk_kv is set, but host_kv is not"):
        ServingConfig(disk_kv="1MiB")
    with pytest.raises(ConfigError, match="host_kv"):
        ServingConfig(host_kv="much")
