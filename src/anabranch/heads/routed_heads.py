"""`RoutedHeads`: an attention some of whose heads are on for some tokens only.

    heads = RoutedHeads(attention, num_shared=5)      # called like the attention
    y = heads(query, key, value)[0]
    loss = ... + heads.losses()                       # where no forward context takes them
    heads.report()["activation"]

Head h of token t is multiplied by s_th (`anabranch.heads.gate`) before the last projection. At the start all s are 1, so nothing changes,
but where a mask says that a query is padding: its routed heads are off, and what comes out there is another than of the plain attention.
Outside of training a head that is 0 for all tokens of a block is not computed.
"""
# Shapes: B sequences, L queries, N = B L, H heads, W width

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.heads.config import HeadRouting
from anabranch.heads.form import Decision, Form, form_of
from anabranch.heads.gate import HeadGate
from anabranch.heads.work import Work
from anabranch.nn.kernels.operands import is_transformed
from anabranch.nn.some_heads import SomeHeads
from anabranch.routing import RateBalance, RoutingContext

__all__ = ["RoutedHeads"]

# Share of heads from which on leaving the others out costs more than it spares.
WORTH = 0.95
# Losses that nobody took, at most.
MOST_PENDING = 64
# What of the attention others may look at as if it were not wrapped.
_SEEN_THROUGH = frozenset(
    "config layer_idx is_causal head_dim num_heads num_kv_heads num_key_value_groups embed_dim kdim vdim scaling batch_first dropout "
    "in_proj_weight in_proj_bias out_proj is_decoder".split()
)


