"""A trained dense model made versatile on its own weights, and back: our `Decoder`, and models of transformers.

    model = from_dense(model, max_loops=4)               # ours; to_dense(model) is the dense model again
    patch_model(llama, max_loops=4); unpatch(llama)      # transformers, in place

In a block of transformers the residual stream and the norm lie outside the MLP, which sees norm(H) alone. `patch_model` lets the
norm pass its input on (a forward hook that returns it), so the MLP's place is given H itself; `VersatileMLP` there calls the norm as
often as it loops and returns Y - H, to which the block adds H. No block is rewritten, and keys of the state dict stay as they were.
"""
# Shapes: B sequences, L positions, N items, D width, F hidden

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.experts.versatile.branch import Branch
from anabranch.experts.versatile.layer import VersatileFFN
from anabranch.experts.versatile.paths import Paths
from anabranch.lm.decoder import Decoder
from anabranch.lm.recipes import Material, fields_beyond, not_chosen, recipe
from anabranch.nn.context import set_unregistered
from anabranch.nn.feed_forward import MLP, SwiGLU
from anabranch.routing import RoutingContext
from anabranch.routing.context import argument_of

PAIRS = (("up_proj", "down_proj"), ("fc1", "fc2"), ("dense_h_to_4h", "dense_4h_to_h"))
ACTIVATIONS = ("act_fn", "activation_fn", "act")


# Our own models


def from_dense(model: Decoder, *, seed: int = 0, **options: Any) -> Decoder:
    """A decoder whose dense layers are versatile, on the weights of ``model``: the tensors are shared, not copied.

    Args:
        model: a decoder of SwiGLU or MLP feed-forwards. Copy it first (``copy.deepcopy``) to keep it as it is while the new one trains.
        seed: of the heads.
        options: fields of `VersatileFFN.Config`.

    Raises ConfigError if the model is not dense, or the options do not fit it.
    """
    dense: Any = model.config.feed_forward
    if not _is_dense(model.config):
        raise ConfigError(f"from_dense needs a model of 'swiglu' or 'mlp' layers, this one has {dense.owner.kind!r}")
    known = {"hidden_dim": dense.hidden_dim, "activation": getattr(dense, "activation", "swiglu")}
    config = model.config.replace(feed_forward=VersatileFFN.Config(**{**known, **options}))
    made = _on_weights_of(model, config, seed)
    for block in made.blocks:
        layer: Any = block.feed_forward
        own = layer.paths.width_norm if isinstance(layer, VersatileFFN) else None
        if own is not None:
            norm: Any = block.feed_forward_norm
            own.load_state_dict(norm.state_dict())
            own.eps = norm.eps
    return made


def to_dense(model: Decoder) -> Decoder:
    """The dense decoder under a versatile one, on the same weights: what is left without the heads.

    Raises ConfigError if the model is not versatile.
    """
    versatile: Any = model.config.feed_forward
    if not isinstance(versatile, VersatileFFN.Config):
        raise ConfigError(f"to_dense needs a 'versatile' model, this one has {versatile.owner.kind!r}")
    hidden_dim, activation = versatile.hidden_dim, versatile.activation
    dense: Any = MLP.Config(hidden_dim=hidden_dim, activation=activation)
    if activation == "swiglu":
        dense = SwiGLU.Config(hidden_dim=hidden_dim)
    return _on_weights_of(model, model.config.replace(feed_forward=dense), 0)


def _is_dense(config: Decoder.Config) -> bool:
    return type(config.feed_forward) in (SwiGLU.Config, MLP.Config)


def _on_weights_of(model: Decoder, config: Decoder.Config, seed: int) -> Decoder:
    made = Decoder(config, seed=seed).to(model.embedding.weight)
    found = made.load_state_dict(model.state_dict(), strict=False, assign=True)
    assert all(".paths." in name for name in (*found.missing_keys, *found.unexpected_keys)), found
    return made.train(model.training)


# Models of transformers


