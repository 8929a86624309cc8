"""Families whose attention is latent are refused, and it is said why."""

from pathlib import Path

import pytest

from anabranch.errors import CheckpointError
from anabranch.lm import formats


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3"])
def test_the_refusal_names_the_attention(kind):
    with pytest.raises(CheckpointError, match=rf"'{kind}' \(multi-head latent attention is not built\); supported"):
        formats.read_config({"model_type": kind}, Path("config.json"))