class RoutedHeads(nn.Module):
    """An attention with routed heads, called as the attention is.

    Args:
        attention: of `anabranch.nn`, a `torch.nn.MultiheadAttention`, or of transformers with q, k, v and a last projection (Llama, Qwen2
            and 3, Mistral, GPT-2, Whisper, ...), self- and cross-attention; or any module with ``num_heads``, ``out`` and
            ``per_head(x, ..., some) -> y_BHLD``. It is kept, not copied.
        num_shared: heads that are always on, the first ones.
        routing, top_k, init, target, balance, control, block: see `HeadRouting`.
        layer: number of the layer, for traces; None for the attention's own.
        width: of what queries are made of; None for what the attention says.
        seed: of initial weights that are drawn (``init="released"``).

    Attributes:
        gate: what weighs heads, a `HeadGate`; None with ``routing="none"``.
        skip: whether heads that are off are left out, outside of training.
        work: what came by, see `report`.

    Raises ConfigError for settings that cannot be, an attention whose heads cannot be routed, and one that has routed heads already.
    """

    def __init__(
        self,
        attention: nn.Module,
        num_shared: int,
        *,
        routing: Literal["relu", "topk", "none"] = "relu",
        top_k: int = 2,
        init: Literal["preserve", "released"] = "preserve",
        target: float | None = None,
        balance: float = 0.01,
        control: RateBalance.Config | None = None,
        block: int = 256,
        layer: int | None = None,
        width: int | None = None,
        seed: int = 0,
    ) -> None:
        settings: dict[str, Any] = {} if control is None else {"control": control}
        config = HeadRouting(
            num_shared=num_shared,
            routing=routing,
            top_k=top_k,
            init=init,
            target=target,
            balance=balance,
            block=block,
            **settings,
        )
        self._build(attention, config, layer=layer, width=width, generator=torch.Generator().manual_seed(seed))

    @classmethod
    def of(cls, attention: nn.Module, config: HeadRouting, *, layer: int | None = None, seed: int = 0) -> "RoutedHeads":
        """The same by a config."""
        made = cls.__new__(cls)
        made._build(attention, config, layer=layer, width=None, generator=torch.Generator().manual_seed(seed))
        return made

    def _build(
        self,
        attention: nn.Module,
        config: HeadRouting,
        *,
        layer: int | None,
        width: int | None,
        generator: torch.Generator | None,
    ) -> None:
        nn.Module.__init__(self)
        if isinstance(attention, RoutedHeads):
            raise ConfigError("the attention has routed heads already; wrap the one inside of it (.attention)")
        self.form: Form = form_of(attention)
        shape = self.form.shape(attention)
        config.check(shape.num_heads)
        self.routing = config
        self.attention = attention
        self.layer = shape.layer if layer is None else layer
        self.skip = True
        self.work = Work()
        self._pending: list[Tensor] = []
        self._items = _Items()
        self.gate: HeadGate | None = None
        if not (width or shape.width):
            raise ConfigError(
                f"the width that a {type(attention).__name__} makes queries of is not known; say width=..."
            )
        if config.routing != "none":
            self.gate = HeadGate(config, shape.num_heads, width or shape.width, layer=self.layer, generator=generator)
            place = next((each.device for each in attention.parameters()), None)
            # What is only looked at keeps its buffers.
            if place is not None and place.type != "meta":
                self.gate.to(place)
            self.form.prepare(attention)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the attention returns."""
        if self.gate is None:
            return self.attention(*args, **kwargs)
        return self.form.run(self, args, kwargs)

    def decide(
        self,
        x_BLW: Tensor,
        context: RoutingContext | None = None,
        *,
        real_BL: Tensor | None = None,
        position_BL: Tensor | None = None,
    ) -> Decision:
        """Which heads the queries made of ``x_BLW`` have, and how much of them.

        Args:
            x_BLW: what queries are made of.
            context: of the pass, which takes losses and loads; None where there is none, and this module keeps them.
            real_BL: bool, False for padding, and
            position_BL: in their sequences, both where there is no context; None for what is not known.
        """
        assert self.gate is not None, "asked where heads are routed"
        batch, length = x_BLW.shape[:2]
        own = context is None
        if context is None:
            context = self._context(batch, length, real_BL, position_BL)
        scale_NH, routing = self.gate(x_BLW.flatten(0, 1), context)
        scale_BLH = scale_NH.view(batch, length, self.gate.num_heads)
        if self.counts:
            self.work.add_routing(routing, context)
            if own and context.training:
                self._keep(context)
        if not self.skip or context.training or torch.compiler.is_compiling() or is_transformed():
            return Decision(scale_BLH)
        some = SomeHeads.of(scale_BLH.detach() != 0, self.routing.block)
        return Decision(scale_BLH, some if some.share < WORTH else None)

    @property
    def counts(self) -> bool:
        """Whether what comes by now is counted: not in compiled code, nor where a backward pass runs it again."""
        if torch.compiler.is_compiling() or is_transformed():
            return False
        return torch._C._current_graph_task_id() == -1

    def _context(self, batch: int, length: int, real_BL: Tensor | None, position_BL: Tensor | None) -> RoutingContext:
        """Of a call that comes with none."""
        assert self.gate is not None
        state = {}
        if self.gate.router._forward_hooks:
            state = self._items.state(self.gate.router, batch, length, position_BL)
        return RoutingContext(
            item_mask_N=None if real_BL is None else real_BL.flatten(),
            sequence_length=length,
            training=self.training and torch.is_grad_enabled(),
            is_measured=False,
            state=state,
        )

    def _keep(self, context: RoutingContext) -> None:
        """Take over what a pass emitted."""
        context.commit()
        losses = context.mean_losses()
        if not losses:
            return
        if len(self._pending) == MOST_PENDING:
            warnings.warn(
                f"nobody takes the losses of routed heads in layer {self.layer}; add losses() to the loss of each step",
                stacklevel=2,
            )
            self._pending.clear()
        self._pending.append(torch.stack(list(losses.values())).sum())

    def losses(self) -> Tensor:
        """The losses of the passes since the last call, added up, and 0 where there are none.

        A pass with a forward context (an attention of `anabranch.nn` in its model) gives them to that, and not here.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return torch.zeros((), device=next((each.device for each in self.parameters()), None))
        return torch.stack(pending).sum()

    def report(self) -> dict[str, Any]:
        """What came by since the last `forget`.

        ``tokens``; ``by_head``, the share of tokens for which each head was on, 1 for shared ones; ``activation``, the mean over the routed
        ones, and its ``target``; ``computed``, the share of (head, token) pairs that was computed; ``saved``, the share of multiply-adds
        that was not. Shares are None before the first token.
        """
        config, gate = self.routing, self.gate
        heads = self.form.shape(self.attention).num_heads if gate is None else gate.num_heads
        told: dict[str, Any] = {"layer": self.layer, "heads": heads, "routing": config.routing}
        tokens = int(self.work.tokens)
        fired = [] if self.work.fired_M is None else self.work.fired_M.tolist()
        on = [value / tokens for value in fired] if tokens else None
        shared = heads if gate is None else config.num_shared
        wanted = {"relu": config.rate(heads), "topk": config.top_k / (heads - shared)} if gate is not None else {}
        return told | {
            "shared": shared,
            "tokens": tokens,
            "by_head": None if on is None else [1.0] * shared + on,
            "activation": None if not on else sum(on) / len(on),
            "target": wanted.get(config.routing),
            "computed": self.work.pairs / self.work.all_pairs if self.work.all_pairs else None,
            "saved": 1 - self.work.needed / self.work.possible if self.work.possible else None,
        }

    def forget(self) -> None:
        """Start `report` anew."""
        self.work.forget()

    def unwrap(self) -> nn.Module:
        """The attention alone, as it was before."""
        if self.gate is not None:
            self.form.restore(self.attention)
        return self.attention

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """No: a torch.nn.TransformerEncoderLayer that sees one matrix for all would compute attention itself, without this."""
        return False

    def __getattr__(self, name: str) -> Any:
        if name in _SEEN_THROUGH:
            return getattr(super().__getattr__("attention"), name)
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        # Losses hang on the graph of their pass.
        return self.__dict__ | {"_pending": []}

    def extra_repr(self) -> str:
        """The settings."""
        config = self.routing
        return f"{config.num_shared} shared, routing={config.routing!r}, init={config.init!r}"


class _Items:
    """Numbers the sequences of calls that say nothing of them, while somebody records (`anabranch.routing.record_routing`)."""

    def __init__(self) -> None:
        self._recorders: tuple[int, ...] = ()
        self._first = self._end = 0

    def state(self, router: nn.Module, batch: int, length: int, position_BL: Tensor | None) -> dict[str, Tensor]:
        """What a recorder reads: ``item_N`` and ``position_N``. A pass that begins behind position 0 goes on with the one before."""
        recorders = tuple(router._forward_hooks)
        if recorders != self._recorders:
            self._recorders, self._first, self._end = recorders, 0, 0
        if position_BL is None:
            position_BL = torch.arange(length).expand(batch, length)
        position_BL = position_BL.expand(batch, length).cpu()
        goes_on = position_BL.numel() > 0 and not bool((position_BL == 0).any()) and self._end - self._first == batch
        if not goes_on:
            self._first, self._end = self._end, self._end + batch
        item_BL = (self._first + torch.arange(batch)).unsqueeze(1).expand(batch, length)
        return {"item_N": item_BL.flatten(), "position_N": position_BL.flatten()}
