"""The contract of attention: one made of the interface alone keeps it, and each broken one fails the check that should catch it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from anabranch.config import configclass
from anabranch.nn import Attention, Count
from anabranch.nn.attention import attend
from anabranch.nn.rotary import rotate
from anabranch.registry import BUILTIN, resolve
from anabranch.testing import check_attention


class Cosine(Attention, kind="cosine_in_a_test"):
    """Queries and keys of length one, times a learned temperature of each head."""

    @configclass
    class Config(Attention.Config):
        """Attributes: ``num_heads``."""

        num_heads: int = 2

        @property
        def kv_heads(self):
            return self.num_heads

        def width(self, dim):
            return dim // self.num_heads

        def count(self, context, sequence_length):
            return Count.dense(4 * context.dim**2) + Count(
                self.num_heads, self.num_heads, 2 * context.dim * sequence_length
            )

    def __init__(self, config, context):
        super().__init__()
        self.layer, self.num_heads = context.layer, config.num_heads
        self.qkv = context.linear(context.dim, 3 * context.dim)
        self.out = context.linear(context.dim, context.dim, residual=True)
        self.temperature_H = torch.nn.Parameter(torch.ones(config.num_heads))

    def heads(self, x_BLW, context):
        """(query, key, value) of each head."""
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x_BLW, context).chunk(3, -1)
        )
        temperature_H11 = self.temperature_H[:, None, None].to(query.dtype)
        query = F.normalize(query, dim=-1) * query.shape[-1] ** 0.5 * temperature_H11
        return rotate(query, context.rotary), rotate(F.normalize(key, dim=-1), context.rotary), value

    def mix(self, query, key, value, context):
        """What each query sees."""
        return attend(query, key, value, context, self.layer)

    def forward(self, x_BLW, context):
        y_BHLD = self.mix(*self.heads(x_BLW, context), context)
        return self.out(y_BHLD.transpose(1, 2).flatten(2), context)


class Ahead(Cosine, kind="ahead"):
    """Sees later positions."""

    def mix(self, query, key, value, context):
        return F.scaled_dot_product_attention(query, key, value) + 0 * super().mix(query, key, value, context)


class Forgetful(Cosine, kind="forgetful"):
    """Sees the tokens of this call alone."""

    def mix(self, query, key, value, context):
        attend(query, key, value, context, self.layer)
        return attend(query, key, value, replace(context, cache=None, attention_mask=None, is_causal=True), self.layer)


class SeesPadding(Cosine, kind="sees_padding"):
    """Leaves the mask of a padded batch out."""

    def mix(self, query, key, value, context):
        if context.cache is None:
            context = replace(context, attention_mask=None, is_causal=True)
        return super().mix(query, key, value, context)


class OneVisit(Cosine, kind="one_visit"):
    """Writes each visit of a layer over the one before."""

    def mix(self, query, key, value, context):
        return super().mix(query, key, value, replace(context, visits={}))


class FirstAlone(Cosine, kind="first_alone"):
    """Gives one position, which adds to all."""

    def forward(self, x_BLW, context):
        return super().forward(x_BLW, context)[:, :1]


class Wide(Cosine, kind="wide"):
    """Gives float64."""

    def forward(self, x_BLW, context):
        return super().forward(x_BLW, context).double()


class Frozen(Cosine, kind="frozen"):
    """Hands its keys no gradient."""

    def mix(self, query, key, value, context):
        return super().mix(query.detach(), key, value, context)


class Stores(Cosine, kind="stores"):
    """Says that it keeps half of what it keeps."""

    @configclass
    class Config(Cosine.Config):
        @property
        def kv_heads(self):
            return self.num_heads // 2


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    for design in (Cosine, *Cosine.__subclasses__()):
        monkeypatch.setitem(BUILTIN["attention"], design.kind, f"{__name__}:{design.__name__}")
    yield
    resolve.cache_clear()


def test_an_attention_of_the_interface_alone_keeps_the_contract():
    check_attention(Cosine.Config(), compile_backend="eager")


@pytest.mark.parametrize(
    ("design", "message"),
    [
        (Ahead, "later tokens leak"),
        (Forgetful, "cached logits"),
        (SeesPadding, "other tokens in its padding"),
        (OneVisit, "cached logits of blocks that are repeated"),
        (FirstAlone, r"an output has shape \[3, 1, 32\] for inputs of \[3, 5, 32\]"),
        (Wide, "an output is torch.float64 for inputs of torch.float32"),
        (Frozen, "temperature_H gets no gradient"),
        (Stores, "kv_heads and kept say 32 numbers of a position in the cache of a layer; it keeps 64"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_broken_attentions(design, message):
    with pytest.raises(AssertionError, match=message):
        check_attention(design.Config(), compile_backend="eager")
