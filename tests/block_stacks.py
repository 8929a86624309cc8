"""Tiny models that depth is routed in."""

import torch
import transformers

from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU
from foreign_models import VOCAB, build_theirs

BLOCKS = 3


def decoder(seed=3, window=None, **options):
    fields = {
        "vocab_size": VOCAB,
        "dim": 16,
        "num_layers": BLOCKS,
        "attention": SelfAttention.Config(num_heads=2, window=window),
        "feed_forward": SwiGLU.Config(hidden_dim=24),
        "init_std": 0.3,
    }
    return Decoder.Config(**fields | options).build(seed=seed).eval()


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=BLOCKS,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "ln_" in name or "bias" in name:
                tensor.copy_(torch.randn_like(tensor) * 0.3 + ("ln_" in name and "weight" in name))
    return model


def theirs(family, **changes):
    return build_theirs(family, intermediate_size=48, **changes)


def eager(model):
    model.set_attn_implementation("eager")
    return model


MAKERS = {
    "ours": decoder,
    "ours-window": lambda: decoder(window=3),
    "llama": lambda: theirs("Llama"),
    "llama-eager": lambda: eager(theirs("Llama")),
    "qwen2": lambda: theirs("Qwen2"),
    "qwen2-window": lambda: theirs("Qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "qwen3": lambda: theirs("Qwen3", head_dim=8),
    "mistral": lambda: theirs("Mistral", sliding_window=None),
    "mistral-window": lambda: theirs("Mistral", sliding_window=3),
    "gpt2": gpt2,
    "gpt2-eager": lambda: eager(gpt2()),
}
_made = {}


def model(name):
    """Made once: nothing here changes it."""
    if name not in _made:
        _made[name] = MAKERS[name]()
    return _made[name]


def tokens(batch, length, seed=0):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
