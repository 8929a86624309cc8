"""Tiny random models of transformers' own classes."""

import torch
import transformers

VOCAB = 61
BODY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # far from the default, so that routing is decided and errors show
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Ones and zeros would hide a swap.
DRAWN = ("norm", "bias", "sinks")


def build_theirs(family, **changes):
    config = getattr(transformers, f"{family}Config")(**{**BODY, **changes})
    config._experts_implementation = "eager"
    torch.manual_seed(1)
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if any(part in name for part in DRAWN):
                tensor.copy_(torch.randn_like(tensor) * 0.3 + ("norm" in name))
    return model
