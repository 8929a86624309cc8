"""Small models whose tokens are skipped, for the tests of FTP: ours, with what attention may have, and transformers'."""

import torch

from anabranch.depth.ftp import TokenRouter
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU

VOCAB, BLOCKS = 31, 5


def decoder(num_layers=BLOCKS, *, seed=0, **attention):
    return (
        Decoder.Config(
            vocab_size=VOCAB,
            dim=32,
            num_layers=num_layers,
            attention=SelfAttention.Config(**{"num_heads": 4, "num_kv_heads": 2, **attention}),
            feed_forward=SwiGLU.Config(hidden_dim=48),
            max_positions=2048,
            init_std=0.3,  # so that blocks matter
        )
        .build(seed=seed)
        .eval()
    )


def tokens(batch=1, length=12, seed=0):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def items(count=3, prompt=10, continuation=4, seed=0):
    rows = tokens(count, prompt + continuation, seed).tolist()
    return [(row[:prompt], row[prompt:]) for row in rows]


def router(seed=3, config=None):
    """One that has not learned, and decides now so, now so: of factors by rank, place and attention; of hidden states by chance."""
    made = TokenRouter(config, seed=seed).requires_grad_(False)
    if made.config.inputs == "hidden":
        made.second.bias.zero_()
        return made
    for parameter in made.parameters():
        parameter.mul_(0.05)
    place, score, rank = made.first.weight[0], made.first.weight[1], made.first.weight[2]
    place[0] += 1.0
    score[1] += 1.0
    rank[2] += 1.0
    made.second.weight[1, :3] += torch.tensor([0.3, 0.05, 1.0])
    made.second.bias[1] -= 0.75
    return made
