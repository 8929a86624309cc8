"""A small model that the compiled step runs, adapters for it, and runs of an engine with requests of several adapters."""

import torch

from adapter_models import make_adapter
from anabranch.adapters import DynMoLE, MixedLowRank
from anabranch.adapters.glider import describe_expert
from anabranch.adapters.mhr import MultiHeadRouted
from anabranch.adapters.own_folder import write_own
from anabranch.adapters.pool import LowRankPool
from anabranch.adapters.put_on import added_names, put_on
from anabranch.lm import Decoder
from anabranch.nn import MoE, SelfAttention, SwiGLU
from anabranch.routing import Router, TopK
from anabranch.serving import Sampling
from anabranch.serving.core.request import Output, Request
from anabranch.serving.core.stream import joined
from anabranch.serving.engine.messages import Add, Refused

DIM, HIDDEN, VOCAB, LAYERS = 64, 96, 257, 2
SIZES = {
    "self_attn.q_proj": (DIM, DIM),
    "self_attn.k_proj": (DIM, DIM // 2),
    "self_attn.v_proj": (DIM, DIM // 2),
    "self_attn.o_proj": (DIM, DIM),
    "mlp.gate_proj": (DIM, HIDDEN),
    "mlp.up_proj": (DIM, HIDDEN),
    "mlp.down_proj": (HIDDEN, DIM),
}
ATTENTION = tuple(name for name in SIZES if "attn" in name)


def make_model(*, is_moe=False, **changes):
    """Random, of the family llama (a mixture of experts: qwen3_moe), so large in its weights that greedy tokens vary."""
    feed_forward = SwiGLU.Config(hidden_dim=HIDDEN)
    if is_moe:
        router = Router.Config(select=TopK.Config(top_k=2, normalize="sum"))
        feed_forward = MoE.Config(num_experts=4, hidden_dim=32, router=router)
    attention = SelfAttention.Config(num_heads=4, num_kv_heads=2, qk_norm="head" if is_moe else "none")
    config = Decoder.Config(
        vocab_size=VOCAB,
        dim=DIM,
        num_layers=LAYERS,
        attention=attention,
        feed_forward=feed_forward,
        init_std=0.2,
        max_positions=256,
    )
    return config.replace(**changes).build(seed=0).eval().requires_grad_(False)


def layers_of(words=tuple(SIZES)):
    """{module: (inputs, outputs)} of all layers' parts."""
    return {f"model.layers.{layer}.{word}": SIZES[word] for layer in range(LAYERS) for word in words}


def make_adapters(root):
    """Folders by name: of other ranks and layers; ``huge`` is finite, and what it makes is not; ``head`` adapts the head too."""
    made = {
        "a": {"layers": layers_of(("self_attn.q_proj", "self_attn.v_proj")), "rank": 4},
        "b": {"layers": layers_of(), "rank": 6},
        "c": {"layers": layers_of(ATTENTION), "rank": 2},
        "huge": {"layers": layers_of(ATTENTION), "rank": 2, "lora_alpha": 9e29},
        "head": {"layers": {**layers_of(("self_attn.q_proj",)), "lm_head": (DIM, VOCAB)}, "rank": 3},
    }
    for name, options in made.items():
        make_adapter(root / name, options.pop("layers"), seed=name, **options)
    return {name: str(root / name) for name in made}


class Runs:
    """An engine and its loop, which stays between runs."""

    def __init__(self, engine):
        self.engine, self.events = engine, []
        self.loop = engine.loop(self.events.extend)
        self._count = 0

    def put(self, adapters, prompt, *, max_tokens=8, **more):
        """Ask for something; its id."""
        self._count += 1
        sampling = Sampling(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=0, prompt_logprobs=more.pop("scores", 0)
        )
        request = Request(id=f"r{self._count}", prompt=tuple(prompt), sampling=sampling, adapters=adapters, **more)
        self.loop.put(Add(request))
        return request.id

    def outputs(self):
        """All that was answered since, by id: an `Output`, or what was refused."""
        self.loop.run(until_idle=True)
        found = {}
        for event in self.events:
            if isinstance(event, Refused):
                found[event.id] = event
            elif isinstance(event, Output):
                found[event.id] = joined(found[event.id], event) if event.id in found else event
        self.events.clear()
        return found

    def __call__(self, asked, **more):
        """The outputs of requests (adapters, prompt) that are asked at once, in order."""
        ids = [self.put(adapters, prompt, **more) for adapters, prompt in asked]
        found = self.outputs()
        return [found[id] for id in ids]


def scores(output):
    """Log probabilities of prompt and answer."""
    return [told.logprob for told in (*output.prompt_logprobs, *output.logprobs)]


# Routers over several adapters, and adapters that go by task

TASKS = ("sql", "law", "sum")
INSTRUCTIONS = {
    "sql": "Write a SQL query that answers a question about a table.",
    "law": "Name the law that a legal case falls under.",
    "sum": "Summarise a news article in one sentence.",
}
# What stands beside matrices, by the kind that a server says of it.
LAYERS_OF = {
    "routed_low_rank": lambda: DynMoLE(num_experts=3, rank=2, alpha=8).linears(LAYERS),
    "mixed_low_rank": lambda: {
        "*.attention.[qkv]": MixedLowRank.Config(ranks=(2, 3, 2), router_group="qkv", router=_router()),
        "*.feed_forward.down": MixedLowRank.Config(ranks=(2, 3, 2), router=_router()),
    },
    "multi_head_routed": lambda: {
        "*.attention.*": MultiHeadRouted.Config(
            tasks=TASKS, skills=3, heads=2, rank=2, alpha=4.0, granularity="layerwise"
        )
    },
}


def _router():
    return Router.Config(select=TopK.Config(top_k=2, normalize="sum"), balance=())


def with_layers(kind, model=None):
    """A model with layers of this kind beside its matrices, whose numbers are drawn."""
    made = put_on(make_model() if model is None else model, LAYERS_OF[kind](), seed=1)
    state, generator = made.state_dict(), torch.Generator().manual_seed(2)
    for name in added_names(made):
        if state[name].is_floating_point() and state[name].dim() > 1:
            state[name].copy_(torch.randn(state[name].shape, generator=generator) * 0.3)
    # As a pool has it: nothing beyond an adapter's own rank, where products need not look.
    for pool in (module for module in made.modules() if isinstance(module, LowRankPool)):
        for adapter, rank in enumerate(pool.ranks):
            pool.a.data[adapter, rank:] = 0
            pool.b.data[adapter, :, rank:] = 0
    return made.eval()


def make_pool(root, *, instructions=True):
    """A pool: adapters of other ranks and layers, of which two have gates."""
    words = {"sql": ATTENTION, "law": tuple(SIZES), "sum": ("self_attn.q_proj", "mlp.down_proj")}
    for number, (name, own) in enumerate(words.items()):
        layers = layers_of(own)
        make_adapter(root / name, layers, seed=name, rank=2 + number)
        generator = torch.Generator().manual_seed(number)
        gates = {module: torch.randn(inputs, generator=generator) for module, (inputs, _) in layers.items()}
        describe_expert(
            root / name, instruction=INSTRUCTIONS[name] if instructions else None, gate=gates if number else None
        )
    return str(root)


def make_routers(root):
    """Folders by name: a pool, and adapters in our own form."""
    made = {"pool": make_pool(root / "pool")}
    for kind in LAYERS_OF:
        write_own(root / kind, with_layers(kind), base="demo")
        made[kind] = str(root / kind)
    return made