class VersatileMLP(nn.Module):
    """Stands in the place of a block's MLP, holds its layers under their names, and adds the two heads as ``paths``.

    ``forward`` takes the residual stream H and returns Y - H. The balance loss and loads go to `collect_routing`.
    """

    def __init__(
        self, parts: "_Parts", config: VersatileFFN.Config, *, layer: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        for name, child in parts.mlp.named_children():
            self.add_module(name, child)
        set_unregistered(self, "parts", parts)
        weight = next(parts.mlp.parameters())
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        self.paths = Paths(config, parts.dim, parts.hidden_dim, layer=layer, generator=generator)
        self.paths.to(weight.device, dtype)
        norms = [norm for norm in (parts.before, parts.after) if norm is not None]
        set_unregistered(self, "handles", [norm.register_forward_hook(_pass_on, with_kwargs=True) for norm in norms])

    parts: "_Parts"
    handles: list[Any]

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Y - H."""
        given = _collecting.get() or RoutingContext()
        context = replace(given, sequence_length=x_BLD.shape[-2], training=self.training)
        # A repetition in the backward pass: what it emits was counted before.
        if torch._C._current_graph_task_id() != -1:
            context = context.fork()
        x_ND = x_BLD.flatten(0, -2)
        if context.item_mask_N is not None and len(context.item_mask_N) != len(x_ND):
            raise ConfigError(
                f"collect_routing was given a mask of {len(context.item_mask_N)} tokens, this pass has {len(x_ND)}"
            )
        return self.paths(x_ND, self.parts.branch(), context).view_as(x_BLD)


@dataclass(frozen=True)
class _Parts:
    """An MLP of transformers taken apart, with the norms of its block."""

    mlp: nn.Module
    # Gate and up, or the one matrix that is both, or up alone.
    inputs: tuple[nn.Module, ...]
    down: Any
    activation: Callable[[Tensor], Tensor]
    is_gated: bool
    before: nn.Module | None
    after: nn.Module | None

    @property
    def dim(self) -> int:
        return self.down.out_features

    @property
    def hidden_dim(self) -> int:
        return self.down.in_features

    def hidden(self, h_ND: Tensor, context: Any = None) -> Tensor:
        """The activated hidden units; layers of transformers ask for no context."""
        values = [layer(h_ND) for layer in self.inputs]
        if not self.is_gated:
            return self.activation(values[0])
        gate, up = values if len(values) == 2 else values[0].chunk(2, dim=-1)
        return self.activation(gate) * up

    def branch(self) -> Branch:
        """As the paths see it. The norms are called past their hooks, which pass their input on."""
        return Branch(
            norm=_same if self.before is None else self.before.forward,
            hidden=self.hidden,
            down=self.down,
            dim=self.dim,
            hidden_dim=self.hidden_dim,
            after=None if self.after is None else self.after.forward,
            num_inputs=1 + self.is_gated,
            weights=self.weights if self.is_sliceable else None,
        )

    @property
    def is_sliceable(self) -> bool:
        """Whether it is a SwiGLU of plain floating-point matrices without biases, which can be cut into experts."""
        plain = all(
            isinstance(layer, nn.Linear) and layer.bias is None and layer.weight.is_floating_point()
            for layer in (*self.inputs, self.down)
        )
        return plain and self.is_gated and isinstance(self.activation, nn.SiLU)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up and down."""
        found: list[Any] = [layer.weight for layer in self.inputs]
        gate_FD, up_FD = found if len(found) == 2 else found[0].chunk(2)
        return gate_FD, up_FD, self.down.weight


def patch_model(model: nn.Module, *, seed: int = 0, **options: Any) -> nn.Module:
    """Make every MLP of a transformers model versatile, in place and on its own weights. Returns ``model``.

    Llama, Qwen, Mistral, SmolLM, OLMo, OLMo 2, Gemma 2, Phi 3 and what is built like them: an ``mlp`` with gate, up and down
    projections (or up and down alone), between norms of known names, added to the residual stream. State dicts keep all keys and gain
    those of the heads, so an unpatched model loads them with ``strict=False`` and is the dense one.

    Args:
        model: the model; nothing of it is imported, so any library with such blocks will do.
        seed: of the heads.
        options: fields of `VersatileFFN.Config`, without ``hidden_dim``.

    Raises:
        ConfigError: there is no such block, one has an unknown structure (named), it is patched already, or the options do not fit.
    """
    found = [
        (name, block) for name, block in model.named_modules() if isinstance(getattr(block, "mlp", None), nn.Module)
    ]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no block with an 'mlp'; use from_dense for a Decoder of ours")
    # All are looked at before one is changed.
    taken = [_take_apart(name, block) for name, block in found]
    configs = [VersatileFFN.Config(**{**options, "hidden_dim": parts.hidden_dim}) for parts in taken]
    for (name, _), parts, config in zip(found, taken, configs, strict=True):
        if config.norm == "separate":
            raise ConfigError("norm is 'separate', which needs a norm of ours; use norm='shared' with patch_model")
        if config.width_compute == "grouped" and not parts.is_sliceable:
            raise ConfigError(
                f"{name}.mlp is no SwiGLU of plain matrices without biases (quantised ones cannot be sliced), so "
                "width_compute='grouped' cannot cut experts from it; use width_compute='masked'"
            )
    generator = torch.Generator().manual_seed(seed)
    for layer, ((_, block), parts, config) in enumerate(zip(found, taken, configs, strict=True)):
        mlp = VersatileMLP(parts, config, layer=layer, generator=generator).train(parts.mlp.training)
        block.mlp = mlp
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch_model`, in place: the MLPs that were there, with their weights as they are now, and without the heads.

    Raises ConfigError if nothing is patched.
    """
    patched = [block for block in model.modules() if isinstance(getattr(block, "mlp", None), VersatileMLP)]
    if not patched:
        raise ConfigError(f"{type(model).__name__} has no patched block; patch_model makes them")
    for block in patched:
        wrapper: Any = block.mlp
        for handle in wrapper.handles:
            handle.remove()
        block.mlp = wrapper.parts.mlp.train(wrapper.training)
    return model


_collecting: ContextVar[RoutingContext | None] = ContextVar("versatile_routing", default=None)


@contextmanager
def collect_routing(*, attention_mask: Tensor | None = None) -> Iterator[RoutingContext]:
    """What patched layers emit during one forward pass inside the block: balance losses, loads, statistics.

        with collect_routing(attention_mask=mask_BL) as context:
            loss = model(token_BL, attention_mask=mask_BL, labels=token_BL).loss
        (loss + sum(context.mean_losses().values())).backward()

    Without it nothing is lost but the balance loss. ``context.mean_metrics()`` has mean loops, lambda and FLOPs.
    """
    context = RoutingContext(item_mask_N=None if attention_mask is None else attention_mask.bool().reshape(-1))
    token = _collecting.set(context)
    try:
        yield context
    finally:
        _collecting.reset(token)
    context.commit()


def _take_apart(name: str, block: nn.Module) -> _Parts:
    mlp: Any = block.mlp
    if isinstance(mlp, VersatileMLP):
        raise ConfigError(f"{name}.mlp is versatile already; unpatch the model first")
    before, after = _norms(name, block)
    layers = dict(mlp.named_children())
    activation = next((getattr(mlp, found) for found in ACTIVATIONS if hasattr(mlp, found)), None)
    inputs: tuple[nn.Module, ...] | None = None
    down, is_gated = layers.get("down_proj"), True
    if {"gate_proj", "up_proj", "down_proj"} <= layers.keys():
        inputs = (layers["gate_proj"], layers["up_proj"])
    elif {"gate_up_proj", "down_proj"} <= layers.keys():
        inputs = (layers["gate_up_proj"],)
    else:
        for first, second in PAIRS:
            if {first, second} <= layers.keys():
                inputs, down, is_gated = (layers[first],), layers[second], False
    if inputs is None or activation is None or not hasattr(down, "in_features"):
        raise ConfigError(
            f"{name}.mlp ({type(mlp).__name__}) has a structure that is not known: layers {', '.join(layers) or 'none'}; "
            "it needs gate_proj, up_proj and down_proj (or a pair such as fc1 and fc2) and an activation"
        )
    return _Parts(mlp, inputs, down, activation, is_gated, before, after)


def _norms(name: str, block: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The norms before and behind the MLP."""
    layers = dict(block.named_children())
    before, after = layers.get("pre_feedforward_layernorm"), layers.get("post_feedforward_layernorm")
    if before is None and after is None:
        before = layers.get("post_attention_layernorm")
    odd = [what for what in ("use_parallel_residual", "residual_multiplier") if getattr(block, what, False)]
    if (before is None and after is None) or odd:
        why = f"it has {odd[0]}" if odd else f"its norms are {', '.join(layers)}"
        raise ConfigError(
            f"{name} ({type(block).__name__}) does not add its MLP to the residual stream in a known way: {why}; it needs "
            "post_attention_layernorm before the MLP, or pre_ or post_feedforward_layernorm"
        )
    return before, after


def _pass_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
    """Forward hook of a norm whose work the patched MLP does: its input goes on."""
    return argument_of(Tensor, args, kwargs)


def _same(x: Tensor) -> Tensor:
    return x


@recipe(
    "from_dense",
    makes=lambda config: type(config.feed_forward) is VersatileFFN.Config,
    takes=_is_dense,
    needs="a dense model of 'swiglu' or 'mlp' layers",
)
def _from_plain(model: Decoder, config: Decoder.Config, material: Material) -> Decoder:
    return from_dense(model, seed=material.seed, **fields_beyond(config.feed_forward, MLP.Config))


# The trained model's activation.
not_chosen(VersatileFFN.Config, "activation")
