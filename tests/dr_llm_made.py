"""What tests of Dr.LLM share: tiny models of ours and of transformers, questions, and rewards that know what they want."""

import torch

from anabranch.depth.dr_llm import BankConfig, Question, RouterBank
from anabranch.depth.stack import stack_of
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU

VOCABULARY = 23
CONFIG = Decoder.Config(
    vocab_size=VOCABULARY,
    dim=16,
    num_layers=5,
    attention=SelfAttention.Config(num_heads=2),
    feed_forward=SwiGLU.Config(hidden_dim=24),
    max_positions=64,
    init_std=0.3,
)


def stack(seed=0, **changes):
    """Of a decoder whose blocks matter."""
    return stack_of(CONFIG.replace(**changes).build(seed=seed).eval())


def transformers_stack(family="llama"):
    """Of a tiny model of transformers."""
    import transformers

    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=4, n_head=2, n_positions=64, initializer_range=0.3
        )
        return stack_of(transformers.GPT2LMHeadModel(config).eval())
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return stack_of(transformers.LlamaForCausalLM(config).eval())


def asked(count=6, length=9, seed=0, answer=1):
    """Questions of random tokens, one shorter than the other."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Question(
            f"q{number}",
            tuple(torch.randint(VOCABULARY, (length - number % 4,), generator=generator).tolist()),
            tuple(torch.randint(VOCABULARY, (answer,), generator=generator).tolist()),
        )
        for number in range(count)
    ]


def bank_of(model, seed=0, **changes):
    """Routers of a model, whose decisions differ."""
    made = BankConfig(num_blocks=model.num_blocks, width=model.width, fingerprint=model.fingerprint())
    bank = RouterBank(made.replace(**changes), seed=seed)
    with torch.no_grad():
        bank.second_NCF.mul_(4.0)
    return bank.requires_grad_(False)


class Wants:
    """A reward for some paths; counts how often each was asked for."""

    name = "wants"

    def __init__(self, *paths):
        self.paths, self.calls = set(paths), []

    def __call__(self, question, run):
        self.calls.append((question.id, run.path))
        return float(run.path in self.paths)
