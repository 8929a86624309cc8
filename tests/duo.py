"""Small duo models and what they predict, for the tests of Duo-LLM."""

import torch
import torch.nn.functional as F

from anabranch.depth.duo_llm import DuoFFN, take
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention

VOCAB = 31


def decoder(num_layers=3, *, seed=0, dim=16, **options):
    feed_forward = DuoFFN.Config(**{"big": 32, "small": 4, **options})
    return Decoder.Config(
        vocab_size=VOCAB,
        dim=dim,
        num_layers=num_layers,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=feed_forward,
        max_positions=64,
        init_std=0.3,  # routes that differ
    ).build(seed=seed)


def tokens(batch=3, length=7, seed=0):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def losses(model, ids_BL, route):
    with torch.no_grad():
        logits_BLV = model.eval()(ids_BL[:, :-1], state=take(route)).logits_BLV
    return F.cross_entropy(logits_BLV.transpose(1, 2), ids_BL[:, 1:], reduction="none")


def all_one(route, ids_BL):
    return torch.tensor(route).expand(ids_BL.shape[0], ids_BL.shape[1] - 1, len(route))
