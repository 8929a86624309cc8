"""A small mixture of experts with a byte tokenizer, saved once, and a server process in front of it."""

import functools
import json
import tempfile
import urllib.request
from contextlib import AbstractContextManager
from pathlib import Path

from anabranch.data import ByteTokenizer
from anabranch.experts.parscale import ParScale
from anabranch.lm import Decoder, save_model
from anabranch.nn import MoE, SelfAttention, SwiGLU
from anabranch.routing import Router, TopK
from server_process import Served, started

LAYERS, EXPERTS = 2, 4


def small_moe() -> Decoder:
    """Random, and so large in its weights that greedy tokens vary."""
    config = Decoder.Config(
        vocab_size=257,
        dim=16,
        num_layers=LAYERS,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
        feed_forward=MoE.Config(num_experts=EXPERTS, hidden_dim=8, router=Router.Config(select=TopK.Config(top_k=2))),
        init_std=0.3,
        max_positions=2048,
    )
    return config.build(seed=0).eval()


def small_streams() -> Decoder:
    """The same as three parallel streams, or two; told apart so far that their greedy tokens differ."""
    streams = ParScale.Config(num_streams=3, switchable=(2,), prefix_len=5, prefix="direct", prefix_std=1.0)
    return small_moe().config.replace(streams=streams).build(seed=0).eval()


@functools.cache
def saved_moe() -> str:
    """Folder of it; it lasts as long as this process."""
    return _saved("small-moe", small_moe())


@functools.cache
def saved_streams() -> str:
    """Folder of the parallel streams."""
    return _saved("small-streams", small_streams())


@functools.cache
def saved_dense() -> str:
    """Folder of a model without experts."""
    dense = small_moe().config.replace(feed_forward=SwiGLU.Config(hidden_dim=8))
    return _saved("small-dense", dense.build(seed=0))


def _saved(name: str, model: Decoder) -> str:
    folder = tempfile.TemporaryDirectory()
    _KEPT.append(folder)
    path = Path(folder.name) / name
    save_model(path, model, ByteTokenizer())
    return str(path)


_KEPT: list[tempfile.TemporaryDirectory] = []


def serve_process(
    *arguments: str, model: str | None = None, environment: dict[str, str] | None = None
) -> AbstractContextManager[Served]:
    """``anabranch serve`` with these arguments on a free port, when it is ready."""
    return started("serve", model or saved_moe(), *arguments, environment=environment)


def posted(url, body):
    """What a server process answers to a completion."""
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())
