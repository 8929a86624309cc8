"""What tests share that hold us against the package peft, where it is installed."""

import importlib.util
import warnings

import pytest
import torch

HAS_PEFT = importlib.util.find_spec("peft") is not None
needs_peft = pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed")


def theirs(base, adapter):
    """peft's model: a folder of transformers with an adapter in it, in float32."""
    import peft
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(model, adapter).eval()
